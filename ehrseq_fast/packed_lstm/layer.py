"""One direction of one layer of the packed LSTM by the compiled kernels, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..autograd import once
from ..recurrent import read_again, with_shapes
from . import (
    cuda,
    operators,  # noqa: F401  (which defines what is called here)
)


class Layer(torch.autograd.Function):
    """On the CPU."""

    @staticmethod
    def forward(
        ctx,
        input,
        batch_sizes,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        c0,
        reverse,
        kept,
    ):
        operands = (input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0)
        return _results(ctx, torch.ops.ehrseq_fast, operands, reverse, kept)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        operator = torch.ops.ehrseq_fast.packed_lstm_layer_backward
        return _gradients(ctx, operator, (grad_output, grad_h_n, grad_c_n))


class CudaLayer(torch.autograd.Function):
    """On a GPU. The gates of all visits are kept."""

    @staticmethod
    def forward(
        ctx,
        input,
        batch_sizes,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        c0,
        reverse,
        kept,
    ):
        operands = (input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0)
        kernels = backend.operators("cuda")
        ctx.operator = kernels.packed_lstm_layer_backward
        ctx.tf32, ctx.device = cuda.takes_tf32(input), input.device.type
        return _results(ctx, kernels, operands, reverse, input.shape[0], ctx.tf32)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        # whose products would be torch's in 16 bits
        with torch.autocast(ctx.device, enabled=False):
            return _gradients(ctx, ctx.operator, (grad_output, grad_h_n, grad_c_n), ctx.tf32)


def _results(
    ctx: Any,
    kernels: Any,
    operands: tuple[Tensor | None, ...],
    reverse: bool,
    kept: int,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and final states; what the backward pass needs is saved."""
    output, h_n, c_n, gates, cells = kernels.packed_lstm_layer(*operands, reverse, True, kept, tf32)
    again = read_again(operands, kept, ctx.needs_input_grad[0])
    ctx.save_for_backward(*again, output, gates, cells)
    ctx.reverse = reverse
    ctx.set_materialize_grads(False)
    return output, h_n, c_n


def _gradients(
    ctx: Any,
    operator: Callable[..., Any],
    incoming: tuple[Tensor | None, ...],
    tf32: bool = False,
) -> tuple[Tensor | None, ...]:
    """Of everything that the forward pass was given."""
    need = ctx.needs_input_grad
    operands = (
        *incoming,
        *with_shapes(ctx.saved_tensors),
        *(ctx.reverse, need[0], any(need[2:6]), any(need[6:8]), tf32),
    )
    with torch.no_grad():
        grads = operator(*operands)
    grads = once("packed_lstm", grads, operands[:12])
    grad_input, grad_weight_ih, grad_weight_hh, grad_bias, grad_h0, grad_c0 = grads
    # Equal numbers, but each its own: gradients may be changed in place.
    other_bias = grad_bias
    if grad_bias is not None and need[4] and need[5]:
        other_bias = grad_bias.clone()
    return (
        grad_input if need[0] else None,
        None,
        grad_weight_ih if need[2] else None,
        grad_weight_hh if need[3] else None,
        grad_bias if need[4] else None,
        other_bias if need[5] else None,
        grad_h0 if need[6] else None,
        grad_c0 if need[7] else None,
        None,
        None,
    )


def infer(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, reverse):
    """On the CPU, without a gradient."""
    return torch.ops.ehrseq_fast.packed_lstm_layer(
        input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, reverse, False, 0
    )[:3]


def infer_on_cuda(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, reverse):
    """On a GPU, without a gradient."""
    operands = (input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0)
    tf32 = cuda.takes_tf32(input)
    return backend.operators("cuda").packed_lstm_layer(*operands, reverse, False, 0, tf32)[:3]
