"""Parts of a store: what one process writes of its share of the subjects, to be merged later."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array
from .chunk import SubjectChunk
from .format import FLOAT32, INT32, INT64, NAT, TIME, naming, read_json, write_json
from .visits import Entries, VisitRule, changes, checked_rule, distinct_entries, group_visits

Ints = NDArray[np.int64]

PART, PART_CODES = "part.json", "codes.json"
STREAMS: Mapping[str, str] = {
    "subject_ids": INT64,
    "patient_visits": INT64,
    "visit_times": TIME,
    "visit_ends": TIME,
    "visit_entries": INT64,
    "codes": INT32,
    "values": FLOAT32,
    "patient_statics": INT64,
    "static_codes": INT32,
    "static_values": FLOAT32,
    "birth_times": TIME,
    "death_times": TIME,
    "patient_periods": INT64,
    "period_starts": TIME,
    "period_ends": TIME,
}
_OF_VALUES = ("values", "static_values")

SUPERSEDED = "numeric values superseded by a later one of the same visit"
SUPERSEDED_STATIC = "numeric values superseded by a later one without a time"
NO_PERIOD = "observation periods that end before they start"


class PartWriter:
    """Writes one part, chunk by chunk; memory is bounded by the chunk and the distinct codes.

    Args:
        folder: an empty folder, or one to make.
        visit_rule: which events make a visit, see :func:`~.visits.group_visits`.
        with_values: whether numeric values are kept.
        name: what the part was read from, for messages.

    Example:
        >>> import tempfile
        >>> chunk = SubjectChunk(
        ...     subject_ids=np.array([7]), event_subject=np.array([0, 0]),
        ...     event_times=np.array(["2020-01-01T08", "2020-01-01T09"], "M8[us]"),
        ...     event_codes=["A", "B"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     part = PartWriter(folder, visit_rule="day", with_values=False)
        ...     part.add(chunk)
        ...     part.finish({"rows without a code": 0})
        ...     Part(Path(folder)).counts["visits"]
        1
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        visit_rule: VisitRule = "day",
        with_values: bool = False,
        name: str = "",
    ) -> None:
        self.folder = Path(folder)
        self.visit_rule = checked_rule(visit_rule)
        self.with_values = with_values
        self.name = name or str(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._codes: dict[str, int] = {}
        self._counts: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._files: dict[str, BinaryIO] = {
            stream: (self.folder / f"{stream}.bin").open("xb")
            for stream in STREAMS
            if with_values or stream not in _OF_VALUES
        }

    def add(self, chunk: SubjectChunk) -> None:
        """Append whole subjects: none of them may be in another chunk or part."""
        assert chunk.birth_times is not None
        assert chunk.death_times is not None
        times = chunk.event_times.view(np.int64)
        subject = chunk.event_subject
        rising = (subject[1:] > subject[:-1]) | (
            (subject[1:] == subject[:-1]) & (times[1:] >= times[:-1])  # a difference can overflow
        )
        order = None if rising.all() else np.lexsort((times, subject))
        codes = self._part_codes(chunk)
        values = chunk.event_values if self.with_values else None
        of_visits: list[Any] = [chunk.event_visits, chunk.visit_starts, chunk.event_ends]
        if order is not None:
            times, subject, codes = times[order], subject[order], codes[order]
            values, *of_visits = _taken(order, values, *of_visits)
        static = times == NAT
        p = len(chunk.subject_ids)
        self._add_static(p, subject, codes, values, static)
        if static.any():
            timed = np.flatnonzero(~static)
            times, subject, codes = times[timed], subject[timed], codes[timed]
            values, *of_visits = _taken(timed, values, *of_visits)
        self._add_visits(p, subject, times, codes, values, *of_visits)
        self._add_periods(p, chunk)
        self._write("subject_ids", chunk.subject_ids)
        self._write("birth_times", chunk.birth_times)
        self._write("death_times", chunk.death_times)
        self._counts["patients"] += p
        self._counts["events"] += len(chunk.event_times)
        self._counts["births"] += int(np.count_nonzero(~np.isnat(chunk.birth_times)))
        self._counts["deaths"] += int(np.count_nonzero(~np.isnat(chunk.death_times)))

    def finish(self, left_out: Mapping[str, int] | None = None) -> None:
        """Close the part; ``left_out`` counts what the reader has not taken up, by reason."""
        for stream, file in self._files.items():
            with naming(self.folder / f"{stream}.bin"):
                file.close()
        counted = Counter(left_out or {})
        for reason, n in self._left_out.items():
            counted[reason] += n
        header = {
            "name": self.name,
            "visit_rule": self.visit_rule,
            "with_values": self.with_values,
            "counts": dict(self._counts),
            "left_out": {reason: int(n) for reason, n in counted.items()},
        }
        write_json(self.folder / PART_CODES, list(self._codes))
        write_json(self.folder / PART, header)

    def _write(self, stream: str, array: Array) -> None:
        data = np.ascontiguousarray(array, STREAMS[stream])
        with naming(self.folder / f"{stream}.bin"):
            self._files[stream].write(data.view(np.uint8).data)

    def _part_codes(self, chunk: SubjectChunk) -> Ints:
        """The events' codes as numbers of this part, in which only codes that occur are listed."""
        assert chunk.chunk_codes is not None
        of_chunk = np.asarray(chunk.event_codes)
        occurs = np.zeros(len(chunk.chunk_codes), bool)
        occurs[of_chunk] = True
        of_part = np.zeros(len(occurs), np.int64)
        for i in np.flatnonzero(occurs).tolist():
            of_part[i] = self._codes.setdefault(str(chunk.chunk_codes[i]), len(self._codes))
        return of_part[of_chunk]

    def _write_entries(self, entries: Entries, prefix: str) -> None:
        self._write(f"{prefix}codes", entries.codes)
        self._counts[f"{prefix}entries"] += len(entries.codes)
        if entries.values is not None:
            self._write(f"{prefix}values", entries.values)
            self._counts[f"{prefix}values"] += int(np.count_nonzero(~np.isnan(entries.values)))

    def _add_static(
        self,
        p: int,
        subject: Ints,
        codes: Ints,
        values: NDArray[np.float32] | None,
        static: NDArray[np.bool_],
    ) -> None:
        at = np.flatnonzero(static)
        of_static = None if values is None else values[at]
        entries = distinct_entries(subject[at], codes[at], of_static, len(self._codes))
        self._left_out[SUPERSEDED_STATIC] += entries.superseded
        self._write_entries(entries, "static_")
        self._write("patient_statics", np.bincount(entries.group, minlength=p))

    def _add_visits(
        self,
        p: int,
        subject: Ints,
        times: Ints,
        codes: Ints,
        values: NDArray[np.float32] | None,
        keys: Ints | None,
        starts: Array | None,
        ends: Array | None,
    ) -> None:
        starts, ends = (None if c is None else c.view(np.int64) for c in (starts, ends))
        visits = group_visits(subject, times, self.visit_rule, keys, starts, ends)
        entries = distinct_entries(visits.of_event, codes, values, len(self._codes))
        n_visits = len(visits.start)
        self._left_out[SUPERSEDED] += entries.superseded
        self._write_entries(entries, "")
        self._write("visit_times", visits.start.view("M8[us]"))
        self._write("visit_ends", visits.end.view("M8[us]"))
        self._write("visit_entries", np.bincount(entries.group, minlength=n_visits))
        of_patient = np.bincount(visits.subject, minlength=p)
        self._write("patient_visits", of_patient)
        self._counts["visits"] += n_visits
        self._counts["patients without visits"] += int(np.count_nonzero(of_patient == 0))

    def _add_periods(self, p: int, chunk: SubjectChunk) -> None:
        assert chunk.period_subject is not None
        assert chunk.period_starts is not None
        assert chunk.period_ends is not None
        starts, ends = chunk.period_starts.view(np.int64), chunk.period_ends.view(np.int64)
        real = np.flatnonzero(ends > starts)
        self._left_out[NO_PERIOD] += len(ends) - len(real)
        subject, starts, ends = merged_periods(chunk.period_subject[real], starts[real], ends[real])
        self._write("patient_periods", np.bincount(subject, minlength=p))
        self._write("period_starts", starts.view("M8[us]"))
        self._write("period_ends", ends.view("M8[us]"))
        self._counts["periods"] += len(starts)


def merged_periods(subject: Ints, starts: Ints, ends: Ints) -> tuple[Ints, Ints, Ints]:
    """Periods by subject and start; those that overlap or follow without a gap are one.

    Example:
        >>> merged_periods(np.zeros(3, int), np.array([5, 0, 9]), np.array([7, 6, 10]))
        (array([0, 0]), array([0, 9]), array([ 7, 10]))
    """
    order = np.lexsort((starts, subject))
    subject, starts, ends = subject[order], starts[order], ends[order]
    # The latest end so far of the same subject, as a running maximum of (subject, rank of the end).
    by_end = np.argsort(ends, kind="stable")
    rank = np.empty_like(by_end)
    rank[by_end] = np.arange(len(by_end))
    latest = np.maximum.accumulate(subject * len(ends) + rank) - subject * len(ends)
    latest_end = ends[by_end[latest]] if len(ends) else ends
    new = changes(subject)
    new[1:] |= starts[1:] > latest_end[:-1]
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(ends))[: len(first)] - 1
    return subject[first], starts[first], latest_end[last]


class Part:
    """A finished part, to be read back piece by piece.

    Raises:
        ValueError: a folder without a finished part, or files of another size than it says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / PART
        if not path.is_file():
            raise ValueError(f"{self.folder}: expected a finished part, got no {PART}")
        header: dict[str, Any] = read_json(path, "a part's header")
        self.name: str = header["name"]
        self.visit_rule: VisitRule = header["visit_rule"]
        self.with_values: bool = header["with_values"]
        self.counts: Counter[str] = Counter(header["counts"])
        self.left_out: dict[str, int] = header["left_out"]

    def codes(self) -> list[str]:
        """The strings that the part's codes stand for; read anew, for there may be many parts."""
        return read_json(self.folder / PART_CODES, "a part's codes")

    def whole(self, stream: str) -> Array:
        """All of a stream: for what there is one of per patient."""
        return np.fromfile(self.folder / f"{stream}.bin", STREAMS[stream])

    def pieces(self, stream: str, most: int) -> Iterator[Array]:
        """A stream in pieces of at most ``most`` elements."""
        dtype = np.dtype(STREAMS[stream])
        with (self.folder / f"{stream}.bin").open("rb") as file:
            while len(piece := np.fromfile(file, dtype, most)):
                yield piece

    def reader(self, stream: str) -> StreamReader:
        return StreamReader(self.folder / f"{stream}.bin", np.dtype(STREAMS[stream]))


class StreamReader:
    """Takes a stream's elements in order, as many as asked for."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file, self._dtype = path.open("rb"), dtype

    def take(self, n: int) -> Array:
        taken = np.fromfile(self._file, self._dtype, n)
        if len(taken) != n:
            raise ValueError(
                f"{self._file.name}: expected {n} more elements, got {len(taken)}: the part changed"
            )
        return taken

    def close(self) -> None:
        self._file.close()


def _taken(at: Ints, *columns: Array | None) -> list[Any]:
    return [None if column is None else column[at] for column in columns]
