"""The public function: a database in, records of one outcome or a store out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

from ..records import EventRecords
from .records import read_records

if TYPE_CHECKING:
    from ..store import EventStore

ROWS_PER_PART = 500_000


@overload
def read_omop(
    database: Any,
    out: None = None,
    *,
    outcome_concept_id: int | Sequence[int],
    tables: Iterable[str] | None = ...,
    schema: str | None = ...,
) -> EventRecords: ...


@overload
def read_omop(
    database: Any,
    out: str | PathLike[str],
    *,
    tables: Iterable[str] | None = ...,
    schema: str | None = ...,
    visits: str | float = ...,
    outside_periods: str = ...,
    workers: int = ...,
    min_count: int = ...,
    split: Mapping[str, float] | None = ...,
    seed: int = ...,
    overwrite: bool = ...,
    memory_limit: str | None = ...,
    rows_per_part: int = ...,
) -> EventStore: ...


def read_omop(
    database: Any,
    out: str | PathLike[str] | None = None,
    *,
    outcome_concept_id: int | Sequence[int] | None = None,
    tables: Iterable[str] | None = None,
    schema: str | None = None,
    visits: str | float = "day",
    outside_periods: str = "leave_out",
    workers: int = 1,
    min_count: int = 1,
    split: Mapping[str, float] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    memory_limit: str | None = None,
    rows_per_part: int = ROWS_PER_PART,
) -> EventRecords | EventStore:
    """Read an OMOP database: into a store of all events (``out``), or into records in memory for
    predicting the first occurrence of one outcome (``outcome_concept_id``).

    **Rows.** Rows without a person (NULL; 0 is a person), without a date (NULL, infinite), in a
    store also dated outside the years 1 to 9999, and rows whose concept is unknown (NULL or 0,
    OMOP's "no matching concept") are left out and counted. A concept counts once per visit however
    many rows repeat it.

    Identifiers may be integers, or decimals, floats and text that are whole numbers exactly (NaN,
    as data frames write a missing number, is NULL). Days are those of a DATE, of a TIMESTAMP, or of
    text that begins with YYYY-MM-DD and names no zone; of a TIMESTAMPTZ **the day in UTC**,
    whatever the session's zone. An ENUM is read as its text.

    **A store** (``out``) is written in parts, each of a range of person ids that has about
    ``rows_per_part`` rows, so that memory does not grow with the database, and appears whole or not
    at all. It does not depend on ``workers`` or ``rows_per_part``, to the byte. A range is found
    quickly where the tables are sorted by ``person_id``; where they are not, each range scans them.
    Under ``torchrun`` all ranks call this function, and share the ranges.

    - A code is the concept's id as a string, described by its name in ``concept``.
    - The time of an event is its date, with the time of day from its datetime where there is one of
      the same day (in UTC); where the date is NULL, its datetime. ``value_as_number`` of
      measurements and observations is the entry's value, rounded to float32; of several of one code
      in one visit the last, of several at one instant the greatest.
    - ``person``: subjects are the persons of this table and those who have an event. The date of
      birth (without a day the first of the month; without a month the 15th of June, or the day of
      the earliest record of that year, as the CDM's documentation has it) and the concepts of
      gender, race and ethnicity, as events without a time.
    - ``observation_period``: periods that overlap or touch are one. Events outside every period of
      the person are left out, as OHDSI's methods take them not to be observed reliably;
      ``outside_periods="keep"`` takes them up. Where the table is missing or has no rows, all
      events are taken up.
    - ``death``: the earliest of a person. Events after it, before birth, and dated after the day of
      reading are taken up, unless they are outside the observation periods.
    - Tables and columns among these that are missing are listed in ``header["source"]["missing"]``,
      event tables that the database has but ``tables`` does not name in ``["not_read"]``, with
      their rows (None: a view that fails), and what was taken up though it is odd is counted in
      ``["noticed"]``.

    **Records** (``outcome_concept_id``): a visit is the events of one day. **No leakage.** The
    hazard at visit t, computed from the visits up to t, is that of the event at visit t + 1. Of a
    person whose first outcome falls in visit j, the visits 0 .. j-1 are kept and ``event_times`` is
    j - 1 with indicator 1: the visit of the event, and all after it, are cut, so the outcome
    concept occurs in no record and is not in the vocabulary. Persons whose outcome falls in their
    first visit have no history; they are left out and counted. All others are censored at their
    last visit.

    Args:
        database: a DuckDB connection (used by this process alone, so with ``workers=1``), or the
            path of a database file (opened read-only).
        out: the folder of the store to make; None for records.
        outcome_concept_id: the concept of the outcome, or several of which the earliest counts;
            None for a store.
        tables: which events to read, of ``condition``, ``drug``, ``procedure``, ``measurement``,
            ``observation`` and ``device``; each must be there. None: for a store all that the
            database has (a table with none of the columns is missing), for records the first four;
            of records the outcome is looked for in the same tables.
        schema: the schema that holds the tables, ``"catalogue.schema"`` or the name of a catalogue
            for those of an attached database (of a catalogue its default schema, ``main`` or
            ``public``). A name may be in double quotes, which it needs where the part before or
            after the dot has one itself: ``'"my.db".cdm'``. None looks where SQL does: TEMP tables
            and what ``connection.register`` was given, then the connection's search path. Names of
            concepts come from the table ``concept`` of the same schema, or from the connection's
            own.
        visits: which events of a store make a visit. ``"day"``: those of one day in UTC;
            ``"time"``: of one instant; a number of hours: those up to so long after the visit's
            first; ``"visit_occurrence"``: those of one ``visit_occurrence_id`` of the person, which
            begins at the visit's start. Events without a visit, whose visit is not one of the
            person's, or which are dated after its end (a model would see them before they were
            known) are then grouped by day, and counted in ``header["source"]["noticed"]``.
        outside_periods: ``"leave_out"`` or ``"keep"``.
        workers: how many processes read. They are spawned, so a script that asks for several needs
            ``if __name__ == "__main__":``.
        min_count: how often a code must occur in the training split to be in the store's
            vocabulary.
        split: fractions by name for a hash split of the persons, by default 80 % train, 10 %
            tuning, 10 % held_out.
        seed: of the split.
        overwrite: replace a store that is at ``out``.
        memory_limit: for each process, as ``"512MB"``. DuckDB gets all of it up to 128 MB, which is
            the default, and of more two fifths, but not less than that: it works in them, and keeps
            there what it has read of the file. The rest is for rows, of which ``rows_per_part``
            are in memory. Not with a connection.
        rows_per_part: how many rows of all tables together are in memory at a time, unless one
            person has more.

    Returns:
        With ``out`` the :class:`~ehrseq_fast.data.EventStore`, subjects by ascending person id;
        ``left_out`` counts rows and persons by reason. Otherwise :class:`EventRecords`, patients by
        ascending person id; ``left_out`` counts ``"rows without a person"``, ``"rows without a
        known concept"``, ``"rows without a date"`` (each row once, under the first of these),
        ``"persons whose rows are all left out"`` and ``"persons with the event in their first
        visit"``.

    Raises:
        ValueError: both or neither of ``out`` and ``outcome_concept_id``, an option of a store
            without ``out``, a table name not listed above, an outcome that never occurs, a file
            that is no DuckDB database, tables without a row of a person, and values that a
            conversion would change: a person 7.5, a day that is no day.
        TypeError: for a column of another type, and outcomes that are not integers.
        LookupError: if the database lacks one of the tables or columns.
        FileNotFoundError, FileExistsError: no database file; ``out`` exists.
        OSError: a database file that is damaged.
        MemoryError: DuckDB needs more than its part of ``memory_limit``.
        RuntimeError: a worker was killed, another rank failed, another process writes ``out``.
        ImportError: if ``database`` is a path and duckdb is not installed.

    Example:
        >>> import duckdb, tempfile
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
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = read_omop(db, f"{folder}/store", tables=("condition",))
        ...     store.n_patients, store.n_visits, store.codes_of
        (2, 4, ('40', '41', '99'))
    """
    options: dict[str, Any] = {
        "visits": visits,
        "outside_periods": outside_periods,
        "workers": workers,
        "min_count": min_count,
        "split": split,
        "seed": seed,
        "overwrite": overwrite,
        "memory_limit": memory_limit,
        "rows_per_part": rows_per_part,
    }
    expected = (
        "out, outcome_concept_id: expected one, a folder for a store or an outcome for records"
    )
    if out is None:
        if outcome_concept_id is None:
            raise ValueError(f"{expected}, got neither")
        given = [name for name, value in options.items() if value != _DEFAULTS[name]]
        if given:
            raise ValueError(
                f"{', '.join(given)}: expected out, the store that they are options of"
            )
        return read_records(
            database, outcome_concept_id=outcome_concept_id, tables=tables, schema=schema
        )
    if outcome_concept_id is not None:
        raise ValueError(
            f"{expected}, got both (a store holds all events; FirstEvent takes outcomes from it)"
        )
    from .store import read_store

    return read_store(database, out, tables=tables, schema=schema, **options)


_DEFAULTS: dict[str, Any] = read_omop.__kwdefaults__ or {}
