"""A call of every raw operator, valid until :mod:`.arguments` changes it.

Expected results are those of the references, in the dtype of the call where they differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ehrseq_fast import operations
from ehrseq_fast.hazard_head import reference as head_reference
from ehrseq_fast.linear import reference as linear_reference
from ehrseq_fast.next_codes import reference as next_codes_reference
from ehrseq_fast.packed_gru import reference as gru_reference
from ehrseq_fast.packed_lstm import reference as lstm_reference
from ehrseq_fast.visit_pool import reference as pool_reference

from .arguments import FLOATING, INTEGER, Call, Draw

MODES = ("mean", "sum", "max")
REDUCTIONS = ("none", "mean", "sum")

_makers: dict[str, Callable[[Draw, Any], Call]] = {}


_FOLDERS_WITH_CUDA = {x.folder for x in operations.registered() if "cuda" in x.backends}
# Those that the CUDA kernels have, which can be called where they are compiled for the host.
ON_CUDA = tuple(x.name for x in operations.operators() if x.folder in _FOLDERS_WITH_CUDA)


def call_of(name: str, draw: Draw, ops: Any = torch.ops.ehrseq_fast) -> Call:
    """A valid call of the operator ``name``."""
    return _makers[name](draw, ops)


def makes(*names: str) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    def register(maker: Callable[..., Call]) -> Callable[..., Call]:
        for name in names:
            _makers[name] = lambda draw, ops, name=name: maker(draw, ops, name)
        return maker

    return register


def known_operators() -> tuple[str, ...]:
    return tuple(_makers)


def gradient(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor], incoming: Tensor
) -> tuple[Tensor, ...]:
    """By autograd through a reference, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    result = forward(*leaves)
    return torch.autograd.grad(result, leaves, incoming.double(), allow_unused=True)


# Visit pooling ------------------------------------------------------------------------------------


def _table(draw: Draw, dtype: torch.dtype) -> Tensor:
    return draw.floats((draw.whole(1, 9), draw.one_of((0, 1, 3, 8, 16, 17, 40))), dtype)


@makes("visit_pool", "visit_pool_backward", "visit_pool_backward_sparse")
def _pool(draw: Draw, ops: Any, name: str) -> Call:
    weight = _table(draw, draw.one_of(FLOATING))
    shape = [draw.whole(0, 4) for _ in range(draw.whole(1, 3))]
    codes = draw.integers(0, len(weight), shape, draw.one_of(INTEGER))
    mask, mode = draw.mask(shape), draw.whole(0, 2)

    def forward(table: Tensor, padding_idx: int | None = None) -> Tensor:
        return pool_reference.visit_mean_pool(
            codes, table, mask, mode=MODES[mode], padding_idx=padding_idx
        )

    if name == "visit_pool":
        return Call(
            ops.visit_pool,
            [codes, weight, mask, mode],
            lambda: [forward(weight.double())],
        )
    pooled, arg_max = ops.visit_pool(codes, weight, mask, mode)
    grad, padding = draw.floats(pooled.shape, weight.dtype), draw.whole(-1, len(weight) - 1)

    def expected() -> list[Tensor]:
        no_row = None if padding < 0 else padding
        return list(gradient(lambda table: forward(table, no_row), [weight], grad))

    return Call(
        getattr(ops, name),
        [grad, codes, len(weight), mask, arg_max if mode == 2 else None, mode, padding],
        expected if name == "visit_pool_backward" else None,
    )


@makes("masked_pool", "masked_pool_backward")
def _masked(draw: Draw, ops: Any, name: str) -> Call:
    shape = [draw.whole(0, 4) for _ in range(draw.whole(1, 3))]
    width = draw.one_of((0, 1, 3, 8, 17))
    embeddings = draw.floats((*shape, width), draw.one_of(FLOATING))
    mask, mode = draw.mask(shape), draw.whole(0, 2)

    def forward(values: Tensor) -> Tensor:
        return pool_reference.masked_pool(values, mask, mode=MODES[mode])

    if name == "masked_pool":
        return Call(
            ops.masked_pool, [embeddings, mask, mode], lambda: [forward(embeddings.double())]
        )
    pooled, arg_max = ops.masked_pool(embeddings, mask, mode)
    grad = draw.floats(pooled.shape, embeddings.dtype)
    return Call(
        ops.masked_pool_backward,
        [grad, mask, arg_max if mode == 2 else None, shape[-1], mode],
        lambda: list(gradient(forward, [embeddings], grad)),
    )


