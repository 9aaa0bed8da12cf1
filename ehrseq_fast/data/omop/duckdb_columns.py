"""Columns of DuckDB tables as integers, numbers, days and instants, without a loss: what a cast
would round, cut off or move to another day is found and refused."""

from __future__ import annotations

from typing import Any, NamedTuple

from .duckdb_tables import Table, quoted

INTEGERS = frozenset(
    ["TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"]
)
WIDE_INTEGERS = frozenset({"UBIGINT", "HUGEINT", "UHUGEINT"})
# Whole floats above may not be the numbers that were meant: adjacent integers share one float.
EXACT_UP_TO = {"FLOAT": 2**24, "DOUBLE": 2**53}
FLOATS = frozenset(EXACT_UP_TO)
TIMESTAMPS = frozenset({"TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"})
ZONED = frozenset({"TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ"})
DAY_AS_TEXT = r"\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}(:\d{2}(\.\d+)?)?)?"  # no zone
NUMBER_AS_TEXT = r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*|\s*[+-]?(inf|infinity|nan)\s*"


class Column(NamedTuple):
    """An SQL expression, and which rows it would change (None: none)."""

    value: str
    lossy: str | None


def whole_number(table: Table, column: str) -> Column:
    """A BIGINT; NaN, which data frames write for a missing number, is NULL.

    Raises:
        TypeError: a column of another kind.
    """
    dtype, x = _typed(table, column)
    if dtype in INTEGERS:
        return Column(f"CAST({x} AS BIGINT)", None)
    cast = f"TRY_CAST({x} AS BIGINT)"
    if dtype in WIDE_INTEGERS or dtype.startswith("DECIMAL"):
        back = f"TRY_CAST({cast} AS {dtype})"
        return Column(cast, f"{x} IS NOT NULL AND {back} IS DISTINCT FROM {x}")
    if dtype in EXACT_UP_TO:
        most = EXACT_UP_TO[dtype]
        return Column(
            f"CASE WHEN isnan({x}) THEN NULL ELSE {cast} END",
            f"NOT isnan({x}) AND ({x} <> trunc({x}) OR abs({x}) > {most})",
        )
    if dtype == "VARCHAR":
        return Column(cast, f"{x} IS NOT NULL AND CAST({cast} AS VARCHAR) IS DISTINCT FROM {x}")
    raise TypeError(f"{table.name}, column {column}: expected integers, got {dtype}")


def number(table: Table, column: str) -> Column:
    """A DOUBLE.

    Raises:
        TypeError: a column of another kind.
    """
    dtype, x = _typed(table, column)
    if dtype in INTEGERS | WIDE_INTEGERS | FLOATS or dtype.startswith("DECIMAL"):
        return Column(f"CAST({x} AS DOUBLE)", None)
    if dtype == "VARCHAR":
        cast = f"TRY_CAST({x} AS DOUBLE)"
        is_number = f"regexp_full_match({x}, '{NUMBER_AS_TEXT}', 'i') AND {cast} IS NOT NULL"
        return Column(cast, f"{x} IS NOT NULL AND NOT ({is_number})")
    raise TypeError(f"{table.name}, column {column}: expected numbers, got {dtype}")


def day(table: Table, column: str) -> Column:
    """A DATE, of a TIMESTAMPTZ the one in UTC whatever the session's zone; infinity is NULL.

    Raises:
        TypeError: a column of another kind.
    """
    dtype, x = _typed(table, column)
    if dtype == "DATE":
        return Column(f"CASE WHEN isfinite({x}) THEN {x} END", None)
    if dtype in TIMESTAMPS:
        return Column(f"CASE WHEN {_is_finite(x)} THEN CAST({_utc(dtype, x)} AS DATE) END", None)
    if dtype in ZONED:
        return Column(f"CASE WHEN isfinite({x}) THEN CAST({_utc(dtype, x)} AS DATE) END", None)
    if dtype == "VARCHAR":
        cast = f"TRY_CAST({x} AS DATE)"
        return Column(cast, _no_day(x, cast))
    raise TypeError(f"{table.name}, column {column}: expected dates or timestamps, got {dtype}")


def instant(table: Table, column: str) -> Column:
    """Microseconds since 1970-01-01 in UTC, as a BIGINT; a value without a zone is taken as UTC.
    NULL for infinity and for days that 64 bits of microseconds do not reach.

    Raises:
        TypeError: a column of another kind.
    """
    dtype, x = _typed(table, column)
    if dtype == "DATE":
        return Column(
            f"CASE WHEN isfinite({x}) THEN epoch_us(TRY_CAST({x} AS TIMESTAMP)) END", None
        )
    if dtype in TIMESTAMPS:
        return Column(f"CASE WHEN {_is_finite(x)} THEN epoch_us({_utc(dtype, x)}) END", None)
    if dtype in ZONED:
        return Column(f"CASE WHEN isfinite({x}) THEN epoch_us({x}) END", None)
    if dtype == "VARCHAR":
        # DuckDB 1.0 casts no time of day without its seconds.
        whole = (
            f"CASE WHEN regexp_full_match({x}, '.{{10}}[ T].{{5}}') THEN {x} || ':00' ELSE {x} END"
        )
        cast = f"TRY_CAST({whole} AS TIMESTAMP)"
        return Column(f"epoch_us({cast})", _no_day(x, cast))
    raise TypeError(f"{table.name}, column {column}: expected dates or timestamps, got {dtype}")


def _typed(table: Table, column: str) -> tuple[str, str]:
    """The column's type, and its name in SQL; an ENUM as the text of its members."""
    dtype, x = table.columns[column], quoted(column)
    return ("VARCHAR", f"CAST({x} AS VARCHAR)") if dtype.startswith("ENUM") else (dtype, x)


def _utc(dtype: str, x: str) -> str:
    """A TIMESTAMP. Of nanoseconds the microsecond that they are in: a cast rounds in DuckDB 2, and
    so may give the next day."""
    if dtype in ZONED:
        return f"make_timestamp(epoch_us({x}))"
    if dtype == "TIMESTAMP_NS":
        below = f"((epoch_ns({x}) % 1000 + 1000) % 1000)"
        return f"make_timestamp((epoch_ns({x}) - {below}) // 1000)"
    return f"CAST({x} AS TIMESTAMP)"


def _is_finite(x: str) -> str:
    return f"isfinite(CAST({x} AS TIMESTAMP))"


def _no_day(x: str, cast: str) -> str:
    is_day = f"regexp_full_match({x}, '{DAY_AS_TEXT}') AND {cast} IS NOT NULL"
    return f"{x} IS NOT NULL AND NOT ({is_day})"


def refuse_lossy(connection: Any, table: Table, column: str, converted: Column, kind: str) -> None:
    """``ValueError`` where the conversion would change a value."""
    if converted.lossy is None:
        return
    count, first = connection.execute(
        f"SELECT count(*), CAST(min({quoted(column)}) AS VARCHAR) FROM {table.name}"
        f" WHERE {converted.lossy}"
    ).fetchone()
    if count:
        raise ValueError(
            f"{table.name}, column {column}: expected {kind}, got {first!r} "
            f"({count} rows have no such value)"
        )
