"""Columns of OMOP tables that a careless cast would change: missing persons, zones, infinities,
fractions, text."""

from __future__ import annotations

from datetime import date

import numpy as np
import pytest

from ehrseq_fast.data import read_omop

from .test_omop import duckdb, fill, visits_of

OUTCOME = 99


@pytest.fixture
def database():
    with duckdb.connect() as connection:
        yield connection


def conditions(connection, rows, person="BIGINT", concept="BIGINT", day="DATE"):
    connection.execute(
        "CREATE OR REPLACE TABLE condition_occurrence (person_id "
        f"{person}, condition_concept_id {concept}, condition_start_date {day})"
    )
    for row in rows:
        connection.execute("INSERT INTO condition_occurrence VALUES (?, ?, ?)", list(row))


def read(connection, **options):
    return read_omop(connection, outcome_concept_id=OUTCOME, tables=("condition",), **options)


ROWS = [
    (7, 40, "2020-01-01"),
    (7, OUTCOME, "2020-02-01"),
    (0, 41, "2020-01-05"),
    (0, 42, "2020-03-05"),
]


def left_out(records):
    return {what: count for what, count in records.left_out.items() if count}


def test_a_person_that_is_null_is_nobody_and_person_0_is_somebody(database):
    rows = [*ROWS, (None, 43, "2020-01-01"), (None, OUTCOME, "2020-01-01"), (None, None, None)]
    conditions(database, rows)
    records = read(database)
    assert records.person_ids.tolist() == [0, 7]
    assert visits_of(records, 0) == [(date(2020, 1, 5), [41]), (date(2020, 3, 5), [42])]
    assert visits_of(records, 7) == [(date(2020, 1, 1), [40])]
    assert left_out(records) == {"rows without a person": 3}


def test_every_row_that_is_left_out_is_counted_once(database):
    unusable = [(None, 0, None), (7, 0, None), (7, None, "2020-01-01"), (7, 40, None)]
    conditions(database, [*ROWS, *unusable, (8, 0, "2020-01-01"), (9, 40, None)])
    records = read(database)
    assert left_out(records) == {
        "rows without a person": 1,
        "rows without a known concept": 3,
        "rows without a date": 2,
        "persons whose rows are all left out": 2,
    }
    assert all(count >= 0 for count in records.left_out.values())


def test_infinite_days_are_no_days(database):
    for dtype in ("DATE", "TIMESTAMP", "TIMESTAMPTZ"):
        rows = [*ROWS, (7, 50, "infinity"), (0, 51, "-infinity"), (8, 40, "infinity")]
        conditions(database, rows, day=dtype)
        database.execute("SET TimeZone = 'UTC'")
        records = read(database)
        assert left_out(records) == {
            "rows without a date": 3,
            "persons whose rows are all left out": 1,
        }
        assert records.visit_days.max() == np.datetime64("2020-03-05")


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo"])
def test_days_are_those_in_utc_whatever_the_session_says(database, zone):
    conditions(database, [], day="TIMESTAMPTZ")
    database.execute(
        "INSERT INTO condition_occurrence VALUES (7, 40, '2020-01-01 23:30:00+00'),"
        " (7, 41, '2020-01-02 00:30:00+00'), (7, 42, '1969-12-31 23:59:59.999999+00'),"
        f" (7, {OUTCOME}, '2020-03-01 01:00:00+02')"
    )
    database.execute(f"SET TimeZone = '{zone}'")
    records = read(database)
    assert visits_of(records, 7) == [
        (date(1969, 12, 31), [42]),
        (date(2020, 1, 1), [40]),
        (date(2020, 1, 2), [41]),
    ]
    for kind in ("TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS", "VARCHAR"):
        conditions(database, [(7, 40, "2020-01-01 23:30:00"), (7, 99, "2020-03-01")], day=kind)
        assert visits_of(read(database), 7) == [(date(2020, 1, 1), [40])]


@pytest.mark.parametrize(
    "person", ["DOUBLE", "FLOAT", "DECIMAL(18,3)", "HUGEINT", "UBIGINT", "VARCHAR", "TINYINT"]
)
def test_whole_numbers_of_any_type_are_taken(database, person):
    conditions(database, [*ROWS, (None, 40, "2020-01-01")], person=person, concept=person)
    records = read(database)
    assert records.person_ids.tolist() == [0, 7]
    assert left_out(records) == {"rows without a person": 1}


def test_enums_are_their_text(database):
    database.execute("CREATE TYPE ids AS ENUM ('7', '0', '40', '41', '42', '99', 'P7')")
    database.execute("CREATE TYPE days AS ENUM ('2020-01-01', '2020-02-01T10:00', '2020-03-05')")
    rows = [(7, 40, "2020-01-01"), (7, 99, "2020-02-01T10:00"), (0, 41, "2020-03-05")]
    conditions(database, [tuple(map(str, row)) for row in rows], "ids", "ids", "days")
    records = read(database)
    assert visits_of(records, 7) == [(date(2020, 1, 1), [40])]
    assert visits_of(records, 0) == [(date(2020, 3, 5), [41])]
    database.execute("INSERT INTO condition_occurrence VALUES ('P7', '40', '2020-01-01')")
    with pytest.raises(ValueError, match=r"person_id: expected whole numbers .*, got 'P7'"):
        read(database)


def test_the_last_nanosecond_of_a_day_is_in_it(database):
    rows = [(7, 40, "2020-01-01 23:59:59.999999999"), (7, 41, "1960-01-01 23:59:59.9999999")]
    conditions(database, [*rows, (7, OUTCOME, "2020-03-01")], day="TIMESTAMP_NS")
    assert visits_of(read(database), 7) == [(date(1960, 1, 1), [41]), (date(2020, 1, 1), [40])]


