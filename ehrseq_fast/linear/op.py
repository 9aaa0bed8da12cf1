"""Linear layers as an operation: gradient, choice of backend.

PyTorch gives products on the CPU to MKL or oneDNN, which cut sums where it suits the threads: the
gradient of a weight then differs between 1 and 2 of them. Here every sum has one order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..autograd import once, transformed, unread
from ..checks import FLOATING
from .operators import ACTIVATIONS


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: int
    ) -> Tensor:
        out = torch.ops.ehrseq_fast.linear_layer(input, weight, bias, activation)
        ctx.save_for_backward(input, weight if ctx.needs_input_grad[0] else None, out)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, out = ctx.saved_tensors
        need = ctx.needs_input_grad
        if weight is None:
            weight = unread(input, out.shape[1], input.shape[1])
        with torch.no_grad():
            gradients = torch.ops.ehrseq_fast.linear_layer_backward(
                grad, input, weight, out, ctx.activation, need[0], need[1] or need[2]
            )
        gradients = once("linear", gradients, (grad, input, weight, out))
        wanted = [x if needed else None for x, needed in zip(gradients, need[:3], strict=True)]
        return *wanted, None


def dtypes_for(input: Tensor, *weights: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
    """What a linear layer of these is computed in here and what its result has to be in, as
    ``nn.Linear`` has it; None where the compiled kernels do not serve, and modules are called.

    16 bits are computed in float32 and rounded once at the end, as PyTorch's own products of them
    are no faster on most CPUs, and take other bits from other numbers of threads.
    """
    operands = (input, *weights)
    given = {x.dtype for x in operands}
    result = input.dtype
    if torch.is_autocast_enabled("cpu") and torch.float64 not in given:
        result = torch.get_autocast_dtype("cpu")
    elif len(given) > 1:
        return None
    served = (
        input.dim() == 2
        and given <= FLOATING
        and all(x.is_cpu for x in operands)
        and not torch.compiler.is_compiling()
        and backend.choose("linear", "cpu", input.dtype) == "cpu"
        and not transformed(*operands)
    )
    if not served:
        return None
    return torch.float64 if result == torch.float64 else torch.float32, result


def linear_layer(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``act(x Wᵀ + b)`` where the kernels serve (:func:`dtypes_for`), the same bits for any number
    of threads.

    Args:
        input: ``[rows, inputs]``, float32 or float64.
        weight: ``[units, inputs]``.
        bias: ``[units]``, or None.
        activation: ``"none"``, ``"relu"``, ``"tanh"`` or ``"sigmoid"``.

    Raises:
        ValueError: for shapes that do not fit.
        RuntimeError: on differentiating twice.
    """
    number = ACTIVATIONS[activation]
    operands = (input, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        return _Linear.apply(input, weight, bias, number)
    return torch.ops.ehrseq_fast.linear_layer(input, weight, bias, number)
