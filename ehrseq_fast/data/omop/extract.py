"""The persons of one range of ids, as a chunk of a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..store.chunk import SubjectChunk
from ..store.visits import NO_VISIT
from .persons import Deaths, Persons, read_deaths, read_periods, read_persons
from .sources import Sources, fetch
from .times import (
    DAY,
    LAST_DAY,
    LAST_INSTANT,
    NAT,
    OUT_OF_RANGE,
    Bools,
    Ints,
    Periods,
    filled,
    instants,
    is_day,
    known,
)


@dataclass(frozen=True)
class Options:
    """What is the same for every range. ``today`` is the day of reading, since 1970."""

    keep_outside_periods: bool
    today: int


class Extracted(NamedTuple):
    """A chunk, and how many rows and persons were left out, or kept though noticed, by reason."""

    chunk: SubjectChunk
    left_out: Counter[str]
    noticed: Counter[str]


class _Events(NamedTuple):
    """Rows with a person, a concept and a time."""

    person: Ints
    concept: Ints
    time: Ints
    value: NDArray[np.float32] | None
    visit: Ints | None

    def take(self, rows: Ints | Bools) -> _Events:
        return _Events(
            self.person[rows],
            self.concept[rows],
            self.time[rows],
            None if self.value is None else self.value[rows],
            None if self.visit is None else self.visit[rows],
        )


def extract(connection: Any, sources: Sources, low: int, high: int, options: Options) -> Extracted:
    """Read the persons ``low`` to ``high``."""
    left_out: Counter[str] = Counter()
    noticed: Counter[str] = Counter()
    events, seen = _read_events(connection, sources, low, high, left_out, noticed)
    persons = read_persons(connection, sources.person, low, high, left_out)
    subjects = np.union1d(persons.ids, events.person)
    subject = np.searchsorted(subjects, events.person)
    birth = persons.births_of(subjects, subject, events.time, left_out)
    periods = read_periods(connection, sources.period, low, high, subjects, left_out, noticed)
    deaths = read_deaths(connection, sources.death, low, high, subjects, left_out, noticed)

    starts = None
    if sources.visit is not None:
        events, starts = _with_visits(connection, sources, low, high, events, left_out, noticed)
    if sources.period is not None:
        at = periods.at(subject, events.time // DAY)
        inside = (at >= 0) | options.keep_outside_periods
        what = "rows outside every observation period of the person"
        (noticed if options.keep_outside_periods else left_out)[what] += int((at < 0).sum())
        noticed["observation periods without a row"] += len(periods.start) - len(
            np.unique(at[at >= 0])
        )
        events, subject = events.take(inside), subject[inside]
        starts = None if starts is None else starts[inside]
    _notice(noticed, subject, events, birth, deaths, options.today)

    real = np.zeros(len(subjects), bool)
    real[subject] = True
    real[periods.subject] = True
    real |= (birth != NAT) | (deaths.time != NAT) | np.isin(subjects, persons.static_person)
    everyone = np.union1d(seen, persons.ids)
    left_out["persons whose rows are all left out"] += len(everyone) - int(real.sum())
    chunk = _chunk(subjects, real, subject, events, starts, persons, birth, deaths, periods)
    return Extracted(chunk, left_out, noticed)


def _read_events(
    connection: Any,
    sources: Sources,
    low: int,
    high: int,
    left_out: Counter[str],
    noticed: Counter[str],
) -> tuple[_Events, Ints]:
    """The events of all tables, and every person that has a row in one."""
    parts: list[_Events] = []
    seen: list[Ints] = []
    has_values = any("value" in source.columns for source in sources.events.values())
    has_visits = sources.visit is not None
    for source in sources.events.values():
        columns = fetch(connection, source, low, high)
        person = filled(columns["person"], 0).astype(np.int64)
        concept = filled(columns["concept"], 0).astype(np.int64)
        time, n_other_day, out_of_range = instants(columns)
        seen.append(np.unique(person))
        left_out["rows without a known concept"] += int(np.count_nonzero(concept == 0))
        no_date = (concept != 0) & (time == NAT)
        left_out["rows without a date"] += int(np.count_nonzero(no_date & ~out_of_range))
        left_out[f"rows {OUT_OF_RANGE}"] += int(np.count_nonzero(no_date & out_of_range))
        noticed["rows with a datetime on another day than their date"] += n_other_day
        value = _values(columns, len(person), left_out) if has_values else None
        visit = filled(columns["visit"], NO_VISIT).astype(np.int64) if has_visits else None
        rows = np.flatnonzero((concept != 0) & (time != NAT))
        parts.append(_Events(person, concept, time, value, visit).take(rows))
    person, concept, time = (np.concatenate([part[i] for part in parts]) for i in range(3))
    value = np.concatenate([part.value for part in parts]) if has_values else None
    visit = np.concatenate([part.visit for part in parts]) if has_visits else None
    joined = _Events(person, concept, time, value, visit)
    order = _in_order(joined)
    return joined.take(order), np.unique(np.concatenate(seen))


def _in_order(events: _Events) -> Ints:
    """By person, time and concept. Of several values of one concept at one instant the greatest is
    the last, whatever the order in which the database gives its rows."""
    columns = (events.person, events.time, events.concept)
    unit = DAY if not (events.time % DAY).any() else 1
    key = _joined(columns, (1, unit, 1))
    if key is None:
        keys = columns[::-1] if events.value is None else (events.value, *columns[::-1])
        return np.lexsort(keys)
    order = np.argsort(key, kind="stable")
    if events.value is None:
        return order
    key = key[order]
    same = key[1:] == key[:-1]
    rows = np.flatnonzero(np.append(same, False) | np.append(False, same))
    again = np.lexsort((events.value[order[rows]], key[rows]))
    order[rows] = order[rows[again]]
    return order


def _joined(columns: Sequence[Ints], units: Sequence[int]) -> Ints | None:
    """Numbers in the order of several columns, which are multiples of their units from their least
    on; None where 63 bits do not hold them. One sort of them takes a fifth of the time of one by
    the columns."""
    if not len(columns[0]):
        return columns[0]
    lows = [int(column.min()) for column in columns]
    spans = [
        (int(column.max()) - low) // unit + 1
        for column, low, unit in zip(columns, lows, units, strict=True)
    ]
    if prod(spans) >= 2**63:
        return None
    key = np.zeros(len(columns[0]), np.int64)
    for column, low, span, unit in zip(columns, lows, spans, units, strict=True):
        key = key * span + (column - low) // unit
    return key


def _values(
    columns: dict[str, np.ma.MaskedArray[Any, Any]], n: int, left_out: Counter[str]
) -> NDArray[np.float32]:
    if "value" not in columns:
        return np.full(n, np.nan, np.float32)
    wide = filled(columns["value"], np.nan).astype(np.float64)
    n_nan = np.count_nonzero(known(columns["value"]) & np.isnan(wide))
    left_out["numeric values that are not a number"] += int(n_nan)
    with np.errstate(over="ignore"):
        value = wide.astype(np.float32)
    infinite = np.isinf(value)
    left_out["numeric values that float32 does not hold"] += int(np.count_nonzero(infinite))
    value[infinite] = np.nan
    return value + np.float32(0)  # one zero: -0 and 0 are the same value


def _with_visits(
    connection: Any,
    sources: Sources,
    low: int,
    high: int,
    events: _Events,
    left_out: Counter[str],
    noticed: Counter[str],
) -> tuple[_Events, Ints]:
    """The events with the start of their visit; without a visit that is the person's own, or dated
    after its end, they have the key ``NO_VISIT``."""
    assert sources.visit is not None
    assert events.visit is not None
    columns = fetch(connection, sources.visit, low, high)
    start, n_other_day, out_of_range = instants(columns)
    has_id = known(columns["visit"])
    no_start = has_id & (start == NAT)
    left_out["visits without an id"] += int(np.count_nonzero(~has_id))
    left_out["visits without a start"] += int(np.count_nonzero(no_start & ~out_of_range))
    left_out[f"visits {OUT_OF_RANGE}"] += int(np.count_nonzero(no_start & out_of_range))
    noticed["visits with a datetime on another day than their date"] += n_other_day
    rows = np.flatnonzero(has_id & (start != NAT))
    person = filled(columns["person"], 0).astype(np.int64)[rows]
    visit, start = filled(columns["visit"], 0).astype(np.int64)[rows], start[rows]
    last = _last_days(columns, len(no_start))[rows]

    ids, rank = np.unique(visit, return_inverse=True)
    people = np.unique(np.concatenate([person, events.person]))
    key = np.searchsorted(people, person) * (len(ids) + 1) + rank
    order = np.lexsort((-last, start, key))
    key, start, last = key[order], start[order], last[order]
    first = np.ones(len(key), bool)
    first[1:] = key[1:] != key[:-1]
    left_out["visits with the id of an earlier one of the person"] += int(np.count_nonzero(~first))
    key, start, last = key[first], start[first], last[first]

    wanted_rank = np.searchsorted(ids, events.visit)
    is_id = _found(ids, wanted_rank, events.visit)
    wanted = np.searchsorted(people, events.person) * (len(ids) + 1) + wanted_rank
    place = np.searchsorted(key, wanted)
    has_visit = is_id & _found(key, place, wanted)
    no_id = events.visit == NO_VISIT
    noticed["rows without a visit, grouped by day"] += int(np.count_nonzero(no_id))
    noticed["rows whose visit is none of the person's, grouped by day"] += int(
        np.count_nonzero(~has_visit & ~no_id)
    )
    starts = np.full(len(wanted), NAT, np.int64)
    rows = np.flatnonzero(has_visit)
    at, day = place[rows], events.time[rows] // DAY
    before, after = day < start[at] // DAY, day > np.maximum(last[at], start[at] // DAY)
    noticed["rows dated before their visit's start"] += int(np.count_nonzero(before))
    noticed["rows dated after their visit's end, grouped by day"] += int(np.count_nonzero(after))
    has_visit[rows[after]] = False
    starts[has_visit] = start[place[has_visit]]
    return events._replace(visit=np.where(has_visit, events.visit, NO_VISIT)), starts


def _last_days(columns: Mapping[str, np.ma.MaskedArray[Any, Any]], n: int) -> Ints:
    """Of visits, since 1970; where none is known the last day that a store holds."""
    last = np.full(n, LAST_DAY, np.int64)
    if "end" in columns:
        end = filled(columns["end"], LAST_DAY).astype(np.int64)
        last = np.where(is_day(end), end, last)
    return last


def _found(sorted_values: Ints, place: Ints, wanted: Ints) -> Bools:
    if not len(sorted_values):
        return np.zeros(len(wanted), bool)
    return sorted_values[np.minimum(place, len(sorted_values) - 1)] == wanted


def _notice(
    noticed: Counter[str],
    subject: Ints,
    events: _Events,
    birth: Ints,
    deaths: Deaths,
    today: int,
) -> None:
    day = events.time // DAY
    of_birth, of_death = birth[subject], deaths.time[subject]
    before = (of_birth != NAT) & (day < of_birth // DAY)
    after = (of_death != NAT) & (day > of_death // DAY)
    noticed["rows before the person's birth"] += int(np.count_nonzero(before))
    noticed["rows after the day of the person's death"] += int(np.count_nonzero(after))
    noticed["rows dated after the day of reading"] += int(np.count_nonzero(day > today))


def _chunk(
    subjects: Ints,
    real: Bools,
    subject: Ints,
    events: _Events,
    starts: Ints | None,
    persons: Persons,
    birth: Ints,
    deaths: Deaths,
    periods: Periods,
) -> SubjectChunk:
    row = np.cumsum(real) - 1  # of a subject in the chunk
    n_static = len(persons.static_person)
    static_subject = np.searchsorted(subjects, persons.static_person)
    concepts, codes = np.unique(
        np.concatenate([persons.static_concept, events.concept]), return_inverse=True
    )

    def behind_static(fill: Any, column: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([np.full(n_static, fill, column.dtype), column])

    return SubjectChunk(
        subject_ids=subjects[real],
        event_subject=row[np.concatenate([static_subject, subject])],
        event_times=_instants(behind_static(NAT, events.time)),
        event_codes=codes,
        chunk_codes=[str(concept) for concept in concepts.tolist()],
        event_values=None if events.value is None else behind_static(np.nan, events.value),
        event_visits=None if events.visit is None else behind_static(NO_VISIT, events.visit),
        visit_starts=None if starts is None else _instants(behind_static(NAT, starts)),
        birth_times=_instants(birth[real]),
        death_times=_instants(deaths.time[real]),
        period_subject=row[periods.subject],
        period_starts=_instants(periods.start * DAY),
        period_ends=_instants(np.minimum(periods.end * DAY, LAST_INSTANT)),
    )


def _instants(micros: Ints) -> NDArray[np.datetime64]:
    return micros.astype(np.int64, copy=False).view("datetime64[us]")
