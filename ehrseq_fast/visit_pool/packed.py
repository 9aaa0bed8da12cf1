"""Visit pooling of packed batches: straight to the rows of a ``PackedSequence``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..arrays import expect_tensor, kind_of
from ..autograd import once, values_are_hidden
from ..backend import must_check_values, operators
from ..checks import (
    accumulator,
    expect_device,
    expect_floating,
    expect_option,
    refuse_codes_outside,
)
from . import reference
from .op import choose, padding_row, sparse_rows
from .operators import MODES

if TYPE_CHECKING:
    from ..batch import PackedVisits

PACKED_MODES = (*MODES, "attention")
WEIGHTED_MODES = ("mean", "sum")


class PackedCodes(NamedTuple):
    """The codes of a :class:`~ehrseq_fast.PackedVisits`, without its patients and outcomes."""

    codes: Tensor
    code_offsets: Tensor
    index_codes: Tensor
    index_offsets: Tensor
    index_visits: Tensor
    code_weights: Tensor | None = None


def codes_in_use(batch: PackedVisits) -> PackedCodes:
    """The batch with its codes numbered by their place in ``batch.index_codes``.

    For a table that holds only the rows in use, ``table[batch.index_codes]``.

    Raises:
        ValueError: a code that the index does not hold, as the batch was changed (on the CPU).

    Example:
        >>> from ehrseq_fast import PackedVisits
        >>> from ehrseq_fast.visit_pool import codes_in_use
        >>> batch = PackedVisits.from_lists([[[70, 900], [900]]])
        >>> batch.index_codes.tolist(), codes_in_use(batch).codes.tolist()
        ([70, 900], [0, 1, 1])
    """
    ids = torch.arange(batch.index_codes.shape[0], dtype=torch.int32, device=batch.codes.device)
    codes = torch.searchsorted(batch.index_codes, batch.codes, out_int32=True)
    if codes.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_in_index(batch, codes)
    return PackedCodes(
        codes, batch.code_offsets, ids, batch.index_offsets, batch.index_visits, batch.code_weights
    )


def packed_visit_pool(
    batch: PackedVisits | PackedCodes,
    weight: Tensor,
    *,
    mode: str = "mean",
    scores: Tensor | None = None,
    code_weights: Tensor | None = None,
    padding_idx: int | None = None,
    sparse_grad: bool = False,
    validate: bool = False,
) -> Tensor:
    r"""Embed and pool the codes of every visit of a packed batch; nothing is padded.

    :func:`visit_mean_pool` on a :class:`~ehrseq_fast.PackedVisits`, whose transposed code index
    makes the gradient a sum that writes each row of the table once. ``mode="attention"`` weighs the
    codes of visit :math:`v` by the softmax of their scores,

    .. math:: \sum_{c \in v} \mathrm{softmax}_{c \in v}(s_c)\, W_c ,

    where the score of a code depends on the code alone, so that it is computed once per code
    (``[K]``) and not once per slot.

    With weights of codes :math:`w` (a dose, a lab value, TF-IDF, a decay over time), those of the
    batch or ``code_weights``, a visit is

    .. math:: \sum_c w_c W_c \,/\, \max(\sum_c w_c, 1)

    for ``mode="mean"``, and ``mode="sum"`` leaves the division out: the numbers of
    :func:`visit_mean_pool` with a mask that holds the weights. So weights that sum to less than 1
    in a visit are not scaled up, negative ones are taken as they are, and a code of weight 0 adds
    nothing, whatever its row holds; NaN and infinity reach the result. A code that a visit holds
    twice counts with both of its weights. The weights are differentiable,
    :math:`\partial L / \partial w_c = g \cdot (W_c - y) / \sum_c w_c` for the mean :math:`y` of
    gradient :math:`g` where the weights sum to 1 or more, and :math:`g \cdot W_c` elsewhere. Modes
    max and attention take none.

    Args:
        batch: the codes, grouped by visit, in the order of ``PackedSequence.data``.
        weight: ``[K, E]`` float32, float64, bfloat16 or float16: the embedding table.
        mode: ``"mean"``, ``"sum"``, ``"max"`` or ``"attention"``.
        scores: ``[K]`` of ``weight``'s dtype, for ``mode="attention"``.
        code_weights: ``[n_codes]``, floating, in the order of ``batch.codes``, in place of those of
            the batch. For none at all, pool ``batch.with_code_weights(None)``.
        padding_idx: this row of ``weight`` gets no gradient. It is not a mask.
        sparse_grad: give ``weight`` a coalesced sparse gradient (not with attention). With
            ``padding_idx`` on a GPU its computation waits for the device, to learn its size.
        validate: check the codes on a GPU too, which waits for the device.

    Returns:
        ``[n_visits, E]`` of ``weight``'s dtype, rows in the order of ``batch``; an empty visit
        gives zeros in every mode.

    Raises:
        ValueError: shapes that do not fit, an unknown mode, attention without scores, weights of
            codes in mode max or attention.
        TypeError: a table or weights that are not floating.
        IndexError: a code, or ``padding_idx``, outside the vocabulary.

    Derivatives are those of :func:`visit_mean_pool`.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PackedVisits, packed_visit_pool
        >>> batch = PackedVisits.from_lists([[[1, 2], [2]], [[1]]])  # two patients
        >>> table = torch.tensor([[0.0, 0.0], [2.0, 4.0], [4.0, 0.0]])
        >>> packed_visit_pool(batch, table)  # first visits of both, then the second visit
        tensor([[3., 2.],
                [2., 4.],
                [4., 0.]])
        >>> packed_visit_pool(batch, table, code_weights=torch.tensor([1.0, 3.0, 1.0, 2.0]))
        tensor([[3.5000, 1.0000],
                [2.0000, 4.0000],
                [4.0000, 0.0000]])
    """
    if code_weights is None:
        code_weights = getattr(batch, "code_weights", None)
    row = _check_arguments(batch, weight, mode, scores, padding_idx, sparse_grad)
    if code_weights is not None:
        _check_code_weights(batch, code_weights, mode)
    operation = "packed_attention_pool" if mode == "attention" else "packed_visit_pool"
    if code_weights is not None:
        operation = "packed_weighted_pool"
    chosen = choose(operation, weight, scores, code_weights)
    must_check = must_check_values(chosen, weight.device.type, validate)
    if must_check and not values_are_hidden(batch.codes, batch.code_offsets):
        _check_packed_codes(batch, weight.shape[0])
    if chosen == "reference":
        return reference.packed_visit_pool(
            batch.codes,
            batch.code_offsets,
            weight,
            mode=mode,
            scores=scores,
            code_weights=code_weights,
            padding_idx=padding_idx,
            sparse_grad=sparse_grad,
        )
    index = (batch.index_codes, batch.index_offsets, batch.index_visits)
    if mode == "attention":
        return _PackedAttentionPool.apply(
            chosen, batch.codes, batch.code_offsets, *index, weight, scores, row
        )
    if code_weights is not None:
        wide = code_weights.to(accumulator(weight.dtype))
        if torch.is_grad_enabled() and (weight.requires_grad or wide.requires_grad):
            codes = (batch.codes, batch.code_offsets)
            return _PackedWeightedPool.apply(
                chosen, *codes, *index, weight, wide, MODES[mode], row, sparse_grad
            )
        return operators(chosen).packed_weighted_pool.default(
            batch.codes, batch.code_offsets, weight, wide, MODES[mode]
        )[0]
    if torch.is_grad_enabled() and weight.requires_grad:
        return _PackedVisitPool.apply(
            chosen, batch.codes, batch.code_offsets, *index, weight, MODES[mode], row, sparse_grad
        )
    return operators(chosen).packed_visit_pool.default(
        batch.codes, batch.code_offsets, weight, MODES[mode]
    )[0]


class _PackedVisitPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        chosen,
        codes,
        code_offsets,
        index_codes,
        index_offsets,
        index_visits,
        weight,
        mode,
        padding_row,
        sparse_grad,
    ):
        pooled, arg_max = operators(chosen).packed_visit_pool.default(
            codes, code_offsets, weight, mode
        )
        # of the table only the shape is used again: it may be changed before the backward pass
        ctx.save_for_backward(code_offsets, index_codes, index_offsets, index_visits, arg_max)
        ctx.chosen, ctx.mode, ctx.vocabulary = chosen, mode, weight.shape[0]
        ctx.padding_row, ctx.sparse_grad = padding_row, sparse_grad
        return pooled

    @staticmethod
    def backward(ctx, grad):
        *index, arg_max = ctx.saved_tensors
        arguments = (grad, *index, ctx.vocabulary, arg_max, ctx.mode, ctx.padding_row)
        with torch.no_grad():
            if ctx.sparse_grad:
                code_ids, rows = operators(ctx.chosen).packed_visit_pool_backward_sparse.default(
                    *arguments
                )
                gradient = sparse_rows(code_ids, rows, ctx.vocabulary)
            else:
                gradient = operators(ctx.chosen).packed_visit_pool_backward.default(*arguments)
        (tied,) = once("packed_visit_pool", [gradient], [grad])
        return *(None,) * 6, tied, None, None, None


class _PackedWeightedPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        chosen,
        codes,
        code_offsets,
        index_codes,
        index_offsets,
        index_visits,
        weight,
        code_weights,
        mode,
        padding_row,
        sparse_grad,
    ):
        pooled, totals = operators(chosen).packed_weighted_pool.default(
            codes, code_offsets, weight, code_weights, mode
        )
        of_weights = ctx.needs_input_grad[7]
        # of the table only the shape is used again, unless the weights have a gradient
        kept = [weight, pooled if mode == MODES["mean"] else None] if of_weights else [None, None]
        index = index_codes, index_offsets, index_visits
        ctx.save_for_backward(codes, code_offsets, code_weights, totals, *index, *kept)
        ctx.chosen, ctx.mode, ctx.vocabulary = chosen, mode, weight.shape[0]
        ctx.padding_row, ctx.sparse_grad = padding_row, sparse_grad
        return pooled

    @staticmethod
    def backward(ctx, grad):
        # read once: activation checkpointing computes them again, and then frees them
        codes, code_offsets, code_weights, totals, *index, weight, pooled = ctx.saved_tensors
        ops = operators(ctx.chosen)
        of_table = of_weights = None
        with torch.no_grad():
            if ctx.needs_input_grad[6]:
                positions = None if ctx.chosen == "cpu" else _positions(codes)
                batch = codes, code_offsets, code_weights, totals, *index, positions
                arguments = (grad, *batch, ctx.vocabulary, ctx.mode, ctx.padding_row)
                if ctx.sparse_grad:
                    ids, rows = ops.packed_weighted_pool_backward_sparse.default(*arguments)
                    of_table = sparse_rows(ids, rows, ctx.vocabulary)
                else:
                    of_table = ops.packed_weighted_pool_backward.default(*arguments)
            if ctx.needs_input_grad[7]:
                of_weights = ops.packed_weighted_pool_backward_weights.default(
                    grad, pooled, totals, codes, code_offsets, weight, ctx.mode
                )
        sources = [grad, code_weights, weight]
        of_table, of_weights = once("packed_visit_pool", [of_table, of_weights], sources)
        return *(None,) * 6, of_table, of_weights, None, None, None


def _positions(codes: Tensor) -> Tensor:
    """int32 ``[n_codes]``: which of ``codes`` each entry of their index is."""
    return torch.sort(codes, stable=True).indices.to(torch.int32)


class _PackedAttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        chosen,
        codes,
        code_offsets,
        index_codes,
        index_offsets,
        index_visits,
        weight,
        scores,
        padding_row,
    ):
        pooled, highest, inverse = operators(chosen).packed_attention_pool.default(
            codes, code_offsets, weight, scores
        )
        ctx.save_for_backward(
            pooled, highest, inverse, index_codes, index_offsets, index_visits, weight, scores
        )
        ctx.chosen, ctx.padding_row = chosen, padding_row
        return pooled

    @staticmethod
    def backward(ctx, grad):
        # read once: activation checkpointing computes them again, and then frees them
        *kept, weight, scores = ctx.saved_tensors
        with torch.no_grad():
            gradients = operators(ctx.chosen).packed_attention_pool_backward.default(
                grad, *kept, weight, scores, ctx.padding_row
            )
        gradients = once("packed_visit_pool", gradients, [grad, weight, scores])
        return *(None,) * 6, *gradients, None


def _check_arguments(
    batch: PackedVisits | PackedCodes,
    weight: Tensor,
    mode: str,
    scores: Tensor | None,
    padding_idx: int | None,
    sparse_grad: bool,
) -> int:
    expect_option("mode", mode, PACKED_MODES)
    if not (hasattr(type(batch), "index_visits") or hasattr(batch, "index_visits")):
        raise TypeError(f"batch: expected a PackedVisits, got {kind_of(batch)}")
    expect_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [K, E], got {list(weight.shape)}")
    if batch.codes.device != weight.device:
        raise ValueError(
            f"batch: expected on {weight.device}, where weight is, got {batch.codes.device}: "
            "move it with batch.to(device)"
        )
    if (scores is not None) != (mode == "attention"):
        expected = "scores" if mode == "attention" else "None"
        raise ValueError(f"scores: expected {expected} with mode={mode!r}, got {kind_of(scores)}")
    if scores is not None:
        expect_tensor("scores", scores)
        if scores.shape != weight.shape[:1]:
            raise ValueError(
                f"scores: expected [K] = {list(weight.shape[:1])}, got {list(scores.shape)}"
            )
        if scores.dtype != weight.dtype:
            raise TypeError(f"scores: expected {weight.dtype}, as weight, got {scores.dtype}")
        if sparse_grad:
            raise ValueError("sparse_grad: expected False with mode='attention', got True")
    return padding_row(padding_idx, weight.shape[0])


def _check_code_weights(batch: PackedVisits | PackedCodes, code_weights: Tensor, mode: str) -> None:
    if mode not in WEIGHTED_MODES:
        raise ValueError(
            f"code_weights: expected none with mode={mode!r}, which has no use for them, got "
            f"{kind_of(code_weights)}: pool batch.with_code_weights(None)"
        )
    expect_tensor("code_weights", code_weights, "a tensor or None")
    expect_floating("code_weights", code_weights)
    if code_weights.shape != batch.codes.shape:
        raise ValueError(
            f"code_weights: expected [n_codes] = {list(batch.codes.shape)}, got "
            f"{list(code_weights.shape)}"
        )
    expect_device("code_weights", code_weights, batch.codes.device, "batch.codes")


def _check_in_index(batch: PackedVisits | PackedCodes, places: Tensor) -> None:
    beyond = places >= batch.index_codes.shape[0]
    held = (
        batch.index_codes.index_select(0, places.masked_fill(beyond, 0)) if len(places) else places
    )
    if bool(beyond.any()) or not torch.equal(held, batch.codes):
        first = int((beyond | (held != batch.codes)).nonzero()[0])
        raise ValueError(
            "index_codes: expected every code of the batch, got none for "
            f"{int(batch.codes[first])} (codes[{first}])"
        )


def _check_packed_codes(batch: PackedVisits | PackedCodes, vocabulary: int) -> None:
    codes, offsets = batch.codes, batch.code_offsets
    falls = torch.cat([offsets[:1] != 0, offsets.diff() < 0, offsets[-1:] != codes.shape[0]])
    if bool(falls.any()):
        first = min(int(falls.nonzero()[0]), offsets.shape[0] - 1)
        raise ValueError(
            f"code_offsets: expected offsets that rise from 0 to the {codes.shape[0]} codes of the "
            f"batch, got {int(offsets[first])} (code_offsets[{first}])"
        )
    refuse_codes_outside(codes, vocabulary)
