"""Columns of DuckDB tables as integers and days, without a loss: what a cast would round, cut off
or move to another day is found and refused."""

from __future__ import annotations

from typing import Any, NamedTuple

from .duckdb_tables import Table, quoted

INTEGERS = frozenset(
    ["TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"]
)
WIDE_INTEGERS = frozenset({"UBIGINT", "HUGEINT", "UHUGEINT"})
# Whole floats above may not be the numbers that were meant: adjacent integers share one float.
EXACT_UP_TO = {"FLOAT": 2**24, "DOUBLE": 2**53}
TIMESTAMPS = frozenset({"TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"})
DAY_AS_TEXT = r"\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}(:\d{2}(\.\d+)?)?)?"  # no zone


class Column(NamedTuple):
    """An SQL expression, and which rows it would change (None: none)."""

    value: str
    lossy: str | None


def whole_number(table: Table, column: str) -> Column:
    """A BIGINT; NaN, which data frames write for a missing number, is NULL.

    Raises:
        TypeError: a column of another kind.
    """
    dtype, x = table.columns[column], quoted(column)
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


def day(table: Table, column: str) -> Column:
    """A DATE, of a TIMESTAMPTZ the one in UTC whatever the session's zone; infinity is NULL.

    Raises:
        TypeError: a column of another kind.
    """
    dtype, x = table.columns[column], quoted(column)
    if dtype == "DATE":
        return Column(f"CASE WHEN isfinite({x}) THEN {x} END", None)
    if dtype in TIMESTAMPS:
        stamp = f"CAST({x} AS TIMESTAMP)"
        return Column(f"CASE WHEN isfinite({stamp}) THEN CAST({stamp} AS DATE) END", None)
    if dtype in ("TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ"):
        utc = f"make_timestamp(epoch_us({x}))"
        return Column(f"CASE WHEN isfinite({x}) THEN CAST({utc} AS DATE) END", None)
    if dtype == "VARCHAR":
        cast = f"TRY_CAST({x} AS DATE)"
        is_day = f"regexp_full_match({x}, '{DAY_AS_TEXT}') AND {cast} IS NOT NULL"
        return Column(cast, f"{x} IS NOT NULL AND NOT ({is_day})")
    raise TypeError(f"{table.name}, column {column}: expected dates or timestamps, got {dtype}")


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
