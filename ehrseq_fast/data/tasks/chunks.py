"""A store's records a chunk of patients at a time, in days, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array
from .search import DAY_US, NAT, days_of, latest_so_far, microseconds

if TYPE_CHECKING:
    from ..store import EventStore

Ints = NDArray[np.int64]
MOST_PATIENTS, MOST_VISITS, MOST_CODES = 1 << 18, 1 << 21, 1 << 22
NEVER = 1 << 40  # a day that no time reaches


@dataclass(frozen=True)
class Chunk:
    """Patients ``first`` to ``first + n_patients`` of a store; all indices count from there.

    Attributes:
        visits, periods, events: int64 ``[n_patients + 1]``, where each patient's begin.
        visit_times: int64 microseconds.
        visit_days: the day of each visit's start.
        seen_until: int64 microseconds, when the last code of the visits up to this one was
            recorded: later than the next visit's start where stays overlap.
        last_days: the day of it.
        period_first_days, period_last_days: the days of each observation period, both in it.
        period_ends: int64 microseconds.
        event_times, event_days: of the outcome, ascending within a patient.
        death_times, death_days: ``NEVER`` as the day of those who are not known to have died.
    """

    first: int
    n_patients: int
    visits: Ints
    visit_times: Ints
    visit_days: Ints
    seen_until: Ints
    last_days: Ints
    periods: Ints
    period_first_days: Ints
    period_last_days: Ints
    period_ends: Ints
    death_times: Ints
    death_days: Ints
    events: Ints
    event_times: Ints
    event_days: Ints


def chunks(store: EventStore, outcome: NDArray[np.bool_] | None) -> Iterator[Chunk]:
    """All patients of a store in order.

    Args:
        store: the store.
        outcome: bool ``[n_codes]``, which codes of the dictionary are the outcome; None for death.

    Raises:
        IndexError: a code outside the dictionary.
    """
    offsets, n_patients = store.patient_offsets, store.n_patients
    first = 0
    while first < n_patients:
        end = int(np.searchsorted(offsets, int(offsets[first]) + MOST_VISITS, side="right")) - 1
        end = min(max(end, first + 1), first + MOST_PATIENTS, n_patients)
        yield _chunk(store, outcome, first, end)
        first = end


def _chunk(store: EventStore, outcome: NDArray[np.bool_] | None, first: int, end: int) -> Chunk:
    visits = np.asarray(store.patient_offsets[first : end + 1], np.int64)
    begin_visit, end_visit = int(visits[0]), int(visits[-1])
    visits = visits - begin_visit
    visit_times = np.asarray(microseconds(store.visit_times[begin_visit:end_visit]))
    visit_days = days_of(visit_times)
    visit_ends = np.asarray(microseconds(store.visit_ends[begin_visit:end_visit]))
    seen_until = latest_so_far(visit_ends, visits)
    periods = np.asarray(store.period_offsets[first : end + 1], np.int64)
    in_chunk = slice(int(periods[0]), int(periods[-1]))
    period_ends = np.asarray(microseconds(store.period_ends[in_chunk]))
    death_times = np.asarray(microseconds(store.death_times[first:end]))
    dead = death_times != NAT
    death_days = np.where(dead, days_of(death_times), NEVER)
    if outcome is None:
        events = np.concatenate([[0], np.cumsum(dead)])
        event_times, event_days = death_times[dead], death_days[dead]
    else:
        at = _visits_with(store, outcome, begin_visit, end_visit)
        events = np.searchsorted(at, visits)
        event_times, event_days = visit_times[at], visit_days[at]
    return Chunk(
        first=first,
        n_patients=end - first,
        visits=visits,
        visit_times=visit_times,
        visit_days=visit_days,
        seen_until=seen_until,
        last_days=days_of(seen_until),
        periods=periods - periods[0],
        period_first_days=days_of(microseconds(store.period_starts[in_chunk])),
        period_last_days=days_of(period_ends - 1),
        period_ends=period_ends,
        death_times=death_times,
        death_days=death_days,
        events=events,
        event_times=event_times,
        event_days=event_days,
    )


def _visits_with(
    store: EventStore, outcome: NDArray[np.bool_], begin_visit: int, end_visit: int
) -> Ints:
    """Which of the visits hold one of the codes, counted from ``begin_visit``, ascending."""
    offsets = np.asarray(store.visit_offsets[begin_visit : end_visit + 1], np.int64)
    found = []
    for begin in range(int(offsets[0]), int(offsets[-1]), MOST_CODES):
        codes: Array = np.asarray(store.codes[begin : min(begin + MOST_CODES, int(offsets[-1]))])
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= len(outcome):
            raise IndexError(
                f"codes: expected indices in [0, {len(outcome)}), the size of the dictionary, got "
                f"{low if low < 0 else high} (entries {begin} to {begin + len(codes)})"
            )
        places = np.flatnonzero(outcome[codes]) + begin
        found.append(np.searchsorted(offsets, places, side="right") - 1)
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


__all__ = ["DAY_US", "NEVER", "Chunk", "chunks"]
