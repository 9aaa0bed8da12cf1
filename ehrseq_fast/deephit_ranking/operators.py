"""The operator of DeepHit's ranking loss. The forward kernel writes the gradient too, where one is
needed."""

from __future__ import annotations

from typing import Any

from ..operations import operator, register
from ..survival_nll.operators import REDUCTIONS, empty_nll_and_grad

register("deephit_ranking", "cpu", "cuda", "triton", package=__package__)


# Logits [B, V] or [B, V, K] with a mask, or rows of a packed batch, [n_visits] or [n_visits, K]:
# the visits of patient p are the rows row_starts[t] + unsorted_indices[p].
@operator(
    "deephit_ranking(Tensor logits, Tensor event_times, Tensor event_types,"
    " Tensor? sequence_mask, Tensor? row_starts, Tensor? unsorted_indices, Tensor? last_rows,"
    " Tensor? entry_times, Tensor? sample_weight, bool competing, bool censored_included,"
    " float sigma, bool needs_grad) -> (Tensor loss, Tensor grad)"
)
def _(logits: Any, event_times: Any, *arguments: Any) -> Any:
    return empty_nll_and_grad(logits, event_times.shape[:1], REDUCTIONS["mean"], arguments[-1])
