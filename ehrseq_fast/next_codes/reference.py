"""The definition of the binary cross-entropy of a visit's codes, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def target_rows(offsets: Tensor, n_codes: int) -> Tensor:
    """The row of each target code: ``offsets [n_visits + 1]`` → ``[n_codes]``."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff(), output_size=n_codes)


def per_visit(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    offsets: Tensor,
    *,
    pos_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """The sum over the classes for each row of states, ``[n_visits]``; dense."""
    logits = F.linear(states, weight, bias)
    targets = torch.zeros_like(logits)
    targets[target_rows(offsets, len(codes)), codes] = 1
    return F.binary_cross_entropy_with_logits(
        logits, targets, weight=class_weight, pos_weight=pos_weight, reduction="none"
    ).sum(1)
