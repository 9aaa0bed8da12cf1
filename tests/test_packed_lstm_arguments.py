"""The raw operators of the packed LSTM are public: whatever they index by is checked, and what does
not fit is refused with its name, never read past its end."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from ehrseq_fast import packed_lstm
from ehrseq_fast.packed_lstm import reference

pytestmark = pytest.mark.operation("packed_lstm")

OPS = torch.ops.ehrseq_fast
VISITS, PATIENTS, INPUTS, HIDDEN = 8, 3, 3, 5
# Fewer visits of gates than there are say how many were kept.
KEPT_GATES = [(visits, 4 * 16) for visits in range(VISITS + 1)]
# torch's own refusals (a schema, a device without a kernel) are as good as ours
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)


def forward_arguments():
    shapes = {
        "input": (VISITS, INPUTS),
        "batch_sizes": None,
        "weight_ih": (4 * HIDDEN, INPUTS),
        "weight_hh": (4 * HIDDEN, HIDDEN),
        "bias_ih": (4 * HIDDEN,),
        "bias_hh": (4 * HIDDEN,),
        "h0": (PATIENTS, HIDDEN),
        "c0": (PATIENTS, HIDDEN),
    }
    sizes = torch.tensor([3, 2, 2, 1])
    tensors = {k: sizes if shape is None else torch.randn(shape) for k, shape in shapes.items()}
    return {**tensors, "reverse": False, "training": True, "kept": VISITS}


def backward_arguments():
    given = forward_arguments()
    output, h_n, c_n, gates, cells = OPS.packed_lstm_layer(**given)
    operands = {k: v for k, v in given.items() if k not in ("training", "kept")}
    return {
        "grad_output": torch.ones_like(output),
        "grad_h_n": torch.ones_like(h_n),
        "grad_c_n": torch.ones_like(c_n),
        **operands,
        "output": output,
        "gates": gates,
        "cells": cells,
        "need_input": True,
        "need_weights": True,
        "need_states": True,
    }


def misfits(tensor):
    """Tensors that do not fit in its place."""
    yield tensor.new_zeros(())
    yield tensor.new_zeros((0, *tensor.shape[1:]))
    for dim in range(tensor.dim()):
        for change in (-1, 1, 40):
            shape = list(tensor.shape)
            shape[dim] += change
            yield tensor.new_ones(shape)
    yield tensor.unsqueeze(0)
    yield tensor.flatten()[None, :, None]
    for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
        if dtype != tensor.dtype:
            yield tensor.to(dtype)
    yield tensor.to_sparse()


@pytest.mark.parametrize("name", ["packed_lstm_layer", "packed_lstm_layer_backward"])
def test_every_argument_is_checked(compiled, name):
    operator = getattr(OPS, name)
    arguments = forward_arguments() if name == "packed_lstm_layer" else backward_arguments()
    operator(**arguments)
    tried = 0
    for key, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        for misfit in misfits(value):
            if key == "gates" and misfit.dtype == value.dtype and misfit.shape in KEPT_GATES:
                continue
            with pytest.raises(REFUSALS):
                operator(**{**arguments, key: misfit})
            tried += 1
    assert tried >= 100


@pytest.mark.parametrize(
    "sizes",
    [[], [8, 0], [0, 8], [2, 3, 3], [9], [4, 3], [-1, 9], [2**62, 2**62], [2**63 - 1] * 3, [5, 4]],
)
def test_batch_sizes_that_do_not_fit(compiled, sizes):
    sizes = torch.tensor(sizes, dtype=torch.int64)
    arguments = {**forward_arguments(), "h0": None, "c0": None, "batch_sizes": sizes}
    with pytest.raises(ValueError, match="batch_sizes must be"):
        OPS.packed_lstm_layer(**arguments)
    with pytest.raises(ValueError, match="batch_sizes must"):
        packed_lstm(
            PackedSequence(arguments["input"], sizes),
            [[arguments[k] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]],
        )


@pytest.mark.parametrize(("kept", "training"), [(-1, True), (VISITS + 1, True), (1, False)])
def test_visits_to_keep_the_gates_of(compiled, kept, training):
    with pytest.raises(ValueError, match=r"kept must be in 0\.\."):
        OPS.packed_lstm_layer(**{**forward_arguments(), "kept": kept, "training": training})


@pytest.mark.parametrize("inputs", [3, 0])
def test_layers_without_units(unemulated, inputs):
    """nn.LSTM cannot be built with none; backward once divided by zero."""
    weights = [torch.randn(0, inputs), torch.randn(0, 0), torch.randn(0), torch.randn(0)]
    data = torch.randn(3, inputs, requires_grad=True)
    with pytest.raises(ValueError, match="at least one hidden unit"):
        packed_lstm(PackedSequence(data, torch.tensor([2, 1])), [weights])


@pytest.mark.parametrize("inputs", [3, 0])
def test_raw_layers_without_units(compiled, inputs):
    data, sizes = torch.randn(3, inputs), torch.tensor([2, 1])
    weights = [torch.randn(0, inputs), torch.randn(0, 0)]
    with pytest.raises(ValueError, match="at least one"):
        OPS.packed_lstm_layer(data, sizes, *weights, None, None, None, None, False, True, 0)
    states = [torch.randn(3, 0), torch.randn(0, 0), torch.randn(3, 0)]
    with pytest.raises(ValueError, match="at least one"):
        OPS.packed_lstm_layer_backward(
            *(None, None, None, data, sizes, *weights, None, None, None, None, *states),
            *(False, True, True, True),
        )


def test_layers_without_inputs(unemulated):
    """Their states come of the biases and of each other."""
    shapes = [(8, 0), (20, 0), (20, 5), (20,), (20,)]
    x, *weights = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    sizes = torch.tensor([3, 2, 2, 1])
    output, (h_n, c_n) = packed_lstm(PackedSequence(x, sizes), [weights])
    expected = reference.packed_lstm_layer(x, sizes, *weights)
    for mine, theirs in zip((output.data, h_n[0], c_n[0]), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    mine = torch.autograd.grad(output.data.sum(), [x, *weights])
    for a, b in zip(mine, torch.autograd.grad(expected[0].sum(), [x, *weights]), strict=True):
        torch.testing.assert_close(a, b)


def test_states_that_are_no_pair(unemulated):
    data, weights = torch.randn(8, INPUTS), [[torch.randn(20, 3), torch.randn(20, 5)]]
    sequence = PackedSequence(data, torch.tensor([3, 2, 2, 1]))
    for hx in (torch.randn(2, 1, 3, 5), [torch.randn(1, 3, 5)], [torch.randn(1, 3, 5)] * 3):
        with pytest.raises(ValueError, match=r"pair \(h_0, c_0\)"):
            packed_lstm(sequence, weights, hx)
