"""Codes of a visit → one vector, the plain PyTorch way: what the fused path is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import accumulator


def plain_pool(embeddings: Tensor, visit_mask: Tensor | None, mode: str) -> Tensor:
    """Masked mean, sum or max over codes, ``[..., C, E]`` → ``[..., E]``, the usual way.

    Oracle and baseline: it reads padded slots, but what they hold does not reach the result. A
    visit without a real code gives zeros.
    """
    if visit_mask is None:
        visit_mask = torch.ones(embeddings.shape[:-1], dtype=torch.bool, device=embeddings.device)
    if mode == "max":
        padded = (visit_mask == 0).unsqueeze(-1)
        if embeddings.shape[-2] == 0:
            return embeddings.sum(-2)
        # max and not amax, whose gradient sends NaN to the other codes of the visit as well
        largest = embeddings.masked_fill(padded, float("-inf")).max(-2).values
        return largest.masked_fill(padded.all(-2), 0.0)
    padded = (visit_mask == 0).unsqueeze(-1)
    if visit_mask.dtype != torch.bool:
        embeddings = embeddings * visit_mask.unsqueeze(-1).to(embeddings.dtype)
    total = embeddings.masked_fill(padded, 0.0).sum(-2)  # a product would let NaN through
    if mode == "sum":
        return total
    count = visit_mask.sum(-1, keepdim=True).clamp(min=1)
    return (total / count).to(embeddings.dtype)


def softmax_over_real(scores: Tensor, real: Tensor) -> Tensor:
    """Attention weights over the last dimension, in at least float32; zeros where not ``real``."""
    scores = scores.to(accumulator(scores.dtype))
    # A lowest finite number in padded slots would outweigh real scores of -inf. In a visit without
    # a real code, -inf everywhere would give NaN.
    scores = scores.masked_fill(~real, float("-inf"))
    scores = scores.masked_fill(~real.any(-1, keepdim=True), 0.0)
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
