"""The outcomes that predictions are held against, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import ArrayLike
from .values import (
    Bools,
    Ints,
    VisitValues,
    included,
    read_entry_times,
    read_outcomes,
    read_types,
    read_values,
    read_visit_times,
    refuse_unordered,
)


@dataclass(frozen=True)
class TrainingOutcomes:
    """Outcomes of the training patients, which the baselines are fitted on.

    Attributes:
        event_times, event_indicators: ``[B]``; the indicators may be None beside ``event_types``.
        entry_times: ``[B]``, or None.
        days_to_end: ``[n_visits]`` patient by patient, with ``lengths`` ``[B]``, for the baselines
            in days; or None.
        event_types: ``[B]``, 0 censored, 1 to K the cause of the event, of competing events.
    """

    event_times: ArrayLike
    event_indicators: ArrayLike | None = None
    entry_times: ArrayLike | None = None
    days_to_end: ArrayLike | None = None
    lengths: ArrayLike | None = None
    event_types: ArrayLike | None = None


@dataclass(frozen=True)
class Held:
    """Outcomes of the evaluated patients.

    Attributes:
        visits: ``[B]``, the visit of event or censoring.
        seen: ``[B]``, whether it was an event, of any cause.
        entry: ``[B]``, the first visit at risk.
        with_censored: whether the visit of a censoring was survived.
        types: ``[B]``, 0 censored, 1 to K; None where there is one cause.
    """

    visits: Ints
    seen: Bools
    entry: Ints
    with_censored: bool
    types: Ints | None = None

    def __len__(self) -> int:
        return len(self.visits)


def read_held(
    values: VisitValues,
    event_times: ArrayLike | None,
    event_indicators: ArrayLike | None,
    event_types: ArrayLike | None,
    entry_times: ArrayLike | None,
    censored_visit: str,
    n_causes: int | None,
) -> Held:
    """Outcomes of patients whose values were read; types where there are causes."""
    with_censored = included(censored_visit)
    types = None
    if n_causes is None:
        times, seen = read_outcomes(values, event_times, event_indicators)
    else:
        times, types = read_types(values, event_times, event_types, n_causes)
        seen = types > 0
    visits = read_visit_times(values, times)
    entry = read_entry_times(values, entry_times, visits)
    entry = np.zeros(len(visits), np.int64) if entry is None else entry
    if not len(visits):
        raise ValueError("event_times: expected at least one patient, got none")
    return Held(visits, seen, entry, with_censored, types)


def read_days(values: VisitValues, days_to_end: Any, lengths: ArrayLike | None) -> VisitValues:
    """Days from each visit to the end, patient by patient, without padding."""
    days = read_values("days_to_end", days_to_end, lengths)
    if len(days) != len(values) or (days.lengths != values.lengths).any():
        raise ValueError("days_to_end: expected the visits of hazards and risks, got other lengths")
    of = np.repeat(np.arange(len(days)), days.lengths)
    starts = days.lengths.cumsum() - days.lengths
    visit = np.arange(len(of)) - starts[of]
    found = days.at(of, visit).astype(np.float64)
    wrong = ~((found >= 0) & (found < math.inf))
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"days_to_end: expected finite days from 0, got {found[first]:g} (patient "
            f"{of[first]}, visit {visit[first]}; {int(wrong.sum())} in all)"
        )
    checked = VisitValues("days_to_end", found, starts, days.lengths)
    refuse_unordered(checked, falls=True)
    return checked
