"""The tables of one database as SQL that gives int64 and float64 columns: what is read of each, and
what a first pass over all rows finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .connection import reading
from .duckdb_columns import INTEGERS, Column, day, instant, number, quoted, whole_number
from .duckdb_tables import Place, Table, find_places, find_table
from .tables import EVENT_TABLES, EventTable, find_needed

WHOLE = "whole numbers that int64 holds"
DAYS = "days, as YYYY-MM-DD"
INSTANTS = "dates or timestamps, as YYYY-MM-DD HH:MM:SS"
NUMBERS = "numbers"


class Check(NamedTuple):
    """A column that has to be converted, and the rows in which that would change it."""

    column: str
    lossy: str
    expected: str


@dataclass
class Source:
    """A table as it is read: its name in the Common Data Model, and SQL expressions by the names of
    what they give."""

    name: str
    table: Table
    person: str
    columns: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, table: Table) -> Source:
        person = whole_number(table, "person_id")
        is_plain = table.columns["person_id"] in INTEGERS  # bare, it is compared with zone maps
        source = cls(name, table, quoted("person_id") if is_plain else person.value)
        source._add("person", "person_id", person, WHOLE)
        return source

    def whole(self, name: str, column: str) -> None:
        self._add(name, column, whole_number(self.table, column), WHOLE)

    def number(self, name: str, column: str) -> None:
        self._add(name, column, number(self.table, column), NUMBERS)

    def day(self, name: str, column: str) -> None:
        found = day(self.table, column)
        since = f"CAST({found.value} - DATE '1970-01-01' AS BIGINT)"
        self._add(name, column, Column(since, found.lossy), DAYS)

    def instant(self, name: str, column: str) -> None:
        self._add(name, column, instant(self.table, column), INSTANTS)

    def _add(self, name: str, column: str, converted: Column, expected: str) -> None:
        self.columns[name] = converted.value
        if converted.lossy is not None:
            self.checks.append(Check(column, converted.lossy, expected))


@dataclass
class Sources:
    """What is read of a database. ``missing`` names the optional tables and columns that it lacks,
    with what was expected; ``not_read`` the event tables that it has, but which were not chosen."""

    events: dict[str, Source]
    person: Source | None = None
    period: Source | None = None
    death: Source | None = None
    visit: Source | None = None
    missing: dict[str, str] = field(default_factory=dict)
    not_read: dict[str, Table] = field(default_factory=dict)

    def all(self) -> list[Source]:
        others = (self.person, self.period, self.death, self.visit)
        return [*self.events.values(), *(source for source in others if source is not None)]


def find_sources(
    connection: Any, chosen: Sequence[EventTable] | None, schema: str | None, *, by_visit: bool
) -> Sources:
    """Where the database has what is read: the ``chosen`` event tables, or (None) all that it has.

    Raises:
        LookupError: a chosen event table is missing, or none is there; one lacks a column; with
            ``by_visit`` also ``visit_occurrence`` or the events' ``visit_occurrence_id``.
        TypeError: a column of a type that cannot be read.
    """
    places = find_places(connection, schema)
    sources = Sources({})
    for asked in _present(connection, places, sources, chosen):
        needed = ["person_id", asked.concept, asked.date]
        if by_visit:
            needed.append("visit_occurrence_id")
        table = find_needed(connection, places, schema, asked.table, needed)
        sources.events[asked.table] = _events(asked, table, sources.missing, by_visit=by_visit)
    if by_visit:
        needed = ["person_id", "visit_occurrence_id", "visit_start_date"]
        table = find_needed(connection, places, schema, "visit_occurrence", needed)
        sources.visit = source = Source.of("visit_occurrence", table)
        source.whole("visit", "visit_occurrence_id")
        source.day("day", "visit_start_date")
        if _has(table, "visit_start_datetime", "visit_occurrence", sources.missing):
            source.instant("moment", "visit_start_datetime")
        if _has(table, "visit_end_date", "visit_occurrence", sources.missing):
            source.day("end", "visit_end_date")
    sources.person = _person(_optional(connection, places, "person", (), sources.missing), sources)
    dates = ("observation_period_start_date", "observation_period_end_date")
    found = _optional(connection, places, "observation_period", dates, sources.missing)
    if found is not None:
        sources.period = source = Source.of("observation_period", found)
        source.day("start", dates[0])
        source.day("end", dates[1])
        if _is_empty(connection, found):
            sources.missing["observation_period"] = "the table has no rows"
            sources.period = None
    found = _optional(connection, places, "death", ("death_date",), sources.missing)
    if found is not None:
        sources.death = source = Source.of("death", found)
        source.day("day", "death_date")
        if _has(found, "death_datetime", "death", sources.missing):
            source.instant("moment", "death_datetime")
    return sources


def _present(
    connection: Any,
    places: Sequence[Place],
    sources: Sources,
    chosen: Sequence[EventTable] | None,
) -> Sequence[EventTable]:
    """The event tables to read; the others are noted in ``sources``."""
    known = EVENT_TABLES.values()
    found = {event: find_table(connection, places, event.table) for event in known}
    # One with none of the columns, as a header taken for a row leaves it, is no such table.
    needed = {event: {"person_id", event.concept, event.date} for event in known}
    present = [event for event in known if needed[event] & found[event].columns.keys()]
    if chosen is None:
        if not present:
            return tuple(known)  # the first is what is missing
        for event in known:
            if not found[event].columns:
                sources.missing[event.table] = "no such table"
            elif event not in present:
                lacks = ", ".join(sorted(needed[event]))
                sources.missing[event.table] = f"the table lacks {lacks}"
        return present
    sources.not_read = {event.table: found[event] for event in present if event not in chosen}
    return chosen


def _events(asked: EventTable, table: Table, missing: dict[str, str], *, by_visit: bool) -> Source:
    source = Source.of(asked.table, table)
    source.whole("concept", asked.concept)
    source.day("day", asked.date)
    if _has(table, asked.datetime, asked.table, missing):
        source.instant("moment", asked.datetime)
    if asked.value is not None and _has(table, asked.value, asked.table, missing):
        source.number("value", asked.value)
    if by_visit:
        source.whole("visit", "visit_occurrence_id")
    return source


def _person(table: Table | None, sources: Sources) -> Source | None:
    if table is None:
        return None
    source = Source.of("person", table)
    if _has(table, "birth_datetime", "person", sources.missing):
        source.instant("birth", "birth_datetime")
    for name in ("year", "month", "day"):
        if _has(table, f"{name}_of_birth", "person", sources.missing):
            source.whole(name, f"{name}_of_birth")
    for name in ("gender", "race", "ethnicity"):
        if _has(table, f"{name}_concept_id", "person", sources.missing):
            source.whole(name, f"{name}_concept_id")
    return source


def _optional(
    connection: Any,
    places: Sequence[Place],
    name: str,
    columns: Iterable[str],
    missing: dict[str, str],
) -> Table | None:
    table = find_table(connection, places, name)
    lacks = {"person_id", *columns} - table.columns.keys()
    if not table.columns:
        missing[name] = "no such table"
    elif lacks:
        missing[name] = f"the table lacks {', '.join(sorted(lacks))}"
    else:
        return table
    return None


def _is_empty(connection: Any, table: Table) -> bool:
    with reading(f"table {table.name}"):
        return connection.execute(f"SELECT 1 FROM {table.name} LIMIT 1").fetchone() is None


def _has(table: Table, column: str, name: str, missing: dict[str, str]) -> bool:
    if column in table.columns:
        return True
    missing[f"{name}.{column}"] = "no such column"
    return False


def count_rows(connection: Any, table: Table) -> int | None:
    """None where it is a view that cannot be computed: nothing of it is needed."""
    try:
        with reading(f"table {table.name}"):
            return connection.execute(f"SELECT count(*) FROM {table.name}").fetchone()[0]
    except (OSError, ValueError):
        return None


class Survey(NamedTuple):
    """What the first pass over a table finds: rows, rows without a person, the least and the
    greatest person (None: no row has one)."""

    rows: int
    no_person: int
    least: int | None
    greatest: int | None


def survey(connection: Any, source: Source) -> Survey:
    """One pass over all rows.

    Raises:
        ValueError: a value that its conversion would change.
    """
    person = source.columns["person"]
    parts = ["count(*)", f"count(*) FILTER (WHERE {person} IS NULL)"]
    parts += [f"min({person})", f"max({person})"]
    for check in source.checks:
        text = f"CAST({quoted(check.column)} AS VARCHAR)"
        where = f"FILTER (WHERE {check.lossy})"
        parts += [f"count(*) {where}", f"min({text}) {where}", f"arg_min({person}, {text}) {where}"]
    with reading(f"table {source.table.name}"):
        row = connection.execute(f"SELECT {', '.join(parts)} FROM {source.table.name}").fetchone()
    for check, at in zip(source.checks, range(4, len(row), 3), strict=True):
        count, first, whose = row[at : at + 3]
        if count:
            raise ValueError(
                f"{source.table.name}, column {check.column}: expected {check.expected}, got "
                f"{first!r}{'' if whose is None else f' (person {whose})'} "
                f"({count} rows have no such value)"
            )
    return Survey(*row[:4])


def fetch(connection: Any, source: Source, low: int, high: int) -> dict[str, np.ma.MaskedArray]:
    """The rows of the persons ``low`` to ``high``, in no order; NULLs are masked."""
    columns = ", ".join(f"{value} AS {quoted(name)}" for name, value in source.columns.items())
    with reading(f"table {source.table.name}, persons {low} to {high}"):
        arrays: Mapping[str, NDArray[Any]] = connection.execute(
            f"SELECT {columns} FROM {source.table.name}"
            f" WHERE {source.person} BETWEEN {low} AND {high}"
        ).fetchnumpy()
    return {name: np.ma.asarray(arrays[name]) for name in source.columns}
