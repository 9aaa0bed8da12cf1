"""Which events make a visit: the one place where every reader's events are grouped."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array
from .format import NAT

DAY, HOUR = 86_400_000_000, 3_600_000_000  # in microseconds
NO_VISIT = int(np.iinfo(np.int64).min)  # the key of an event that belongs to no visit of the source
BY_TIME = ("day", "time")
BY_KEY = ("visit_occurrence", "visit_id")
VisitRule = str | float

Ints = NDArray[np.int64]


class Visits(NamedTuple):
    """V visits, by subject and, of one subject, by their start.

    Attributes:
        of_event: int64 ``[m]``, the visit of each event.
        subject: int64 ``[V]``.
        start: int64 ``[V]``, microseconds since 1970-01-01.
        end: int64 ``[V]``, the time of the latest event, not before ``start``.
    """

    of_event: Ints
    subject: Ints
    start: Ints
    end: Ints


def checked_rule(visits: object) -> VisitRule:
    """The rule as stored in a header.

    Raises:
        ValueError: neither one of the names nor a positive number of hours.
    """
    if isinstance(visits, str):
        if visits in BY_TIME + BY_KEY:
            return visits
    elif isinstance(visits, numbers.Real) and not isinstance(visits, bool):
        hours = float(visits)
        if 0 < hours <= 24 * 366 * 1000:
            return int(hours) if hours.is_integer() else hours
    names = ", ".join(map(repr, BY_TIME + BY_KEY))
    raise ValueError(f"visits: expected {names} or a positive number of hours, got {visits!r:.100}")


def group_visits(
    subject: Ints,
    times: Ints,
    rule: VisitRule,
    keys: Ints | None = None,
    starts: Ints | None = None,
    ends: Ints | None = None,
) -> Visits:
    """Group events into visits.

    ``"day"``: the events of one day in UTC. ``"time"``: those of one instant. A number of hours h:
    those up to h hours after the visit's first event. A visit then starts with its first event.
    ``"visit_occurrence"`` and ``"visit_id"``: those of one key; the visit starts at the least of
    its ``starts`` (of its events' times, without ``starts``). Events whose key is ``NO_VISIT`` are
    grouped by day. Under every rule a visit ends at the greatest of its ``ends``, or at its start
    where that is later.

    Args:
        subject: int64 ``[m]``, ascending.
        times: int64 ``[m]``, microseconds since 1970-01-01 in UTC, ascending within a subject.
        rule: as above.
        keys: int64 ``[m]``, the source's visit of each event, unique within a subject.
        starts: int64 ``[m]``, the start of the visit of each event.
        ends: int64 ``[m]``, not before ``times``: until when the visit of each event lasts at
            least; ``times`` by default.

    Example:
        >>> at = np.array([0, 3, 30]) * HOUR
        >>> group_visits(np.array([0, 0, 0]), at, "day").of_event.tolist()
        [0, 0, 1]
        >>> group_visits(np.array([0, 0, 0]), at, "time").of_event.tolist()
        [0, 1, 2]
        >>> group_visits(np.array([0, 0, 0]), at, 48).of_event.tolist()
        [0, 0, 0]
        >>> (group_visits(np.array([0, 0, 0]), at, "day").end // HOUR).tolist()
        [3, 30]
    """
    ends = times if ends is None else ends
    if rule in BY_KEY:
        if keys is None and len(times):
            raise ValueError(f"visits={rule!r}: expected the visit of each event, got none")
        keys = times if keys is None else keys  # of no event
        return _by_key(subject, times, keys, times if starts is None else starts, ends)
    if rule == "day":
        new = changes(subject, times // DAY)
    elif rule == "time":
        new = changes(subject, times)
    else:
        new = _within(subject, times, round(float(rule) * HOUR))
    first = np.flatnonzero(new)
    return Visits(np.cumsum(new) - 1, subject[first], times[first], _greatest(ends, first))


def changes(*columns: Array) -> NDArray[np.bool_]:
    """Where a row differs from the one before; the first does."""
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return new


def _greatest(values: Ints, first: Ints) -> Ints:
    """The greatest of each group; ``first`` is where the groups begin."""
    return np.maximum.reduceat(values, first) if len(first) else values[:0]


def _within(subject: Ints, times: Ints, longest: int) -> NDArray[np.bool_]:
    """Where a visit begins that takes in all events up to ``longest`` after its first."""
    new = changes(subject)
    new[1:] |= np.diff(times) > longest  # a new visit, wherever the one before began
    begin = np.flatnonzero(new)
    end = np.append(begin[1:], len(times))
    while len(begin):
        begin = _first_after(times, begin, end, times[begin] + longest)
        more = begin < end
        begin, end = begin[more], end[more]
        new[begin] = True
    return new


def _first_after(times: Ints, low: Ints, high: Ints, limit: Ints) -> Ints:
    """Of each range ``low .. high`` of ascending times the first that is after its limit."""
    low, high = low.copy(), high.copy()
    while (low < high).any():
        middle = (low + high) >> 1
        before = (low < high) & (times[np.minimum(middle, len(times) - 1)] <= limit)
        high = np.where((low < high) & ~before, middle, high)
        low = np.where(before, middle + 1, low)
    return low


def _by_key(subject: Ints, times: Ints, keys: Ints, starts: Ints, ends: Ints) -> Visits:
    own = keys == NO_VISIT
    starts = np.where(own | (starts == NAT), times, starts)
    keys = np.where(own, times // DAY, keys)
    order = np.lexsort((keys, own, subject))
    new = changes(subject[order], own[order], keys[order])
    first = np.flatnonzero(new)
    start = np.minimum.reduceat(starts[order], first) if len(first) else starts[:0]
    end = np.maximum(_greatest(ends[order], first), start)
    at = order[first]
    in_time = np.lexsort((keys[at], own[at], start, subject[at]))
    place = np.empty_like(in_time)
    place[in_time] = np.arange(len(in_time))
    of_event = np.empty(len(order), np.int64)
    of_event[order] = place[np.cumsum(new) - 1]
    return Visits(of_event, subject[at][in_time], start[in_time], end[in_time])


class Entries(NamedTuple):
    """Distinct codes of groups (visits, subjects), by group and code.

    Attributes:
        group: int64 ``[k]``.
        codes: int64 ``[k]``.
        values: float32 ``[k]``, or None.
        superseded: how many numeric values a later one of the same group and code has replaced.
    """

    group: Ints
    codes: Ints
    values: NDArray[np.float32] | None
    superseded: int


def distinct_entries(
    group: Ints, codes: Ints, values: NDArray[np.float32] | None, n_codes: int
) -> Entries:
    """The codes of each group once, with the last of their values; events come in order of time."""
    key = group * max(n_codes, 1) + codes
    order = None if (np.diff(key) > 0).all() else np.argsort(key, kind="stable")
    if order is not None:
        key, group, codes = key[order], group[order], codes[order]
        values = None if values is None else values[order]
    new = changes(key)
    first = np.flatnonzero(new)
    if values is None:
        return Entries(group[first], codes[first], None, 0)
    known = np.flatnonzero(~np.isnan(values))
    entry = (np.cumsum(new) - 1)[known]
    last = np.full(len(first), np.nan, np.float32)
    last[entry] = values[known]  # of several, NumPy keeps the last
    return Entries(
        group[first], codes[first], last, len(known) - int(np.count_nonzero(changes(entry)))
    )
