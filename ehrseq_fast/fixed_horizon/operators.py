"""The operators of the losses of a horizon. The forward kernel writes the gradient too, where one
is needed; ``survival_nll_scale`` scales it."""

from __future__ import annotations

from typing import Any

from ..operations import operator, register
from ..survival_nll.operators import REDUCTIONS, empty_nll_and_grad

for _name in ("fixed_horizon_bce", "masked_bce"):
    register(_name, "cpu", "cuda", "triton", package=__package__)


# Logits [B, V] with a mask, or rows of a packed batch, [n_visits]: the visits of patient p are the
# rows row_starts[t] + unsorted_indices[p]. Without visit_times visit t is at the time t.
@operator(
    "fixed_horizon_bce(Tensor logits, Tensor event_times, Tensor event_indicators,"
    " Tensor? sequence_mask, Tensor? row_starts, Tensor? unsorted_indices, Tensor? last_rows,"
    " Tensor? visit_times, Tensor? visit_weight, Tensor? sample_weight, float horizon,"
    " float pos_weight, int reduction, bool needs_grad) -> (Tensor loss, Tensor grad)"
)
def _(logits: Any, *arguments: Any) -> Any:
    reduction, needs_grad = arguments[-2:]
    return empty_nll_and_grad(logits, logits.shape, reduction, needs_grad)


# Labels in [0, 1] and weights are given, [B, V] each; the mean is over max(sum of weights, 1).
@operator(
    "masked_bce(Tensor logits, Tensor labels, Tensor weights, bool needs_grad)"
    " -> (Tensor loss, Tensor grad)"
)
def _(logits: Any, labels: Any, weights: Any, needs_grad: Any) -> Any:
    return empty_nll_and_grad(logits, (), REDUCTIONS["mean"], needs_grad)
