"""The operator of the survival losses with weights of visits. The forward kernel writes the
gradient too, where one is needed."""

from __future__ import annotations

from typing import Any

from ..operations import operator, register
from ..survival_nll.operators import empty_nll_and_grad

register("visit_weighted_nll", "cpu", "cuda", "triton", package=__package__)


# Hazards [B, V] with a mask, or rows of a packed batch, [n_visits]; with competing risks there is
# one more dimension, of the causes. The weights of visits have the dtype of the loss.
@operator(
    "visit_weighted_nll(Tensor hazards, Tensor event_times, Tensor event_types,"
    " Tensor? sequence_mask, Tensor? row_starts, Tensor? unsorted_indices, Tensor? last_rows,"
    " Tensor? entry_times, Tensor? sample_weight, Tensor visit_weight, bool competing, int link,"
    " bool censored_included, float eps, int reduction, bool needs_grad)"
    " -> (Tensor nll, Tensor grad)"
)
def _(hazards: Any, event_times: Any, *arguments: Any) -> Any:
    reduction, needs_grad = arguments[-2:]
    return empty_nll_and_grad(hazards, event_times.shape[:1], reduction, needs_grad)
