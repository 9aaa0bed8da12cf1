"""What the losses of a horizon refuse."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..checks import INTEGER, REAL
from ..survival_nll.checks import check_companion
from ..visitwise import Visits, check_of_visits, check_visits, refuse_patients, refuse_visits


def check_horizon(horizon: float, name: str = "horizon") -> None:
    """Refuse anything but one number above 0."""
    _expect_number(name, horizon)
    if not horizon > 0:
        raise ValueError(f"{name}: expected a number above 0, got {horizon}")


def check_pos_weight(pos_weight: float) -> None:
    """Refuse anything but one finite number from 0."""
    _expect_number("pos_weight", pos_weight)
    if not 0 <= pos_weight < float("inf"):
        raise ValueError(f"pos_weight: expected a finite weight from 0, got {pos_weight}")


def _expect_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_outcomes(
    like: Tensor,
    name: str,
    visits: Visits,
    patients: int,
    event_times: Tensor,
    event_indicators: Tensor,
    visit_times: Tensor | None,
) -> None:
    """Refuse times and indicators whose kind, dtype, shape or device does not fit ``like``, which
    errors call ``name``."""
    shape = (patients,)
    if visit_times is None:
        allowed, kind = INTEGER, "(of visits, as there are no visit_times) an integer"
    else:
        allowed, kind = REAL, "an integer or floating-point"
        check_of_visits(like, visits, "visit_times", visit_times, REAL, "a real")
    check_companion(like, name, shape, "event_times", event_times, allowed, kind)
    kind = "a bool, integer or floating-point"
    check_companion(like, name, shape, "event_indicators", event_indicators, REAL, kind)


def check_values(
    visits: Visits, event_times: Tensor, event_indicators: Tensor, visit_times: Tensor | None
) -> None:
    """Refuse impossible outcomes, with the first patient. Reads values, as the CPU kernel does."""
    check_visits(visits)
    if visit_times is None:
        rule = "event_times must be visits, counted from 0"
        refuse_patients(event_times < 0, event_times, rule)
    else:
        refuse_patients(event_times.isnan(), event_times, "event_times must not be NaN")
    unknown = (event_indicators != 0) & (event_indicators != 1)
    rule = "event_indicators must be 0 (censored) or 1 (event)"
    refuse_patients(unknown, event_indicators, rule)
    if visit_times is not None:
        refuse_visits(visits, visit_times.isnan(), visit_times, "visit_times must not be NaN")
