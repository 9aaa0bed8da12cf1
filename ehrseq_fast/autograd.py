"""Gradients that must not be differentiated again without an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def once(
    name: str, gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """``gradients`` of the operation ``name``, tied to what they were computed from.

    Called in a backward pass. A saved result of the forward pass is a source that depends on all of
    its arguments, saved or not. Under ``create_graph=True`` differentiating the results by anything
    that ``sources`` depend on raises ``RuntimeError``. (``once_differentiable`` does not connect
    its error to the sources: ``torch.autograd.grad`` would leave out a term, without an error.)
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(gradients)
    given = [gradient for gradient in gradients if gradient is not None]
    tied = iter(_Once.apply(name, len(given), *given, *sources))
    return tuple(None if gradient is None else next(tied) for gradient in gradients)


def unread(like: Tensor, *shape: int) -> Tensor:
    """A tensor of this shape, for an operator that checks its shape and does not read it: what a
    backward pass does not read is not saved for it, so that it may be changed until then, as
    PyTorch's layers allow for their biases."""
    return like.new_zeros(()).expand(shape)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        return tuple(gradient.detach() for gradient in tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            f"{ctx.name}: the compiled kernel's gradient cannot be differentiated again; compute "
            'this part under ehrseq_fast.use_backend("reference")'
        )


@contextlib.contextmanager
def outside_inference() -> Iterator[None]:
    """In the block new tensors are ordinary ones, even under ``torch.inference_mode``: what is kept
    beyond a call may be trained on later. Gradients stay as switched on or off as they are."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def transformed(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation or a transform of ``torch.func`` (grad, jvp, vmap, and
    what is built of them) is active for ``tensors``.

    Kernels know neither tangents nor batched tensors: an operation then has to be computed by its
    reference, which PyTorch differentiates and batches in every mode. (An input without
    ``requires_grad`` would go straight to the operator, which drops its tangent: a derivative of
    zero, without an error.)
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def nothing_watches() -> bool:
    """Whether operations are computed and nothing else: no graph is traced, and no transform of
    ``torch.func``, forward mode, or mode that sees calls of functions or operators is active."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )


def varies(tensor: Tensor) -> bool:
    """Whether a derivative by ``tensor`` may be asked for. Then nothing may be left out because it
    is 0 there: the derivative by a weight of 0 is what it multiplies."""
    return tensor.requires_grad or transformed(tensor)


def values_are_hidden(*tensors: Tensor | None) -> bool:
    """Whether ``torch.func.vmap`` runs over any of ``tensors``: then nothing can be decided by
    their values."""
    if not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    for given in tensors:
        tensor = given
        while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    return False


def unwrapped(tensor: Tensor) -> Tensor:
    """The plain tensor under all transforms of ``torch.func``, with a dimension more for each
    ``vmap`` over it: to ask something of all its values at once, :func:`outside_transforms`."""
    if not torch._C._are_functorch_transforms_active():
        return tensor
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def outside_transforms() -> contextlib.AbstractContextManager[Any]:
    """Inside, new tensors are plain ones, whichever transform of ``torch.func`` is active.

    A batch is built from values on the host. Under a transform even what is computed from plain
    tensors is wrapped, and a wrapped tensor's memory cannot be read.
    """
    if torch._C._are_functorch_transforms_active():
        return torch._C._DisableFuncTorch()
    return contextlib.nullcontext()
