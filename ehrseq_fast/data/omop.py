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
    tables: Sequence[str] = ("condition", "drug", "procedure", "measurement"),
    schema: str | None = None,
) -> EventRecords:
    """Event records for predicting the first occurrence of an outcome.

    The events of one person on one day are one visit, and a concept counts once per visit however
    many rows repeat it. Rows without a date, and rows whose concept is unknown (NULL or 0, OMOP's
    "no matching concept"), are left out and counted; a day with no other row is no visit.

    **No leakage.** The hazard at visit t, computed from the visits up to t, is that of the event at
    visit t + 1. Of a person whose first outcome falls in visit j, the visits 0 .. j-1 are kept and
    ``event_times`` is j - 1 with indicator 1: the visit of the event, and all after it, are cut,
    so the outcome concept occurs in no record and has no place in the vocabulary. Persons whose
    outcome falls in their first visit have no history; they are left out and counted. All others
    are censored at their last visit.

    Args:
        database: a DuckDB connection, or the path of a database file (opened read-only).
        outcome_concept_id: the concept of the outcome, or several of which the earliest counts.
        tables: which events to read, of ``condition``, ``drug``, ``procedure``, ``measurement``,
            ``observation`` and ``device``; the outcome is looked for in the same tables.
        schema: the schema that holds the tables; None for the connection's own.

    Returns:
        :class:`EventRecords`, patients by ascending person id. ``left_out`` counts ``"rows without
        a known concept"``, ``"rows without a date"`` and ``"persons with the event in their first
        visit"``.

    Raises:
        ValueError: for a table name not listed above, and where the outcome never occurs.
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
    outcomes = sorted(int(c) for c in np.atleast_1d(np.asarray(outcome_concept_id, np.int64)))
    with _connection(database) as connection:
        _require_columns(connection, chosen, schema)
        rows = _union_of_events(connection, chosen, schema)
        person, day, concept = _distinct_events(connection, rows)
        left_out = _count_left_out(connection, rows)
        if not np.isin(concept, outcomes).any():
            raise ValueError(
                f"outcome_concept_id {outcome_concept_id} never occurs in the tables "
                f"{', '.join(tables)}: there is nothing to predict"
            )
        records = _assemble(person, day, concept, outcomes, left_out)
        names = _concept_names(connection, schema, records.vocabulary.concept_ids)
    return _named(records, names)


def _event_tables(names: Sequence[str]) -> list[EventTable]:
    unknown = [name for name in names if name not in EVENT_TABLES]
    if unknown or not names or isinstance(names, str):
        raise ValueError(
            f"tables must be a sequence of {', '.join(EVENT_TABLES)}, but got {names!r}"
        )
    return [EVENT_TABLES[name] for name in dict.fromkeys(names)]


@contextmanager
def _connection(database: Any) -> Iterator[Any]:
    if not isinstance(database, str | PathLike):
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


def _qualified(connection: Any, table: str, schema: str | None) -> str:
    """The table's full name: a file ``cdm.duckdb`` with a schema ``cdm`` makes shorter ones
    ambiguous."""
    place = connection.execute(
        "SELECT current_database(), coalesce(?, current_schema())", [schema]
    ).fetchone()
    return ".".join(_quoted(name) for name in (*place, table))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _columns(connection: Any, table: str, schema: str | None) -> set[str]:
    """The table's column names in lower case; empty where there is no such table."""
    rows = connection.execute(
        "SELECT lower(column_name) FROM information_schema.columns WHERE lower(table_name) = ?"
        " AND table_catalog = current_database()"
        " AND lower(table_schema) = lower(coalesce(?, current_schema()))",
        [table, schema],
    ).fetchall()
    return {name for (name,) in rows}


def _require_columns(connection: Any, chosen: Iterable[EventTable], schema: str | None) -> None:
    for source in chosen:
        present = _columns(connection, source.table, schema)
        if not present:
            where = "" if schema is None else f" in schema {schema!r}"
            raise LookupError(f"this database has no OMOP table {source.table!r}{where}")
        missing = {"person_id", source.concept, source.date} - present
        if missing:
            raise LookupError(f"table {source.table!r} lacks {', '.join(sorted(missing))}")


def _union_of_events(connection: Any, chosen: Iterable[EventTable], schema: str | None) -> str:
    return " UNION ALL ".join(
        f"SELECT CAST(person_id AS BIGINT) AS person, CAST({source.date} AS DATE) AS day,"
        f" CAST({source.concept} AS BIGINT) AS concept"
        f" FROM {_qualified(connection, source.table, schema)}"
        for source in chosen
    )


def _distinct_events(connection: Any, rows: str) -> tuple[NDArray[np.int64], ...]:
    """Person, day (since 1970-01-01) and concept of every event, once each, in that order."""
    columns = connection.execute(
        "SELECT DISTINCT person, CAST(day - DATE '1970-01-01' AS BIGINT) AS day, concept"
        f" FROM ({rows}) WHERE day IS NOT NULL AND concept IS NOT NULL AND concept <> 0"
        " ORDER BY person, day, concept"
    ).fetchnumpy()
    return tuple(np.asarray(columns[name], np.int64) for name in ("person", "day", "concept"))


def _count_left_out(connection: Any, rows: str) -> dict[str, int]:
    no_concept, no_date = connection.execute(
        "SELECT count(*) FILTER (WHERE concept IS NULL OR concept = 0),"
        f" count(*) FILTER (WHERE day IS NULL AND concept <> 0) FROM ({rows})"
    ).fetchone()
    return {"rows without a known concept": no_concept, "rows without a date": no_date}


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

    new_person = np.diff(person, prepend=np.iinfo(np.int64).min) != 0
    new_visit = new_person | (np.diff(day, prepend=np.iinfo(np.int64).min) != 0)
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


def _before_first_outcome(
    person: NDArray[np.int64], day: NDArray[np.int64], is_outcome: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which events fall on a day before the person's first outcome (all, for who has none)."""
    persons, first = np.unique(person[is_outcome], return_index=True)
    event_day = day[is_outcome][first]
    at = np.minimum(np.searchsorted(persons, person), len(persons) - 1)
    return (persons[at] != person) | (day < event_day[at])


def _concept_names(
    connection: Any, schema: str | None, concept_ids: NDArray[np.int64]
) -> dict[int, str]:
    """Names from the concept table; empty where the database has none."""
    if not {"concept_id", "concept_name"} <= _columns(connection, "concept", schema):
        return {}
    rows = connection.execute(
        f"SELECT concept_id, concept_name FROM {_qualified(connection, 'concept', schema)}"
        " WHERE concept_id IN (SELECT unnest(?)) AND concept_name IS NOT NULL",
        [concept_ids.tolist()],
    ).fetchall()
    return {int(concept): name for concept, name in rows}


def _named(records: EventRecords, names: dict[int, str]) -> EventRecords:
    concept_ids = records.vocabulary.concept_ids
    known = tuple(names.get(concept, "") for concept in concept_ids[1:].tolist())
    return replace(records, vocabulary=Vocabulary(concept_ids, ("", *known)))
