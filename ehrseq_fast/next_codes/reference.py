"""The definition of the binary cross-entropy of a visit's codes, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator


def places(codes: Tensor, code_offsets: Tensor, classes: int, sampled: bool) -> Tensor:
    """int64 ``[n_codes]``: ``row * classes + code`` of each code, its place among all logits.

    One past them all for codes that no row has, and with ``sampled`` for those that are no columns
    (-1). A code outside the vocabulary is further out, so that indexing by it fails on every
    device.
    """
    rows = len(code_offsets) - 1
    at = torch.arange(len(codes), device=codes.device, dtype=code_offsets.dtype)
    row = torch.searchsorted(code_offsets, at, right=True) - 1
    place = row * classes + codes
    end = rows * classes
    outside = (codes < (-1 if sampled else 0)) | (codes >= classes)
    place = torch.where(outside, end + classes + 1, torch.where(codes < 0, end, place))
    return torch.where((row < 0) | (row >= rows), end, place)


def next_codes(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    code_offsets: Tensor,
    pos_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    sampled: bool = False,
) -> Tensor:
    """The sum over the classes for each row of states, ``[n_visits]``; dense. With ``sampled`` the
    visit's own codes add nothing to it."""
    wide = accumulator(states.dtype)
    bias, pos_weight, class_weight = (
        None if x is None else x.to(wide) for x in (bias, pos_weight, class_weight)
    )
    with torch.autocast(states.device.type, enabled=False):
        logits = F.linear(states.to(wide), weight.to(wide), bias)
    flat = torch.zeros(logits.numel() + 1, dtype=wide, device=logits.device)
    place = places(codes, code_offsets, len(weight), sampled)
    targets = flat.index_fill(0, place, 1)[:-1].view(logits.shape)
    if pos_weight is not None:  # which a visit without the code has no part in, even if it is NaN
        pos_weight = torch.where(targets != 0, pos_weight, 1)
    losses = F.binary_cross_entropy_with_logits(
        logits, targets, weight=class_weight, pos_weight=pos_weight, reduction="none"
    )
    return (torch.where(targets == 0, losses, 0) if sampled else losses).sum(1)
