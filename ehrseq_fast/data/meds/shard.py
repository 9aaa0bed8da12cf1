"""One MEDS file as one part of a store, read in batches of bounded size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..store import PartWriter, SubjectChunk
from ..store.format import NAT
from ..store.visits import VisitRule, changes
from .arrow import parquet_errors, pyarrow
from .columns import NO_CODE, CodeTable, Rows, check_types, rows_of
from .names import (
    BIRTH,
    CODE,
    DEATH,
    NO_EVENTS,
    PERIOD_END,
    PERIOD_START,
    SUBJECT,
    TIME,
    VALUE,
    reserved,
)

Ints = NDArray[np.int64]

BATCH = 1 << 17  # rows
_READ_BUFFER = 1 << 20
COLUMNS = "columns_not_read.json"  # in a part's folder
KINDS = (BIRTH, DEATH, PERIOD_START, PERIOD_END, NO_EVENTS)

NO_CODES = "rows without a code"
NAN_VALUES = "numeric values that are not a number"
NO_TIME = "births, deaths and observation periods without a time"
LATER_BIRTHS, LATER_DEATHS = "further births of a subject", "further deaths of a subject"
UNPAIRED = "starts or ends of observation periods without the other"
THEIR_VALUES = "numeric values of births, deaths and observation periods"
CAUSES = "what follows // in codes of births and deaths"


@dataclass(frozen=True)
class Shard:
    """A file to read, and how."""

    path: Path
    name: str  # relative to the dataset
    visit_rule: VisitRule
    visit_column: str | None
    end_column: str | None  # when the visit of an event ends


def columns_not_read(part: Path) -> list[str]:
    """Which columns of its file the part has not."""
    return json.loads((part / COLUMNS).read_text())


def write_part(folder: Path, shard: Shard) -> None:
    """Read the file into a part of a store.

    Raises:
        ValueError: a file that is not Parquet or damaged, a column that is missing; a subject
            that is null or not contiguous, times that fall within a subject.
        TypeError: a column of another type.
    """
    _Reader(folder, shard).read()


class _Reader:
    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard, self.where = shard, str(shard.path)
        self.folder = folder
        self.table = CodeTable(self.where)
        self.kinds = np.empty(0, np.int8)  # of the table's codes: an index into KINDS, or -1
        self.suffixed = np.empty(0, bool)
        self.left_out: Counter[str] = Counter()
        self.runs: list[tuple[Ints, Ints]] = []  # subjects, and the rows where they begin

    def read(self) -> None:
        with parquet_errors(self.where):
            metadata = pyarrow().parquet.read_metadata(self.shard.path)
            schema = metadata.schema.to_arrow_schema()
        check_types(self.where, schema, self.shard.visit_column, self.shard.end_column)
        with parquet_errors(self.where):
            file = self._open(metadata)
        with_values = VALUE in schema.names
        part = PartWriter(
            self.folder,
            visit_rule=self.shard.visit_rule,
            with_values=with_values,
            name=self.shard.name,
        )
        read = {SUBJECT, TIME, CODE, VALUE, self.shard.visit_column, self.shard.end_column}
        others = sorted(set(schema.names) - read)
        (self.folder / COLUMNS).write_text(json.dumps(others))
        for rows, first_row in self._whole_subjects(file, with_values):
            part.add(self._chunk(rows, first_row))
        self._refuse_scattered()
        part.finish(self.left_out)

    def _open(self, metadata: Any) -> Any:
        # without pre_buffer, a row group is not held in memory whole
        return pyarrow().parquet.ParquetFile(
            self.shard.path,
            metadata=metadata,
            pre_buffer=False,
            buffer_size=_READ_BUFFER,
            read_dictionary=[CODE],
            page_checksum_verification=True,  # where the file has checksums
        )

    def _batches(self, file: Any, with_values: bool) -> Iterator[tuple[Rows, int]]:
        columns = [SUBJECT, TIME, CODE]
        if with_values:
            columns.append(VALUE)
        own = (self.shard.visit_column, self.shard.end_column)
        columns += [name for name in own if name is not None]
        row = 0
        batches = file.iter_batches(BATCH, columns=columns, use_threads=False)
        while True:
            with parquet_errors(self.where):
                batch = next(batches, None)
            if batch is None:
                return
            if len(batch):
                rows, n_nan = rows_of(self.where, batch, row, self.table, *own)
                self.left_out[NAN_VALUES] += n_nan
                yield rows, row
            row += len(batch)

    def _whole_subjects(self, file: Any, with_values: bool) -> Iterator[tuple[Rows, int]]:
        """Rows of whole subjects, and the number of the first: the last subject of a batch waits
        for the next."""
        held: list[Rows] = []
        begin = 0
        for rows, row in self._batches(file, with_values):
            last = len(rows) - int(np.argmax(rows.subjects[::-1] != rows.subjects[-1]))
            if (rows.subjects == rows.subjects[-1]).all():
                last = 0
            same = held and held[-1].subjects[-1] == rows.subjects[-1] and not last
            if held and not same:
                head = rows.taken(slice(0, last))
                yield Rows.joined([*held, head] if len(head) else held), begin
                held = []
            elif last:
                yield rows.taken(slice(0, last)), row
            if not held:
                begin = row + last
            held.append(rows.taken(slice(last, None)))
        if held:
            yield Rows.joined(held), begin

    def _chunk(self, rows: Rows, first_row: int) -> SubjectChunk:
        begins = changes(rows.subjects)
        first = np.flatnonzero(begins)
        subject_ids, at = rows.subjects[first], np.cumsum(begins) - 1
        self.runs.append((subject_ids, first + first_row))
        if len(np.unique(subject_ids)) < len(subject_ids):
            self._refuse_scattered()
        self._refuse_unsorted(rows, at, first_row)
        self._know_codes()
        kind = np.where(rows.codes == NO_CODE, -1, self.kinds[rows.codes])
        self.left_out[NO_CODES] += int(np.count_nonzero(rows.codes == NO_CODE))
        self.left_out[CAUSES] += int(np.count_nonzero(self.suffixed[rows.codes[kind >= 0]]))
        if rows.values is not None:
            self.left_out[THEIR_VALUES] += int(np.count_nonzero(~np.isnan(rows.values[kind >= 0])))
        timeless = (kind >= 0) & (kind != KINDS.index(NO_EVENTS)) & (rows.times == NAT)
        self.left_out[NO_TIME] += int(np.count_nonzero(timeless))
        p = len(subject_ids)

        def of_kind(name: str) -> tuple[Ints, Ints]:
            where = np.flatnonzero((kind == KINDS.index(name)) & ~timeless)
            return at[where], rows.times[where]

        periods = self._periods(*of_kind(PERIOD_START), *of_kind(PERIOD_END))
        events = np.flatnonzero((kind < 0) & (rows.codes != NO_CODE))
        event = rows.taken(events)
        return SubjectChunk(
            subject_ids=subject_ids,
            event_subject=at[events],
            event_times=event.times.view("M8[us]"),
            event_codes=event.codes,
            chunk_codes=self.table.names,
            event_values=event.values,
            event_visits=event.visits,
            event_ends=None if event.ends is None else event.ends.view("M8[us]"),
            birth_times=self._first(*of_kind(BIRTH), p, LATER_BIRTHS),
            death_times=self._first(*of_kind(DEATH), p, LATER_DEATHS),
            period_subject=periods[0],
            period_starts=periods[1].view("M8[us]"),
            period_ends=periods[2].view("M8[us]"),
        )

    def _know_codes(self) -> None:
        """Extend what is known of the table's codes by those that were added."""
        new = self.table.names[len(self.kinds) :]
        names = [reserved(code) for code in new]
        kinds = [-1 if name is None else KINDS.index(name) for name in names]
        longer = [name is not None and name != code for name, code in zip(names, new, strict=True)]
        self.kinds = np.append(self.kinds, np.array(kinds, np.int8))
        self.suffixed = np.append(self.suffixed, np.array(longer, bool))
        if not len(self.kinds):  # for NO_CODE to index
            self.kinds, self.suffixed = np.array([-1], np.int8), np.array([False])

    def _first(self, subject: Ints, times: Ints, p: int, further: str) -> Any:
        found = np.full(p, NAT)
        new = changes(subject)
        found[subject[new]] = times[new]
        self.left_out[further] += int(np.count_nonzero(~new))
        return found.view("M8[us]")

    def _periods(
        self, start_of: Ints, starts: Ints, end_of: Ints, ends: Ints
    ) -> tuple[Ints, Ints, Ints]:
        """A subject's first start and first end are a period, the second ones, and so on."""
        most = max(len(starts), len(ends), 1)
        start_key, end_key = (_numbered(of, most) for of in (start_of, end_of))
        pairs, at_start, at_end = np.intersect1d(
            start_key, end_key, assume_unique=True, return_indices=True
        )
        self.left_out[UNPAIRED] += len(starts) + len(ends) - 2 * len(pairs)
        return start_of[at_start], starts[at_start], ends[at_end]

    def _refuse_unsorted(self, rows: Rows, at: Ints, first_row: int) -> None:
        timed = np.flatnonzero(rows.times != NAT)
        times, subject = rows.times[timed], at[timed]
        falls = np.flatnonzero((np.diff(times) < 0) & (np.diff(subject) == 0))
        if len(falls):
            row = timed[falls[0] + 1]
            raise ValueError(
                f"{self.where}, column {TIME}, row {first_row + row} (subject "
                f"{rows.subjects[row]}): expected times that do not fall within a subject, got "
                f"{np.datetime64(int(rows.times[row]), 'us')} after "
                f"{np.datetime64(int(times[falls[0]]), 'us')}"
            )

    def _refuse_scattered(self) -> None:
        if not self.runs:
            return
        subjects = np.concatenate([subjects for subjects, _ in self.runs])
        rows = np.concatenate([rows for _, rows in self.runs])
        order = np.argsort(subjects, kind="stable")
        twice = np.flatnonzero(np.diff(subjects[order]) == 0)
        if len(twice):
            one, other = order[twice[0]], order[twice[0] + 1]
            raise ValueError(
                f"{self.where}: expected the rows of a subject together, got subject "
                f"{subjects[one]} from row {rows[one]} and again from row {rows[other]}"
            )


def _numbered(subject: Ints, most: int) -> Ints:
    """A key of each (subject, how many of this subject came before); subjects ascend."""
    first = np.flatnonzero(changes(subject))
    before = np.arange(len(subject)) - np.repeat(first, np.diff(np.append(first, len(subject))))
    return subject * most + before
