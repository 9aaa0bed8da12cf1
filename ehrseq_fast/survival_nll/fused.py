"""A loss of hazards or logits computed by kernels, and its gradient; or by the reference, of padded
or packed rows alike. Not of the survival losses alone: :class:`Loss` says what one consists of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from .. import backend
from ..autograd import nothing_watches, transformed
from ..backend import operators
from . import reference
from .options import Options

# row_starts, unsorted_indices, last_rows of a packed batch; None for padded hazards
Rows = tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]
PADDED = (None, None, None)
# hazards, event_times, event_types, sequence_mask, entry_times, sample_weight; a loss with rows of
# PADDED may have others after the hazards, which nothing here looks at
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class Loss(Protocol):
    """The options of a loss, and what computes it with them.

    A class that takes more rows of visits than its hazards has ``of_visits``, their positions among
    the inputs, which may be None there.
    """

    def check(self) -> None:
        """``ValueError`` or ``TypeError`` for options that there are not."""

    def define(self, inputs: Inputs) -> Tensor:
        """The definition, of padded inputs."""

    def compute(self, ops: Any, rows: Rows, inputs: Inputs, needs_grad: bool) -> Any:
        """The kernels' loss and gradient; the gradient is an empty tensor where none is needed."""


class SurvivalNll(Options):
    """The survival losses: of one risk ``[B, V]``, of competing ones ``[B, V, K]``. Their
    definition takes weights of visits too, after the other inputs."""

    __slots__ = ()

    def define(self, inputs: Any) -> Tensor:
        hazards, event_times, event_types, sequence_mask, entry_times, sample_weight, *more = inputs
        definition: Callable[..., Tensor] = reference.discrete_time_survival_nll
        if hazards.dim() == 3:
            definition = reference.competing_risks_nll
        return definition(
            hazards,
            event_times,
            event_types,
            sequence_mask,
            self,
            entry_times=entry_times,
            sample_weight=sample_weight,
            visit_weight=more[0] if more else None,
        )

    def compute(self, ops: Any, rows: Rows, inputs: Inputs, needs_grad: bool) -> Any:
        hazards = inputs[0]
        numbered = (*self.numbered(), needs_grad)
        if rows[0] is not None:
            outcomes = (*inputs[1:3], *inputs[4:])
            return ops.packed_survival_nll.default(hazards, *rows, *outcomes, *numbered)
        operator = ops.competing_risks_nll if hazards.dim() == 3 else ops.survival_nll
        return operator.default(*inputs, *numbered)


def nll(chosen: str, rows: Rows, inputs: Inputs, loss: Loss) -> Tensor:
    """The loss of checked arguments, by the backend ``chosen``: ``reference`` where a transform of
    ``torch.func`` or forward mode is active (:func:`~ehrseq_fast.autograd.transformed`)."""
    hazards = inputs[0]
    if chosen == "reference":
        return loss.define(as_padded(rows, inputs, loss))
    if hazards.requires_grad and torch.is_grad_enabled():
        if chosen == "cpu" and not torch.compiler.is_compiling():
            return _NllOnHost.apply(hazards, operators("cpu"), loss, rows, inputs)
        return _Nll.apply(chosen, loss, *rows, *inputs)
    return loss.compute(operators(chosen), rows, inputs, False)[0]


def nll_on_host(
    operation: str,
    dims: int,
    loss: Loss,
    rows: Rows,
    inputs: Any,
    weights: tuple[Tensor | None, ...] = (),
) -> Tensor | None:
    """The loss of arguments that nobody has checked, by the ``cpu`` kernels: their operator refuses
    what the checks of the public functions refuse of tensors, which take longer than the loss of a
    small batch. It cannot know of how many ``dims`` hazards are to be, nor that ``weights`` get no
    gradient.

    None where more has to be looked at, and where something is refused: the caller then goes the
    long way, by those checks, which say what is wrong in the words of the public functions. So
    nothing that is allowed may be refused here for long: it would be computed twice.
    """
    hazards = inputs[0]
    is_usual = type(hazards) is Tensor and hazards.dim() == dims and nothing_watches()
    if not is_usual or not _are_plain(rows, inputs, weights):
        return None
    ops = backend.unwatched_operators
    is_graph = hazards.requires_grad and torch.is_grad_enabled()
    try:
        if not backend.is_cpu(operation, hazards.dtype):
            return None
        loss.check()
        if not is_graph:
            return loss.compute(ops, rows, inputs, False)[0]
    except Exception:  # whatever it is, the long way meets it again
        return None
    try:
        return _apply_on_host(unwrap_if_dead(hazards), ops, loss, rows, inputs)
    except _Refused:  # no other: what hooks of saved tensors raise is theirs (checkpoints stop so)
        return None


class _Refused(Exception):
    """What an operator raised of arguments that nobody has checked."""


def _are_plain(rows: Rows, inputs: Any, weights: tuple[Tensor | None, ...]) -> bool:
    """Whether all are tensors on the host, of no class derived from Tensor, or None; ``weights``
    without a gradient. (With one on the meta device, an operator computes nothing.)"""
    for tensor in (*rows, *inputs):
        if tensor is not None and (type(tensor) is not Tensor or not tensor.is_cpu):
            return False
    learned = [weight for weight in weights if weight is not None and weight.requires_grad]
    return not learned


