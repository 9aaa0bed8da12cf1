"""The public function: a database in, records out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..records import EventRecords
from .records import read_records


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
    return read_records(
        database, outcome_concept_id=outcome_concept_id, tables=tables, schema=schema
    )