def _packed_codes(draw: Draw, vocabulary: int) -> tuple[Tensor, ...]:
    """Codes by visit, their offsets, and the transposed index."""
    counts = draw.integers(0, 5, (draw.whole(0, 6),))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    codes = draw.integers(0, vocabulary, (int(offsets[-1]),), torch.int32)
    visits = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
    order = torch.argsort(codes, stable=True)
    kinds, times = codes.unique(return_counts=True)
    index_offsets = torch.cat([times.new_zeros(1), times.cumsum(0)]).int()
    return codes, offsets, kinds.int(), index_offsets, visits[order]


@makes(
    "packed_visit_pool",
    "packed_visit_pool_backward",
    "packed_visit_pool_backward_sparse",
    "packed_attention_pool",
    "packed_attention_pool_backward",
)
def _packed(draw: Draw, ops: Any, name: str) -> Call:
    weight = _table(draw, draw.one_of(FLOATING))
    codes, offsets, *index = _packed_codes(draw, len(weight))
    scores = draw.floats(weight.shape[:1], weight.dtype)
    mode, padding = draw.whole(0, 2), draw.whole(-1, len(weight) - 1)
    no_row = None if padding < 0 else padding

    def pooled_by(table: Tensor) -> Tensor:
        return pool_reference.packed_visit_pool(
            codes, offsets, table, mode=MODES[mode], padding_idx=no_row
        )

    def attended(table: Tensor, of_codes: Tensor) -> Tensor:
        return pool_reference.packed_visit_pool(
            codes, offsets, table, mode="attention", scores=of_codes, padding_idx=no_row
        )

    if name == "packed_visit_pool":
        arguments = [codes, offsets, weight, mode]
        return Call(ops.packed_visit_pool, arguments, lambda: [pooled_by(weight.double())])
    if name == "packed_attention_pool":
        return Call(
            ops.packed_attention_pool,
            [codes, offsets, weight, scores],
            lambda: [attended(weight.double(), scores.double())],
        )
    if name == "packed_attention_pool_backward":
        pooled, *kept = ops.packed_attention_pool(codes, offsets, weight, scores)
        grad = draw.floats(pooled.shape, weight.dtype)
        return Call(
            ops.packed_attention_pool_backward,
            [grad, pooled, *kept, *index, weight, scores, padding],
            lambda: list(gradient(attended, [weight, scores], grad)),
        )
    pooled, arg_max = ops.packed_visit_pool(codes, offsets, weight, mode)
    grad = draw.floats(pooled.shape, weight.dtype)
    return Call(
        getattr(ops, name),
        [grad, offsets, *index, len(weight), arg_max if mode == 2 else None, mode, padding],
        (lambda: list(gradient(pooled_by, [weight], grad)))
        if name == "packed_visit_pool_backward"
        else None,
    )


