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

from .. import backend
from ..autograd import once, transformed
from .reading import are_plain


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The operator that torch.compile itself puts in place of a float32 Linear on the CPU."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, activation, [], "")


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def hazards_of(head: nn.Module, states: Tensor) -> Tensor:
    """``head`` (Linear, ReLU, Dropout, Linear, Sigmoid) of states: ``[..., D]`` → ``[..., 1]``.

    Its first four modules as one function for float32 rows of a packed batch on the CPU, where they
    are what they were built as and nothing watches them. Elsewhere, on the backend ``reference``,
    and under autocast and ``torch.compile``, as the modules stand.
    """
    if not _is_as_built(head):
        return head(states)
    assert isinstance(head, nn.Sequential)
    if not _takes_onednn(states, head) or transformed(states, *head.parameters()):
        return head(states)
    hidden, last = cast(nn.Linear, head[0]), cast(nn.Linear, head[3])
    dropout = cast(nn.Dropout, head[2])
    kept = None
    if dropout.training and dropout.p > 0:
        kept = torch.empty(len(states), hidden.out_features, dtype=torch.bool)
        kept.bernoulli_(1 - dropout.p)
    scale = 1 / (1 - dropout.p) if dropout.p < 1 else 0.0
    logits = _Head.apply(states, hidden.weight, hidden.bias, last.weight, last.bias, kept, scale)
    return head[4](logits)


_BUILT_AS = (nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.Sigmoid)


def _is_as_built(head: nn.Module) -> bool:
    return are_plain(head, _BUILT_AS) and _has_biases(cast(nn.Sequential, head))


def _has_biases(head: nn.Sequential) -> bool:
    hidden, last = cast(nn.Linear, head[0]), cast(nn.Linear, head[3])
    return hidden.bias is not None and last.bias is not None and last.out_features == 1


def _takes_onednn(states: Tensor, head: nn.Sequential) -> bool:
    return (
        _HAS_ONEDNN
        and states.device.type == "cpu"
        and states.dim() == 2
        and states.dtype == head[0].weight.dtype == head[3].weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and backend.choose("packed_lstm", "cpu", torch.float32) == "cpu"
    )


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, last_weight, hidden = ctx.saved_tensors
        with torch.no_grad():
            # Zero where the ReLU or the dropout made it so, and there alone.
            grad_hidden = grad * last_weight
            torch.ops.aten.threshold_backward.grad_input(
                grad_hidden, hidden, 0, grad_input=grad_hidden
            )
            if ctx.scale != 1.0:
                grad_hidden.mul_(ctx.scale)
            gradients = (
                _linear(grad_hidden, weight.t(), None, "none"),
                grad_hidden.t() @ rows,
                grad_hidden.sum(0),
                grad.t() @ hidden,
                grad.sum(0),
            )
        sources = (grad, rows, weight, last_weight)
        return *once("the hazard head", gradients, sources), None, None
