"""Read patient records from an OMOP Common Data Model in DuckDB.

A visit is what happened to one person on one day: ``visit_occurrence`` is sparse in many databases
(1,037 rows for the 116,367 person-days of Eunomia), the dates of the events are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import kind_of, longs
from .duckdb_columns import day, refuse_lossy, whole_number
from .duckdb_tables import Place, Table, find_places, find_table, places_with
from .records import EventRecords, Vocabulary


@dataclass(frozen=True)
class EventTable:
    """Where an OMOP event table keeps its concept and its date."""

    table: str
    concept: str
    date: str


EVENT_TABLES = {
    "condition": EventTable("condition_occurrence", "condition_concept_id", "condition_start_date"),
    "drug": EventTable("drug_exposure", "drug_concept_id", "drug_exposure_start_date"),
    "procedure": EventTable("procedure_occurrence", "procedure_concept_id", "procedure_date"),
    "measurement": EventTable("measurement", "measurement_concept_id", "measurement_date"),
    "observation": EventTable("observation", "observation_concept_id", "observation_date"),
    "device": EventTable("device_exposure", "device_concept_id", "device_exposure_start_date"),
}


def read_omop(
    database: Any,
    *,
    outcome_concept_id: int | Sequence[int],
    tables: Iterable[str] = ("condition", "drug", "procedure", "measurement"),
    schema: str | None = None,
) -> EventRecords:
    """Event records for predicting the first occurrence of an outcome.

    The events of one person on one day are one visit, and a concept counts once per visit however
    many rows repeat it. Rows without a person (NULL; 0 is a person), rows without a date (NULL or
    infinite), and rows whose concept is unknown (NULL or 0, OMOP's "no matching concept") are left
    out and counted; a day with no other row is no visit, and a person with no other row is counted.

    Identifiers may be integers, or decimals, floats and text that are whole numbers exactly (NaN,
    as data frames write a missing number, is NULL). Days are those of a DATE, of a TIMESTAMP, or of
    text that begins with YYYY-MM-DD and names no zone; of a TIMESTAMPTZ **the day in UTC**,
    whatever the session's zone.

    **No leakage.** The hazard at visit t, computed from the visits up to t, is that of the event at
    visit t + 1. Of a person whose first outcome falls in visit j, the visits 0 .. j-1 are kept and
    ``event_times`` is j - 1 with indicator 1: the visit of the event, and all after it, are cut,
    so the outcome concept occurs in no record and is not in the vocabulary. Persons whose
    outcome falls in their first visit have no history; they are left out and counted. All others
    are censored at their last visit.

    Args:
        database: a DuckDB connection, or the path of a database file (opened read-only).
        outcome_concept_id: the concept of the outcome, or several of which the earliest counts.
        tables: which events to read, of ``condition``, ``drug``, ``procedure``, ``measurement``,
            ``observation`` and ``device``; the outcome is looked for in the same tables.
        schema: the schema that holds the tables, ``"catalogue.schema"`` or the name of a catalogue
            for those of an attached database (of a catalogue its default schema, ``main`` or
            ``public``). A name may be in double quotes, which it needs where the part before or
            after the dot has one itself: ``'"my.db".cdm'``. None looks where SQL does: TEMP tables
            and what ``connection.register`` was given, then the connection's search path. Names of
            concepts come from the table ``concept`` of the same schema, or from the connection's
            own.

    Returns:
        :class:`EventRecords`, patients by ascending person id. ``left_out`` counts ``"rows without
        a person"``, ``"rows without a known concept"``, ``"rows without a date"`` (each row once,
        under the first of these), ``"persons whose rows are all left out"`` and ``"persons with the
        event in their first visit"``.

    Raises:
        ValueError: for a table name not listed above, where the outcome never occurs, and for
            values that a cast would change: a person 7.5, a day that is no day.
        TypeError: for a column of another type, and outcomes that are not integers.
        LookupError: if the database lacks one of the tables or columns.
        ImportError: if ``database`` is a path and duckdb is not installed.

    Example:
        >>> import duckdb
        >>> db = duckdb.connect()
        >>> _ = db.execute('''CREATE TABLE condition_occurrence AS SELECT * FROM (VALUES
        ...     (7, 40, DATE '2020-01-01'), (7, 41, DATE '2020-02-01'), (7, 99, DATE '2020-03-01'),
        ...     (8, 40, DATE '2020-01-05')
        ... ) t(person_id, condition_concept_id, condition_start_date)''')
        >>> records = read_omop(db, outcome_concept_id=99, tables=("condition",))
        >>> records.vocabulary.concept_ids.tolist(), records.codes.tolist()
        ([0, 40, 41], [1, 2, 1])
        >>> records.patient_offsets.tolist(), records.event_times.tolist()
        ([0, 2, 3], [1, 0])
        >>> records.event_indicators.tolist()
        [1, 0]
    """
    chosen = _event_tables(tables)
    outcomes = _outcome_ids(outcome_concept_id)
    with _connection(database) as connection:
        places = find_places(connection, schema)
        found = _find_tables(connection, chosen, places, schema)
        rows = _union_of_events(connection, chosen, found)
        person, day, concept = _distinct_events(connection, rows)
        left_out = _count_left_out(connection, rows)
        if not np.isin(concept, outcomes).any():
            raise ValueError(
                f"outcome_concept_id {outcome_concept_id} never occurs in the tables "
                f"{', '.join(source.table for source in chosen)}: there is nothing to predict"
            )
        records = _assemble(person, day, concept, outcomes, left_out)
        names = _concept_names(connection, places, records.vocabulary.concept_ids)
    return _named(records, names)


def _event_tables(tables: Iterable[str]) -> list[EventTable]:
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


@contextmanager
def _connection(database: Any) -> Iterator[Any]:
    if not isinstance(database, str | PathLike):
        if not hasattr(database, "execute"):
            raise TypeError(
                f"database: expected a DuckDB connection or a path, got {type(database).__name__}"
            )
        yield database
        return
    try:
        import duckdb
    except ImportError as error:
        raise ImportError(
            "reading a database file needs duckdb: pip install 'ehrseq_fast[omop]'"
        ) from error
    with duckdb.connect(str(database), read_only=True) as connection:
        yield connection


def _outcome_ids(concept_ids: int | Sequence[int]) -> list[int]:
    name = "outcome_concept_id"
    many = concept_ids if np.ndim(concept_ids) else [concept_ids]
    ids = longs(name, many)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(f"{name}: expected a concept or several, got shape {list(ids.shape)}")
    return sorted(ids.tolist())


def _find_tables(
    connection: Any, chosen: Iterable[EventTable], places: Sequence[Place], schema: str | None
) -> list[Table]:
    found = []
    for source in chosen:
        table = find_table(connection, places, source.table)
        if not table.columns:
            where = "" if schema is None else f" in schema {schema!r}"
            elsewhere = places_with(connection, source.table)
            raise LookupError(
                f"this database has no OMOP table {source.table!r}{where}: looked in "
                f"{', '.join(map(str, places))}; "
                + (
                    f"there is one in {', '.join(elsewhere)} (pass it as schema)"
                    if elsewhere
                    else "no attached schema has one (a data frame is found after "
                    f"connection.register({source.table!r}, frame))"
                )
            )
        missing = {"person_id", source.concept, source.date} - table.columns.keys()
        if missing:
            raise LookupError(f"table {source.table!r} lacks {', '.join(sorted(missing))}")
        found.append(table)
    return found


def _union_of_events(connection: Any, chosen: list[EventTable], tables: list[Table]) -> str:
    selects = []
    for source, table in zip(chosen, tables, strict=True):
        person, date = whole_number(table, "person_id"), day(table, source.date)
        concept = whole_number(table, source.concept)
        refuse_lossy(connection, table, "person_id", person, "whole numbers that int64 holds")
        refuse_lossy(connection, table, source.concept, concept, "whole numbers that int64 holds")
        refuse_lossy(connection, table, source.date, date, "days, as YYYY-MM-DD")
        selects.append(
            f"SELECT {person.value} AS person, {date.value} AS day, {concept.value} AS concept"
            f" FROM {table.name}"
        )
    return " UNION ALL ".join(selects)


IS_TAKEN = "person IS NOT NULL AND day IS NOT NULL AND concept IS NOT NULL AND concept <> 0"


def _distinct_events(connection: Any, rows: str) -> tuple[NDArray[np.int64], ...]:
    """Person, day (since 1970-01-01) and concept of every event, once each, in that order."""
    columns = connection.execute(
        "SELECT DISTINCT person, CAST(day - DATE '1970-01-01' AS BIGINT) AS day, concept"
        f" FROM ({rows}) WHERE {IS_TAKEN} ORDER BY person, day, concept"
    ).fetchnumpy()
    return tuple(longs(name, columns[name]) for name in ("person", "day", "concept"))


def _count_left_out(connection: Any, rows: str) -> dict[str, int]:
    """Every row that is not taken up, under the first of the reasons that it has."""
    no_person, no_concept, no_date, persons, taken = connection.execute(
        "SELECT count(*) FILTER (WHERE person IS NULL),"
        " count(*) FILTER (WHERE person IS NOT NULL AND (concept IS NULL OR concept = 0)),"
        " count(*) FILTER (WHERE person IS NOT NULL AND concept <> 0 AND day IS NULL),"
        f" count(DISTINCT person), count(DISTINCT person) FILTER (WHERE {IS_TAKEN}) FROM ({rows})"
    ).fetchone()
    return {
        "rows without a person": no_person,
        "rows without a known concept": no_concept,
        "rows without a date": no_date,
        "persons whose rows are all left out": persons - taken,
    }


def _assemble(
    person: NDArray[np.int64],
    day: NDArray[np.int64],
    concept: NDArray[np.int64],
    outcomes: Sequence[int],
    left_out: dict[str, int],
) -> EventRecords:
    """Records from distinct events sorted by person, day and concept; the names are still empty."""
    n_persons = len(np.unique(person))
    before_event = _before_first_outcome(person, day, np.isin(concept, outcomes))
    had_event = np.unique(person[~before_event])
    person, day, concept = person[before_event], day[before_event], concept[before_event]

    new_person = _is_new(person)
    new_visit = new_person | _is_new(day)
    visit_offsets = np.append(np.flatnonzero(new_visit), len(person))
    patient_offsets = np.append(np.flatnonzero(new_person[new_visit]), len(visit_offsets) - 1)
    person_ids = person[new_person]

    concept_ids, codes = np.unique(concept, return_inverse=True)
    left_out["persons with the event in their first visit"] = n_persons - len(person_ids)
    return EventRecords(
        codes=(codes + 1).astype(np.int32),
        visit_offsets=visit_offsets,
        patient_offsets=patient_offsets,
        visit_days=day[new_visit].astype("datetime64[D]"),
        person_ids=person_ids,
        event_times=np.diff(patient_offsets) - 1,
        event_indicators=np.isin(person_ids, had_event).astype(np.uint8),
        vocabulary=Vocabulary(np.append(0, concept_ids), ("",) * (len(concept_ids) + 1)),
        left_out=left_out,
    )


def _is_new(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where another value begins."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return new


def _before_first_outcome(
    person: NDArray[np.int64], day: NDArray[np.int64], is_outcome: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which events fall on a day before the person's first outcome (all, for who has none)."""
    persons, first = np.unique(person[is_outcome], return_index=True)
    event_day = day[is_outcome][first]
    at = np.minimum(np.searchsorted(persons, person), len(persons) - 1)
    return (persons[at] != person) | (day < event_day[at])


def _concept_names(
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


def _named(records: EventRecords, names: dict[int, str]) -> EventRecords:
    concept_ids = records.vocabulary.concept_ids
    known = tuple(names.get(concept, "") for concept in concept_ids[1:].tolist())
    return replace(records, vocabulary=Vocabulary(concept_ids, ("", *known)))
