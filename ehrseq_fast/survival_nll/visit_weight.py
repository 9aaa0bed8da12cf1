"""Weights of the visits of a loss: their kind and shape, and those of packed rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import FLOATING, accumulator
from ..rows import PackedRows
from ..rows.beside import values_beside
from .checks import check_companion
from .fused import Rows


def check_weight(rows: Rows, hazards: Tensor, visit_weight: Any, name: str) -> None:
    """Refuse anything but weights ``[B, V]``, or ``[n_visits]`` of packed rows, that fit the
    hazards, which errors call ``name``."""
    dims = ("B", "V") if rows[0] is None else ("n_visits",)
    shape = tuple(hazards.shape[: len(dims)])
    of_weight = ("visit_weight", visit_weight, FLOATING, "a floating-point")
    check_companion(hazards, name, shape, *of_weight, dims)


def is_accumulated(visit_weight: Any, hazards: Any) -> bool:
    """Whether weights have the dtype that the operators take, which is that of the loss."""
    return (
        isinstance(visit_weight, Tensor)
        and isinstance(hazards, Tensor)
        and visit_weight.dtype == accumulator(hazards.dtype)
    )


def weight_of_rows(hazards: Tensor, batch: Any, visit_weight: Any) -> Any:
    """Weights of a packed batch's visits; of PackedRows their values, refused if they are another
    batch's."""
    if not isinstance(visit_weight, PackedRows):
        return visit_weight
    return values_beside(PackedRows(hazards, batch), visit_weight, "visit_weight")
