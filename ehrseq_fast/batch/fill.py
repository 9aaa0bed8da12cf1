"""What padding may hold: a number that the dtype of the values holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..arrays import kind_of


def check_fill(fill: Any, dtype: torch.dtype) -> None:
    """Refuse a ``fill`` that the dtype would cut off, wrap or make infinite.

    Raises:
        ValueError: a number that ``dtype`` does not hold.
        TypeError: no number, or a boolean or complex number for values that are not.
    """
    if isinstance(fill, np.generic):
        fill = fill.item()
    if isinstance(fill, torch.Tensor) or not isinstance(fill, (bool, int, float, complex)):
        raise TypeError(f"fill: expected a number, got {kind_of(fill)}")
    wrong_kind = isinstance(fill, bool) and dtype != torch.bool
    if wrong_kind or (isinstance(fill, complex) and not dtype.is_complex):
        raise TypeError(
            f"fill: expected a number as the values, which are {dtype}, got {fill} of type "
            f"{type(fill).__name__}"
        )
    if not _holds(dtype, fill):
        raise ValueError(f"fill: expected a number that {dtype} holds, as the values, got {fill}")


def _holds(dtype: torch.dtype, fill: Any) -> bool:
    if dtype == torch.bool:
        return fill in (0, 1)
    if dtype.is_complex:
        return True
    if dtype.is_floating_point:
        # what is finite must stay so; rounding is what every float does
        return not math.isfinite(fill) or abs(fill) <= torch.finfo(dtype).max
    bounds = torch.iinfo(dtype)
    return math.isfinite(fill) and fill == int(fill) and bounds.min <= fill <= bounds.max
