"""Births, static concepts, deaths and observation periods of the persons of one range."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from .sources import Source, fetch
from .times import (
    DAY,
    NAT,
    OUT_OF_RANGE,
    Births,
    Bools,
    Ints,
    Periods,
    births,
    filled,
    instants,
    is_day,
    known,
    merged_periods,
)

STATIC = ("gender", "race", "ethnicity")


class Persons(NamedTuple):
    """Rows of the table ``person``, one for each of ``ids``, ascending.

    Attributes:
        births: of each person.
        static_person, static_concept: int64 ``[s]``, the concepts that are known, by person.
    """

    ids: Ints
    births: Births
    static_person: Ints
    static_concept: Ints

    def births_of(self, subjects: Ints, subject: Ints, times: Ints, left_out: Counter[str]) -> Ints:
        """Microseconds since 1970 for each of ``subjects``. Where only the year is known, it is the
        day of the earliest record of that year, if there is one."""
        left_out["births that are no day"] += int(np.count_nonzero(self.births.impossible))
        micros = np.full(len(subjects), NAT, np.int64)
        only_year = np.zeros(len(subjects), bool)
        at = np.searchsorted(subjects, self.ids)
        micros[at], only_year[at] = self.births.micros, self.births.only_year
        if only_year.any():
            rows = np.flatnonzero(only_year[subject])
            rows = rows[_year(times[rows]) == _year(micros[subject[rows]])]
            earliest = np.full(len(subjects), np.iinfo(np.int64).max)
            np.minimum.at(earliest, subject[rows], times[rows])
            has_record = np.unique(subject[rows])
            micros[has_record] = earliest[has_record] // DAY * DAY
        return micros


def read_persons(
    connection: Any, source: Source | None, low: int, high: int, left_out: Counter[str]
) -> Persons:
    """One row for each person; of several the first by all their columns."""
    if source is None:
        none = np.empty(0, np.int64)
        return Persons(none, births({}, 0), none, none)
    columns = fetch(connection, source, low, high)
    names = list(columns)
    keys = [filled(columns[name], NAT).astype(np.int64) for name in names]
    order = np.lexsort(keys[::-1])
    person = keys[names.index("person")][order]
    first = _first_of(person)
    left_out["further rows of one person in person"] += int(np.count_nonzero(~first))
    rows = order[first]
    columns = {name: column[rows] for name, column in columns.items()}
    ids = person[first]
    concepts = [
        filled(columns[name], 0).astype(np.int64)
        if name in columns
        else np.zeros(len(ids), np.int64)
        for name in STATIC
    ]
    table = np.stack(concepts, axis=1)
    is_known = table != 0
    absent = sum(
        int((concept == 0).sum())
        for name, concept in zip(STATIC, concepts, strict=True)
        if name in columns
    )
    left_out["concepts of persons that are NULL or 0"] += absent
    whose = np.broadcast_to(ids[:, None], table.shape)
    return Persons(ids, births(columns, len(ids)), whose[is_known], table[is_known])


class Deaths(NamedTuple):
    """Microseconds since 1970 of each subject (``NAT``: none is known)."""

    time: Ints


def read_deaths(
    connection: Any,
    source: Source | None,
    low: int,
    high: int,
    subjects: Ints,
    left_out: Counter[str],
    noticed: Counter[str],
) -> Deaths:
    """The earliest death of each subject."""
    time = np.full(len(subjects), NAT, np.int64)
    if source is None:
        return Deaths(time)
    columns = fetch(connection, source, low, high)
    at, n_other_day, out_of_range = instants(columns)
    noticed["deaths with a datetime on another day than their date"] += n_other_day
    left_out["deaths without a date"] += int(np.count_nonzero((at == NAT) & ~out_of_range))
    left_out[f"deaths {OUT_OF_RANGE}"] += int(np.count_nonzero(out_of_range))
    subject, is_subject = _subjects_of(subjects, columns)
    left_out["deaths of persons with no other row"] += int(
        np.count_nonzero(~is_subject & (at != NAT))
    )
    rows = np.flatnonzero(is_subject & (at != NAT))
    subject, at = subject[rows], at[rows]
    order = np.lexsort((at, subject))
    subject, at = subject[order], at[order]
    first = _first_of(subject)
    left_out["further deaths of one person"] += int(np.count_nonzero(~first))
    time[subject[first]] = at[first]
    return Deaths(time)


def read_periods(
    connection: Any,
    source: Source | None,
    low: int,
    high: int,
    subjects: Ints,
    left_out: Counter[str],
    noticed: Counter[str],
) -> Periods:
    """The observation periods of the subjects."""
    if source is None:
        none = np.empty(0, np.int64)
        return Periods(none, none, none)
    columns = fetch(connection, source, low, high)
    dated = known(columns["start"]) & known(columns["end"])
    start, end = filled(columns["start"], 0), filled(columns["end"], 0)
    in_range = is_day(start) & is_day(end)
    subject, is_subject = _subjects_of(subjects, columns)
    left_out["observation periods without a start or an end"] += int(np.count_nonzero(~dated))
    left_out[f"observation periods {OUT_OF_RANGE}"] += int(np.count_nonzero(dated & ~in_range))
    dated &= in_range
    falls = dated & (end < start)
    left_out["observation periods that end before they start"] += int(np.count_nonzero(falls))
    rows = dated & ~falls
    left_out["observation periods of persons with no other row"] += int(
        np.count_nonzero(rows & ~is_subject)
    )
    rows &= is_subject
    periods = merged_periods(subject[rows], start[rows], end[rows])
    noticed["observation periods that overlap or touch another, merged"] += int(
        np.count_nonzero(rows)
    ) - len(periods.start)
    return periods


def _subjects_of(subjects: Ints, columns: Any) -> tuple[Ints, Bools]:
    person = filled(columns["person"], 0).astype(np.int64)
    at = np.searchsorted(subjects, person)
    if not len(subjects):
        return at, np.zeros(len(person), bool)
    at = np.minimum(at, len(subjects) - 1)
    return at, subjects[at] == person


def _first_of(values: Ints) -> Bools:
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return first


def _year(micros: Ints) -> Ints:
    return micros.view("datetime64[us]").astype("datetime64[Y]").astype(np.int64)
