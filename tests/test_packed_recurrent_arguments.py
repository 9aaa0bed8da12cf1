"""The raw operators of the packed LSTM and GRU are public: whatever they index by is checked, and
what does not fit is refused with its name, never read past its end."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from tests.recurrent_layers import LSTM, every_cell, flat, packed_rows

pytestmark = [pytest.mark.operation("packed_lstm"), pytest.mark.operation("packed_gru")]

VISITS, PATIENTS, INPUTS, HIDDEN = 8, 3, 3, 5
# Fewer visits of gates than there are say how many were kept.
KEPT_GATES = [(visits, 4 * 16) for visits in range(VISITS + 1)]
# torch's own refusals (a schema, a device without a kernel) are as good as ours
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)


WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
STATES = ("h0", "c0")


def forward_arguments(cell):
    weights = cell.weights(INPUTS, HIDDEN, dtype=torch.float32)
    return {
        "input": torch.randn(VISITS, INPUTS),
        "batch_sizes": torch.tensor([3, 2, 2, 1]),
        **dict(zip(WEIGHTS, weights, strict=True)),
        **{name: torch.randn(PATIENTS, HIDDEN) for name in STATES[: cell.states]},
        "reverse": False,
        "training": True,
        "kept": VISITS,
    }


def backward_arguments(cell):
    given = forward_arguments(cell)
    output, *others = cell.forward(**given)
    finals, saved = others[: cell.states], others[cell.states :]
    operands = {k: v for k, v in given.items() if k not in ("training", "kept")}
    names = ("grad_h_n", "grad_c_n")[: cell.states]
    return {
        "grad_output": torch.ones_like(output),
        **{name: torch.ones_like(final) for name, final in zip(names, finals, strict=True)},
        **operands,
        "output": output,
        **dict(zip(("gates", "cells")[: cell.states], saved, strict=True)),
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


@every_cell
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_every_argument_is_checked(cell, compiled, which):
    operator = getattr(cell, which)
    arguments = (forward_arguments if which == "forward" else backward_arguments)(cell)
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
    assert tried >= 90


@every_cell
@pytest.mark.parametrize(
    "sizes",
    [[], [8, 0], [0, 8], [2, 3, 3], [9], [4, 3], [-1, 9], [2**62, 2**62], [2**63 - 1] * 3, [5, 4]],
)
def test_batch_sizes_that_do_not_fit(cell, compiled, sizes):
    sizes = torch.tensor(sizes, dtype=torch.int64)
    without = dict.fromkeys(STATES[: cell.states])
    arguments = {**forward_arguments(cell), **without, "batch_sizes": sizes}
    with pytest.raises(ValueError, match="batch_sizes: expected"):
        cell.forward(**arguments)
    with pytest.raises(ValueError, match="batch_sizes"):
        cell.function(PackedSequence(arguments["input"], sizes), [[arguments[k] for k in WEIGHTS]])


@every_cell
@pytest.mark.parametrize(("kept", "training"), [(-1, True), (VISITS + 1, True), (1, False)])
def test_visits_to_keep_the_gates_of(cell, compiled, kept, training):
    with pytest.raises(ValueError, match=r"kept: expected 0\.\."):
        cell.forward(**{**forward_arguments(cell), "kept": kept, "training": training})


@every_cell
@pytest.mark.parametrize("inputs", [3, 0])
def test_layers_without_units(cell, unemulated, inputs):
    """PyTorch's cannot be built with none; backward once divided by zero."""
    weights = [torch.randn(0, inputs), torch.randn(0, 0), torch.randn(0), torch.randn(0)]
    data = torch.randn(3, inputs, requires_grad=True)
    with pytest.raises(ValueError, match="at least one hidden unit"):
        cell.function(packed_rows(data, 2, 1), [weights])


@every_cell
@pytest.mark.parametrize("inputs", [3, 0])
def test_raw_layers_without_units(cell, compiled, inputs):
    data, sizes = torch.randn(3, inputs), torch.tensor([2, 1])
    weights, no_states = [torch.randn(0, inputs), torch.randn(0, 0)], [None] * cell.states
    with pytest.raises(ValueError, match="at least one"):
        cell.forward(data, sizes, *weights, None, None, *no_states, False, True, 0)
    saved = [torch.randn(3, 0), torch.randn(0, 0), torch.randn(3, 0)][: 1 + cell.states]
    with pytest.raises(ValueError, match="at least one"):
        cell.backward(
            *(None, *no_states, data, sizes, *weights, None, None, *no_states, *saved),
            *(False, True, True, True),
        )


@every_cell
def test_layers_without_inputs(cell, unemulated):
    """Their states come of the biases and of each other."""
    x = torch.randn(8, 0, dtype=torch.float64, requires_grad=True)
    weights = [weight.requires_grad_() for weight in cell.weights(0, 5)]
    rows = packed_rows(x, 3, 2, 2, 1)
    output, final = cell.function(rows, [weights])
    expected = cell.definition(x, rows.batch_sizes, *weights)
    results = [output.data, *(state[0] for state in flat(final))]
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    mine = torch.autograd.grad(output.data.sum(), [x, *weights])
    for a, b in zip(mine, torch.autograd.grad(expected[0].sum(), [x, *weights]), strict=True):
        torch.testing.assert_close(a, b)


def test_states_that_are_no_pair(unemulated):
    data, weights = torch.randn(8, INPUTS), [[torch.randn(20, 3), torch.randn(20, 5)]]
    sequence = packed_rows(data, 3, 2, 2, 1)
    for hx in (torch.randn(2, 1, 3, 5), [torch.randn(1, 3, 5)], [torch.randn(1, 3, 5)] * 3):
        with pytest.raises(ValueError, match=r"pair \(h_0, c_0\)"):
            LSTM.function(sequence, weights, hx)
