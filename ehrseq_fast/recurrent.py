"""What the packed LSTM and the packed GRU share: input validation, layers and directions, and the
choice of what computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.utils.rnn import PackedSequence

from . import backend
from .arrays import kind_of
from .autograd import transformed, unread
from .openmp import products_are_safe, refuse_restricted_openmp

States = tuple[Tensor, ...]
Weights = Sequence[Sequence[Tensor]]

# csrc/common/recurrent/layer.h: saved tensors are padded to this many hidden units.
UNIT_PADDING = 16

# csrc/packed_lstm/cell.h and csrc/packed_gru/cell.h: values per hidden unit in a visit's gates.
_SUMS = 4

# Without a share of its own a layer keeps the gates of all visits where they fit into this many
# bytes, which is at most 8 MiB more than it would hold otherwise. Of more it keeps two fifths, with
# which the peak of a training step on 256 real records is 1/20 of the padded step's, and 1/15 with
# all of them.
_KEPT_BYTES, _KEPT_SHARE = 16 * 2**20, 0.4

# A step of at most this many patients is left to PyTorch's cells.
_FEW_PATIENTS = 4


def padded_units(hidden):
    """The hidden units of a saved tensor, padding included."""
    return (hidden + UNIT_PADDING - 1) // UNIT_PADDING * UNIT_PADDING


@dataclass(frozen=True)
class CudaCell:
    """The compiled kernels of a cell on a GPU.

    Attributes:
        train, infer: as of :class:`Cell`.
        why_not: ``(data, hidden units)`` → why they do not compute a layer; None where they do.
    """

    train: Callable[..., States]
    infer: Callable[..., States]
    why_not: Callable[[Tensor, int], str | None]


@dataclass(frozen=True)
class Cell:
    """A kind of recurrent layer.

    Attributes:
        name: of the operation.
        gates: blocks of H rows that its weights consist of.
        states: names of the initial states.
        train: one direction of one layer by the compiled kernels, with their gradient:
            ``(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, *states, reverse, kept)``
            → outputs and final states.
        infer: likewise without a gradient, and without ``kept``.
        definition: likewise in plain PyTorch.
        step: PyTorch's cell, ``(data, states, weights)`` → the new states.
        by_pytorch: PyTorch's layers, ``(data, batch_sizes, states, weights, options)`` → outputs
            and final states.
        cuda: its kernels on a GPU.
    """

    name: str
    gates: int
    states: tuple[str, ...]
    train: Callable[..., States]
    infer: Callable[..., States]
    definition: Callable[..., States]
    step: Callable[[Tensor, States, Sequence[Tensor]], States]
    by_pytorch: Callable[..., States]
    cuda: CudaCell | None = None


def run(
    cell: Cell,
    sequence: PackedSequence,
    weights: Weights,
    hx: States | None,
    bidirectional: bool,
    dropout: float,
    training: bool,
    keep_gates: float | None,
) -> tuple[PackedSequence, States]:
    """All layers of a cell; arguments, results and errors are those of :func:`packed_lstm`, with
    the states as a tuple."""
    directions = 2 if bidirectional else 1
    if torch.is_autocast_enabled("cpu") and isinstance(sequence, PackedSequence):
        dtype = sequence.data.dtype
        weights = [[tensor.to(dtype) for tensor in layer] for layer in weights]
        hx = hx if hx is None else tuple(state.to(dtype) for state in hx)
    _check(cell, sequence, weights, hx, directions, dropout, keep_gates)
    data, batch_sizes, sorted_indices, unsorted_indices = sequence
    if hx is not None and sorted_indices is not None:
        hx = tuple(state.index_select(1, sorted_indices) for state in hx)
    rate = dropout if training else 0.0

    chosen = backend.choose(cell.name, data.device.type, data.dtype)
    on_cuda = cell.cuda
    if on_cuda is not None and on_cuda.why_not(data, weights[0][1].shape[1]) is None:
        chosen = "cuda"
        cell = replace(cell, train=on_cuda.train, infer=on_cuda.infer)
    if transformed(data, *(tensor for layer in weights for tensor in layer), *(hx or ())):
        _check_batch_sizes(cell, data, batch_sizes)
        refuse_restricted_openmp(data, cell.name)
        output, *finals = _layers(
            cell, data, batch_sizes, weights, hx, directions, rate, keep_gates
        )
    elif chosen == "reference":
        _check_batch_sizes(cell, data, batch_sizes)
        if hx is None:
            patients, hidden = int(batch_sizes[0]), weights[0][1].shape[1]
            zeros = data.new_zeros(len(weights), patients, hidden)
            hx = (zeros,) * len(cell.states)
        flat = [tensor for layer in weights for tensor in layer]
        options = (
            *(len(weights[0]) == 4, len(weights) // directions),
            *(rate, rate > 0, directions == 2),
        )
        refuse_restricted_openmp(data, cell.name)
        output, *finals = cell.by_pytorch(data, batch_sizes, hx, flat, options)
    elif (
        hx is not None
        and chosen == "cpu"
        and _is_one_small_step(data, batch_sizes, directions, rate)
    ):
        output, *finals = _one_step(cell, data, weights, hx)
    else:
        output, *finals = _layers(
            cell, data, batch_sizes, weights, hx, directions, rate, keep_gates
        )

    if unsorted_indices is not None:
        finals = [final.index_select(1, unsorted_indices) for final in finals]
    return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), tuple(finals)


def _layer(
    cell: Cell,
    input: Tensor,
    batch_sizes: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor | None],
    reverse: bool,
    keep_gates: float | None,
) -> States:
    biases = weights[2:] if len(weights) == 4 else (None, None)
    operands = (input, batch_sizes, *weights[:2], *biases, *states)
    if transformed(*operands):
        return cell.definition(*operands, reverse)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        return cell.train(*operands, reverse, _kept_visits(input, weights[1].shape[1], keep_gates))
    return cell.infer(*operands, reverse)


def _kept_visits(input: Tensor, hidden: int, keep_gates: float | None) -> int:
    """How many visits' gates to keep: that share, in 64ths. None: see ``_KEPT_BYTES``."""
    visits = input.shape[0]
    if torch.compiler.is_compiling():  # a share of a size has no name in the traced graph
        return visits
    if input.dtype not in (torch.float32, torch.float64):
        # 16-bit states were rounded on their way out, and would not give the same gates again.
        return visits
    if keep_gates is None:
        all_bytes = visits * _SUMS * padded_units(hidden) * input.element_size()
        keep_gates = 1.0 if all_bytes <= _KEPT_BYTES else _KEPT_SHARE
    return visits * int(64 * keep_gates) // 64