def test_nan_is_a_missing_number(database):
    rows = [*ROWS, (float("nan"), 40, "2020-01-01"), (7, float("nan"), "2020-01-01")]
    conditions(database, rows, person="DOUBLE", concept="DOUBLE")
    assert left_out(read(database)) == {
        "rows without a person": 1,
        "rows without a known concept": 1,
    }


LOSSY = {
    "fractions": ({"person": "DOUBLE"}, (7.5, 40, "2020-01-01"), "person_id.*got '7.5'"),
    "fractions of concepts": (
        {"concept": "DOUBLE"},
        (7, 40.25, "2020-01-01"),
        "condition_concept_id.*'40.25'",
    ),
    "decimals": ({"person": "DECIMAL(9,2)"}, (7.25, 40, "2020-01-01"), "person_id.*'7.25'"),
    "floats that have merged": ({"person": "DOUBLE"}, (2**53 + 2, 40, "2020-01-01"), "person_id"),
    "small floats that have merged": (
        {"person": "FLOAT"},
        (2**24 + 2, 40, "2020-01-01"),
        "person_id",
    ),
    "infinity": ({"person": "DOUBLE"}, (float("inf"), 40, "2020-01-01"), "person_id.*'inf'"),
    "too large": ({"person": "HUGEINT"}, (2**64, 40, "2020-01-01"), "'18446744073709551616'"),
    "unsigned": ({"person": "UBIGINT"}, (2**63, 40, "2020-01-01"), "'9223372036854775808'"),
    "text with zeros": ({"person": "VARCHAR"}, ("007", 40, "2020-01-01"), "'007'"),
    "text with a fraction": ({"person": "VARCHAR"}, ("7.5", 40, "2020-01-01"), "'7.5'"),
    "text": ({"person": "VARCHAR"}, ("P7", 40, "2020-01-01"), "'P7'"),
    "a day with a zone": (
        {"day": "VARCHAR"},
        (7, 40, "2020-01-01 23:00:00+05"),
        r"condition_start_date.*'2020-01-01 23:00:00\+05'",
    ),
    "no day": ({"day": "VARCHAR"}, (7, 40, "2020-02-31"), "'2020-02-31'"),
}


@pytest.mark.parametrize("what", LOSSY)
def test_what_a_cast_would_change_is_refused(database, what):
    types, row, message = LOSSY[what]
    conditions(database, [*ROWS, row], **types)
    with pytest.raises(ValueError, match=message + r".*\(1 rows have no such value\)"):
        read(database)


def test_columns_of_other_types_are_refused(database):
    conditions(database, [], person="BOOLEAN")
    with pytest.raises(TypeError, match="person_id: expected integers, got BOOLEAN"):
        read(database)
    conditions(database, [], day="INTEGER")
    with pytest.raises(TypeError, match="condition_start_date: expected dates or timestamps, got"):
        read(database)
    for database_ in (None, 5, ["path"]):
        with pytest.raises(TypeError, match="database: expected a DuckDB connection or a path"):
            read(database_)


@pytest.mark.parametrize("schema", ["omop.cdm", "OMOP.CDM", "omop"])
def test_an_attached_catalogue(tmp_path, schema):
    with duckdb.connect(str(tmp_path / "file.duckdb")) as connection:
        connection.execute("CREATE SCHEMA cdm")
        fill(connection, "main" if schema == "omop" else "cdm")
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{tmp_path / 'file.duckdb'}' AS omop (READ_ONLY)")
        records = read_omop(connection, outcome_concept_id=OUTCOME, schema=schema)
        with pytest.raises(LookupError, match=r"in schema 'omop\.nowhere'"):
            read_omop(connection, outcome_concept_id=OUTCOME, schema="omop.nowhere")
    assert records.person_ids.tolist() == [1, 3, 4]
    assert records.vocabulary.names[1] == "cough"


def test_a_schema_with_a_dot_in_its_name(database):
    database.execute('CREATE SCHEMA "my.cdm"')
    fill(database, '"my.cdm"')
    records = read_omop(database, outcome_concept_id=OUTCOME, schema="my.cdm")
    assert records.person_ids.tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (99.5, TypeError),
        (99.0, TypeError),
        ("99", TypeError),
        (True, TypeError),
        (np.ma.array([99, 40], mask=[False, True]), ValueError),
        ([99, None], TypeError),
        ([], ValueError),
        ([[99]], ValueError),
        (2**63, ValueError),
    ],
)
def test_outcomes_are_integers(database, outcome, error):
    conditions(database, ROWS)
    with pytest.raises(error, match="outcome_concept_id"):
        read_omop(database, outcome_concept_id=outcome, tables=("condition",))


def test_names_of_concepts_are_the_same_on_every_run(database):
    conditions(database, ROWS)
    database.execute("CREATE TABLE concept (concept_id DOUBLE, concept_name VARCHAR)")
    database.execute("INSERT INTO concept VALUES (40, 'b'), (40, 'c'), (40, 'a'), (41.4, 'x')")
    names = read(database).vocabulary.names
    assert names == ("", "c", "", "")


def test_records_where_everybody_has_the_event_at_once(database):
    conditions(database, [(7, OUTCOME, "2020-01-01")])
    records = read(database)
    assert records.n_patients == 0
    assert left_out(records) == {"persons with the event in their first visit": 1}
