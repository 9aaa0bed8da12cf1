"""The operator of the binary cross-entropy of a visit's codes."""

from __future__ import annotations

from typing import Any

from ..checks import accumulator
from ..operations import operator, register

register("next_codes", "cpu", "cuda", "triton", package=__package__)


# The loss of each row of states, or with `total` (row_scale * loss).sum(); and the gradients of
# that sum, which are empty where they are not needed. The codes of row r are
# codes[code_offsets[r]:code_offsets[r + 1]]; with `sampled` they add nothing, and those that are no
# columns are -1.
@operator(
    "next_codes_bce(Tensor states, Tensor weight, Tensor? bias, Tensor codes, Tensor code_offsets,"
    " Tensor? pos_weight, Tensor? class_weight, Tensor? row_scale, bool total, bool sampled,"
    " bool need_states, bool need_weight) -> (Tensor loss, Tensor states, Tensor weight,"
    " Tensor bias)"
)
def _(states: Any, weight: Any, *arguments: Any) -> Any:
    total, _, need_states, need_weight = arguments[-4:]
    wide = accumulator(states.dtype)
    classes = weight.shape[:1]
    return (
        states.new_empty(() if total else states.shape[:1], dtype=wide),
        states.new_empty(states.shape if need_states else (0,), dtype=wide),
        states.new_empty(weight.shape if need_weight else (0,), dtype=wide),
        states.new_empty(classes if need_weight else (0,), dtype=wide),
    )
