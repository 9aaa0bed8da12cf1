"""The tables of an OMOP Common Data Model that are read, and where a database has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import kind_of
from .duckdb_columns import whole_number
from .duckdb_tables import Place, Table, find_places, find_table, places_with


@dataclass(frozen=True)
class EventTable:
    """Where an OMOP event table keeps its concept, its date, the same with the time of day, and the
    numeric value (None: the table has none)."""

    table: str
    concept: str
    date: str
    datetime: str
    value: str | None = None


EVENT_TABLES = {
    "condition": EventTable(
        "condition_occurrence",
        "condition_concept_id",
        "condition_start_date",
        "condition_start_datetime",
    ),
    "drug": EventTable(
        "drug_exposure",
        "drug_concept_id",
        "drug_exposure_start_date",
        "drug_exposure_start_datetime",
    ),
    "procedure": EventTable(
        "procedure_occurrence", "procedure_concept_id", "procedure_date", "procedure_datetime"
    ),
    "measurement": EventTable(
        "measurement",
        "measurement_concept_id",
        "measurement_date",
        "measurement_datetime",
        "value_as_number",
    ),
    "observation": EventTable(
        "observation",
        "observation_concept_id",
        "observation_date",
        "observation_datetime",
        "value_as_number",
    ),
    "device": EventTable(
        "device_exposure",
        "device_concept_id",
        "device_exposure_start_date",
        "device_exposure_start_datetime",
    ),
}


RECORDS = ("condition", "drug", "procedure", "measurement")  # without ``tables``, of records


def event_tables(tables: Iterable[str]) -> list[EventTable]:
    """The tables of those names, each once.

    Raises:
        ValueError: a name that is none of ``EVENT_TABLES``, no name, or a string.
        TypeError: not a sequence.
    """
    expected = f"tables: expected a sequence of at least one of {', '.join(EVENT_TABLES)}"
    if isinstance(tables, str):
        raise ValueError(f"{expected}, got {tables!r}")
    if not isinstance(tables, Iterable):
        raise TypeError(f"{expected}, got {kind_of(tables)}")
    names = tuple(tables)  # an iterator can be read once
    unknown = [name for name in names if not isinstance(name, str) or name not in EVENT_TABLES]
    if unknown or not names:
        raise ValueError(f"{expected}, got {', '.join(map(repr, unknown)) or 'none'}")
    return [EVENT_TABLES[name] for name in dict.fromkeys(names)]


def find_event_tables(
    connection: Any, chosen: Iterable[EventTable], places: Sequence[Place], schema: str | None
) -> list[Table]:
    """Where the database has the chosen tables.

    Raises:
        LookupError: it has not, or the table lacks a column.
    """
    found = []
    for source in chosen:
        needed = ("person_id", source.concept, source.date)
        found.append(find_needed(connection, places, schema, source.table, needed))
    return found


def find_needed(
    connection: Any,
    places: Sequence[Place],
    schema: str | None,
    name: str,
    columns: Iterable[str],
) -> Table:
    """Where the database has a table with those columns.

    Raises:
        LookupError: it has not, or the table lacks a column.
    """
    table = find_table(connection, places, name)
    if not table.columns:
        where = "" if schema is None else f" in schema {schema!r}"
        elsewhere = places_with(connection, name)
        raise LookupError(
            f"this database has no OMOP table {name!r}{where}: looked in "
            f"{', '.join(map(str, places))}; "
            + (
                f"there is one in {', '.join(elsewhere)} (pass it as schema)"
                if elsewhere
                else "no attached schema has one (a data frame is found after "
                f"connection.register({name!r}, frame))"
            )
            + _choice(name)
        )
    missing = set(columns) - table.columns.keys()
    if missing:
        raise LookupError(f"table {name!r} lacks {', '.join(sorted(missing))}{_choice(name)}")
    return table


def _choice(table: str) -> str:
    """For messages about an event table: how to do without it."""
    if all(table != event.table for event in EVENT_TABLES.values()):
        return ""
    return f"; tables= (--tables) chooses which to read, of {', '.join(EVENT_TABLES)}"


def concept_names(
    connection: Any, places: Sequence[Place], concept_ids: NDArray[np.int64]
) -> dict[int, str]:
    """Names from the concept table; empty where the database has none."""
    table = find_table(connection, [*places, *find_places(connection, None)], "concept")
    if not {"concept_id", "concept_name"} <= table.columns.keys():
        return {}
    concept = whole_number(table, "concept_id")
    rows = connection.execute(
        f"SELECT {concept.value}, CAST(concept_name AS VARCHAR) FROM {table.name}"
        f" WHERE {concept.value} IN (SELECT unnest(?)) AND concept_name IS NOT NULL"
        f" AND NOT coalesce({concept.lossy or 'false'}, false) ORDER BY ALL",
        [concept_ids.tolist()],
    ).fetchall()
    return dict(rows)
