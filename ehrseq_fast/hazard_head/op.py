"""The hazard head as an operation, and its gradient.

One function of the rows, since autograd would hold the hidden layer, its gradient before and after
the ReLU and that of the rows at once, each ``[rows, units]``. Here the gradient of the hidden layer
exists for a few thousand rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import once, unread
from . import operators  # noqa: F401  (which defines what is called here)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        last_weight: Tensor,
        last_bias: Tensor,
        kept: Tensor | None,
        scale: float,
    ) -> Tensor:
        operands = (input, weight, bias, last_weight, last_bias, kept)
        hazards, hidden = torch.ops.ehrseq_fast.hazard_head(*operands, scale, True)
        of_input = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(hazards, hidden, input, of_input, last_weight, kept)
        ctx.scale = scale
        return hazards

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hazards, hidden, input, weight, last_weight, kept = ctx.saved_tensors
        need, units = ctx.needs_input_grad, hidden.shape[1]
        if weight is None:
            weight = unread(input, units, input.shape[1])
        biases = unread(input, units), unread(input, 1)
        with torch.no_grad():
            gradients = torch.ops.ehrseq_fast.hazard_head_backward(
                *(grad, hazards, hidden, input, weight, biases[0], last_weight, biases[1], kept),
                *(ctx.scale, need[0], any(need[1:5])),
            )
        gradients = once("hazard_head", gradients, (grad, hazards, input, weight, last_weight))
        wanted = [x if needed else None for x, needed in zip(gradients, need[:5], strict=True)]
        return *wanted, None, None


def hazard_head(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    kept: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Hazards where the kernels serve (``linear.op.dtypes_for``), the same bits for any number of
    threads; see ``reference.py``.

    Args:
        input: ``[rows, inputs]``, float32 or float64.
        weight, bias: ``[units, inputs]`` and ``[units]``.
        last_weight, last_bias: ``[1, units]`` and ``[1]``.
        kept: ``[rows, units]`` bool: which hidden units dropout keeps. All of them by default.
        scale: what dropout multiplies them by.

    Returns:
        ``[rows]``.

    Raises:
        ValueError: for shapes that do not fit.
        RuntimeError: on differentiating twice.
    """
    operands = (input, weight, bias, last_weight, last_bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        return _Head.apply(*operands, kept, scale)
    return torch.ops.ehrseq_fast.hazard_head(*operands, kept, scale, False)[0]