def read_again(
    operands: tuple[Tensor | None, ...], kept: int, needs_input: bool
) -> tuple[Tensor | None, ...]:
    """What the backward pass reads of a layer's operands (input, batch sizes, both weights, both
    biases, states), None in the place of the rest: the first weight is read where the input has a
    gradient, and with the biases where gates are computed again. PyTorch's layers do not keep
    their biases, so that these may be changed before the backward pass: copies are kept."""
    input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, *states = operands
    assert input is not None
    if kept != input.shape[0]:
        biases = (None if bias is None else bias.detach().clone() for bias in (bias_ih, bias_hh))
        return input, batch_sizes, weight_ih, weight_hh, *biases, *states
    return input, batch_sizes, weight_ih if needs_input else None, weight_hh, None, None, *states


def with_shapes(operands: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What :func:`read_again` gave, as the operators take it."""
    input, batch_sizes, weight_ih, weight_hh, *others = operands
    if weight_ih is None:
        assert input is not None
        assert weight_hh is not None
        weight_ih = unread(input, weight_hh.shape[0], input.shape[1])
    return input, batch_sizes, weight_ih, weight_hh, *others


def _stacked(data: Tensor, finals: Sequence[States]) -> States:
    return data, *(torch.stack(states) for states in zip(*finals, strict=True))


def _layers(
    cell: Cell,
    data: Tensor,
    batch_sizes: Tensor,
    weights: Weights,
    hx: States | None,
    directions: int,
    dropout: float,
    keep_gates: float | None,
) -> States:
    finals: list[States] = []
    for first in range(0, len(weights), directions):
        if first > 0 and dropout > 0:
            data = drop(data, dropout, training=True)
        outputs = []
        for i in range(first, first + directions):
            before = [None if hx is None else hx[at][i] for at in range(len(cell.states))]
            output, *final = _layer(
                cell, data, batch_sizes, weights[i], before, i > first, keep_gates
            )
            outputs.append(output)
            finals.append(tuple(final))
        data = outputs[0] if directions == 1 else torch.cat(outputs, dim=1)
    return _stacked(data, finals)


def _one_step(cell: Cell, data: Tensor, weights: Weights, hx: States) -> States:
    """One visit of each patient: packing the weights would cost more than the step itself.

    Autocast is off, as for the kernels: a patient's state must not depend on how many there are.
    """
    finals = []
    with torch.autocast("cpu", enabled=False):
        for i, layer in enumerate(weights):
            final = cell.step(data, tuple(state[i] for state in hx), layer)
            finals.append(final)
            data = final[0]
    return _stacked(data, finals)


def _is_one_small_step(data: Tensor, batch_sizes: Tensor, directions: int, rate: float) -> bool:
    return (
        not torch.compiler.is_compiling()
        and directions == 1
        and rate == 0
        and data.dtype in (torch.float32, torch.float64)
        and batch_sizes.numel() == 1
        and data.shape[0] == int(batch_sizes[0]) <= _FEW_PATIENTS
        and products_are_safe(data.dtype)
    )


def _check(
    cell: Cell,
    sequence: PackedSequence,
    weights: Weights,
    hx: States | None,
    directions: int,
    dropout: float,
    keep_gates: float | None,
) -> None:
    name, rows = cell.name, cell.gates
    if not isinstance(sequence, PackedSequence):
        raise TypeError(f"{name}: sequence: expected a PackedSequence, got {kind_of(sequence)}")
    data, batch_sizes = sequence.data, sequence.batch_sizes
    if data.dim() != 2:
        raise ValueError(
            f"{name}: sequence.data: expected [visits, inputs], got {list(data.shape)}"
        )
    if not weights or len(weights) % directions:
        raise ValueError(
            f"{name}: weights: expected one entry per layer and direction, {directions} per "
            f"layer, got {len(weights)}"
        )
    if keep_gates is not None and not 0 <= keep_gates <= 1:
        raise ValueError(f"{name}: keep_gates: expected a share in [0, 1], got {keep_gates}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"{name}: dropout: expected a probability in [0, 1], got {dropout}")
    for i, layer in enumerate(weights):
        if len(layer) not in (2, 4) or len(layer) != len(weights[0]):
            raise ValueError(
                f"{name}: weights[{i}]: expected weight_ih, weight_hh and either both biases in "
                f"every entry or none, got {len(layer)} tensors"
            )
    hidden = weights[0][1].shape[-1] if weights[0][1].dim() else 0
    if hidden < 1:
        raise ValueError(
            f"{name}: weight_hh of weights[0]: expected at least one hidden unit, got "
            f"{list(weights[0][1].shape)}"
        )
    for i, layer in enumerate(weights):
        inputs = data.shape[1] if i < directions else directions * hidden
        shapes = [[rows * hidden, inputs], [rows * hidden, hidden], [rows * hidden]]
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
        for what, tensor, shape in zip(names, layer, [*shapes, shapes[2]], strict=False):
            if list(tensor.shape) != shape:
                raise ValueError(
                    f"{name}: {what} of weights[{i}]: expected {shape}, got {list(tensor.shape)}"
                )
    named = [(f"weights[{i}]", tensor) for i, layer in enumerate(weights) for tensor in layer]
    if batch_sizes.numel() == 0:
        raise ValueError(f"{name}: batch_sizes: expected one number per time, got none")
    if hx is not None:
        named += _check_states(cell, hx, len(weights), hidden, batch_sizes)
    for what, tensor in named:
        if tensor.dtype != data.dtype:
            raise TypeError(
                f"{name}: {what}: expected {data.dtype}, as of the sequence, got {tensor.dtype}"
            )


def _check_states(
    cell: Cell, hx: States, layers: int, hidden: int, batch_sizes: Tensor
) -> list[tuple[str, Tensor]]:
    named = list(zip(cell.states, hx, strict=True))
    for what, state in named:
        if state.dim() != 3 or [state.shape[0], state.shape[2]] != [layers, hidden]:
            raise ValueError(
                f"{cell.name}: {what}: expected [layers * directions, patients, hidden] = "
                f"[{layers}, patients, {hidden}], got {list(state.shape)}"
            )
    if torch.compiler.is_compiling():
        return named
    for what, state in named:
        if state.shape[1] != batch_sizes[0]:
            raise ValueError(
                f"{cell.name}: {what}: expected the {int(batch_sizes[0])} patients of the "
                f"sequence, got {state.shape[1]}"
            )
    return named


def _check_batch_sizes(cell: Cell, data: Tensor, batch_sizes: Tensor) -> None:
    """What the compiled kernel checks for itself."""
    if torch.compiler.is_compiling():
        return
    sizes = batch_sizes.tolist()
    falls = all(later <= earlier for earlier, later in pairwise(sizes))
    if not sizes or not falls or sizes[-1] < 1:
        raise ValueError(
            f"{cell.name}: batch_sizes: expected positive numbers that do not rise, got {sizes}"
        )
    if sum(sizes) != data.shape[0]:
        raise ValueError(
            f"{cell.name}: batch_sizes: expected the number of visits at each time, "
            f"{data.shape[0]} in all, got {sum(sizes)}"
        )
