"""Visit pooling in plain PyTorch: the definition, the test oracle and the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float64 for float64 and in float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def masked_pool(embeddings: Tensor, mask: Tensor | None = None, *, mode: str = "mean") -> Tensor:
    """``[..., C, E]`` and ``[..., C]`` to ``[..., E]``; empty visits give zeros."""
    wide = embeddings.to(accumulator(embeddings.dtype))
    if mask is None:
        mask = torch.ones(embeddings.shape[:-1], dtype=torch.bool, device=embeddings.device)
    real = (mask != 0).unsqueeze(-1)
    if mode == "max":
        if embeddings.shape[-2] == 0:
            return wide.sum(-2).to(embeddings.dtype)
        best = wide.masked_fill(~real, float("-inf")).max(dim=-2).values
        return torch.where(real.any(-2), best, 0).to(embeddings.dtype)
    weights = mask.to(wide.dtype).unsqueeze(-1)
    # where, not a product: NaN times a mask of zero is NaN
    total = torch.where(real, wide * weights, 0).sum(-2)
    if mode == "mean":
        total = total / weights.sum(-2).clamp(min=1)
    return total.to(embeddings.dtype)


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
    wide = weight.to(accumulator(weight.dtype))
    embeddings = F.embedding(codes, wide, padding_idx, sparse=sparse_grad)
    return masked_pool(embeddings, visit_mask, mode=mode).to(weight.dtype)


def packed_visit_pool(
    codes: Tensor,
    code_offsets: Tensor,
    weight: Tensor,
    *,
    mode: str = "mean",
    scores: Tensor | None = None,
    padding_idx: int | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """Codes grouped by visit (``code_offsets`` ``[n_visits + 1]``) to ``[n_visits, E]``."""
    counts = code_offsets.diff()
    n_visits = counts.shape[0]
    visit = torch.arange(n_visits, device=codes.device).repeat_interleave(
        counts, output_size=codes.shape[0]
    )
    wide = weight.to(accumulator(weight.dtype))
    rows = F.embedding(codes.long(), wide, padding_idx, sparse=sparse_grad)
    zeros = rows.new_zeros(n_visits, weight.shape[1])
    if mode == "max":
        best = zeros.index_reduce(0, visit, rows, "amax", include_self=False)
        return best.to(weight.dtype)
    if mode == "attention":
        assert scores is not None
        score = scores.to(rows.dtype)[codes.long()]
        highest = score.new_zeros(n_visits).index_reduce(
            0, visit, score.detach(), "amax", include_self=False
        )
        exponential = torch.exp(score - highest[visit])
        total = score.new_zeros(n_visits).index_add(0, visit, exponential)
        rows = rows * (exponential / total[visit]).unsqueeze(-1)
    pooled = zeros.index_add(0, visit, rows)
    if mode == "mean":
        pooled = pooled / counts.clamp(min=1).unsqueeze(-1)
    return pooled.to(weight.dtype)
