"""The operators of visit pooling: codes (or embeddings) to one vector per visit.

``arg_max`` is filled in mode max alone. A backward operator takes no table, of which no value is
needed, but the number of its rows. The packed operators take the transposed index (``index_*``)
that the batch builder makes.
"""

from __future__ import annotations

import torch

from ..checks import accumulator
from ..operations import operator, register

for _name in (
    "visit_pool",
    "masked_pool",
    "packed_visit_pool",
    "packed_weighted_pool",
    "packed_attention_pool",
):
    register(_name, "cpu", "cuda", "triton", package=__package__)

# as the operators take them
MODES = {"mean": 0, "sum": 1, "max": 2}


def _arg_max(like, shape, mode):
    return like.new_empty(shape if mode == MODES["max"] else (0,), dtype=torch.int32)


@operator(
    "visit_pool(Tensor codes, Tensor weight, Tensor? visit_mask, int mode)"
    " -> (Tensor pooled, Tensor arg_max)"
)
def _(codes, weight, visit_mask, mode):
    shape = (*codes.shape[:-1], weight.shape[1])
    return weight.new_empty(shape), _arg_max(weight, shape, mode)


@operator(
    "visit_pool_backward(Tensor grad, Tensor codes, SymInt vocabulary, Tensor? visit_mask,"
    " Tensor? arg_max, int mode, int padding_idx) -> Tensor"
)
def _(grad, codes, vocabulary, visit_mask, arg_max, mode, padding_idx):
    return grad.new_empty((vocabulary, grad.shape[-1]))


@operator(
    "visit_pool_backward_sparse(Tensor grad, Tensor codes, SymInt vocabulary, Tensor? visit_mask,"
    " Tensor? arg_max, int mode, int padding_idx) -> (Tensor code_ids, Tensor rows)"
)
def _(grad, codes, vocabulary, visit_mask, arg_max, mode, padding_idx):
    n_distinct = torch.library.get_ctx().new_dynamic_size()
    return (
        grad.new_empty((n_distinct,), dtype=torch.int64),
        grad.new_empty((n_distinct, grad.shape[-1])),
    )


@operator(
    "masked_pool(Tensor embeddings, Tensor? mask, int mode) -> (Tensor pooled, Tensor arg_max)"
)
def _(embeddings, mask, mode):
    shape = (*embeddings.shape[:-2], embeddings.shape[-1])
    return embeddings.new_empty(shape), _arg_max(embeddings, shape, mode)


@operator(
    "masked_pool_backward(Tensor grad, Tensor? mask, Tensor? arg_max, SymInt n_slots, int mode)"
    " -> Tensor"
)
def _(grad, mask, arg_max, n_slots, mode):
    return grad.new_empty((*grad.shape[:-1], n_slots, grad.shape[-1]))


@operator(
    "packed_visit_pool(Tensor codes, Tensor code_offsets, Tensor weight, int mode)"
    " -> (Tensor pooled, Tensor arg_max)"
)
def _(codes, code_offsets, weight, mode):
    shape = (code_offsets.shape[0] - 1, weight.shape[1])
    return weight.new_empty(shape), _arg_max(weight, shape, mode)


@operator(
    "packed_visit_pool_backward(Tensor grad, Tensor code_offsets, Tensor index_codes,"
    " Tensor index_offsets, Tensor index_visits, SymInt vocabulary, Tensor? arg_max, int mode,"
    " int padding_idx) -> Tensor"
)
def _(
    grad,
    code_offsets,
    index_codes,
    index_offsets,
    index_visits,
    vocabulary,
    arg_max,
    mode,
    padding_idx,
):
    return grad.new_empty((vocabulary, grad.shape[1]))


@operator(
    "packed_visit_pool_backward_sparse(Tensor grad, Tensor code_offsets, Tensor index_codes,"
    " Tensor index_offsets, Tensor index_visits, SymInt vocabulary, Tensor? arg_max, int mode,"
    " int padding_idx) -> (Tensor code_ids, Tensor rows)"
)
def _(
    grad,
    code_offsets,
    index_codes,
    index_offsets,
    index_visits,
    vocabulary,
    arg_max,
    mode,
    padding_idx,
):
    n_rows = torch.library.get_ctx().new_dynamic_size()
    return (
        grad.new_empty((n_rows,), dtype=torch.int64),
        grad.new_empty((n_rows, grad.shape[1])),
    )


