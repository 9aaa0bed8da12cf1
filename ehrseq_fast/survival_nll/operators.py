"""The operators of the survival losses. The forward kernel writes the gradient too, where one is
needed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator
from ..operations import operator, register

for _name in ("survival_nll", "packed_survival_nll"):
    register(_name, "cpu", "cuda", "triton", package=__package__)

# as the operators take them
LINKS = {"probabilities": 0, "sigmoid": 1, "softmax": 2, "cloglog": 3}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def empty_nll_and_grad(
    hazards: Tensor, patients: tuple[int, ...], reduction: int, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of loss and saved gradient (float32 for float16: see ``csrc``)."""
    wide = accumulator(hazards.dtype)
    saved = torch.float32 if hazards.dtype == torch.float16 else hazards.dtype
    value = hazards.new_empty(patients if reduction == REDUCTIONS["none"] else (), dtype=wide)
    return value, hazards.new_empty(hazards.shape if needs_grad else (0,), dtype=saved)


@operator(
    "survival_nll(Tensor hazards, Tensor event_times, Tensor event_indicators,"
    " Tensor? sequence_mask, Tensor? entry_times, Tensor? sample_weight, int link,"
    " bool censored_included, float eps, int reduction, bool needs_grad)"
    " -> (Tensor nll, Tensor grad)"
)
@operator(
    "competing_risks_nll(Tensor hazards, Tensor event_times, Tensor event_types,"
    " Tensor? sequence_mask, Tensor? entry_times, Tensor? sample_weight, int link,"
    " bool censored_included, float eps, int reduction, bool needs_grad)"
    " -> (Tensor nll, Tensor grad)"
)
def _(
    hazards: Tensor,
    event_times: Tensor,
    event_types: Tensor,
    sequence_mask: Tensor | None,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    link: int,
    censored_included: bool,
    eps: float,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    return empty_nll_and_grad(hazards, hazards.shape[:1], reduction, needs_grad)


# Hazards as rows of a packed batch, [n_visits] or, with competing risks, [n_visits, K]: the visits
# of patient p are the rows row_starts[t] + unsorted_indices[p].
@operator(
    "packed_survival_nll(Tensor hazards, Tensor row_starts, Tensor unsorted_indices,"
    " Tensor last_rows, Tensor event_times, Tensor event_types, Tensor? entry_times,"
    " Tensor? sample_weight, int link, bool censored_included, float eps, int reduction,"
    " bool needs_grad) -> (Tensor nll, Tensor grad)"
)
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


# The saved gradient times that of the loss, in the dtype of the hazards: what a GPU's backward pass
# launches. grad_nll is one number or, with reduction none, one per patient, whose rows in a packed
# batch are found as above.
@operator(
    "survival_nll_scale(Tensor grad, Tensor grad_nll, Tensor? row_starts,"
    " Tensor? unsorted_indices, Tensor? last_rows, ScalarType dtype) -> Tensor"
)
def _(
    grad: Tensor,
    grad_nll: Tensor,
    row_starts: Tensor | None,
    unsorted_indices: Tensor | None,
    last_rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)
