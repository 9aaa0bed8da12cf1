"""The operator of the cross-entropy of one class per visit. The forward kernel writes the gradient
too, where one is needed; ``survival_nll_scale`` scales it."""

from __future__ import annotations

from typing import Any

from ..operations import operator, register
from ..survival_nll.operators import empty_nll_and_grad

register("visit_cross_entropy", "cpu", "cuda", "triton", package=__package__)


# Logits [B, V, K] with a mask, or rows of a packed batch, [n_visits, K]: the visits of patient p
# are the rows row_starts[t] + unsorted_indices[p].
@operator(
    "visit_cross_entropy(Tensor logits, Tensor labels, Tensor? sequence_mask, Tensor? row_starts,"
    " Tensor? unsorted_indices, Tensor? last_rows, Tensor? class_weight, Tensor? visit_weight,"
    " Tensor? sample_weight, int ignore_index, float label_smoothing, int reduction,"
    " bool needs_grad) -> (Tensor loss, Tensor grad)"
)
def _(logits: Any, *arguments: Any) -> Any:
    reduction, needs_grad = arguments[-2:]
    return empty_nll_and_grad(logits, logits.shape[:-1], reduction, needs_grad)
