"""The losses of hazards with a weight for each visit. No kernel knows of them, so they are computed
by the reference, on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backend import must_check_values
from ..checks import FLOATING
from ..rows import PackedRows
from ..rows.beside import values_beside
from .checks import (
    check_companion,
    check_outcomes,
    check_probabilities,
    refuse_visit_weight,
    visits_read,
)
from .fused import PADDED, Rows, SurvivalNll, as_padded, nll, padded_values


def weighted_nll(
    rows: Rows, inputs: Any, options: SurvivalNll, visit_weight: Any, validate: bool
) -> Tensor:
    """The loss of arguments that have been checked, but for values and the weights."""
    weight = padded_weight(rows, inputs[0], visit_weight, "hazards")
    padded = as_padded(rows, inputs)
    if must_check_values("reference", inputs[0].device.type, validate):
        check_outcomes(padded, options.link)
        check_probabilities(padded, options)
        refuse_visit_weight(weight, visits_read(padded, options.censored_visit == "included"))
    inputs = (*padded, weight)
    return nll("reference", PADDED, inputs, options)


def padded_weight(rows: Rows, hazards: Tensor, visit_weight: Any, name: str) -> Tensor:
    """Weights ``[B, V]``, or ``[n_visits]`` of packed rows, as padded ones; refused where they do
    not fit the hazards, which errors call ``name``."""
    dims = ("B", "V") if rows[0] is None else ("n_visits",)
    shape = tuple(hazards.shape[: len(dims)])
    of_weight = ("visit_weight", visit_weight, FLOATING, "a floating-point")
    check_companion(hazards, name, shape, *of_weight, dims)
    return padded_values(rows, visit_weight)


def weight_of_rows(hazards: Tensor, batch: Any, visit_weight: Any) -> Any:
    """Weights of a packed batch's visits; of PackedRows their values, refused if they are another
    batch's."""
    if not isinstance(visit_weight, PackedRows):
        return visit_weight
    return values_beside(PackedRows(hazards, batch), visit_weight, "visit_weight")
