"""Instants from OMOP's pairs of a date and a datetime, births from their parts, periods of days."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Columns = Mapping[str, "np.ma.MaskedArray[Any, Any]"]

DAY = 86_400_000_000  # microseconds
NAT = int(np.iinfo(np.int64).min)
# Days since 1970 of the years that a store holds, 1 to 9999.
FIRST_DAY, LAST_DAY = -719_162, 2_932_896
LAST_INSTANT = (LAST_DAY + 1) * DAY - 1
OUT_OF_RANGE = "dated outside the years 1 to 9999"
_SUBJECT = 2**23  # more than there are such days


def known(column: np.ma.MaskedArray[Any, Any]) -> Bools:
    """Where a column is not NULL."""
    return ~np.ma.getmaskarray(column)


def is_day(days: Ints) -> Bools:
    """Which days (since 1970) are in the years 1 to 9999."""
    return (days >= FIRST_DAY) & (days <= LAST_DAY)


def filled(column: np.ma.MaskedArray[Any, Any], value: float) -> NDArray[Any]:
    return np.ma.filled(column, value)


class Instants(NamedTuple):
    """Microseconds since 1970 (``NAT``: unknown), of how many rows the datetime was on another day
    than the date, and which unknown ones have a date that a store does not hold."""

    micros: Ints
    n_other_day: int
    out_of_range: Bools


def instants(columns: Columns) -> Instants:
    """Of rows with a ``day`` (since 1970) and perhaps a ``moment`` (in microseconds).

    The day is that of the date, which the Common Data Model requires; the datetime adds the time of
    day, and serves where the date is NULL. One on another day is not used.
    """
    day = filled(columns["day"], 0)
    has_date = known(columns["day"])
    has_day = has_date & is_day(day)
    micros = np.where(has_day, day, 0) * DAY
    if "moment" not in columns:
        return Instants(np.where(has_day, micros, NAT), 0, has_date & ~has_day)
    moment = filled(columns["moment"], 0)
    is_moment = known(columns["moment"])
    out_of_range = (has_date & ~has_day) | (~has_date & is_moment & ~is_day(moment // DAY))
    alone = ~has_date & is_moment & ~out_of_range
    same = has_day & is_moment & (moment // DAY == day)
    micros = np.where(same | alone, moment, micros)
    n_other_day = int(np.count_nonzero(has_day & is_moment & ~same))
    return Instants(np.where(has_day | alone, micros, NAT), n_other_day, out_of_range)


class Births(NamedTuple):
    """Microseconds since 1970 (``NAT``: unknown); where only the year is known; where the parts
    are no day, or the datetime is in a year that a store does not hold."""

    micros: Ints
    only_year: Bools
    impossible: Bools


def births(columns: Columns, n: int) -> Births:
    """Of rows with a ``birth``, or else with ``year``, ``month`` and ``day``, of which each may be
    absent.

    As the Common Data Model has it: without a day the first of the month, without a month the 15th
    of June (until the person's records of that year say better).
    """

    def part(name: str) -> tuple[Ints, Bools]:
        if name not in columns:
            return np.zeros(n, np.int64), np.zeros(n, bool)
        return filled(columns[name], 0).astype(np.int64), known(columns[name])

    micros, has_birth = part("birth")
    out_of_range = has_birth & ~is_day(micros // DAY)
    has_birth &= ~out_of_range
    year, has_year = part("year")
    month, has_month = part("month")
    day, has_day = part("day")
    parts = ~has_birth & has_year
    only_year = parts & ~has_month
    month = np.where(has_month, month, 6)
    day = np.where(only_year, 15, np.where(has_day, day, 1))
    possible = (year >= 1) & (year <= 9999) & (month >= 1) & (month <= 12)
    possible &= (day >= 1) & (day <= 31)
    months = np.where(possible, (year - 1970) * 12 + month - 1, 0).astype("datetime64[M]")
    date = months.astype("datetime64[D]") + (np.where(possible, day, 1) - 1)
    possible &= date.astype("datetime64[M]") == months  # else 31 April is 1 May
    taken = parts & possible
    micros = np.where(taken, date.astype(np.int64) * DAY, np.where(has_birth, micros, NAT))
    return Births(micros, only_year & possible, (parts | out_of_range) & (micros == NAT))


class Periods(NamedTuple):
    """Periods of days by subject and start, of one subject apart from each other.

    Attributes:
        subject: int64 ``[n]``.
        start: int64 ``[n]``, days since 1970.
        end: int64 ``[n]``, the first day that is not in the period.
    """

    subject: Ints
    start: Ints
    end: Ints

    def at(self, subject: Ints, day: Ints) -> Ints:
        """The period in which each day is, -1 where it is in none of the subject's."""
        if not len(self.start):
            return np.full(len(day), -1, np.int64)
        place = np.searchsorted(_key(self.subject, self.start), _key(subject, day), "right") - 1
        at = np.maximum(place, 0)
        inside = (place >= 0) & (self.subject[at] == subject) & (day < self.end[at])
        return np.where(inside, place, -1)


def merged_periods(subject: Ints, start: Ints, last: Ints) -> Periods:
    """Of periods from ``start`` to ``last``, both included: those that overlap or touch are one."""
    order = np.lexsort((last, start, subject))
    subject, start, end = subject[order], start[order], last[order] + 1
    latest = np.maximum.accumulate(_key(subject, end)) if len(order) else end
    new = np.ones(len(order), bool)
    new[1:] = _key(subject, start)[1:] > latest[:-1]
    new[1:] |= subject[1:] != subject[:-1]
    first = np.flatnonzero(new)
    end = np.maximum.reduceat(end, first) if len(first) else end
    return Periods(subject[first], start[first], end)


def _key(subject: Ints, day: Ints) -> Ints:
    """Numbers in the order of subject, then day."""
    return subject * _SUBJECT + (day - FIRST_DAY)