@makes(
    "packed_weighted_pool",
    "packed_weighted_pool_backward",
    "packed_weighted_pool_backward_sparse",
    "packed_weighted_pool_backward_weights",
)
def _packed_weighted(draw: Draw, ops: Any, name: str) -> Call:
    weight = _table(draw, draw.one_of(FLOATING))
    codes, offsets, *index = _packed_codes(draw, len(weight))
    sums = torch.float64 if weight.dtype == torch.float64 else torch.float32
    of_codes = draw.floats(codes.shape, sums) * draw.one_of((0.1, 3.0))
    if draw.chance(0.5):
        of_codes = torch.where(draw.floats(codes.shape) < 0, 0, of_codes)
    mode, padding = draw.whole(0, 1), draw.whole(-1, len(weight) - 1)
    no_row = None if padding < 0 else padding

    def pooled_by(table: Tensor, weights: Tensor) -> Tensor:
        return pool_reference.packed_visit_pool(
            codes, offsets, table, mode=MODES[mode], code_weights=weights, padding_idx=no_row
        )

    forward = [codes, offsets, weight, of_codes, mode]
    if name == "packed_weighted_pool":
        return Call(
            ops.packed_weighted_pool,
            forward,
            lambda: [pooled_by(weight.double(), of_codes.double())],
        )
    pooled, totals = ops.packed_weighted_pool(*forward)
    grad = draw.floats(pooled.shape, weight.dtype)
    mean = mode == MODES.index("mean")

    def gradients() -> tuple[Tensor, ...]:
        return gradient(pooled_by, [weight, of_codes], grad)

    if name == "packed_weighted_pool_backward_weights":
        return Call(
            ops.packed_weighted_pool_backward_weights,
            [
                grad,
                pooled if mean else None,
                totals if mean else None,
                codes,
                offsets,
                weight,
                mode,
            ],
            # of a 16-bit table the mean that is subtracted is rounded to 16 bits
            (lambda: [gradients()[1]]) if sums == weight.dtype else None,
        )
    positions = torch.argsort(codes, stable=True).int()
    of_visits = [codes, offsets, of_codes, totals if mean else None]
    return Call(
        getattr(ops, name),
        [grad, *of_visits, *index, positions, len(weight), mode, padding],
        (lambda: [gradients()[0]]) if name == "packed_weighted_pool_backward" else None,
    )


# Packed LSTM and GRU ------------------------------------------------------------------------------


@makes("packed_lstm_layer", "packed_lstm_layer_backward")
def _lstm(draw: Draw, ops: Any, name: str) -> Call:
    return _recurrent(draw, ops, name, 4, 2, lstm_reference.packed_lstm_layer)


@makes("packed_gru_layer", "packed_gru_layer_backward")
def _gru(draw: Draw, ops: Any, name: str) -> Call:
    return _recurrent(draw, ops, name, 3, 1, gru_reference.packed_gru_layer)


def _recurrent(
    draw: Draw, ops: Any, name: str, gates: int, n_states: int, definition: Callable[..., Any]
) -> Call:
    dtype = draw.one_of(FLOATING)
    inputs, hidden = draw.whole(1, 9), draw.one_of((1, 2, 7, 16, 17, 33))
    sizes = torch.sort(draw.integers(1, 6, (draw.whole(1, 6),)), descending=True).values
    visits, patients = int(sizes.sum()), int(sizes[0])
    input = draw.floats((visits, inputs), dtype)
    weights = [
        draw.floats((gates * hidden, inputs), dtype) * 0.3,
        draw.floats((gates * hidden, hidden), dtype) * 0.3,
    ]
    biases: list[Any] = [None, None]
    if draw.chance(0.7):
        biases = [draw.floats((gates * hidden,), dtype) for _ in range(2)]
    states: list[Any] = [None] * n_states
    if draw.chance(0.5):
        states = [draw.floats((patients, hidden), dtype) for _ in range(n_states)]
    reverse = draw.chance(0.5)
    # gates of 16-bit layers are never computed again
    kept = draw.whole(0, visits) if dtype in (torch.float32, torch.float64) else visits
    operands = [input, sizes, *weights, *biases, *states]

    def expected() -> list[Tensor]:
        double = [None if x is None else x.double() for x in (input, *weights, *biases, *states)]
        return list(definition(double[0], sizes, *double[1:], reverse))

    forward = getattr(ops, name.removesuffix("_backward"))
    if not name.endswith("_backward"):
        training = draw.chance(0.5)
        return Call(forward, [*operands, reverse, training, kept if training else 0], expected)
    output, *others = forward(*operands, reverse, True, kept)
    finals, saved = others[:n_states], others[n_states:]
    grads = [draw.floats(x.shape, dtype) if draw.chance(0.8) else None for x in (output, *finals)]
    needs = [draw.chance(0.7) for _ in range(3)]
    return Call(getattr(ops, name), [*grads, *operands, output, *saved, reverse, *needs])


# Linear layers and the hazard head ----------------------------------------------------------------

ACTIVATIONS = tuple(linear_reference.ACTIVATIONS)


