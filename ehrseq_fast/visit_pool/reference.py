"""Visit pooling in plain PyTorch: the definition, the test oracle and the fallback.

Right in every mode of differentiation and under ``vmap``: nothing here branches on a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import transformed
from ..checks import accumulator


def masked_pool(embeddings: Tensor, mask: Tensor | None = None, *, mode: str = "mean") -> Tensor:
    """``[..., C, E]`` and ``[..., C]`` to ``[..., E]``; empty visits give zeros."""
    wide = embeddings.to(accumulator(embeddings.dtype))
    if mask is None:
        mask = torch.ones(embeddings.shape[:-1], dtype=torch.bool, device=embeddings.device)
    real = (mask != 0).unsqueeze(-1)
    if mode == "max":
        return _largest(wide, real).to(embeddings.dtype)
    weights = mask.to(wide.dtype).unsqueeze(-1)
    # where, not a product: NaN times a mask of zero is NaN
    total = torch.where(real, wide * weights, 0).sum(-2)
    if mode == "mean":
        total = total / weights.sum(-2).clamp(min=1)
    return total.to(embeddings.dtype)


def _largest(values: Tensor, real: Tensor) -> Tensor:
    """Each column's largest real value, NaN above all, from the first slot that holds it: the one
    that the gradient goes to. Zeros where no slot is real."""
    n_slots = values.shape[-2]
    if n_slots == 0:
        return values.sum(-2)
    known = values.detach()
    largest = known.masked_fill(~real, float("-inf")).amax(-2, keepdim=True)
    wins = real & ((known == largest) | known.isnan())
    slots = torch.arange(n_slots, device=values.device).unsqueeze(-1)
    first = torch.where(wins, slots, n_slots - 1).amin(-2, keepdim=True)
    return torch.where(real.any(-2), values.gather(-2, first).squeeze(-2), 0)


def visit_mean_pool(
    codes: Tensor,
    weight: Tensor,
    visit_mask: Tensor | None = None,
    *,
    mode: str = "mean",
    padding_idx: int | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """``codes`` ``[..., C]`` and a table ``[K, E]`` to ``[..., E]``; holds ``[..., C, E]``."""
    if visit_mask is not None:
        codes = codes.masked_fill(visit_mask == 0, 0)  # a padded slot may hold any number
    embeddings = _rows(codes, weight, padding_idx, sparse_grad)
    return masked_pool(embeddings, visit_mask, mode=mode).to(weight.dtype)


def packed_visit_pool(
    codes: Tensor,
    code_offsets: Tensor,
    weight: Tensor,
    *,
    mode: str = "mean",
    scores: Tensor | None = None,
    code_weights: Tensor | None = None,
    padding_idx: int | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """Codes grouped by visit (``code_offsets`` ``[n_visits + 1]``) to ``[n_visits, E]``;
    ``code_weights`` ``[n_codes]`` in mode mean or sum."""
    counts = code_offsets.diff()
    n_visits = counts.shape[0]
    visit = torch.arange(n_visits, device=codes.device).repeat_interleave(
        counts, output_size=codes.shape[0]
    )
    rows = _rows(codes.long(), weight, padding_idx, sparse_grad)
    if mode == "max":
        return _largest_of_visits(rows, visit, n_visits).to(weight.dtype)
    if mode == "attention":
        assert scores is not None
        score = scores.to(rows.dtype)[codes.long()]
        highest = score.new_full((n_visits,), float("-inf")).scatter_reduce(
            0, visit, score.detach(), "amax"
        )
        exponential = torch.exp(score - highest[visit])
        total = score.new_zeros(n_visits).index_add(0, visit, exponential)
        rows = rows * (exponential / total[visit]).unsqueeze(-1)
    total_weights = counts
    if code_weights is not None:
        weights = code_weights.to(rows.dtype)
        rows = _weighted(rows, weights)
        total_weights = weights.new_zeros(n_visits).index_add(0, visit, weights)
    pooled = rows.new_zeros(n_visits, weight.shape[1]).index_add(0, visit, rows)
    if mode == "mean":
        pooled = pooled / total_weights.clamp(min=1).unsqueeze(-1)
    return pooled.to(weight.dtype)


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows ``[n, E]`` times ``weights`` ``[n]``; zeros where a weight is zero, as of a slot that a
    mask leaves out, whatever the row holds."""
    if not torch.compiler.is_compiling():
        return _Weighted.apply(rows, weights)
    # of a row that holds a NaN and has no weight, this has no derivative by the weight
    nothing = (weights == 0).unsqueeze(-1)
    return torch.where(nothing, rows.nan_to_num(), rows) * weights.unsqueeze(-1)


class _Weighted(torch.autograd.Function):
    """A product that is zero at a weight of zero, with the derivatives of a product everywhere: by
    its weight too where that is zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, weights):
        weights = weights.unsqueeze(-1)
        return torch.where(weights == 0, 0, rows * weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        rows, weights = ctx.saved_tensors
        return _Weighted.apply(grad, weights), (grad * rows).sum(-1)

    @staticmethod
    def jvp(ctx, rows_tangent, weights_tangent):
        rows, weights = ctx.saved_tensors
        tangent = torch.zeros_like(rows)
        if rows_tangent is not None:
            tangent = tangent + _Weighted.apply(rows_tangent, weights)
        if weights_tangent is not None:
            tangent = tangent + rows * weights_tangent.unsqueeze(-1)
        return tangent


def _largest_of_visits(rows: Tensor, visit: Tensor, n_visits: int) -> Tensor:
    """As :func:`_largest`, of the rows of each visit."""
    n_rows, row_size = rows.shape
    at = visit.unsqueeze(-1).expand(n_rows, row_size)
    known = rows.detach()
    is_nan = known.isnan()
    largest = known.new_full((n_visits, row_size), float("-inf")).scatter_reduce(
        0, at, known.masked_fill(is_nan, float("-inf")), "amax"
    )
    nans = is_nan.int().new_zeros(n_visits, row_size).scatter_reduce(0, at, is_nan.int(), "amax")
    wins = torch.where(nans[visit] > 0, is_nan, known == largest[visit])
    places = torch.arange(n_rows, device=rows.device).unsqueeze(-1)
    first = places.new_full((n_visits, row_size), n_rows).scatter_reduce(
        0, at, torch.where(wins, places, n_rows), "amin"
    )
    nothing = rows.new_zeros(1, row_size)  # what an empty visit holds
    return torch.cat([rows, nothing]).gather(0, first)


def _rows(codes: Tensor, weight: Tensor, padding_idx: int | None, sparse_grad: bool) -> Tensor:
    """``weight[codes]`` in the dtype of sums, in which gradients are summed too."""
    wide = accumulator(weight.dtype)
    if sparse_grad and weight.dtype != wide:
        # PyTorch cannot convert a sparse gradient back
        if transformed(weight):
            sparse_grad = False
        else:
            return F.embedding(codes, _Widened.apply(weight), padding_idx, sparse=True)
    return F.embedding(codes, weight.to(wide), padding_idx, sparse=sparse_grad)


class _Widened(torch.autograd.Function):
    """A 16-bit table in float32, whose gradient may be sparse."""

    @staticmethod
    def forward(ctx, weight):
        ctx.dtype = weight.dtype
        return weight.float()

    @staticmethod
    def backward(ctx, grad):
        if not grad.is_sparse:
            return grad.to(ctx.dtype)
        grad = grad.coalesce()
        return torch.sparse_coo_tensor(
            grad.indices(),
            grad.values().to(ctx.dtype),
            grad.shape,
            is_coalesced=True,
            check_invariants=False,
        )