def as_padded(rows: Rows, inputs: Any, loss: Loss | None = None) -> Any:
    """The same patients with hazards ``[B, V, ...]`` and a mask."""
    if rows[0] is None:
        return inputs
    row, exists = _numbers(rows)
    padded = [inputs[0][row], *inputs[1:3], exists, *inputs[4:]]
    for position in getattr(loss, "of_visits", ()):
        if inputs[position] is not None:
            padded[position] = inputs[position][row]
    return tuple(padded)


def _numbers(rows: Rows) -> tuple[Tensor, Tensor]:
    """The number of each slot's row, and which slots have one."""
    row_starts, ranks, _ = rows
    assert row_starts is not None
    assert ranks is not None
    exists = ranks[:, None] < row_starts.diff()
    return torch.where(exists, row_starts[:-1] + ranks[:, None], 0), exists


class _Nll(torch.autograd.Function):
    """The kernel writes the gradient along with the loss, so that backward has only to scale it."""

    @staticmethod
    def forward(ctx: Any, chosen: str, loss: Loss, *tensors: Any) -> Tensor:
        rows, inputs = tensors[:3], tensors[3:]
        value, grad = loss.compute(operators(chosen), rows, inputs, True)
        ctx.save_for_backward(grad, *rows, *inputs)
        ctx.chosen, ctx.loss = chosen, loss
        return value

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        saved, *tensors = ctx.saved_tensors
        rows, inputs = tuple(tensors[:3]), tuple(tensors[3:])
        if torch.is_grad_enabled() or transformed(grad_nll):
            grad = _by_definition(ctx.loss, rows, inputs, grad_nll)
        else:
            grad = _scaled(ctx.chosen, saved, grad_nll, rows, inputs[0].dtype)
        return *(None,) * 5, grad, *(None,) * (len(inputs) - 1)


class _NllOnHost(torch.autograd.Function):
    """As :class:`_Nll`, where calls are short: tensors that get no gradient are no arguments, each
    of which costs autograd some time.

    The first backward pass returns the very tensor that the kernel wrote, which nothing else uses;
    a second pass computes it again. So no copy is ever made, and changing the result in place, even
    where autograd does not see it, changes no other result.
    """

    @staticmethod
    def forward(ctx: Any, hazards: Tensor, ops: Any, loss: Loss, rows: Any, inputs: Any) -> Tensor:
        try:
            value, grad = loss.compute(ops, rows, (hazards, *inputs[1:]), True)
        except Exception as error:
            if ops is backend.unwatched_operators:
                raise _Refused from error
            raise
        ctx.save_for_backward(hazards, *rows, *inputs[1:])
        ctx.once, ctx.loss = [grad], loss
        return value

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        # looked at in every pass, so that what changed since the forward pass is noticed
        hazards, *tensors = ctx.saved_tensors
        rows, inputs = tuple(tensors[:3]), (hazards, *tensors[3:])
        if torch.is_grad_enabled() or transformed(grad_nll):
            return _by_definition(ctx.loss, rows, inputs, grad_nll), None, None, None, None
        try:
            own = ctx.once.pop()
        except IndexError:
            _, own = ctx.loss.compute(operators("cpu"), rows, inputs, True)
        return _scaled_in_place(own, grad_nll, rows, hazards.dtype), None, None, None, None


# What Function.apply() calls where no transform of torch.func is active. What it does before takes
# half as long again: it takes arguments out of the wrappers of transforms that have ended.
_apply_on_host = super(torch.autograd.Function, _NllOnHost).apply


def _by_definition(loss: Loss, rows: Any, inputs: Any, grad_nll: Tensor) -> Tensor:
    """With create_graph=True a gradient that has a gradient itself; or several gradients at
    once."""
    with torch.enable_grad():
        value = loss.define(as_padded(rows, inputs, loss))
    (grad,) = torch.autograd.grad(value, inputs[0], grad_nll, create_graph=torch.is_grad_enabled())
    return grad


def _scaled(chosen: str, grad: Tensor, grad_nll: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """The saved gradient times that of the loss: a number, one per patient, or one per visit."""
    if grad_nll.dim() == 2:
        flat = _scaled(chosen, grad.flatten(0, 1), grad_nll.flatten(), rows, dtype)
        return flat.view(grad.shape)
    return operators(chosen).survival_nll_scale.default(grad, grad_nll, *rows, dtype)


def _scaled_in_place(grad: Tensor, grad_nll: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """As :func:`_scaled`, of a gradient on the host that nothing else holds."""
    if grad.dtype == dtype and grad_nll.dim() == 0 and type(grad_nll) is Tensor:
        factor = grad_nll.item()
        if factor == 1:
            return grad
        if math.isfinite(factor):
            return grad.mul_(factor)
    return _scaled("cpu", grad, grad_nll, rows, dtype)
