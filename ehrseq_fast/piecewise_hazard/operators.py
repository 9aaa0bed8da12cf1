"""The operator of the loss of rates that are constant within intervals. The forward kernel writes
the gradient too, where one is needed."""

from __future__ import annotations

from typing import Any

from ..operations import operator, register
from ..survival_nll.operators import empty_nll_and_grad

register("piecewise_hazard", "cpu", "cuda", "triton", package=__package__)

LINKS = {"softplus": 0, "exp": 1}  # as the operator takes them


# Logits [B, V] with a mask, or rows of a packed batch, [n_visits]: the visits of patient p are the
# rows row_starts[t] + unsorted_indices[p]. Weights of visits have the shape of the logits and the
# dtype of the loss.
@operator(
    "piecewise_hazard_nll(Tensor logits, Tensor event_times, Tensor event_indicators,"
    " Tensor? sequence_mask, Tensor? row_starts, Tensor? unsorted_indices, Tensor? last_rows,"
    " Tensor? entry_times, Tensor? sample_weight, Tensor? fraction, Tensor? visit_weight, int link,"
    " int reduction, bool needs_grad) -> (Tensor nll, Tensor grad)"
)
def _(logits: Any, event_times: Any, *arguments: Any) -> Any:
    reduction, needs_grad = arguments[-2:]
    return empty_nll_and_grad(logits, event_times.shape[:1], reduction, needs_grad)
