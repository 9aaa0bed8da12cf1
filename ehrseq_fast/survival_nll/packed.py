"""The survival losses of packed batches: hazards as rows of visits, nothing padded or unpadded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backend
from ..backend import must_check_values, operators
from ..schemas import fake
from .checks import INTEGER, REAL, check_companions, check_hazards
from .op import (
    LINKS,
    REDUCTIONS,
    Inputs,
    Options,
    check_link,
    check_options,
    check_outcomes,
    empty_nll_and_grad,
    packed_rows,
    reference_nll,
    scaled_gradient,
)

if TYPE_CHECKING:
    from ..batch import PackedVisits

backend.register("packed_survival_nll", "cpu", "cuda", "triton")


def packed_survival_nll(
    hazards: Tensor,
    batch: PackedVisits,
    *,
    event_times: Tensor | None = None,
    event_indicators: Tensor | None = None,
    from_logits: bool = False,
    censored_visit: str = "excluded",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    eps: float = 1e-7,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """:func:`discrete_time_survival_nll` of one hazard per row of a packed batch.

    Args:
        hazards: ``[n_visits]``, rows in the order of ``batch``: probabilities, or logits with
            ``from_logits=True``.
        batch: whose visits they are; its ``event_times`` and ``event_indicators`` are the outcomes.
        event_times, event_indicators: ``[B]`` in the caller's order, in place of the batch's.
        entry_times, sample_weight: ``[B]`` in the caller's order.

    All else as for :func:`discrete_time_survival_nll`; ``reduction="none"`` gives ``[B]`` in the
    caller's order of patients.

    Raises:
        ValueError: if neither the batch nor the call has outcomes; else as there.
        TypeError: as there.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PackedVisits, packed_survival_nll
        >>> batch = PackedVisits.from_lists(
        ...     [[[1]], [[2], [3]]], event_times=[0, 1], event_indicators=[1, 0]
        ... )
        >>> packed_survival_nll(torch.tensor([0.2, 0.1, 0.3]), batch, reduction="none")
        tensor([2.3026, 0.2231])
    """
    times = batch.event_times if event_times is None else event_times
    seen = batch.event_indicators if event_indicators is None else event_indicators
    if times is None or seen is None:
        raise ValueError(
            "there are no outcomes: give event_times and event_indicators to the batch or the call"
        )
    types = ("event_indicators", seen, REAL)
    _check_tensors(hazards, batch, (), times, types, entry_times, sample_weight)
    link = "sigmoid" if from_logits else "probabilities"
    inputs = (hazards, times, seen, None, entry_times, sample_weight)
    return _packed_nll(batch, inputs, (link, censored_visit, eps, reduction), validate)


def packed_competing_risks_nll(
    hazards: Tensor,
    batch: PackedVisits,
    *,
    event_times: Tensor | None = None,
    event_types: Tensor | None = None,
    from_logits: bool = False,
    link: str = "sigmoid",
    censored_visit: str = "excluded",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    eps: float = 1e-7,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """:func:`competing_risks_nll` of K hazards (or logits) per row of a packed batch.

    Args:
        hazards: ``[n_visits, K]``, or ``[n_visits, K + 1]`` logits for ``link="softmax"``.
        batch: whose visits they are; its ``event_times`` and ``event_types`` are the outcomes.
        event_times, event_types: ``[B]`` in the caller's order, in place of the batch's.

    All else as for :func:`competing_risks_nll`.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PackedVisits, packed_competing_risks_nll
        >>> batch = PackedVisits.from_lists([[[1], [2]]], event_times=[1], event_types=[1])
        >>> packed_competing_risks_nll(torch.tensor([[0.1, 0.2], [0.5, 0.3]]), batch)
        tensor(1.0217)
    """
    times = batch.event_times if event_times is None else event_times
    kinds = batch.event_types if event_types is None else event_types
    if times is None or kinds is None:
        raise ValueError(
            "there are no outcomes: give event_times and event_types to the batch or the call"
        )
    trailing = ("K + 1",) if link == "softmax" else ("K",)
    types = ("event_types", kinds, INTEGER | {torch.bool})
    _check_tensors(hazards, batch, trailing, times, types, entry_times, sample_weight)
    check_link(hazards, link, from_logits)
    inputs = (hazards, times, kinds, None, entry_times, sample_weight)
    options = (link if from_logits else "probabilities", censored_visit, eps, reduction)
    return _packed_nll(batch, inputs, options, validate)


def _check_tensors(
    hazards: Tensor,
    batch: PackedVisits,
    trailing: tuple[str, ...],
    event_times: Tensor,
    event_types: tuple[str, Tensor, frozenset[torch.dtype]],
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
) -> None:
    check_hazards(hazards, ("n_visits", *trailing))
    if hazards.shape[0] != batch.n_visits:
        raise ValueError(
            f"hazards must have one row per visit, n_visits = {batch.n_visits}, "
            f"got {list(hazards.shape)}"
        )
    if batch.row_starts.device != hazards.device:
        raise ValueError(
            f"the batch is on {batch.row_starts.device}, and hazards is on {hazards.device}: "
            "move it with batch.to(device)"
        )
    check_companions(hazards, len(batch), event_times, event_types, entry_times, sample_weight)


def _packed_nll(batch: PackedVisits, inputs: Inputs, options: Options, validate: bool) -> Tensor:
    hazards = inputs[0]
    check_options(options)
    chosen = backend.choose("packed_survival_nll", hazards.device.type, hazards.dtype)
    if chosen == "reference" or must_check_values(chosen, hazards.device.type, validate):
        padded, mask = _padded(batch, hazards)
        padded_inputs = (padded, *inputs[1:3], mask, *inputs[4:])
        if must_check_values(chosen, hazards.device.type, validate):
            check_outcomes(padded_inputs, options)
        if chosen == "reference":
            return reference_nll(padded_inputs, options)
    rows = packed_rows(batch)
    if hazards.requires_grad and torch.is_grad_enabled():
        return _PackedNll.apply(chosen, batch, *rows, *inputs, *options)
    return _fused(chosen, rows, inputs, options, needs_grad=False)[0]


def _padded(batch: PackedVisits, hazards: Tensor) -> tuple[Tensor, Tensor]:
    real = torch.ones(batch.n_visits, dtype=torch.bool, device=hazards.device)
    return batch.pad(hazards), batch.pad(real, False)


Rows = tuple[Tensor, Tensor, Tensor]  # row_starts, unsorted_indices, last_rows


def _fused(
    chosen: str, rows: Rows, inputs: Inputs, options: Options, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    hazards, times, types, _, entry_times, sample_weight = inputs
    link, censored_visit, eps, reduction = options
    return operators(chosen).packed_survival_nll.default(
        hazards,
        *rows,
        times,
        types,
        entry_times,
        sample_weight,
        LINKS[link],
        censored_visit == "included",
        eps,
        REDUCTIONS[reduction],
        needs_grad,
    )


class _PackedNll(torch.autograd.Function):
    """As for padded hazards: the kernel writes the gradient along with the loss."""

    @staticmethod
    def forward(ctx: Any, chosen: str, batch: PackedVisits, *args: Any) -> Tensor:
        rows, inputs, options = args[:3], args[3:9], args[9:]
        nll, grad = _fused(chosen, rows, inputs, options, needs_grad=True)
        ctx.save_for_backward(grad, *inputs)
        ctx.chosen, ctx.batch, ctx.options = chosen, batch, options
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        grad, *inputs = ctx.saved_tensors
        hazards = inputs[0]
        if torch.is_grad_enabled():  # create_graph=True: a gradient that has a gradient itself
            padded, mask = _padded(ctx.batch, hazards)
            nll = reference_nll((padded, *inputs[1:3], mask, *inputs[4:]), ctx.options)
            (grad,) = torch.autograd.grad(nll, hazards, grad_nll, create_graph=True)
        else:
            grad = scaled_gradient(ctx.chosen, grad, grad_nll, hazards, ctx.batch)
        return *(None,) * 5, grad, *(None,) * 9


@fake("packed_survival_nll")
def _(
    hazards,
    row_starts,
    unsorted_indices,
    last_rows,
    event_times,
    event_types,
    entry_times,
    sample_weight,
    link,
    censored_included,
    eps,
    reduction,
    needs_grad,
):
    return empty_nll_and_grad(hazards, event_times.shape[:1], reduction, needs_grad)
