"""Linear layers and the hazard head by the package's kernels: PyTorch's numbers, NaN where PyTorch
has NaN, and whatever does not fit refused."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch

from ehrseq_fast.hazard_head import reference as head_reference
from ehrseq_fast.hazard_head.op import hazard_head
from ehrseq_fast.linear import reference
from ehrseq_fast.linear.op import linear_layer

pytestmark = pytest.mark.operation("linear")

OPS = torch.ops.ehrseq_fast
DTYPES = [torch.float32, torch.float64]
BOUND = {torch.float32: 1e-4, torch.float64: 1e-12}
SHAPES = [(1, 1, 1), (7, 3, 5), (300, 17, 33), (5, 256, 70), (3000, 9, 130)]
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)


def with_gradients(run, operands, incoming):
    leaves = [x.clone().requires_grad_() for x in operands]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming)]


def layer_operands(rows, inputs, units, dtype):
    return [torch.randn(shape).to(dtype) for shape in [(rows, inputs), (units, inputs), (units,)]]


def head_operands(rows, inputs, units, dtype):
    operands = layer_operands(rows, inputs, units, dtype)
    return [*operands, torch.randn(1, units).to(dtype), torch.randn(1).to(dtype)]


def close(actual, expected, dtype):
    for mine, theirs in zip(actual, expected, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=BOUND[dtype] * scale)


def check_layers():
    for shape, dtype, activation in product(SHAPES, DTYPES, reference.ACTIVATIONS):
        operands = layer_operands(*shape, dtype)
        incoming = torch.randn(shape[0], shape[2]).to(dtype)
        runs = [
            with_gradients(partial(run, activation=activation), operands, incoming)
            for run in (linear_layer, reference.linear_layer)
        ]
        close(*runs, dtype)


def check_heads():
    for shape, dtype, drops in product(SHAPES, DTYPES, (False, True)):
        operands = head_operands(*shape, dtype)
        kept = torch.rand(shape[0], shape[2]) < 0.7 if drops else None
        incoming = torch.randn(shape[0]).to(dtype)
        runs = [
            with_gradients(partial(run, kept=kept, scale=1 / 0.7), operands, incoming)
            for run in (hazard_head, head_reference.hazard_head)
        ]
        close(*runs, dtype)


def check_what_is_not_finite():
    """A NaN and both infinities in every operand show where the definition has them."""
    tried = 0
    for (rows, inputs, units), dtype in product([(4, 3, 5), (20, 6, 33)], DTYPES):
        kept = torch.rand(rows, units) < 0.6
        kinds = {
            **{
                activation: (
                    partial(linear_layer, activation=activation),
                    partial(reference.linear_layer, activation=activation),
                    layer_operands(rows, inputs, units, dtype),
                    torch.randn(rows, units).to(dtype),
                )
                for activation in reference.ACTIVATIONS
            },
            "head": (
                partial(hazard_head, kept=kept, scale=1 / 0.6),
                partial(head_reference.hazard_head, kept=kept, scale=1 / 0.6),
                head_operands(rows, inputs, units, dtype),
                torch.randn(rows).to(dtype),
            ),
        }
        for kind, (run, definition, operands, incoming) in kinds.items():
            for which, value in product(
                range(len(operands) + 1), (torch.nan, torch.inf, -torch.inf)
            ):
                spoilt = [tensor.clone() for tensor in (*operands, incoming)]
                flat = spoilt[which].view(-1)
                flat[torch.randint(len(flat), (1,))] = value
                mine = with_gradients(run, spoilt[:-1], spoilt[-1])
                theirs = with_gradients(definition, spoilt[:-1], spoilt[-1])
                case = (kind, dtype, which, value)
                for a, b in zip(mine, theirs, strict=True):
                    assert torch.equal(a.isnan(), b.isnan()), case
                    assert torch.equal(a.isinf(), b.isinf()), case
                tried += 1
    assert tried == 2 * 2 * 3 * (4 * 4 + 6)


@pytest.mark.parametrize("check", [check_layers, check_heads, check_what_is_not_finite])
def test_equal_to_the_definition(compiled, check):
    check()


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_also_with_other_instruction_sets(compiled, capability):
    code = (
        "from tests.test_linear import *; torch.manual_seed(0); "
        "check_layers(); check_heads(); check_what_is_not_finite(); print('done')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, "EHRSEQ_FAST_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "done\n", run.stderr


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 0, 5), (4, 3, 0), (0, 0, 0)])
def test_nothing_of_something(compiled, shape):
    rows, _, units = shape
    for dtype in DTYPES:
        operands, incoming = layer_operands(*shape, dtype), torch.ones(rows, units, dtype=dtype)
        theirs = with_gradients(reference.linear_layer, operands, incoming)
        assert all(map(torch.equal, with_gradients(linear_layer, operands, incoming), theirs))
        operands, incoming = head_operands(*shape, dtype), torch.ones(rows, dtype=dtype)
        theirs = with_gradients(head_reference.hazard_head, operands, incoming)
        mine = with_gradients(hazard_head, operands, incoming)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_of_some_only(compiled):
    operands = layer_operands(6, 3, 4, torch.float64)
    for wanted in operands:
        wanted.requires_grad_()
        mine, theirs = (
            torch.autograd.grad(run(*operands, "tanh").sum(), wanted)
            for run in (linear_layer, reference.linear_layer)
        )
        torch.testing.assert_close(mine, theirs)
        wanted.requires_grad_(False)


def test_a_layer_without_bias_and_differentiated_twice(compiled):
    x, weight, _ = layer_operands(6, 3, 4, torch.float64)
    weight.requires_grad_()
    out = linear_layer(x, weight)
    torch.testing.assert_close(out, x @ weight.t())
    (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_operands_of_any_stride(compiled):
    x, weight, bias = layer_operands(20, 12, 10, torch.float32)
    strided = x.t().contiguous().t(), weight[::2, :].contiguous().repeat(1, 2)[:, ::2], bias[::2]
    kept = (torch.rand(5, 20) < 0.5).t()
    mine = linear_layer(*strided, "relu")
    torch.testing.assert_close(mine, reference.linear_layer(*strided, "relu"), rtol=0, atol=1e-5)
    last = torch.randn(5, 2)[:, :1].t(), torch.randn(2)[::2]
    torch.testing.assert_close(
        hazard_head(*strided, *last, kept, 2.0),
        head_reference.hazard_head(*strided, *last, kept, 2.0),
        rtol=0,
        atol=1e-5,
    )


def test_a_row_does_not_depend_on_the_rows_beside_it(compiled):
    operands = head_operands(100, 20, 33, torch.float32)
    together = hazard_head(*operands)
    apart = torch.cat([hazard_head(row[None], *operands[1:]) for row in operands[0]])
    assert torch.equal(together, apart)


def test_opcheck(compiled):
    operands = head_operands(7, 3, 5, torch.float32)
    kept = torch.rand(7, 5) < 0.5
    torch.library.opcheck(OPS.linear_layer, (*operands[:3], 1))
    out = OPS.linear_layer(*operands[:3], 1)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(OPS.linear_layer_backward, (out, *operands[:2], out, 1, *need))
        hazards, hidden = OPS.hazard_head(*operands, kept, 2.0, True)
        torch.library.opcheck(
            OPS.hazard_head_backward, (hazards, hazards, hidden, *operands, kept, 2.0, *need)
        )
    torch.library.opcheck(OPS.hazard_head, (*operands, kept, 2.0, False))


def test_every_argument_is_checked(compiled):
    x, weight, bias, last_weight, last_bias = head_operands(7, 3, 5, torch.float32)
    layer = {"input": x, "weight": weight}
    head = {**layer, "bias": bias, "last_weight": last_weight, "last_bias": last_bias}
    head["kept"] = torch.rand(7, 5) < 0.5
    hazards, hidden = OPS.hazard_head(**head, scale=2.0, training=True)
    out = OPS.linear_layer(x, weight, bias, 0)
    need = {"need_input": True, "need_weights": True}
    backward = {"grad": hazards, "hazards": hazards, "hidden": hidden, **head}
    calls = [
        (OPS.linear_layer, {**layer, "bias": bias}, {"activation": 1}),
        (OPS.linear_layer_backward, {"grad": out, **layer, "out": out}, {"activation": 1, **need}),
        (OPS.hazard_head, head, {"scale": 2.0, "training": True}),
        (OPS.hazard_head_backward, backward, {"scale": 2.0, **need}),
    ]
    tried = 0
    for operator, tensors, others in calls:
        operator(**tensors, **others)
        for name, tensor in tensors.items():
            misfits = [tensor.new_zeros(()), tensor[None], tensor.double(), tensor.long()]
            misfits += [tensor.flatten()[None, :, None], tensor.to(torch.complex64)]
            for dim, change in product(range(tensor.dim()), (-1, 1, 40)):
                size = [n + change * (d == dim) for d, n in enumerate(tensor.shape)]
                misfits.append(tensor.new_ones(size))
            for misfit in misfits:
                fits = misfit.dtype == tensor.dtype and misfit.shape[1:] == tensor.shape[1:]
                if name == "input" and operator is OPS.linear_layer and fits:
                    continue  # any number of rows
                with pytest.raises(REFUSALS):
                    operator(**{**tensors, name: misfit}, **others)
                tried += 1
        for activation in (-1, 4) if "activation" in others else ():
            with pytest.raises(ValueError, match=r"linear_layer\w*: activation: expected 0\.\.3"):
                operator(**tensors, **{**others, "activation": activation})
    assert tried > 150
