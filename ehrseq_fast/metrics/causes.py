"""What a model of competing events has to beat: cause-specific hazards that are the same at every
visit, and such that depend on the visit's index alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import ArrayLike, as_array, integer
from ..models.intervals import boundaries, interval_hazards
from .baselines import DayBaselines, fit_by_index
from .values import (
    Bools,
    Floats,
    Ints,
    included,
    read_entry_times,
    read_types,
    read_values,
    read_visit_times,
)


@dataclass(frozen=True)
class CauseBaselines:
    """Cause-specific hazards per visit, fitted by :func:`cause_baselines`.

    Attributes:
        constant: ``[K]``, events of each cause per visit at risk.
        by_visit: ``[V, K]``, the same at each visit index; later visits have the constant ones.
        censored_visit: how the visit of a censoring was counted.
    """

    constant: Floats
    by_visit: Floats
    censored_visit: str

    def hazards(self, visits: Ints) -> Floats:
        """``[n, K]``: the hazards by index at these visits."""
        inside = visits < len(self.by_visit)
        return np.where(inside[:, None], self.by_visit[np.where(inside, visits, 0)], self.constant)


def cause_baselines(
    event_times: ArrayLike,
    event_types: ArrayLike,
    n_causes: int,
    entry_times: ArrayLike | None = None,
    *,
    censored_visit: str = "excluded",
) -> CauseBaselines:
    """Fit cause-specific hazards per visit on training patients, as
    :func:`~ehrseq_fast.metrics.visit_baselines` fits one: events of a cause per visit at risk. The
    visit of an event of any cause is at risk of all.

    A cause of which there is no event has half an event, and each visit index one pseudo-visit at
    the constant hazards, so that none is 0 and their sums stay below 1.

    Args:
        event_times: ``[B]``, the visit of event or censoring, counted from 0.
        event_types: ``[B]``, 0 censored, 1 to K the cause of the event.
        n_causes: K.
        entry_times: ``[B]``, the first visit at risk.
        censored_visit: ``"included"`` counts the visit of a censoring as survived.

    Raises:
        ValueError: for times below 0, types that are no whole number from 0 to K, entry times after
            the event, no patient.

    Example:
        >>> from ehrseq_fast.metrics import cause_baselines
        >>> fitted = cause_baselines([0, 1, 2, 2], [1, 0, 2, 1], 2)
        >>> fitted.constant  # two events of cause 1 and one of cause 2 in eight visits at risk
        array([0.25 , 0.125])
    """
    n_causes = integer("n_causes", n_causes, 1, 10_000)
    array = as_array("event_times", event_times)
    values = read_values("event_times", array)
    values.lengths[:] = np.iinfo(np.int64).max
    times, types = read_types(values, array, event_types, n_causes)
    visits = read_visit_times(values, times)
    entry = read_entry_times(values, entry_times, visits)
    if not len(visits):
        raise ValueError("event_times: expected at least one training patient, got none")
    size = int(visits.max()) + 1
    at_risk = at_risk_by_visit(visits, types > 0, entry, included(censored_visit), size)
    events = events_by_visit(visits, types, n_causes, size)
    total, n_visits = events.sum(0), int(at_risk.sum())
    one_more = not 0 < total.sum() < n_visits or not total.all()
    constant = np.where(total == 0, 0.5, total) / (n_visits + one_more)
    constant /= max(1.0, constant.sum() * (1 + 1e-9))
    return CauseBaselines(constant, (events + constant) / (at_risk[:, None] + 1), censored_visit)


def at_risk_by_visit(
    visits: Ints, events: Bools, entry: Ints | None, with_censored: bool, size: int
) -> Ints:
    """``[size]``: how many are at risk at each visit. Those censored at it are where its hazard was
    survived."""
    end = visits + (events | with_censored)  # the first visit that says nothing
    started = np.zeros(len(visits), np.int64) if entry is None else entry
    began, left = (np.bincount(x, minlength=size + 1)[:size] for x in (started, end))
    return (began - left).cumsum()


def events_by_visit(visits: Ints, types: Ints, n_causes: int, size: int) -> Ints:
    """``[size, K]``: events of each cause at each visit."""
    at = visits * (n_causes + 1) + types
    counts = np.bincount(at, minlength=size * (n_causes + 1))
    return counts.reshape(size, n_causes + 1)[:, 1:]


def cause_day_baselines(
    days_to_end: ArrayLike,
    event_types: ArrayLike,
    n_causes: int,
    lengths: ArrayLike,
    horizons_days: Iterable[float],
    entry_times: ArrayLike | None = None,
) -> tuple[DayBaselines, ...]:
    """The cumulative incidence of each cause within each horizon from any visit, and from a visit
    of that index: :func:`~ehrseq_fast.metrics.day_baselines` of competing events. The rate of each
    cause is constant within an interval, and so is each one's share of the events in it:
    ``F_k += S · Λ_k / Λ · (1 − exp(−Λ))``.

    Args:
        event_types: ``[B]``, 0 censored, 1 to K.
        n_causes: K.

    Returns:
        K of them, one for each cause.

    All else and the errors as there.

    Example:
        >>> from ehrseq_fast.metrics import cause_day_baselines
        >>> first, second = cause_day_baselines([40.0, 10.0, 90.0], [1, 2], 2, [2, 1], [30, 60])
        >>> first.constant.shape, second.by_visit.shape
        ((2,), (1, 2))
    """
    values = read_values("days_to_end", days_to_end, lengths)
    bounds = boundaries(horizons_days)
    n_causes = integer("n_causes", n_causes, 1, 10_000)
    _, types = read_types(values, np.zeros(len(values)), event_types, n_causes)

    def incidences(days: Floats, of_type: NDArray[Any], bounds: tuple[float, ...]) -> Floats:
        rates = np.stack(
            [
                -np.log1p(-interval_hazards(days, of_type == cause, bounds))
                for cause in range(1, n_causes + 1)
            ],
            1,
        )
        total = rates.sum(1, keepdims=True)
        before = np.exp(-(total.cumsum(0) - total))
        return (before * rates / total * -np.expm1(-total)).cumsum(0)

    constant, by_visit = fit_by_index(values, types, entry_times, bounds, incidences)
    return tuple(
        DayBaselines(bounds, constant[:, cause], by_visit[:, :, cause]) for cause in range(n_causes)
    )
