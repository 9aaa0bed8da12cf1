"""Columns of DuckDB tables as integers and days, without a loss: what a cast would round, cut off
or move to another day is found and refused."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

INTEGERS = frozenset(
    ["TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"]
)
WIDE_INTEGERS = frozenset({"UBIGINT", "HUGEINT", "UHUGEINT"})
# Whole floats above are not the numbers that were meant: neighbours have merged.
EXACT_UP_TO = {"FLOAT": 2**24, "DOUBLE": 2**53}
TIMESTAMPS = frozenset({"TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"})
DAY_AS_TEXT = r"\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}(:\d{2}(\.\d+)?)?)?"  # no zone


class Place(NamedTuple):
    """A schema of the connection's own database, or of an attached one."""

    catalog: str
    schema: str

    def __str__(self) -> str:
        return f"{_quoted(self.catalog)}.{_quoted(self.schema)}"


class Table(NamedTuple):
    """Where a table is, and its columns' types by their names in lower case."""

    name: str
    columns: dict[str, str]


class Column(NamedTuple):
    """An SQL expression, and which rows it would change (None: none)."""

    value: str
    lossy: str | None


def find_place(connection: Any, schema: str | None) -> Place:
    """``schema`` may be a schema of the current database, ``catalogue.schema``, or an attached
    catalogue, of which the default schema is taken. Names are compared without case."""
    here = Place(*connection.execute("SELECT current_database(), current_schema()").fetchone())
    if schema is None:
        return here
    candidates = [Place(here.catalog, schema)]
    candidates += [
        Place(schema[: dot.start()], schema[dot.end() :]) for dot in re.finditer(r"\.", schema)
    ]
    candidates += [Place(schema, default) for default in ("main", "public")]
    for candidate in candidates:
        found = connection.execute(
            "SELECT table_catalog, table_schema FROM information_schema.tables"
            " WHERE lower(table_catalog) = lower(?) AND lower(table_schema) = lower(?) LIMIT 1",
            list(candidate),
        ).fetchone()
        if found is not None:
            return Place(*found)
    return candidates[0]


def find_table(connection: Any, place: Place, name: str) -> Table:
    """The table; without columns where there is none of that name."""
    rows = connection.execute(
        "SELECT table_name, lower(column_name), data_type FROM information_schema.columns"
        " WHERE lower(table_name) = lower(?) AND table_catalog = ? AND table_schema = ?",
        [name, *place],
    ).fetchall()
    columns = {column: str(dtype).upper() for _, column, dtype in rows}
    return Table(f"{place}.{_quoted(rows[0][0] if rows else name)}", columns)


def whole_number(table: Table, column: str) -> Column:
    """A BIGINT; NaN, which data frames write for a missing number, is NULL.

    Raises:
        TypeError: a column of another kind.
    """
    dtype, x = table.columns[column], _quoted(column)
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
    dtype, x = table.columns[column], _quoted(column)
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
        f"SELECT count(*), CAST(min({_quoted(column)}) AS VARCHAR) FROM {table.name}"
        f" WHERE {converted.lossy}"
    ).fetchone()
    if count:
        raise ValueError(
            f"{table.name}, column {column}: expected {kind}, got {first!r} "
            f"({count} rows have no such value)"
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