@makes("linear_layer", "linear_layer_backward")
def _linear(draw: Draw, ops: Any, name: str) -> Call:
    dtype = draw.one_of((torch.float32, torch.float64))
    rows, inputs, units = draw.whole(0, 9), draw.whole(0, 40), draw.one_of((0, 1, 7, 16, 33, 70))
    input, weight = draw.floats((rows, inputs), dtype), draw.floats((units, inputs), dtype) * 0.2
    bias = draw.floats((units,), dtype) if draw.chance(0.7) else None
    activation = draw.whole(0, 3)

    def forward(*operands: Tensor) -> Tensor:
        given = (*operands, None)[:3]
        return linear_reference.linear_layer(*given, activation=ACTIVATIONS[activation])

    operands = [input, weight] if bias is None else [input, weight, bias]
    if name == "linear_layer":
        return Call(
            ops.linear_layer,
            [input, weight, bias, activation],
            lambda: [forward(*(x.double() for x in operands))],
        )
    out = ops.linear_layer(input, weight, bias, activation)
    grad = draw.floats((rows, units), dtype)
    needs = [draw.chance(0.7) for _ in range(2)]
    return Call(ops.linear_layer_backward, [grad, input, weight, out, activation, *needs])


@makes("hazard_head", "hazard_head_backward")
def _head(draw: Draw, ops: Any, name: str) -> Call:
    dtype = draw.one_of((torch.float32, torch.float64))
    rows, inputs, units = draw.whole(0, 9), draw.whole(0, 40), draw.one_of((0, 1, 7, 16, 33, 70))
    shapes = [(rows, inputs), (units, inputs), (units,), (1, units), (1,)]
    operands = [draw.floats(shape, dtype) * 0.2 for shape in shapes]
    kept = draw.integers(0, 2, (rows, units), torch.int64).bool() if draw.chance(0.5) else None
    scale = draw.one_of((1.0, 1.25, 0.0))
    if name == "hazard_head":
        return Call(
            ops.hazard_head,
            [*operands, kept, scale, draw.chance(0.5)],
            lambda: [head_reference.hazard_head(*(x.double() for x in operands), kept, scale)],
        )
    hazards, hidden = ops.hazard_head(*operands, kept, scale, True)
    needs = [draw.chance(0.7) for _ in range(2)]
    grad = draw.floats((rows,), dtype)
    return Call(ops.hazard_head_backward, [grad, hazards, hidden, *operands, kept, scale, *needs])


@makes("next_codes_bce")
def _next_codes(draw: Draw, ops: Any, name: str) -> Call:
    rows, width, classes = draw.whole(0, 9), draw.whole(0, 20), draw.one_of((1, 7, 16, 33, 70))
    kinds = (torch.float64,) if draw.chance(0.3) else (torch.float32, *FLOATING[2:])
    counts = draw.integers(0, 5, (rows + 1,))  # the first are of no row
    starts = counts.cumsum(0).int()
    sampled, total = draw.chance(0.3), draw.chance(0.5)
    codes = draw.integers(-sampled, classes, (int(starts[-1]),), torch.int32)
    operands = [
        draw.floats(shape, draw.one_of(kinds)) * 0.2 if draw.chance(0.8) or at < 2 else None
        for at, shape in enumerate([(rows, width), (classes, width), (classes,)])
    ]
    weights = [
        draw.floats((size,), draw.one_of(FLOATING)).abs() if draw.chance(0.5) else None
        for size in (classes, classes, rows)
    ]

    def expected() -> list[Tensor]:
        leaves = [None if x is None else x.double().requires_grad_() for x in operands]
        wide = [None if x is None else x.double() for x in weights]
        losses = next_codes_reference.next_codes(
            leaves[0], leaves[1], leaves[2], codes, starts, wide[0], wide[1], sampled
        )
        scaled = (losses if wide[2] is None else losses * wide[2]).sum()
        given = [x for x in leaves if x is not None]
        found = torch.autograd.grad(scaled, given, allow_unused=True)
        return [(scaled if total else losses).detach(), *found]

    arguments = [*operands, codes, starts, *weights, total, sampled, True, True]
    return Call(ops.next_codes_bce, arguments, expected)
