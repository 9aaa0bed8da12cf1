"""Losses computed by kernels or by chunks, and their gradients; or by the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import transformed
from ..backend import operators
from ..checks import accumulator
from ..openmp import refuse_restricted_openmp
from . import chunks, reference


class Inputs(NamedTuple):
    """What the operator takes: rows of states that count, and their ragged codes."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None
    codes: Tensor
    code_offsets: Tensor
    pos_weight: Tensor | None
    class_weight: Tensor | None
    row_scale: Tensor | None


def losses(chosen: str, inputs: Inputs, *, total: bool, sampled: bool = False) -> Tensor:
    """The loss of each row, or with ``total`` the sum of ``row_scale * loss``.

    ``chosen`` is the backend. Under a transform of ``torch.func`` or in forward mode the definition
    computes, which is dense; and where ``reference`` is compiled, as a loop over chunks is none for
    a graph of any number of rows.
    """
    is_plain = chosen == "reference"
    is_transformed = transformed(*inputs)
    if (is_plain or is_transformed) and not torch.compiler.is_compiling():
        like = inputs.states.new_empty(0, dtype=accumulator(inputs.states.dtype))
        with torch.autocast(like.device.type, enabled=False):
            refuse_restricted_openmp(like, "next_codes_bce")
    if is_transformed or (is_plain and torch.compiler.is_compiling()):
        return _define(inputs, total, sampled)
    differentiated = inputs[:3]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiated):
        return _NextCodes.apply(chosen, total, sampled, *inputs)
    return _compute(chosen, inputs, total, sampled, False, False)[0]


def _compute(chosen: str, inputs: Inputs, *options: bool) -> Any:
    compute: Callable[..., Any] = chunks.next_codes_bce
    if chosen != "reference":
        compute = operators(chosen).next_codes_bce.default
    device = inputs.states.device.type
    if not torch.is_autocast_enabled(device):
        return compute(*inputs, *options)
    # the products within, of a GPU's kernels too, are in the accumulator's dtype
    with torch.autocast(device, enabled=False):
        return compute(*inputs, *options)


def _define(inputs: Inputs, total: bool, sampled: bool) -> Tensor:
    value = reference.next_codes(*inputs[:-1], sampled)
    scale = inputs.row_scale
    if not total:
        return value
    return (value if scale is None else value * scale.to(value.dtype)).sum()


class _NextCodes(torch.autograd.Function):
    """Of a sum the gradients are computed along with it, while the logits are there, and backward
    scales them. Of losses by row they need the incoming gradient: backward computes the logits
    again."""

    @staticmethod
    def forward(ctx: Any, chosen: str, total: bool, sampled: bool, *given: Any) -> Tensor:
        inputs = Inputs(*given)
        need_states = total and inputs.states.requires_grad
        bias = inputs.bias
        learns = inputs.weight.requires_grad or (bias is not None and bias.requires_grad)
        needs = (need_states, total and learns)
        value, *gradients = _compute(chosen, inputs, total, sampled, *needs)
        # Of a sum the backward pass reads the bias only to be differentiated itself; until then it
        # may be changed, as that of nn.Linear.
        apart = bias is not None and total and not torch.compiler.is_compiling()
        ctx.bias = (bias, bias._version) if bias is not None and apart else None
        kept = inputs._replace(bias=None) if apart else inputs
        ctx.save_for_backward(*kept, *(gradients if total else ()))
        ctx.options = chosen, total, sampled
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chosen, total, sampled = ctx.options
        # read once: activation checkpointing computes them again, and then frees them
        saved = ctx.saved_tensors
        inputs = Inputs(*saved[:8])
        needs = ctx.needs_input_grad[3:6]
        found: list[Tensor | None]
        if torch.is_grad_enabled() or transformed(grad):
            # create_graph=True: a gradient that has a gradient itself; or several gradients at once
            inputs = _with_bias(inputs, ctx.bias)
            with torch.enable_grad():
                value = _define(inputs, total, sampled)
            differentiable = zip(inputs[:3], needs, strict=True)
            wanted = [x for x, need in differentiable if need and x is not None]
            taken = iter(
                torch.autograd.grad(value, wanted, grad, create_graph=torch.is_grad_enabled())
            )
            found = [next(taken) if need else None for need in needs]
        else:
            with torch.no_grad():
                if total:
                    gradients = [x * grad for x in saved[8:]]
                else:
                    given = inputs._replace(row_scale=grad)
                    computed = (needs[0], needs[1] or needs[2])
                    _, *gradients = _compute(chosen, given, False, sampled, *computed)
                likes = (*inputs[:2], inputs.bias if ctx.bias is None else ctx.bias[0])
                found = [
                    x.to(like.dtype) if need and like is not None else None
                    for x, like, need in zip(gradients, likes, needs, strict=True)
                ]
        return None, None, None, *found, None, None, None, None, None


def _with_bias(inputs: Inputs, bias: tuple[Tensor, int] | None) -> Inputs:
    if bias is None:
        return inputs
    tensor, version = bias
    if tensor._version != version:
        raise RuntimeError(
            "next_codes_bce: bias: one of the variables needed for gradient computation has been "
            "modified by an inplace operation since the forward pass"
        )
    return inputs._replace(bias=tensor)
