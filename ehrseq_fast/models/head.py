"""The hazard head on packed rows: Linear, ReLU, Dropout, Linear as one function of the rows.

Two reasons. Autograd holds the hidden layer, its gradient before and after the ReLU and the
gradient of the rows at once, each ``[n_visits, H]``; here the first of the two gradients is never
made. And PyTorch gives float32 products on the CPU to MKL, which is half as fast as oneDNN on
processors that are not Intel's (7.1 against 3.4 ms for 9,762 visits of 256 on two Zen 5 cores).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The operator that torch.compile itself puts in place of a float32 Linear on the CPU."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, activation, [], "")


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def head_logits(head: nn.Sequential, rows: Tensor) -> Tensor:
    """What ``head`` (Linear, ReLU, Dropout, Linear, ...) gives before its last activation.

    ``rows`` ``[..., D]`` → ``[..., 1]``. As one function for float32 rows of a packed batch on the
    CPU, where no module of the head has hooks; differentiating it twice is refused. Elsewhere, and
    under autocast and ``torch.compile``, as the modules stand.
    """
    hidden, last = cast(nn.Linear, head[0]), cast(nn.Linear, head[3])
    dropout = cast(nn.Dropout, head[2])
    as_one = (
        _HAS_ONEDNN
        and rows.device.type == "cpu"
        and rows.dim() == 2
        and rows.dtype == hidden.weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not any(module._forward_hooks or module._forward_pre_hooks for module in head)
    )
    if not as_one:
        return head[:4](rows)
    kept = None
    if head.training and dropout.p > 0:
        kept = torch.empty(len(rows), hidden.out_features, dtype=torch.bool)
        kept.bernoulli_(1 - dropout.p)
    scale = 1 / (1 - dropout.p) if dropout.p < 1 else 0.0
    return _Head.apply(rows, hidden.weight, hidden.bias, last.weight, last.bias, kept, scale)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        last_weight: Tensor,
        last_bias: Tensor,
        kept: Tensor | None,
        scale: float,
    ) -> Tensor:
        hidden = _linear(rows, weight, bias, "relu")
        if kept is not None:
            hidden.mul_(kept).mul_(scale)
        ctx.save_for_backward(rows, weight, last_weight, hidden)
        ctx.scale = scale if kept is not None else 1.0
        return torch.addmm(last_bias, hidden, last_weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, last_weight, hidden = ctx.saved_tensors
        # Zero where the ReLU or the dropout made it so, and there alone.
        grad_hidden = torch.mm(grad, last_weight)
        torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
        if ctx.scale != 1.0:
            grad_hidden.mul_(ctx.scale)
        return (
            _linear(grad_hidden, weight.t(), None, "none"),
            grad_hidden.t() @ rows,
            grad_hidden.sum(0),
            grad.t() @ hidden,
            grad.sum(0),
            None,
            None,
        )
