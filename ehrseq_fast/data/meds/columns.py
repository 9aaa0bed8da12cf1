"""Rows of a MEDS file as NumPy columns; an error says which column and which row it is about."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array
from ..store.format import NAT
from ..store.visits import NO_VISIT
from .arrow import pyarrow
from .names import CODE, SUBJECT, TIME, VALUE

Ints = NDArray[np.int64]

NO_CODE = -1
_FIRST, _END = np.datetime64("0001-01-01", "us"), np.datetime64("10000-01-01", "us")


@dataclass
class Rows:
    """Consecutive rows of a file.

    ``times`` are microseconds (``NAT`` = none), ``codes`` numbers of the file's :class:`CodeTable`
    (``NO_CODE`` = none), ``visits`` the source's keys (``NO_VISIT`` = none), ``ends`` when their
    visits end, as ``times``.
    """

    subjects: Ints
    times: Ints
    codes: Ints
    values: NDArray[np.float32] | None
    visits: Ints | None
    ends: Ints | None

    def __len__(self) -> int:
        return len(self.subjects)

    def taken(self, at: slice | Array) -> Rows:
        return _rows([None if c is None else c[at] for c in self._columns()])

    @staticmethod
    def joined(rows: list[Rows]) -> Rows:
        if len(rows) == 1:
            return rows[0]
        columns = zip(*(one._columns() for one in rows), strict=True)
        return _rows([None if column[0] is None else np.concatenate(column) for column in columns])

    def _columns(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]


def _rows(columns: list[Any]) -> Rows:
    return Rows(*columns)


class CodeTable:
    """The distinct codes of a file, numbered as they come."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._last: tuple[Any, Ints] | None = None

    def numbers(self, column: Any, first_row: int) -> Ints:
        """Of a dictionary-encoded column; ``NO_CODE`` for a null and for an empty string."""
        dictionary = column.dictionary
        if self._last is None or not dictionary.equals(self._last[0]):
            self._last = dictionary, self._of_dictionary(dictionary, column, first_row)
        of_dictionary = self._last[1]
        indices = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        # a null index takes the entry that was appended
        return of_dictionary[indices]

    def _of_dictionary(self, dictionary: Any, column: Any, first_row: int) -> Ints:
        numbers = np.full(len(dictionary) + 1, NO_CODE, np.int64)
        try:
            names = dictionary.to_pylist()
        except UnicodeDecodeError:
            raise _not_text(self.where, dictionary, column, first_row) from None
        for i, name in enumerate(names):
            if not name:
                continue
            number = self._numbers.setdefault(name, len(self.names))
            if number == len(self.names):
                self.names.append(name)
            numbers[i] = number
        return numbers


def _not_text(where: str, dictionary: Any, column: Any, first_row: int) -> ValueError:
    for i, raw in enumerate(dictionary.cast(pyarrow().large_binary()).to_pylist()):
        try:
            (raw or b"").decode()
        except UnicodeDecodeError:
            indices = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
            rows = np.flatnonzero(indices == i)
            row = f", row {first_row + rows[0]}" if len(rows) else ""
            return ValueError(f"{where}, column {CODE}{row}: expected UTF-8, got {raw!r:.60}")
    return ValueError(f"{where}, column {CODE}: expected UTF-8")


def check_types(where: str, schema: Any, visit_column: str | None, end_column: str | None) -> None:
    """Refuse a file by its columns, before a row is read.

    Raises:
        ValueError: a column is missing.
        TypeError: a column is of another type.
    """
    pa = pyarrow()
    t = pa.types
    instants = (
        "timestamps or dates",
        lambda kind: t.is_timestamp(kind) or t.is_date(kind) or t.is_null(kind),
    )
    needed = {
        SUBJECT: ("integers", t.is_integer),
        TIME: instants,
        CODE: ("strings", lambda kind: _is_text(t, kind)),
        VALUE: (
            "numbers",
            lambda kind: t.is_floating(kind) or t.is_integer(kind) or t.is_null(kind),
        ),
    }
    if visit_column is not None:
        needed[visit_column] = ("integers", lambda kind: t.is_integer(kind) or t.is_null(kind))
    if end_column is not None:
        needed[end_column] = instants
    for name, (expected, is_right) in needed.items():
        found = schema.names.count(name)
        if not found and name == VALUE:
            continue
        if found != 1:
            columns = ", ".join(map(str, schema.names)) or "none"
            what = "has no such column" if not found else f"has {found} such columns"
            raise ValueError(f"{where}: expected the column {name!r}; it {what}, but: {columns}")
        kind = schema.field(name).type
        if not is_right(kind):
            raise TypeError(f"{where}, column {name}: expected {expected}, got {kind}")


