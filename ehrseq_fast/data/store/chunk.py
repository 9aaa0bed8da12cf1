"""Some subjects' events, as readers hand them over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array, as_array, got, longs
from .format import NAT

Ints = NDArray[np.int64]
Times = NDArray[np.datetime64]

FIRST_TIME = np.datetime64("0001-01-01", "us")
END_OF_TIME = np.datetime64("10000-01-01", "us")


@dataclass
class SubjectChunk:
    """Whole subjects with all their events: p subjects, m events in any order.

    Attributes:
        subject_ids: int64 ``[p]``, the source's identifiers, distinct, in the order in which the
            subjects are to be stored.
        event_subject: int64 ``[m]``, the row in ``subject_ids``.
        event_times: ``datetime64[us]`` ``[m]``, UTC; NaT is an event without a time.
        event_codes: m strings, or integers that index ``chunk_codes``.
        chunk_codes: the strings that ``event_codes`` index.
        event_values: float32 ``[m]``, NaN = none; or None.
        event_visits: int64 ``[m]``, the source's key of the visit, unique within a subject, for
            the rules ``"visit_occurrence"`` and ``"visit_id"``; ``visits.NO_VISIT`` is none (such
            events are grouped by day).
        visit_starts: ``datetime64[us]`` ``[m]``, the start of that visit; NaT, or None: its first
            event.
        event_ends: ``datetime64[us]`` ``[m]``, not before ``event_times``: until when the visit of
            each event lasts at least, where the events' own times do not tell (visits of which
            every event has the start); NaT, or None: ``event_times``.
        birth_times, death_times: ``datetime64[us]`` ``[p]``, NaT = unknown; None: all are.
        period_subject: int64 ``[o]``, the row in ``subject_ids`` of each observation period.
        period_starts, period_ends: ``datetime64[us]`` ``[o]``; an end is the first instant that is
            no longer observed.

    Raises:
        ValueError: lengths that do not belong together, a subject twice, a missing code, a time
            outside the years 1 to 9999, an end before its event.
        IndexError: a row or a code outside.
        TypeError: arrays of another kind.
    """

    subject_ids: Ints
    event_subject: Ints
    event_times: Times
    event_codes: Array | Sequence[str]
    chunk_codes: Sequence[str] | None = None
    event_values: NDArray[np.float32] | None = None
    event_visits: Ints | None = None
    visit_starts: Times | None = None
    event_ends: Times | None = None
    birth_times: Times | None = None
    death_times: Times | None = None
    period_subject: Ints | None = None
    period_starts: Times | None = None
    period_ends: Times | None = None

    def __post_init__(self) -> None:
        self.subject_ids = _ints("subject_ids", self.subject_ids, None)
        p = len(self.subject_ids)
        _refuse_twice(self.subject_ids)
        self.event_times = _times("event_times", self.event_times, None)
        m = len(self.event_times)
        self.event_subject = _rows("event_subject", self.event_subject, m, p)
        self._take_codes(m)
        if self.event_values is not None:
            values = as_array("event_values", self.event_values)
            if values.dtype.kind not in "fiu":
                raise TypeError(f"event_values: expected numbers, got {got(values)}")
            _length("event_values", values, m)
            self.event_values = values.astype(np.float32, copy=False)
        if self.event_visits is not None:
            self.event_visits = _ints("event_visits", self.event_visits, m)
        if self.visit_starts is not None:
            self.visit_starts = _times("visit_starts", self.visit_starts, m)
        if self.event_ends is not None:
            self._take_ends(_times("event_ends", self.event_ends, m))
        for name in ("birth_times", "death_times"):
            values = getattr(self, name)
            given = np.full(p, NAT).view("M8[us]") if values is None else _times(name, values, p)
            setattr(self, name, given)
        self._take_periods(p)

    def _take_codes(self, m: int) -> None:
        if self.chunk_codes is None:
            names = list(self.event_codes)
            index = {name: i for i, name in enumerate(dict.fromkeys(names))}
            self.chunk_codes = list(index)
            self.event_codes = np.fromiter((index[name] for name in names), np.int64, len(names))
            _length("event_codes", self.event_codes, m)
        else:
            self.event_codes = _rows("event_codes", self.event_codes, m, len(self.chunk_codes))
        for code in self.chunk_codes:
            if not isinstance(code, str) or not code:
                raise ValueError(f"event_codes: expected strings that are not empty, got {code!r}")

    def _take_ends(self, ends: Times) -> None:
        early = np.flatnonzero(ends < self.event_times)  # NaT is in no order
        if len(early):
            at = early[0]
            raise ValueError(
                f"event_ends: expected no end before its event, got {ends[at]} and the event at "
                f"{self.event_times[at]}, at {at} (subject "
                f"{self.subject_ids[self.event_subject[at]]})"
            )
        self.event_ends = np.where(np.isnat(ends), self.event_times, ends)

    def _take_periods(self, p: int) -> None:
        if self.period_subject is None:
            self.period_subject = np.empty(0, np.int64)
            self.period_starts = self.period_ends = np.empty(0, "M8[us]")
        o = len(self.period_subject)
        self.period_subject = _rows("period_subject", self.period_subject, o, p)
        self.period_starts = _times("period_starts", self.period_starts, o)
        self.period_ends = _times("period_ends", self.period_ends, o)
        missing = np.isnat(self.period_starts) | np.isnat(self.period_ends)
        if missing.any():
            row = self.period_subject[np.flatnonzero(missing)[0]]
            raise ValueError(
                f"period_starts, period_ends: expected times, got NaT for {missing.sum()} periods, "
                f"the first of subject {self.subject_ids[row]}"
            )


def _ints(name: str, values: Any, length: int | None) -> Ints:
    array = as_array(name, values)
    if array.dtype != np.int64:
        array = longs(name, values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {list(array.shape)}")
    if length is not None:
        _length(name, array, length)
    return array


def _rows(name: str, values: Any, length: int, n: int) -> Ints:
    array = _ints(name, values, length)
    outside = (array < 0) | (array >= n)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise IndexError(f"{name}: expected 0 <= row < {n}, got {array[at]}, at {at}")
    return array


def _times(name: str, values: object, length: int | None) -> Times:
    array = as_array(name, values)
    if array.dtype.kind != "M":
        raise TypeError(f"{name}: expected datetime64, got {got(array)}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {list(array.shape)}")
    if length is not None:
        _length(name, array, length)
    known = ~np.isnat(array)
    years = array.astype("M8[Y]").view(np.int64) + 1970
    outside = known & ((years < 1) | (years > 9999))
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise ValueError(f"{name}: expected years 1 to 9999, got the year {years[at]}, at {at}")
    times = array.astype("M8[us]")
    if np.datetime_data(array.dtype)[0] in ("ns", "ps", "fs", "as"):
        cut = known & (times.astype(array.dtype) != array)
        if cut.any():
            at = int(np.flatnonzero(cut)[0])
            raise ValueError(f"{name}: expected whole microseconds, got {array[at]}, at {at}")
    return times


def _length(name: str, array: Array, length: int) -> None:
    if array.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}], got {list(array.shape)}")


def _refuse_twice(subject_ids: Ints) -> None:
    if not (subject_ids[1:] > subject_ids[:-1]).all():
        ids, counts = np.unique(subject_ids, return_counts=True)
        if len(ids) < len(subject_ids):
            raise ValueError(
                f"subject_ids: expected each subject once, got subject {ids[counts > 1][0]} "
                f"{counts[counts > 1][0]} times"
            )
