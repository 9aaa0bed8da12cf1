"""Stores from OMOP databases: every column, rule and count, against plain Python."""

from __future__ import annotations

from datetime import date, datetime

import numpy as np
import pytest

from ehrseq_fast.data import read_omop

from .omop_tables import READ, by_hand, contents, database, fill, random_tables

duckdb = pytest.importorskip("duckdb", reason="pip install 'ehrseq_fast[omop]'")

DAY = datetime(2020, 1, 1)


@pytest.fixture
def connection():
    with duckdb.connect() as opened:
        yield opened


def counted(store):
    return {reason: n for reason, n in store.left_out.items() if n}


def noticed(store):
    return {what: n for what, n in store.header["source"]["noticed"].items() if n}


@pytest.mark.parametrize("visits", ["day", "time", "visit_occurrence", 30, 100.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_store_holds_what_plain_python_finds(connection, tmp_path, visits, seed):
    tables = random_tables(seed)
    fill(connection, tables)
    for keep in (False, True):
        store = read_omop(
            connection,
            tmp_path / f"{keep}",
            tables=READ,
            visits=visits,
            outside_periods="keep" if keep else "leave_out",
            rows_per_part=30,
        )
        expected = by_hand(tables, visits, keep=keep)
        found = contents(store)
        assert found.keys() == expected.keys()
        for person, one in expected.items():
            assert found[person] == one, person


def test_events_by_day_are_those_of_the_reader_in_memory(connection, tmp_path):
    fill(connection, {"condition_occurrence": random_tables(5)["condition_occurrence"]})
    connection.execute("DELETE FROM condition_occurrence WHERE condition_start_date IS NULL")
    connection.execute(
        f"INSERT INTO condition_occurrence VALUES ({2**50}, 99, '2020-03-01', NULL, 1)"
    )
    store = read_omop(connection, tmp_path / "store", tables=("condition",))
    records = read_omop(connection, outcome_concept_id=99, tables=("condition",))
    n = records.n_patients
    assert store.subject_ids.tolist() == [*records.person_ids.tolist(), 2**50]
    assert (store.patient_offsets[: n + 1] == records.patient_offsets).all()
    days = store.visit_times[: records.n_visits].astype("datetime64[D]")
    assert (days == records.visit_days).all()
    codes = np.array([int(code) for code in store.codes_of])[store.codes[: len(records.codes)]]
    # A store's codes are in the order of their strings, within a visit too.
    for v in range(records.n_visits):
        at = slice(*records.visit_offsets[v : v + 2])
        assert sorted(codes[at]) == records.vocabulary.concept_ids[records.codes[at]].tolist()


def test_rows_and_persons_left_out_are_counted_once(connection, tmp_path):
    day = date(2020, 1, 1)
    tables = {
        "condition_occurrence": [
            (None, 40, day),
            (None, None, None),
            (1, None, day),
            (1, 0, None),
            (1, 40, None),
            (1, 40, "infinity"),
            (1, 40, "4000-01-01 (BC)"),
            (1, 40, "290000-01-01", datetime(2020, 1, 1)),
            (1, 40, None, "290000-01-01"),
            (1, 40, day),
            (1, 40, date(2021, 1, 1)),
            (2, 0, day),
            (3, 40, day),
        ],
        "measurement": [(1, 50, day, None, None, value) for value in (1e300, np.inf, np.nan, None)]
        + [(1, 51, day, None, None, value) for value in (2.0, 3.0)],
        "person": [
            (1, 8507, 0, None, 1950, 2, 31),
            (1, 8532, 0, None, 1950, 2, 30),
            (None, 8507),
            (4, 0, 0, 0),
            (5, 0, 0, 0, 1960),
        ],
        "observation_period": [
            (1, day, day),
            (1, day, date(2020, 2, 1)),
            (1, date(2022, 1, 1), date(2022, 2, 1)),
            (1, date(2020, 2, 1), day),
            (1, None, day),
            (1, day, "infinity"),
            (1, day, "10000-01-01"),
            (None, day, day),
            (6, day, day),
        ],
        "death": [
            (1, date(2030, 1, 1)),
            (1, date(2031, 1, 1)),
            (1, None),
            (1, "20000-01-01"),
            (None, day),
            (6, day),
        ],
    }
    fill(connection, tables)
    store = read_omop(connection, tmp_path / "store", tables=READ)
    assert counted(store) == {
        "rows without a person": 2,
        "rows without a known concept": 3,
        "rows without a date": 2,
        "rows dated outside the years 1 to 9999": 3,
        "rows outside every observation period of the person": 2,
        "persons whose rows are all left out": 3,
        "numeric values that are not a number": 1,
        "numeric values that float32 does not hold": 2,
        "numeric values superseded by a later one of the same visit": 1,
        "births that are no day": 1,
        "concepts of persons that are NULL or 0": 8,
        "further rows of one person in person": 1,
        "person rows without a person_id": 1,
        "observation periods that end before they start": 1,
        "observation periods without a start or an end": 2,
        "observation periods dated outside the years 1 to 9999": 1,
        "observation periods of persons with no other row": 1,
        "observation_period rows without a person_id": 1,
        "further deaths of one person": 1,
        "deaths without a date": 1,
        "deaths dated outside the years 1 to 9999": 1,
        "deaths of persons with no other row": 1,
        "death rows without a person_id": 1,
    }
    assert noticed(store) == {
        "observation periods that overlap or touch another, merged": 1,
        "observation periods without a row": 1,
    }
    assert contents(store) == {
        1: {
            "visits": [(DAY, {"40": None, "50": None, "51": 3.0})],
            "ends": [DAY],
            "static": ["8532"],
            "birth": None,
            "death": datetime(2030, 1, 1),
            "periods": [
                (DAY, datetime(2020, 2, 2)),
                (datetime(2022, 1, 1), datetime(2022, 2, 2)),
            ],
        },
        5: {
            "visits": [],
            "ends": [],
            "static": [],
            "birth": datetime(1960, 6, 15),
            "death": None,
            "periods": [],
        },
    }


def test_odd_rows_are_taken_up_and_noticed(connection, tmp_path):
    future = date(2900, 1, 1)
    tables = {
        "condition_occurrence": [
            (1, 40, date(1949, 1, 1)),
            (1, 40, date(2020, 1, 2), datetime(2020, 1, 3, 4)),
            (1, 40, None, datetime(2020, 1, 5, 4)),
            (1, 40, date(2020, 1, 2), "290000-01-01"),
            (1, 41, future),
        ],
        "person": [(1, None, None, None, None, None, None, datetime(1950, 1, 1))],
        "death": [(1, date(2020, 1, 3), datetime(2020, 1, 4, 1))],
    }
    fill(connection, tables)
    store = read_omop(connection, tmp_path / "store", tables=("condition",))
    assert noticed(store) == {
        "rows with a datetime on another day than their date": 2,
        "deaths with a datetime on another day than their date": 1,
        "rows before the person's birth": 1,
        "rows after the day of the person's death": 2,
        "rows dated after the day of reading": 1,
    }
    assert [at for at, _ in contents(store)[1]["visits"]] == [
        datetime(1949, 1, 1),
        datetime(2020, 1, 2),
        datetime(2020, 1, 5, 4),
        datetime(2900, 1, 1),
    ]
    missing = store.header["source"]["missing"]
    assert missing == {"observation_period": "no such table"}


@pytest.mark.parametrize(
    ("parts", "records", "expected"),
    [
        ((1950, 3, 4), [], datetime(1950, 3, 4)),
        ((1950, 3, None), [], datetime(1950, 3, 1)),
        ((1950, None, 4), [], datetime(1950, 6, 15)),
        ((1950, None, None), [date(1951, 2, 3)], datetime(1950, 6, 15)),
        ((1950, None, None), [date(1950, 9, 3), date(1950, 2, 3)], datetime(1950, 2, 3)),
        ((1950, 2, 29), [], None),
        ((1952, 2, 29), [], datetime(1952, 2, 29)),
        ((1950, 13, 1), [], None),
        ((1950, 0, 1), [], None),
        ((0, 1, 1), [], None),
        ((2**31 - 1, 1, 1), [], None),
        ((None, 1, 1), [], None),
        ((1600, 12, 31), [], datetime(1600, 12, 31)),
    ],
)
def test_births_from_their_parts(connection, tmp_path, parts, records, expected):
    rows = [(1, 40, day) for day in [date(1990, 1, 1), *records]]
    tables = {"condition_occurrence": rows, "person": [(1, 8507, None, None, *parts)]}
    fill(connection, tables)
    store = read_omop(connection, tmp_path / "store", tables=("condition",))
    assert contents(store)[1]["birth"] == expected
    impossible = expected is None and parts[0] is not None
    assert counted(store).get("births that are no day", 0) == impossible


def test_visits_of_another_person_or_without_a_start_are_none(connection, tmp_path):
    day = date(2020, 1, 5)
    tables = {
        "condition_occurrence": [
            (1, 40, day, None, 10),
            (1, 41, date(2020, 1, 20), None, 10),
            (1, 42, day, datetime(2020, 1, 5, 3), None),
            (1, 43, day, None, 20),
            (1, 44, day, None, 11),
            (1, 45, day, None, 30),
            (1, 46, day, None, 404),
            (1, 47, date(2020, 1, 21), None, 10),
            (1, 48, date(2020, 1, 1), None, 10),
            (1, 49, date(2021, 1, 1), None, 12),
            (1, 50, date(2021, 1, 1), None, 13),
            (2, 40, day, None, 20),
        ],
        "visit_occurrence": [
            (1, 10, date(2020, 1, 2), datetime(2020, 1, 2, 9), date(2020, 1, 20)),
            (1, 12, date(2020, 1, 7), None, date(2020, 1, 6)),
            (1, 13, date(2020, 1, 8), None, None),
            (1, 10, date(2020, 1, 3)),
            (2, 20, day),
            (1, 11, None),
            (1, None, day),
            (None, 30, day),
        ],
    }
    fill(connection, tables)
    store = read_omop(
        connection, tmp_path / "store", tables=("condition",), visits="visit_occurrence"
    )
    assert contents(store)[1]["visits"] == [
        (datetime(2020, 1, 2, 9), {"40": None, "41": None, "48": None}),
        (datetime(2020, 1, 5), {"42": None, "43": None, "44": None, "45": None, "46": None}),
        (datetime(2020, 1, 8), {"50": None}),
        (datetime(2020, 1, 21), {"47": None}),
        (datetime(2021, 1, 1), {"49": None}),
    ]
    assert counted(store) == {
        "visits with the id of an earlier one of the person": 1,
        "visits without a start": 1,
        "visits without an id": 1,
        "visit_occurrence rows without a person_id": 1,
    }
    assert noticed(store) == {
        "rows without a visit, grouped by day": 1,
        "rows whose visit is none of the person's, grouped by day": 4,
        "rows dated before their visit's start": 1,
        "rows dated after their visit's end, grouped by day": 2,
    }


def test_zones_text_and_enums_are_read_as_instants_in_utc(connection, tmp_path):
    connection.execute("SET TimeZone = 'America/New_York'")
    zoned = {"condition_occurrence.condition_start_datetime": "TIMESTAMPTZ"}
    rows = [
        (1, 40, "2020-01-02", "2020-01-02 01:00:00+02"),
        (1, 41, None, "2020-01-02 23:00:00-05"),
    ]
    fill(connection, {"condition_occurrence": rows}, types=zoned)
    store = read_omop(connection, tmp_path / "zoned", tables=("condition",))
    assert [at for at, _ in contents(store)[1]["visits"]] == [
        datetime(2020, 1, 2),  # 2020-01-01 23:00 is on another day than the date
        datetime(2020, 1, 3, 4),
    ]
    connection.execute("DROP TABLE condition_occurrence")
    connection.execute("CREATE TYPE days AS ENUM ('2020-01-02', '2020-01-05T03:04:05')")
    connection.execute("CREATE TYPE ids AS ENUM ('7', '40')")
    text = {
        "condition_occurrence.person_id": "ids",
        "condition_occurrence.condition_concept_id": "ids",
        "condition_occurrence.condition_start_date": "VARCHAR",
        "condition_occurrence.condition_start_datetime": "days",
    }
    rows = [("7", "40", "2020-01-05 10:00", "2020-01-05T03:04:05"), ("7", "40", "2020-01-02")]
    fill(connection, {"condition_occurrence": rows}, types=text)
    store = read_omop(connection, tmp_path / "text", tables=("condition",))
    assert [at for at, _ in contents(store)[7]["visits"]] == [
        datetime(2020, 1, 2),
        datetime(2020, 1, 5, 3, 4, 5),
    ]


@pytest.mark.parametrize("dtype", ["FLOAT", "DECIMAL(9,2)", "VARCHAR", "INTEGER", "HUGEINT"])
def test_numeric_values_of_every_type(connection, tmp_path, dtype):
    values = [3, None, -2]
    rows = [(1, 50 + i, DAY, None, None, value) for i, value in enumerate(values)]
    fill(connection, {"measurement": rows}, types={"measurement.value_as_number": dtype})
    store = read_omop(connection, tmp_path / "store", tables=("measurement",))
    assert contents(store)[1]["visits"] == [(DAY, {"50": 3.0, "51": None, "52": -2.0})]


@pytest.mark.parametrize("dtype", ["FLOAT", "DOUBLE", "VARCHAR"])
def test_values_that_are_no_number_are_counted(connection, tmp_path, dtype):
    rows = [(1, 50 + i, DAY, None, None, value) for i, value in enumerate(["nan", None, 1, "NaN"])]
    fill(connection, {"measurement": rows}, types={"measurement.value_as_number": dtype})
    store = read_omop(connection, tmp_path / "store", tables=("measurement",))
    assert contents(store)[1]["visits"] == [(DAY, {"50": None, "51": None, "52": 1.0, "53": None})]
    assert counted(store) == {"numeric values that are not a number": 2}


def test_births_out_of_range_are_counted(connection, tmp_path):
    births = [(2, 1950, "20000-01-01"), (3, None, "20000-01-01"), (4, None, "4000-01-01 (BC)")]
    tables = {
        "condition_occurrence": [(person, 40, DAY) for person in (2, 3, 4)],
        "person": [(p, 8507, 8507, 8507, year, 1, 1, birth) for p, year, birth in births],
    }
    fill(connection, tables)
    store = read_omop(connection, tmp_path / "store", tables=("condition",))
    assert [one["birth"] for one in contents(store).values()] == [datetime(1950, 1, 1), None, None]
    assert counted(store) == {"births that are no day": 2}


@pytest.mark.parametrize("other", [2, 2**63 - 1])
def test_the_last_value_of_a_visit_does_not_depend_on_the_order_of_the_rows(tmp_path, other):
    moments = [datetime(2020, 1, 1, hour) for hour in (3, 9, 9, 9, 1)]
    rows = [
        (1, 50, DAY, at, None, value)
        for at, value in zip(moments, (8.0, 4.0, 6.0, None, 9.0), strict=True)
    ]
    rows += [(other, 50, DAY, None, None, value) for value in (3.0, 2.0, 1.0)]
    found = set()
    for i, order in enumerate((rows, rows[::-1], rows[2:] + rows[:2])):
        path = database(tmp_path / f"{i}.duckdb", {"measurement": order})
        store = read_omop(path, tmp_path / f"{i}", tables=("measurement",))
        found.add(store.header["content_sha256"])
        assert contents(store)[1]["visits"] == [(moments[0].replace(hour=1), {"50": 6.0})]
        assert contents(store)[other]["visits"] == [(DAY, {"50": 3.0})]
    assert len(found) == 1


def test_schemas_views_attached_catalogues_and_mixed_case(connection, tmp_path):
    path = database(tmp_path / "other.duckdb", {"concept": [(40, "cough"), (41, "fever")]})
    connection.execute(f"ATTACH '{path}' AS other")
    connection.execute('CREATE SCHEMA other."CDM.5"')
    connection.execute(
        'CREATE VIEW other."CDM.5"."Condition_Occurrence" AS SELECT 7 AS "Person_ID",'
        " 40 AS CONDITION_CONCEPT_ID, DATE '2020-01-01' AS \"Condition_Start_Date\""
    )
    store = read_omop(connection, tmp_path / "store", tables=("condition",), schema='other."CDM.5"')
    assert contents(store)[7]["visits"] == [(DAY, {"40": None})]
    assert store.descriptions == ("",)
    connection.execute('CREATE VIEW other."CDM.5".concept AS SELECT * FROM other.main.concept')
    store = read_omop(connection, tmp_path / "named", tables=("condition",), schema='other."CDM.5"')
    assert store.descriptions == ("cough",)
    assert set(store.header["source"]["missing"]) == {
        "condition_occurrence.condition_start_datetime",
        "person",
        "observation_period",
        "death",
    }


def test_ids_of_all_64_bits(connection, tmp_path):
    ids = [-(2**63) + 1, -1, 0, 2**31, 2**53 + 1, 2**63 - 1]
    rows = [(person, 2**63 - 1 - i, DAY) for i, person in enumerate(ids)]
    fill(connection, {"condition_occurrence": rows})
    store = read_omop(connection, tmp_path / "one", tables=("condition",))
    split = read_omop(connection, tmp_path / "many", tables=("condition",), rows_per_part=1)
    assert store.subject_ids.tolist() == split.subject_ids.tolist() == ids
    assert store.header["content_sha256"] == split.header["content_sha256"]
    assert [next(iter(one["visits"][0][1])) for one in contents(store).values()] == [
        str(2**63 - 1 - i) for i in range(len(ids))
    ]


def test_open_ends_and_the_first_and_last_days(connection, tmp_path):
    days = [date(1, 1, 1), date(9999, 12, 31)]
    tables = {
        "condition_occurrence": [(1, 40, day) for day in days] + [(1, 40, "10000-01-01")],
        "observation_period": [(1, days[0], days[1])],
    }
    fill(connection, tables)
    store = read_omop(connection, tmp_path / "store", tables=("condition",))
    assert [at.date() for at, _ in contents(store)[1]["visits"]] == days
    assert store.period_ends.tolist() == [datetime(9999, 12, 31, 23, 59, 59, 999999)]
    assert counted(store) == {"rows dated outside the years 1 to 9999": 1}