def _sums(like, size):
    return like.new_empty(size, dtype=accumulator(like.dtype))


# Of modes mean and sum. ``code_weights`` and ``totals``, the sums of each visit's weights, which
# mode mean alone has, are of the dtype that sums have. ``index_positions`` says of each entry of
# the index which of ``codes`` it is; a GPU needs it, and the CPU finds it.
@operator(
    "packed_weighted_pool(Tensor codes, Tensor code_offsets, Tensor weight, Tensor code_weights,"
    " int mode) -> (Tensor pooled, Tensor totals)"
)
def _(codes, code_offsets, weight, code_weights, mode):
    n_visits = code_offsets.shape[0] - 1
    totals = _sums(weight, (n_visits if mode == MODES["mean"] else 0,))
    return weight.new_empty((n_visits, weight.shape[1])), totals


@operator(
    "packed_weighted_pool_backward(Tensor grad, Tensor codes, Tensor code_offsets,"
    " Tensor code_weights, Tensor? totals, Tensor index_codes, Tensor index_offsets,"
    " Tensor index_visits, Tensor? index_positions, SymInt vocabulary, int mode, int padding_idx)"
    " -> Tensor"
)
def _(
    grad,
    codes,
    code_offsets,
    code_weights,
    totals,
    index_codes,
    index_offsets,
    index_visits,
    index_positions,
    vocabulary,
    mode,
    padding_idx,
):
    return grad.new_empty((vocabulary, grad.shape[1]))


@operator(
    "packed_weighted_pool_backward_sparse(Tensor grad, Tensor codes, Tensor code_offsets,"
    " Tensor code_weights, Tensor? totals, Tensor index_codes, Tensor index_offsets,"
    " Tensor index_visits, Tensor? index_positions, SymInt vocabulary, int mode, int padding_idx)"
    " -> (Tensor code_ids, Tensor rows)"
)
def _(
    grad,
    codes,
    code_offsets,
    code_weights,
    totals,
    index_codes,
    index_offsets,
    index_visits,
    index_positions,
    vocabulary,
    mode,
    padding_idx,
):
    n_rows = torch.library.get_ctx().new_dynamic_size()
    return (
        grad.new_empty((n_rows,), dtype=torch.int64),
        grad.new_empty((n_rows, grad.shape[1])),
    )


@operator(
    "packed_weighted_pool_backward_weights(Tensor grad, Tensor? pooled, Tensor? totals,"
    " Tensor codes, Tensor code_offsets, Tensor weight, int mode) -> Tensor"
)
def _(grad, pooled, totals, codes, code_offsets, weight, mode):
    return _sums(weight, codes.shape)


# Attention is exp(score - highest) * inverse, with a visit's highest score and 1 / (sum of
# exp(score - highest)), in float64.
@operator(
    "packed_attention_pool(Tensor codes, Tensor code_offsets, Tensor weight, Tensor scores)"
    " -> (Tensor pooled, Tensor highest, Tensor inverse)"
)
def _(codes, code_offsets, weight, scores):
    n_visits = code_offsets.shape[0] - 1
    return (
        weight.new_empty((n_visits, weight.shape[1])),
        weight.new_empty((n_visits,), dtype=torch.float64),
        weight.new_empty((n_visits,), dtype=torch.float64),
    )


@operator(
    "packed_attention_pool_backward(Tensor grad, Tensor pooled, Tensor highest, Tensor inverse,"
    " Tensor index_codes, Tensor index_offsets, Tensor index_visits, Tensor weight, Tensor scores,"
    " int padding_idx) -> (Tensor grad_weight, Tensor grad_scores)"
)
def _(
    grad,
    pooled,
    highest,
    inverse,
    index_codes,
    index_offsets,
    index_visits,
    weight,
    scores,
    padding_idx,
):
    return grad.new_empty(weight.shape), grad.new_empty(scores.shape)
