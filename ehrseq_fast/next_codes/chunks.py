"""Loss and gradients of a visit's codes by chunks of rows: ``[n_visits, K]`` is never whole. The
products are those of PyTorch; what is done to a chunk of logits is given, here in plain PyTorch,
which is what the backend ``reference`` computes by."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator
from .reference import places

_LOGITS_AT_ONCE = {"cpu": 640_000}  # which the second-level cache holds
_ELSEWHERE = 1 << 24

# Takes the logits of rows [begin, end) in a row, and memory for one more; gives the loss of each
# row and, in place of the logits or not, their derivatives times row_scale, [end - begin, K].
Transform = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


def by_chunks(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    transform: Transform,
    total: bool,
    need_states: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator gives; ``weight``, ``bias`` and ``row_scale`` are in the accumulator's
    dtype."""
    n_rows, classes = len(states), len(weight)
    losses = weight.new_empty(n_rows)
    grad_states = weight.new_empty(states.shape if need_states else 0)
    grad_weight = torch.zeros_like(weight) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_zeros(classes if need_weight else 0)
    at_once = _LOGITS_AT_ONCE.get(states.device.type, _ELSEWHERE)
    step = max(1, at_once // max(1, classes))
    for begin in range(0, n_rows, step):
        end = min(begin + step, n_rows)
        chunk = states[begin:end].to(weight.dtype)
        buffer = weight.new_empty((end - begin) * classes + 1)
        logits = buffer[:-1].view(end - begin, classes)
        torch.mm(chunk, weight.t(), out=logits)
        if bias is not None:
            logits += bias
        losses[begin:end], slopes = transform(buffer, begin, end)
        if need_states:
            torch.mm(slopes, weight, out=grad_states[begin:end])
        if need_weight:
            grad_weight.addmm_(slopes.t(), chunk)
            grad_bias += slopes.sum(0)
    if total:
        losses = (losses if row_scale is None else losses * row_scale).sum()
    return losses, grad_states, grad_weight, grad_bias


def next_codes_bce(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    code_offsets: Tensor,
    pos_weight: Tensor | None,
    class_weight: Tensor | None,
    row_scale: Tensor | None,
    total: bool,
    sampled: bool,
    need_states: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the operator of that name; without a wait for the device on a GPU."""
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        wide = accumulator(states.dtype)
        n_rows, classes = len(states), len(weight)
        bias, pos_weight, class_weight, row_scale = (
            None if x is None else x.to(wide) for x in (bias, pos_weight, class_weight, row_scale)
        )
        place = places(codes, code_offsets, classes, sampled)
        of_code = codes.clamp(min=0).long()
        bounds = _bounds(code_offsets)

        def transform(buffer: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
            n_logits = buffer.numel() - 1
            buffer[-1] = 0  # the place of other rows' codes
            span = slice(None) if bounds is None else slice(bounds[begin], bounds[end])
            local = place[span] - begin * classes
            elsewhere = (local < 0) | ((local >= n_logits) & (place[span] <= n_rows * classes))
            local = torch.where(elsewhere, n_logits, local)
            positive = buffer[local]
            # Assigned, not added: a duplicate counts once, and inf - inf cannot arise.
            values = F.logsigmoid(-buffer).neg_()  # exact where softplus is cut off at 20
            values.masked_fill_(buffer == -torch.inf, torch.nan)  # as PyTorch's: not hidden
            slopes = buffer.sigmoid_()
            if sampled:
                values[local], slopes[local] = 0, 0
            else:
                loss = positive * 0 - F.logsigmoid(positive)
                slope = -torch.sigmoid(-positive)
                if pos_weight is not None:
                    loss *= pos_weight[of_code[span]]
                    slope *= pos_weight[of_code[span]]
                values[local], slopes[local] = loss, slope
            by_row = values[:-1].view(end - begin, classes)
            slopes = slopes[:-1].view(end - begin, classes)
            if class_weight is not None:
                by_row, slopes = by_row.mul_(class_weight), slopes.mul_(class_weight)
            if row_scale is not None:
                slopes *= row_scale[begin:end, None]
            return by_row.sum(1), slopes

        needs = (total, need_states, need_weight)
        return by_chunks(states, weight.to(wide), bias, row_scale, transform, *needs)


def _bounds(code_offsets: Tensor) -> list[int] | None:
    """Where each row's codes begin, on the host: elsewhere asking would be a wait."""
    return code_offsets.tolist() if code_offsets.device.type == "cpu" else None
