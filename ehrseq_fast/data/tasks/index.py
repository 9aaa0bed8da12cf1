"""When each person's prediction is made: the index, and the observation that holds it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from .chunks import DAY_US, NEVER, Chunk
from .dates import IndexDates
from .search import at_or, first_not_below

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Predictions of one chunk, by patient and index time; all int64.

    Attributes:
        patient: counted from the chunk's first.
        index_time: microseconds.
        index_day: the last day on which what is seen at the index may have been recorded.
        index_visit: the visit that is the index (``each_visit``), or the last that is seen.
        first_day, last_day: of the observation that holds the index.
        observed_until: microseconds, its end.
        number: of a date among those given.
    """

    patient: Ints
    index_time: Ints
    index_day: Ints
    index_visit: Ints
    first_day: Ints
    last_day: Ints
    observed_until: Ints
    number: Ints

    def __len__(self) -> int:
        return len(self.patient)

    def keep(self, kept: NDArray[np.bool_]) -> Rows:
        return Rows(*(getattr(self, field.name)[kept] for field in fields(self)))


def first_visits(chunk: Chunk, whose: Ints, by_period: bool, washout: int) -> Rows:
    """The first visit of each patient after ``washout`` days of an observation period, or of the
    record; those who have one."""
    begins, ends = chunk.visits[whose], chunk.visits[whose + 1]
    if not by_period:
        first_day = chunk.visit_days[begins]
        visit = first_not_below(chunk.visit_days, begins, ends, first_day + washout)
        there = visit < ends
        return _rows(chunk, whose[there], visit[there], None)
    visit, period = np.full(len(whose), -1), np.full(len(whose), -1)
    todo, tried = np.arange(len(whose)), chunk.periods[whose]
    while len(todo := todo[tried[todo] < chunk.periods[whose[todo] + 1]]):
        of = tried[todo]
        found = first_not_below(
            chunk.visit_days, begins[todo], ends[todo], chunk.period_first_days[of] + washout
        )
        day = at_or(chunk.visit_days, found, found < ends[todo], NEVER)
        inside = day <= chunk.period_last_days[of]
        visit[todo[inside]], period[todo[inside]] = found[inside], of[inside]
        tried[todo] += 1
        todo = todo[~inside]
    there = visit >= 0
    return _rows(chunk, whose[there], visit[there], period[there])


def on_dates(chunk: Chunk, patient: Ints, times: Ints, numbers: Ints, by_period: bool) -> Rows:
    """The given index times that lie within an observation period, or between the first and the
    last event of the record, or death."""
    day = times // DAY_US
    period = None
    if by_period:
        low, high = chunk.periods[patient], chunk.periods[patient + 1]
        period = first_not_below(chunk.period_first_days, low, high, day + 1) - 1
        last_day = at_or(chunk.period_last_days, period, period >= low, -NEVER)
        inside = day <= last_day
        period = period[inside]
    else:
        first = chunk.visit_days[chunk.visits[patient]]
        inside = (first <= day) & (day <= _end_of_record(chunk, patient)[0])
    patient = patient[inside]
    return replace(
        _rows(chunk, patient, chunk.visits[patient], period),
        index_time=times[inside],
        index_day=day[inside],
        number=numbers[inside],
    )


def with_seen_visits(chunk: Chunk, rows: Rows, dates: IndexDates | None, include_day: bool) -> Rows:
    """Single predictions with the last visit that each sees; those that see one.

    A visit that holds a code recorded later than what may be seen is not seen, nor are those after
    it; only the first visit as the index is seen whole.
    """
    begins, ends = chunk.visits[rows.patient], chunk.visits[rows.patient + 1]
    if not include_day:
        end = first_not_below(chunk.last_days, begins, ends, rows.index_day)
    elif dates is None:
        end = first_not_below(chunk.visit_times, begins, ends, rows.index_time + 1)
    else:
        end = first_not_below(chunk.seen_until, begins, ends, dates.seen_before(rows.number))
    return replace(rows, index_visit=end - 1).keep(end > begins)


def n_open_visits(chunk: Chunk, rows: Rows) -> int:
    """How many of the predictions fall into a visit, which is not seen."""
    ends = chunk.visits[rows.patient + 1]
    started = first_not_below(chunk.visit_times, rows.index_visit, ends, rows.index_time + 1)
    return int(np.count_nonzero(started > rows.index_visit + 1))


def from_last_seen_day(chunk: Chunk, rows: Rows) -> Rows:
    """With the index day moved to the last day on which a code that is seen was recorded."""
    seen = chunk.last_days[rows.index_visit]
    return replace(rows, index_day=np.maximum(rows.index_day, seen))


def _rows(chunk: Chunk, patient: Ints, visit: Ints, period: Ints | None) -> Rows:
    if period is None:
        first_day = chunk.visit_days[chunk.visits[patient]]
        last_day, until = _end_of_record(chunk, patient)
    else:
        first_day = chunk.period_first_days[period]
        last_day, until = chunk.period_last_days[period], chunk.period_ends[period]
    return Rows(
        patient=patient,
        index_time=chunk.visit_times[visit],
        index_day=chunk.visit_days[visit],
        index_visit=visit,
        first_day=first_day,
        last_day=last_day,
        observed_until=until,
        number=np.full(len(patient), -1),
    )


def _end_of_record(chunk: Chunk, patient: Ints) -> tuple[Ints, Ints]:
    """Day and time of death, or else of the last code."""
    last = chunk.visits[patient + 1] - 1
    day, time = chunk.death_days[patient], chunk.death_times[patient]
    dead = day < NEVER
    return (
        np.where(dead, day, chunk.last_days[last]),
        np.where(dead, time, chunk.seen_until[last]),
    )
