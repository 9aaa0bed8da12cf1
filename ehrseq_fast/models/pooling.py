"""Codes of a visit → one vector: the plain PyTorch way, and attention over real codes.

Mean, sum and max of the fused path are :func:`ehrseq_fast.visit_pool.visit_mean_pool`; here is what
that operation is compared with, and the attention that it does not cover.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_pool(embeddings: Tensor, visit_mask: Tensor | None, mode: str) -> Tensor:
    """Masked mean, sum or max over codes, ``[..., C, E]`` → ``[..., E]``, the usual way.

    Oracle and baseline: it reads padded slots and multiplies them by zero. A visit without a real
    code gives zeros.
    """
    if visit_mask is None:
        visit_mask = embeddings.new_ones(embeddings.shape[:-1])
    if mode == "max":
        padded = (visit_mask == 0).unsqueeze(-1)
        largest = embeddings.masked_fill(padded, float("-inf")).amax(-2)
        return largest.masked_fill(padded.all(-2), 0.0)
    total = (embeddings * visit_mask.unsqueeze(-1).to(embeddings.dtype)).sum(-2)
    if mode == "sum":
        return total
    count = visit_mask.sum(-1, keepdim=True).clamp(min=1)
    return (total / count).to(embeddings.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are accumulated in: float64 for itself, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax_over_real(scores: Tensor, real: Tensor) -> Tensor:
    """Attention weights over the last dimension, in at least float32; zeros where not ``real``."""
    scores = scores.to(wide_dtype(scores.dtype))
    # The lowest finite number, since -inf everywhere in a visit would give NaN.
    scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~real, 0.0)


def attend(
    embeddings: Tensor, visit_mask: Tensor | None, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """Attention pooling of embeddings that exist, ``[..., C, E]`` → ``[..., E]``.

    ``score`` maps ``[..., E]`` to ``[..., 1]``. Padded slots are blanked before they are scored: a
    NaN there would come back through the gradient of the score's weights, as 0 · NaN.
    """
    if visit_mask is None:
        real = torch.ones(embeddings.shape[:-1], dtype=torch.bool, device=embeddings.device)
    else:
        real = visit_mask != 0
    embeddings = embeddings.masked_fill(~real.unsqueeze(-1), 0.0)
    weights = softmax_over_real(score(embeddings).squeeze(-1), real)
    return (embeddings * weights.unsqueeze(-1).to(embeddings.dtype)).sum(-2)


def attend_codes(
    codes: Tensor,
    weight: Tensor,
    visit_mask: Tensor | None,
    score: Callable[[Tensor], Tensor],
    padding_idx: int | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """Attention pooling straight from codes, ``[N, C]`` → ``[N, E]``; no ``[N, C, E]`` exists.

    A score depends on the code alone, so each code in use is embedded and scored once. Codes that
    only padded slots name are never read. On a GPU, finding the codes in use takes two
    synchronisations.

    Raises:
        IndexError: for a real code outside the vocabulary.
    """
    if visit_mask is None:
        visit_mask = torch.ones_like(codes, dtype=torch.bool)
    real = visit_mask != 0
    slots = real.flatten().nonzero().squeeze(1)
    in_use, which = torch.unique(codes.flatten()[slots], return_inverse=True)
    table = F.embedding(in_use, weight, padding_idx, sparse=sparse_grad)

    # Scores are looked up as an embedding, whose gradient has a fixed order of summation.
    scores = F.embedding(which, score(table)).squeeze(-1)
    spread = scores.new_zeros(codes.numel()).index_copy(0, slots, scores).view(codes.shape)
    weights = softmax_over_real(spread, real).flatten().index_select(0, slots)

    counts = real.sum(-1)
    pooled = F.embedding_bag(
        which,
        table.to(wide_dtype(table.dtype)),
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=weights.to(wide_dtype(table.dtype)),
    )
    return pooled.to(weight.dtype)
