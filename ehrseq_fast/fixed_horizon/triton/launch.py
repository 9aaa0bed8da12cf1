"""The operators of the losses of a horizon in Triton: one launch, and one before it for a mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...operations import implemented_in_triton
from ...survival_nll.operators import REDUCTIONS
from ...survival_nll.triton import arguments
from ...survival_nll.triton.visit_losses import VisitInputs, contiguous, loss_of_visits
from ...triton_support import launch
from .kernel import horizon_kernel


@implemented_in_triton("fixed_horizon_bce")
def fixed_horizon_bce(
    logits: Tensor,
    event_times: Tensor,
    event_indicators: Tensor,
    sequence_mask: Tensor | None,
    row_starts: Tensor | None,
    unsorted_indices: Tensor | None,
    last_rows: Tensor | None,
    visit_times: Tensor | None,
    visit_weight: Tensor | None,
    sample_weight: Tensor | None,
    horizon: float,
    pos_weight: float,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    name = "fixed_horizon_bce"
    rows = (row_starts, unsorted_indices, last_rows)
    sizes = arguments.check_layout(name, logits, False, sequence_mask, rows)
    arguments.check_reduction(name, reduction)
    if not horizon > 0:
        arguments.refuse(name, "horizon", "a number above 0", f"{horizon:g}")
    if not 0 <= pos_weight < float("inf"):
        arguments.refuse(name, "pos_weight", "a finite weight from 0", f"{pos_weight:g}")
    of_patients = ((sizes[0],), "[B]")
    of_visits = (logits.shape, "[B, V]" if row_starts is None else "[n_visits]")
    arguments.check_numbers(name, logits, "event_times", event_times, *of_patients)
    arguments.check_numbers(name, logits, "event_indicators", event_indicators, *of_patients)
    arguments.check_numbers(name, logits, "visit_times", visit_times, *of_visits)
    arguments.check_numbers(name, logits, "visit_weight", visit_weight, *of_visits)
    arguments.check_numbers(name, logits, "sample_weight", sample_weight, *of_patients)
    outcomes = (event_times, event_times.stride(0), event_indicators, event_indicators.stride(0))
    inputs = VisitInputs(logits, sequence_mask, rows, visit_weight, sample_weight, *sizes)
    targets = (None, *outcomes, contiguous(visit_times), horizon, pos_weight)
    return _loss_of(inputs, targets, reduction, needs_grad)


@implemented_in_triton("masked_bce")
def masked_bce(
    logits: Tensor, labels: Tensor, weights: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    name = "masked_bce"
    arguments.check_hazards(name, logits, (2,), "[B, V]", "logits")
    of_visits = (logits.shape, "the shape of logits")
    arguments.check_numbers(name, logits, "labels", labels, *of_visits)
    arguments.check_numbers(name, logits, "weights", weights, *of_visits)
    patients, slots = logits.shape
    inputs = VisitInputs(logits, None, (None,) * 3, weights, None, patients, slots, 1)
    targets = (contiguous(labels), None, 0, None, 0, None, 1.0, 1.0)
    return _loss_of(inputs, targets, REDUCTIONS["mean"], needs_grad)


def _loss_of(
    inputs: VisitInputs, targets: tuple[Any, ...], reduction: int, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    def start(grid: tuple[int, ...], *given: Any, **options: Any) -> None:
        launch(horizon_kernel, grid, *given, *targets, **options)

    return loss_of_visits(start, inputs, reduction, needs_grad, has_classes=False)