def _is_text(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    view = getattr(types, "is_string_view", None)
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_null(kind)
        or bool(view and view(kind))
    )


def rows_of(
    where: str,
    batch: Any,
    first_row: int,
    table: CodeTable,
    visit_column: str | None,
    end_column: str | None,
) -> tuple[Rows, int]:
    """A batch's columns, and how many of its values are NaN and not null.

    Raises:
        ValueError: a subject that is null or beyond int64, a time outside the years 1 to 9999 or
            not in whole microseconds, a value that float32 does not hold, a code that is not UTF-8.
    """
    pa = pyarrow()
    subjects = _longs(where, batch.column(SUBJECT), SUBJECT, first_row, None)
    times = _times(where, batch.column(TIME), TIME, first_row, subjects)
    code = batch.column(CODE)
    if pa.types.is_null(code.type):
        code = code.cast(pa.string())
    if not pa.types.is_dictionary(code.type):
        code = code.dictionary_encode()
    codes = table.numbers(code, first_row)
    values, n_nan = None, 0
    if VALUE in batch.schema.names:
        values = _values(where, batch.column(VALUE), first_row, subjects)
        n_nan = int(np.count_nonzero(np.isnan(values))) - batch.column(VALUE).null_count
    visits = None
    if visit_column is not None:
        visits = _longs(where, batch.column(visit_column), visit_column, first_row, NO_VISIT)
    ends = None
    if end_column is not None:
        ends = _times(where, batch.column(end_column), end_column, first_row, subjects)
        _refuse_early(where, ends, times, end_column, first_row, subjects)
    return Rows(subjects, times, codes, values, visits, ends), n_nan


def _longs(where: str, column: Any, name: str, first_row: int, null: int | None) -> Ints:
    pa = pyarrow()
    if column.null_count and null is None:
        row = first_row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(
            f"{where}, column {name}, row {row}: expected a subject, got null "
            f"({column.null_count} in these rows)"
        )
    try:
        column = column.cast(pa.int64())
    except pa.ArrowInvalid:
        most = np.iinfo(np.int64).max
        wide = column.fill_null(0).to_numpy(zero_copy_only=False)
        at = int(np.flatnonzero(wide > most)[0])
        raise ValueError(
            f"{where}, column {name}, row {first_row + at}: expected what int64 holds, got "
            f"{wide[at]}"
        ) from None
    if column.null_count:
        column = column.fill_null(null)
    return column.to_numpy(zero_copy_only=False)


def _times(where: str, column: Any, name: str, first_row: int, subjects: Ints) -> Ints:
    pa = pyarrow()
    if pa.types.is_null(column.type):
        return np.full(len(column), NAT)
    if pa.types.is_date(column.type):
        # the days of date64 are milliseconds
        column = column.cast(pa.timestamp("s" if pa.types.is_date32(column.type) else "ms"))
    unit = column.type.unit
    known = column.is_valid().to_numpy(zero_copy_only=False)
    raw = column.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    limits = np.array([_FIRST, _END]).astype(f"M8[{unit}]", casting="unsafe").view(np.int64)
    if unit == "ns":  # holds the years 1677 to 2262 only
        limits = np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max])
    wrong = known & ((raw < limits[0]) | (raw >= limits[1]))
    expected = "the years 1 to 9999"
    if unit == "ns" and not wrong.any():
        wrong, expected = known & (raw % 1000 != 0), "whole microseconds"
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{where}, column {name}, row {first_row + at} (subject {subjects[at]}): expected "
            f"{expected}, got {raw[at]} {unit} since 1970"
        )
    scale = {"s": 1_000_000, "ms": 1000, "us": 1, "ns": 1}[unit]
    times = raw // 1000 if unit == "ns" else raw * scale
    return np.where(known, times, NAT)


def _refuse_early(
    where: str, ends: Ints, times: Ints, name: str, first_row: int, subjects: Ints
) -> None:
    early = np.flatnonzero((ends != NAT) & (ends < times))
    if len(early):
        at = early[0]
        end, time = (np.datetime64(int(column[at]), "us") for column in (ends, times))
        raise ValueError(
            f"{where}, column {name}, row {first_row + at} (subject {subjects[at]}): expected no "
            f"end before the event's {TIME}, {time}, got {end}"
        )


def _values(where: str, column: Any, first_row: int, subjects: Ints) -> NDArray[np.float32]:
    """float32, rounded; NaN where null."""
    pa = pyarrow()
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan, np.float32)
    wide = column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        values = wide.astype(np.float32)
    wrong = np.isinf(values) & np.isfinite(wide)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{where}, column {VALUE}, row {first_row + at} (subject {subjects[at]}): expected "
            f"what float32 holds, got {wide[at]:g}"
        )
    return values
