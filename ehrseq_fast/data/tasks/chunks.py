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
Causes = NDArray[np.uint8]
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
        event_times, event_days: of the outcomes; days ascend within a patient.
        event_causes: uint8, 1 to K, which of competing outcomes; ascending within a day.
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
    event_causes: Causes


def chunks(store: EventStore, outcomes: Causes | None, death: int = 1) -> Iterator[Chunk]:
    """All patients of a store in order.

    Args:
        store: the store.
        outcomes: uint8 ``[n_codes]``, which outcome each code of the dictionary is, 1 to K, or 0;
            None for none.
        death: which outcome death is, or 0.

    Raises:
        IndexError: a code outside the dictionary.
    """
    offsets, n_patients = store.patient_offsets, store.n_patients
    first = 0
    while first < n_patients:
        end = int(np.searchsorted(offsets, int(offsets[first]) + MOST_VISITS, side="right")) - 1
        end = min(max(end, first + 1), first + MOST_PATIENTS, n_patients)
        yield _chunk(store, outcomes, death, first, end)
        first = end


def _chunk(store: EventStore, outcomes: Causes | None, death: int, first: int, end: int) -> Chunk:
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
    if outcomes is None:
        events = np.concatenate([[0], np.cumsum(dead)])
        event_times, event_days = death_times[dead], death_days[dead]
        event_causes = np.full(len(event_days), death, np.uint8)
    else:
        at, event_causes = _visits_with(store, outcomes, begin_visit, end_visit)
        events = np.searchsorted(at, visits)
        event_times, event_days = visit_times[at], visit_days[at]
        if death or outcomes.max(initial=0) > 1:
            patient = np.repeat(np.arange(end - first), np.diff(events))
            who = np.flatnonzero(dead) if death else np.zeros(0, np.int64)
            patient = np.concatenate([patient, who])
            event_times = np.concatenate([event_times, death_times[who]])
            event_days = np.concatenate([event_days, death_days[who]])
            event_causes = np.append(event_causes, np.full(len(who), death, np.uint8))
            order = np.lexsort((event_causes, event_days, patient))
            event_times, event_days = event_times[order], event_days[order]
            event_causes = event_causes[order]
            events = np.searchsorted(patient[order], np.arange(end - first + 1))
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
        event_causes=event_causes,
    )


def _visits_with(
    store: EventStore, outcomes: Causes, begin_visit: int, end_visit: int
) -> tuple[Ints, Causes]:
    """Which of the visits hold one of the codes, counted from ``begin_visit``, ascending, and the
    first outcome of each."""
    offsets = np.asarray(store.visit_offsets[begin_visit : end_visit + 1], np.int64)
    found, causes = [], []
    for begin in range(int(offsets[0]), int(offsets[-1]), MOST_CODES):
        codes: Array = np.asarray(store.codes[begin : min(begin + MOST_CODES, int(offsets[-1]))])
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= len(outcomes):
            raise IndexError(
                f"codes: expected indices in [0, {len(outcomes)}), the size of the dictionary, got "
                f"{low if low < 0 else high} (entries {begin} to {begin + len(codes)})"
            )
        of_code = outcomes[codes]
        places = np.flatnonzero(of_code)
        found.append(np.searchsorted(offsets, places + begin, side="right") - 1)
        causes.append(of_code[places])
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.uint8)
    visits, starts = np.unique(np.concatenate(found), return_index=True)
    of_visit = np.concatenate(causes)
    return visits, np.minimum.reduceat(of_visit, starts) if len(starts) else of_visit


__all__ = ["DAY_US", "NEVER", "Chunk", "chunks"]
