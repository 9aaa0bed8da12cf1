"""Intervals of days since a visit: where an outcome falls, its likelihood, and observed hazards.

The intervals are open on the left and closed on the right, ``(b_{j-1}, b_j]`` with ``b_0 = 0``: an
event exactly at a boundary belongs to the interval that ends there, so that "within 365 days"
holds day 365. The first one holds day 0 as well.

Within an interval the hazard rate is constant (piecewise exponential; Friedman 1982, Annals of
Statistics 10; Kvamme and Borgan 2021, Lifetime Data Analysis 27, "PC-Hazard"; MOTOR, Steinberg et
al. 2024). With ``Λ_j = −log(1 − h_j)`` the integral of the rate over interval j, an outcome in
interval j at the fraction f of its width, δ = 1 for an event and 0 for censoring, has

``nll = Σ_{k<j} Λ_k + f·Λ_j − δ·log Λ_j``

up to a constant, so that censoring inside an interval counts for exactly the share that was seen.
A grouped likelihood (log h_j for an event, nothing or a full ``log(1 − h_j)`` for a censoring) is
biased where patients are censored inside intervals; this one is not, wherever the rate is constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from numbers import Real

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import ArrayLike, as_array, kind_of
from ..piecewise_hazard import piecewise_hazard_nll

MICROSECONDS = 86_400_000_000  # of a day
_MOST = 1 - 1e-12  # of observed hazards, so that they have logits


def boundaries(horizons_days: Iterable[float]) -> tuple[float, ...]:
    """The horizons as a tuple: positive, finite and ascending.

    Raises:
        ValueError: for none, and for others than these.
        TypeError: for anything but numbers.

    Example:
        >>> from ehrseq_fast.models.intervals import boundaries
        >>> boundaries([30, 365])
        (30.0, 365.0)
    """
    if isinstance(horizons_days, (str, bytes)) or not isinstance(horizons_days, Iterable):
        raise TypeError(f"horizons_days: expected numbers, got {kind_of(horizons_days)}")
    days: list[float] = []
    for value in horizons_days:
        if isinstance(value, bool) or not isinstance(value, (Real, np.number)):
            raise TypeError(f"horizons_days: expected numbers, got {value!r:.50}")
        days.append(float(value))
    before = 0.0
    for at, day in enumerate(days):
        if not before < day < float("inf"):
            raise ValueError(
                f"horizons_days: expected positive and ascending days, got {day:g} at {at}, "
                f"after {before:g}"
            )
        before = day
    if not days:
        raise ValueError("horizons_days: expected at least one, got none")
    return tuple(days)


def place(days: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where outcomes ``days`` from now fall: the interval (int64), the fraction of it that was seen
    and whether they lie beyond the last boundary; there the whole last interval was seen.

    ``days`` and ``bounds`` ``[J + 1]``, from 0, are float64 on one device.
    """
    last = len(bounds) - 2
    interval = torch.searchsorted(bounds[1:], days)
    beyond = interval > last
    interval = interval.clamp(max=last)
    fraction = (days - bounds[interval]) / bounds.diff()[interval]
    return interval, fraction.clamp(max=1), beyond


def piecewise_nll(logits: Tensor, interval: Tensor, fraction: Tensor, event: Tensor) -> Tensor:
    """The formula of this module: logits ``[N, J]`` of the hazards, the rest ``[N]``; to ``[N]``,
    in float64 for float64 and float32 otherwise.

    With a sigmoid link ``Λ = −log(1 − σ(z))`` is softplus(z). Only logits up to ``interval`` are
    read, and that of ``interval`` only with a fraction above 0 or an event.
    """
    return piecewise_hazard_nll(logits, interval, event, fraction, reduction="none")


def interval_hazards(
    days_to_end: ArrayLike,
    events: ArrayLike,
    horizons_days: Iterable[float],
    weights: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """The hazards that maximise this module's likelihood where all outcomes share them:
    ``1 − exp(−events_j · width_j / days at risk_j)``, ``[J]``.

    For the first bias of a head, and as a baseline. One event more than seen, spread over the
    intervals by their days at risk, keeps every hazard above 0; all stay below 1.

    Args:
        days_to_end: ``[N]``, days to the event or to the end of observation.
        events: ``[N]``, non-zero where it was the event.
        horizons_days: the intervals' ends.
        weights: ``[N]``.

    Raises:
        ValueError: for shapes that differ, and days that are negative or NaN.

    Example:
        >>> from ehrseq_fast.models.intervals import interval_hazards
        >>> interval_hazards([10, 25, 40], [1, 0, 1], [30, 60]).round(3)
        array([0.577, 0.967])
    """
    days = as_array("days_to_end", days_to_end).astype(np.float64)
    seen = as_array("events", events) != 0
    weight = np.ones(len(days)) if weights is None else as_array("weights", weights)
    for name, values in (("events", seen), ("weights", weight)):
        if values.shape != days.shape:
            raise ValueError(f"{name}: expected shape {list(days.shape)}, got {list(values.shape)}")
    if (wrong := ~(days >= 0)).any():
        at = int(wrong.argmax())
        raise ValueError(f"days_to_end: expected days from 0, got {days[at]:g} at {at}")
    bounds = np.array([0.0, *boundaries(horizons_days)])
    at_risk = np.array(
        [(weight * np.clip(days - low, 0, high - low)).sum() for low, high in pairwise(bounds)]
    )
    interval = np.searchsorted(bounds[1:], days)
    inside = seen & (interval < len(at_risk))
    counts = np.bincount(interval[inside], weight[inside], minlength=len(at_risk))
    at_risk = np.maximum(at_risk, 1e-6 * max(at_risk.max(), 1.0))
    counts = counts + at_risk / at_risk.sum()
    return np.minimum(-np.expm1(-counts * np.diff(bounds) / at_risk), _MOST)
