"""Loss and gradients of a visit's codes by chunks of rows; ``[n_visits, K]`` is never whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import target_rows


def loss_and_gradients(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    offsets: Tensor,
    scale: Tensor,
    *,
    pos_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    chunk_rows: int = 256,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each visit, and the gradients of ``(scale * loss).sum()``.

    Returns:
        ``[n_visits]``, ``[n_visits, H]``, ``[K, H]`` and ``[K]``.
    """
    rows = target_rows(offsets, len(codes))
    losses = states.new_empty(len(states))
    grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight)
    grad_bias = weight.new_zeros(len(weight))
    for begin in range(0, len(states), chunk_rows):
        end = min(begin + chunk_rows, len(states))
        logits = F.linear(states[begin:end], weight, bias)
        first, last = int(offsets[begin]), int(offsets[end])
        where = (rows[first:last] - begin, codes[first:last])
        positive = logits[where]
        # Assigned, not added: a duplicate counts once, and inf - inf cannot arise.
        values = F.logsigmoid(-logits).neg_()  # exact where softplus is cut off at 20
        slopes = logits.sigmoid_()
        loss, slope = -F.logsigmoid(positive), -torch.sigmoid(-positive)
        if pos_weight is not None:
            loss, slope = loss * pos_weight[where[1]], slope * pos_weight[where[1]]
        values[where], slopes[where] = loss, slope
        if class_weight is not None:
            values, slopes = values.mul_(class_weight), slopes.mul_(class_weight)
        losses[begin:end] = values.sum(1)
        slopes.mul_(scale[begin:end, None])
        torch.mm(slopes, weight, out=grad_states[begin:end])
        grad_weight.addmm_(slopes.t(), states[begin:end])
        grad_bias += slopes.sum(0)
    return losses, grad_states, grad_weight, grad_bias
