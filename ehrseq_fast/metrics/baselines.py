"""What a model has to beat: one hazard for everybody, and a hazard by the visit's index alone.

Both are fitted on training patients and scored on others. In visits they are hazards per visit; in
days the risk within each horizon, from any visit or from a visit of that index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import ArrayLike, as_array
from ..models.intervals import boundaries, interval_hazards
from .values import (
    Floats,
    Ints,
    VisitValues,
    included,
    read_entry_times,
    read_outcomes,
    read_values,
    read_visit_times,
)

# Visits of training patients that a risk by visit index rests on at least; later indices share one.
_FEWEST_VISITS = 50


@dataclass(frozen=True)
class VisitBaselines:
    """Hazards per visit, fitted by :func:`visit_baselines`.

    Attributes:
        constant: events per visit at risk.
        by_visit: ``[V]``, the same at each visit index; later visits have the constant one.
        censored_visit: how the visit of a censoring was counted.
    """

    constant: float
    by_visit: Floats
    censored_visit: str

    def hazards(self, visits: Ints) -> Floats:
        """The hazard by index at these visits."""
        inside = visits < len(self.by_visit)
        return np.where(inside, self.by_visit[np.where(inside, visits, 0)], self.constant)

    def nll(
        self,
        event_times: ArrayLike,
        event_indicators: ArrayLike,
        entry_times: ArrayLike | None = None,
    ) -> tuple[float, float]:
        """The mean negative log-likelihood per patient of both, as
        :func:`~ehrseq_fast.discrete_time_survival_nll` has it: constant, by index.

        Example:
            >>> from ehrseq_fast.metrics import visit_baselines
            >>> fitted = visit_baselines([0, 1, 2], [1, 0, 1])
            >>> [round(nll, 3) for nll in fitted.nll([1, 1], [1, 0])]
            [0.969, 1.236]
        """
        times, seen, entry = _outcomes(event_times, event_indicators, entry_times)
        size = int(times.max(initial=0)) + 1
        found = []
        for hazards in (np.full(size, self.constant), self.hazards(np.arange(size))):
            before = np.concatenate([[0.0], -np.log1p(-hazards).cumsum()])
            last = -np.log1p(-hazards[times]) * included(self.censored_visit)
            nll = before[times] - before[entry] + np.where(seen, -np.log(hazards[times]), last)
            found.append(float(nll.mean()))
        return found[0], found[1]


def visit_baselines(
    event_times: ArrayLike,
    event_indicators: ArrayLike,
    entry_times: ArrayLike | None = None,
    *,
    censored_visit: str = "excluded",
) -> VisitBaselines:
    """Fit both hazards per visit on training patients.

    The constant hazard is events per visit at risk (half an event in one more visit where that is
    0 or 1). Each visit index has one pseudo-visit at the constant hazard beside its own, so that
    none is 0.

    Args:
        event_times: ``[B]``, the visit of event or censoring, counted from 0.
        event_indicators: ``[B]``, 1 event seen, 0 censored.
        entry_times: ``[B]``, the first visit at risk.
        censored_visit: ``"included"`` counts the visit of a censoring as survived.

    Raises:
        ValueError: for times below 0, indicators other than 0 and 1, entry times after the event,
            no patient.

    Example:
        >>> from ehrseq_fast.metrics import visit_baselines
        >>> fitted = visit_baselines([0, 1, 2], [1, 0, 1])
        >>> fitted.constant  # two events in five visits at risk
        0.4
        >>> fitted.by_visit  # 1.4 of 4, 0.4 of 2, 1.4 of 2
        array([0.35, 0.2 , 0.7 ])
    """
    times, seen, entry = _outcomes(event_times, event_indicators, entry_times)
    if not len(times):
        raise ValueError("event_times: expected at least one training patient, got none")
    size = int(times.max()) + 1
    end = times + (seen | included(censored_visit))  # the first visit that says nothing
    started, left = (np.bincount(x, minlength=size + 1)[:size] for x in (entry, end))
    at_risk = (started - left).cumsum()
    events = np.bincount(times[seen], minlength=size)
    seen_all, visits = int(events.sum()), int(at_risk.sum())
    few = not 0 < seen_all < visits
    constant = (seen_all + 0.5) / (visits + 1) if few else seen_all / visits
    return VisitBaselines(float(constant), (events + constant) / (at_risk + 1), censored_visit)


@dataclass(frozen=True)
class DayBaselines:
    """Risks within horizons of days, fitted by :func:`day_baselines`.

    Attributes:
        horizons_days: J of them.
        constant: ``[J]``, from any visit.
        by_visit: ``[V, J]``, from a visit of that index; the last row for all later ones.
    """

    horizons_days: tuple[float, ...]
    constant: Floats
    by_visit: Floats

    def risks(self, visits: Ints) -> Floats:
        """``[n, J]``: the risks by index from these visits."""
        return self.by_visit[np.minimum(visits, len(self.by_visit) - 1)]


def day_baselines(
    days_to_end: ArrayLike,
    event_indicators: ArrayLike,
    lengths: ArrayLike,
    horizons_days: Iterable[float],
    entry_times: ArrayLike | None = None,
) -> DayBaselines:
    """Fit both risks in days on training patients, by the likelihood of
    :class:`~ehrseq_fast.models.HorizonSurvivalLSTM`. A visit index of few training patients has
    the constant's risks.

    Args:
        days_to_end: ``[n_visits]`` patient by patient, the days from each visit to the event or the
            end of observation.
        event_indicators: ``[B]``.
        lengths: ``[B]``, visits of each patient.
        horizons_days: J ascending horizons.
        entry_times: ``[B]``, the first visit at risk. Those before it are not counted: whoever is
            at risk later cannot have had the event soon after them.

    Raises:
        ValueError: for shapes that do not fit, days that are negative or NaN, entry times outside a
            patient's visits.

    Example:
        >>> from ehrseq_fast.metrics import day_baselines
        >>> fitted = day_baselines([40.0, 10.0, 90.0], [1, 0], [2, 1], [30, 60])
        >>> fitted.constant.shape, fitted.by_visit.shape
        ((2,), (1, 2))
    """
    values = read_values("days_to_end", days_to_end, lengths)
    bounds = boundaries(horizons_days)
    _, seen = read_outcomes(values, np.zeros(len(values)), event_indicators)
    return DayBaselines(bounds, *fit_by_index(values, seen, entry_times, bounds, _risks))


def fit_by_index(
    values: VisitValues,
    outcomes: NDArray[Any],
    entry_times: ArrayLike | None,
    bounds: tuple[float, ...],
    fit: Callable[[Floats, NDArray[Any], tuple[float, ...]], Floats],
) -> tuple[Floats, Floats]:
    """What ``fit`` makes of the days and outcomes of all visits at risk, and ``[V, ...]`` of those
    of each visit index, where there are enough of them.

    Args:
        values: days to the end, patient by patient.
        outcomes: ``[B]``.
    """
    entry = read_entry_times(values, entry_times, values.lengths - 1)
    days = np.asarray(values.values, np.float64)
    of = np.repeat(np.arange(len(values)), values.lengths)
    index = np.arange(len(days)) - values.starts[of]
    if entry is not None:
        counted = index >= entry[of]
        days, of, index = days[counted], of[counted], index[counted]
    constant = fit(days, outcomes[of], bounds)
    size = int(np.flatnonzero(np.bincount(index, minlength=1) >= _FEWEST_VISITS).max(initial=0)) + 1
    index = np.minimum(index, size - 1)
    order = np.argsort(index, kind="stable")
    parts = np.split(order, np.bincount(index, minlength=size).cumsum()[:-1])
    by_visit = [
        fit(days[part], outcomes[of[part]], bounds) if len(part) >= _FEWEST_VISITS else constant
        for part in parts
    ]
    return constant, np.stack(by_visit)


def _risks(days: Floats, seen: ArrayLike, bounds: tuple[float, ...]) -> Floats:
    return -np.expm1(np.log1p(-interval_hazards(days, seen, bounds)).cumsum())


def _outcomes(
    event_times: ArrayLike, event_indicators: ArrayLike, entry_times: ArrayLike | None
) -> tuple[Ints, ArrayLike, Ints]:
    array = as_array("event_times", event_times)
    values = read_values("event_times", array)
    values.lengths[:] = np.iinfo(np.int64).max
    times, seen = read_outcomes(values, array, event_indicators)
    visits = read_visit_times(values, times)
    entry = read_entry_times(values, entry_times, visits)
    return visits, seen, np.zeros(len(visits), np.int64) if entry is None else entry
