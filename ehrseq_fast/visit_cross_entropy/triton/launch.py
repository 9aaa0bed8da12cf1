"""The operator of the cross-entropy of one class per visit in Triton: one launch, and one before it
for a mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...checks import INTEGER
from ...operations import implemented_in_triton
from ...survival_nll.triton import arguments
from ...survival_nll.triton.visit_losses import VisitInputs, contiguous, loss_of_visits
from ...triton_support import launch
from .kernel import cross_entropy_kernel


@implemented_in_triton("visit_cross_entropy")
def visit_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    sequence_mask: Tensor | None,
    row_starts: Tensor | None,
    unsorted_indices: Tensor | None,
    last_rows: Tensor | None,
    class_weight: Tensor | None,
    visit_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    name = "visit_cross_entropy"
    rows = (row_starts, unsorted_indices, last_rows)
    sizes = arguments.check_layout(name, logits, True, sequence_mask, rows)
    patients, _, classes = sizes
    if not 1 <= classes < 2**31:
        arguments.refuse(name, "logits", "1 to 2^31 - 1 classes", classes)
    arguments.check_reduction(name, reduction)
    if not 0 <= label_smoothing <= 1:
        arguments.refuse(name, "label_smoothing", "a number in [0, 1]", f"{label_smoothing:g}")
    of_visits = (logits.shape[:-1], "[B, V]" if row_starts is None else "[n_visits]")
    arguments.check_numbers(name, logits, "labels", labels, *of_visits, INTEGER)
    arguments.check_numbers(name, logits, "class_weight", class_weight, (classes,), "[K]")
    arguments.check_numbers(name, logits, "visit_weight", visit_weight, *of_visits)
    arguments.check_numbers(name, logits, "sample_weight", sample_weight, (patients,), "[B]")
    targets = (contiguous(labels), contiguous(class_weight), ignore_index, label_smoothing)
    inputs = VisitInputs(logits, sequence_mask, rows, visit_weight, sample_weight, *sizes)

    def start(grid: tuple[int, ...], *given: Any, **options: Any) -> None:
        launch(
            cross_entropy_kernel,
            grid,
            *given,
            *targets,
            CLASSES=classes,
            SMOOTHED=label_smoothing > 0 and not options["WEIGHS"],
            **options,
        )

    return loss_of_visits(start, inputs, reduction, needs_grad, has_classes=True)
