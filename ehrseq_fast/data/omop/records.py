"""Records for predicting one outcome, from an OMOP Common Data Model in DuckDB, in memory.

A visit is what happened to one person on one day: ``visit_occurrence`` is sparse in many databases
(1,037 rows for the 116,367 person-days of Eunomia), the dates of the events are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import longs
from ..records import EventRecords, Vocabulary
from .connection import opened
from .duckdb_columns import day, refuse_lossy, whole_number
from .duckdb_tables import Table, find_places
from .tables import RECORDS, EventTable, concept_names, event_tables, find_event_tables


def read_records(
    database: Any,
    *,
    outcome_concept_id: int | Sequence[int],
    tables: Iterable[str] | None,
    schema: str | None,
) -> EventRecords:
    """What :func:`read_omop` gives without ``out``."""
    chosen = event_tables(RECORDS if tables is None else tables)
    outcomes = _outcome_ids(outcome_concept_id)
    with opened(database) as connection:
        places = find_places(connection, schema)
        found = find_event_tables(connection, chosen, places, schema)
        rows = _union_of_events(connection, chosen, found)
        person, day, concept = _distinct_events(connection, rows)
        left_out = _count_left_out(connection, rows)
        if not np.isin(concept, outcomes).any():
            raise ValueError(
                f"outcome_concept_id {outcome_concept_id} never occurs in the tables "
                f"{', '.join(source.table for source in chosen)}: there is nothing to predict"
            )
        records = _assemble(person, day, concept, outcomes, left_out)
        names = concept_names(connection, places, records.vocabulary.concept_ids)
    return _named(records, names)


def _outcome_ids(concept_ids: int | Sequence[int]) -> list[int]:
    name = "outcome_concept_id"
    many = concept_ids if np.ndim(concept_ids) else [concept_ids]
    ids = longs(name, many)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(f"{name}: expected a concept or several, got shape {list(ids.shape)}")
    return sorted(ids.tolist())


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


def _named(records: EventRecords, names: dict[int, str]) -> EventRecords:
    concept_ids = records.vocabulary.concept_ids
    known = tuple(names.get(concept, "") for concept in concept_ids[1:].tolist())
    return replace(records, vocabulary=Vocabulary(concept_ids, ("", *known)))
