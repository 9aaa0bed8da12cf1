"""OMOP databases that cannot be read, or not as they are: each with its error, and no store."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from datetime import date

import pytest

from ehrseq_fast.data import EventStore, read_omop
from ehrseq_fast.data.omop.connection import opened
from ehrseq_fast.data.omop.store import _settings

from .omop_tables import COLUMNS, READ, contents, database, fill

duckdb = pytest.importorskip("duckdb", reason="pip install 'ehrseq_fast[omop]'")

DAY = date(2020, 1, 1)
TABLES = {
    "condition_occurrence": [(1, 40, DAY, None, 10), (2, 41, DAY, None, 11)],
    "measurement": [(1, 50, DAY, None, 10, 1.5), (2, 51, DAY, None, None, 2.5)],
    "person": [(1, 8507, 8527, 0, 1950, 3, 4, None), (2, 8532, 8527, 0, 1960, 3, 4, None)],
    "observation_period": [(1, DAY, DAY), (2, DAY, DAY)],
    "death": [(1, date(2020, 2, 1), None)],
    "visit_occurrence": [(1, 10, DAY), (2, 11, DAY)],
    "concept": [(40, "cough")],
}


@pytest.fixture
def connection():
    with duckdb.connect() as opened:
        yield opened


@pytest.fixture
def path(tmp_path):
    return database(tmp_path / "omop.duckdb", TABLES)


def read(source, out, **options):
    return read_omop(source, out, tables=READ, **options)


def refused(source, out, error, message, **options):
    """The read fails with that message, and leaves nothing behind."""
    with pytest.raises(error, match=message):
        read(source, out, **options)
    assert not out.exists()
    assert [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")] == []


def test_each_missing_table(connection, tmp_path):
    fill(connection, TABLES)
    whole = read(connection, tmp_path / "whole", visits="visit_occurrence")
    assert whole.header["source"]["missing"] == {}
    for table in TABLES:
        connection.execute(f"ALTER TABLE {table} RENAME TO away")
        out = tmp_path / table
        if table in ("condition_occurrence", "measurement"):
            refused(connection, out, LookupError, f"no OMOP table '{table}'")
        else:
            store = read(connection, out)
            missing = {} if table in ("concept", "visit_occurrence") else {table: "no such table"}
            assert store.header["source"]["missing"] == missing
            assert store.n_visits == 2
        if table == "visit_occurrence":
            refused(
                connection,
                tmp_path / "by_visit",
                LookupError,
                f"no OMOP table '{table}'",
                visits="visit_occurrence",
            )
        connection.execute(f"ALTER TABLE away RENAME TO {table}")


def test_all_event_tables_are_read_that_there_are(connection, tmp_path):
    fill(connection, TABLES)
    measurements = "SELECT person_id, measurement_concept_id + 900 AS observation_concept_id, "
    measurements += "measurement_date AS observation_date FROM measurement"
    connection.execute(f"CREATE TABLE observation AS {measurements}")
    connection.execute("CREATE TABLE procedure_occurrence AS SELECT 'person_id' AS column00")
    store = read_omop(connection, tmp_path / "all")
    source = store.header["source"]
    absent = ("drug_exposure", "device_exposure")
    assert source["tables"] == ["condition_occurrence", "measurement", "observation"]
    assert {source["missing"][name] for name in absent} == {"no such table"}
    lacks = "the table lacks person_id, procedure_concept_id, procedure_date"
    assert source["missing"]["procedure_occurrence"] == lacks
    assert source["not_read"] == {}
    assert "missing             device_exposure: no such table" in store.describe()
    assert any(int(code) > 900 for code in store.codes_of)

    asked = read(connection, tmp_path / "asked")
    assert asked.header["source"]["not_read"] == {"observation": len(TABLES["measurement"])}
    assert f"not read            table observation: {len(TABLES['measurement'])} rows" in (
        asked.describe()
    )
    connection.execute("DROP TABLE observation")
    connection.execute("CREATE TABLE gone AS SELECT 1 AS person_id")
    connection.execute("CREATE VIEW observation AS SELECT person_id FROM gone")
    connection.execute("DROP TABLE gone")
    asked = read(connection, tmp_path / "view")
    assert asked.header["source"]["not_read"] == {"observation": None}
    assert "not read            table observation: a view that fails" in asked.describe()


def test_event_tables_that_are_asked_for_must_be_there(connection, tmp_path):
    out = tmp_path / "none"
    fill(connection, TABLES)
    for options in ({"out": out}, {"outcome_concept_id": 40}):
        with pytest.raises(LookupError, match=r"no OMOP table 'drug_exposure'.*; tables= \(--tab"):
            read_omop(connection, tables=("drug", "condition"), **options)
    connection.execute("CREATE TABLE device_exposure (person_id INTEGER)")
    lacks = "table 'device_exposure' lacks device_concept_id, device_exposure_start_date; tables= "
    with pytest.raises(LookupError, match=lacks):
        read_omop(connection, out)
    for table in ("condition_occurrence", "measurement", "device_exposure"):
        connection.execute(f"DROP TABLE {table}")
    with pytest.raises(LookupError, match="no OMOP table 'condition_occurrence'"):
        read_omop(connection, out)
    assert not out.exists()


NEEDED = {
    "condition_occurrence": {"person_id", "condition_concept_id", "condition_start_date"},
    "measurement": {"person_id", "measurement_concept_id", "measurement_date"},
}
NEEDED_BY_VISIT = {
    "condition_occurrence": {"visit_occurrence_id"},
    "measurement": {"visit_occurrence_id"},
    "visit_occurrence": {"person_id", "visit_occurrence_id", "visit_start_date"},
}
WHOLE_TABLE = {  # without them the table says nothing
    "person": {"person_id"},
    "observation_period": set(COLUMNS["observation_period"]),
    "death": {"person_id", "death_date"},
}


@pytest.mark.parametrize("table", [name for name in COLUMNS if name != "concept"])
def test_each_missing_column(connection, tmp_path, table):
    fill(connection, TABLES)
    for column in COLUMNS[table]:
        connection.execute(f"ALTER TABLE {table} RENAME COLUMN {column} TO away")
        out, by_visit = tmp_path / column, tmp_path / f"{column}_by_visit"
        lacks = f"table '{table}' lacks {column}"
        if column in NEEDED.get(table, ()):
            refused(connection, out, LookupError, lacks)
        else:
            missing = {f"{table}.{column}": "no such column"}
            if column in WHOLE_TABLE.get(table, ()):
                missing = {table: f"the table lacks {column}"}
            if table == "visit_occurrence" or column == "visit_occurrence_id":
                missing = {}
            store = read(connection, out)
            assert store.header["source"]["missing"] == missing
            assert store.n_visits == 2
        if column in NEEDED_BY_VISIT.get(table, ()):
            refused(connection, by_visit, LookupError, lacks, visits="visit_occurrence")
        connection.execute(f"ALTER TABLE {table} RENAME COLUMN away TO {column}")


@pytest.mark.parametrize("table", [name for name in COLUMNS if name != "concept"])
def test_null_in_each_column_is_no_error(connection, tmp_path, table):
    rows = TABLES[table]
    for at, column in enumerate(COLUMNS[table]):
        one = [*rows[0], *[None] * (len(COLUMNS[table]) - len(rows[0]))]
        one[at] = None
        fill(connection, {**TABLES, table: [one, *rows[1:]]})
        store = read(connection, tmp_path / column, visits="visit_occurrence")
        assert store.n_patients == 2
        found = {reason for reason, n in store.left_out.items() if n}
        expected = {
            "person_id": {
                "condition_occurrence": {"rows without a person"},
                "measurement": {"rows without a person"},
                "visit_occurrence": {"visit_occurrence rows without a person_id"},
                "observation_period": {
                    "observation_period rows without a person_id",
                    "rows outside every observation period of the person",
                },
            }.get(table, {f"{table} rows without a person_id"}),
            "condition_concept_id": {"rows without a known concept"},
            "measurement_concept_id": {"rows without a known concept"},
            "condition_start_date": {"rows without a date"},
            "measurement_date": {"rows without a date"},
            "death_date": {"deaths without a date"},
            "visit_start_date": {"visits without a start"},
            "observation_period_start_date": {
                "observation periods without a start or an end",
                "rows outside every observation period of the person",
            },
        }
        expected["observation_period_end_date"] = expected["observation_period_start_date"]
        if table == "visit_occurrence":
            expected["visit_occurrence_id"] = {"visits without an id"}
        concepts = {"concepts of persons that are NULL or 0"}
        assert found == expected.get(column, set()) | concepts, column
        for name in TABLES:
            connection.execute(f"DROP TABLE {name}")


WRONG = [
    ("condition_occurrence.person_id", "BOOLEAN", "expected integers, got BOOLEAN"),
    ("condition_occurrence.person_id", "UUID", "expected integers, got UUID"),
    ("condition_occurrence.condition_concept_id", "DATE", "expected integers, got DATE"),
    ("condition_occurrence.condition_start_date", "BIGINT", "expected dates or timestamps, got"),
    ("condition_occurrence.condition_start_datetime", "TIME", "expected dates or timestamps, got"),
    ("condition_occurrence.visit_occurrence_id", "BLOB", "expected integers, got BLOB"),
    ("measurement.value_as_number", "BLOB", "expected numbers, got BLOB"),
    ("measurement.value_as_number", "DATE", "expected numbers, got DATE"),
    ("person.birth_datetime", "INTEGER", "expected dates or timestamps, got INTEGER"),
    ("person.year_of_birth", "DATE", "expected integers, got DATE"),
    ("person.gender_concept_id", "INTEGER[]", r"expected integers, got INTEGER\[\]"),
    ("observation_period.person_id", "DATE", "expected integers, got DATE"),
    ("observation_period.observation_period_end_date", "TIME", "expected dates or timestamps"),
    ("death.death_date", "BOOLEAN", "expected dates or timestamps, got BOOLEAN"),
    ("visit_occurrence.visit_start_datetime", "TIME", "expected dates or timestamps, got TIME"),
    ("visit_occurrence.visit_end_date", "TIME", "expected dates or timestamps, got TIME"),
    ("concept.concept_id", "BOOLEAN", "expected integers, got BOOLEAN"),
    ("visit_occurrence.visit_occurrence_id", "STRUCT(a INTEGER)", "expected integers, got STRUCT"),
]


@pytest.mark.parametrize(("column", "dtype", "message"), WRONG)
def test_columns_of_a_wrong_type(connection, tmp_path, column, dtype, message):
    table, name = column.split(".")
    fill(connection, {**TABLES, table: []}, types={column: dtype})
    message = rf'"{table}", column {name}: {message}'
    refused(connection, tmp_path / "out", TypeError, message, visits="visit_occurrence")


LOSSY = [
    ("condition_occurrence.person_id", "DOUBLE", 7.5, "whole numbers that int64 holds, got '7.5'"),
    ("condition_occurrence.person_id", "VARCHAR", "P7", "whole numbers that int64 holds, got 'P7'"),
    ("condition_occurrence.condition_concept_id", "VARCHAR", "R05", "whole numbers .*'R05'"),
    ("measurement.measurement_date", "VARCHAR", "2020-02-30", "days, as YYYY-MM-DD, got"),
    (
        "measurement.measurement_datetime",
        "VARCHAR",
        "noon",
        "dates or timestamps, as .* got 'noon'",
    ),
    ("measurement.value_as_number", "VARCHAR", "<5", "numbers, got '<5'"),
    ("measurement.value_as_number", "VARCHAR", "1_000", "numbers, got '1_000'"),
    ("person.gender_concept_id", "VARCHAR", "F", "whole numbers that int64 holds, got 'F'"),
    ("person.person_id", "HUGEINT", 2**63, f"whole numbers that int64 holds, got '{2**63}'"),
    ("death.death_date", "VARCHAR", "unknown", "days, as YYYY-MM-DD, got 'unknown'"),
    ("observation_period.observation_period_start_date", "VARCHAR", "2020", "days, as YYYY-MM-DD"),
    ("visit_occurrence.visit_occurrence_id", "DECIMAL(9,1)", 1.5, "whole numbers .*'1.5'"),
]


@pytest.mark.parametrize(("column", "dtype", "value", "message"), LOSSY)
def test_values_that_a_conversion_would_change(connection, tmp_path, column, dtype, value, message):
    table, name = column.split(".")
    rows = [list(row) for row in TABLES[table]]
    at = list(COLUMNS[table]).index(name)
    wrong = [*rows[0], *[None] * (len(COLUMNS[table]) - len(rows[0]))]
    wrong[at] = value
    whose = "" if name == "person_id" else r" \(person 1\)"
    fill(connection, {**TABLES, table: [wrong]}, types={column: dtype})
    message = rf'"{table}", column {name}: expected {message}.*{whose} \(1 rows have no such value'
    refused(connection, tmp_path / "out", ValueError, message, visits="visit_occurrence")


def test_files_that_are_no_database(tmp_path, path):
    out = tmp_path / "store"
    refused(tmp_path / "none.duckdb", out, FileNotFoundError, "none.duckdb: no such file")
    refused(tmp_path, out, ValueError, "expected a DuckDB file that can be opened read-only")
    for content in (b"", b"person_id,condition_concept_id\n1,40\n" * 400, b"\0" * 50_000):
        wrong = tmp_path / "wrong.duckdb"
        wrong.write_bytes(content)
        message = f"expected a DuckDB file .*got {re.escape(str(wrong))}"
        refused(wrong, out, ValueError, message)
        with pytest.raises(ValueError, match=message):
            read_omop(wrong, outcome_concept_id=40)


def test_a_file_of_sqlite(tmp_path):
    path = tmp_path / "cdm.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE condition_occurrence (person_id INTEGER)")
        connection.commit()
    message = "expected a DuckDB file .*cdm.sqlite: it is one of SQLite"
    refused(path, tmp_path / "out", ValueError, message)
    with pytest.raises(ValueError, match=message):
        read_omop(path, outcome_concept_id=40)


@pytest.mark.parametrize(
    ("given", "of_duckdb"),
    [
        (None, 128_000_000),
        ("100MB", 100_000_000),
        ("300 mb", 128_000_000),
        ("1GB", 400_000_000),
        ("1.5GiB", int(0.6 * 1024**3)),
        ("65536KiB", 64 * 1024**2),
        ("99000000B", 99_000_000),
    ],
)
def test_how_much_memory_duckdb_gets(path, given, of_duckdb):
    settings = _settings(path, 1, given)
    assert settings["memory_limit"] == f"{of_duckdb}B"
    with opened(path, settings) as connection:
        set_to = connection.execute("SELECT current_setting('memory_limit')").fetchone()[0]
    assert set_to.endswith(" MiB")
    assert float(set_to.split()[0]) * 1024**2 == pytest.approx(of_duckdb, rel=0.01)


def test_nothing_is_installed_for_a_database(path):
    with opened(path) as connection:
        setting = "SELECT current_setting('autoinstall_known_extensions')"
        assert connection.execute(setting).fetchone() == (False,)


def test_files_that_are_cut_off_or_damaged(tmp_path):
    rows = [(i // 20, 40 + i % 900, DAY) for i in range(60_000)]
    whole = tmp_path / "whole.duckdb"
    with duckdb.connect(str(whole)) as connection:
        fill(
            connection, {name: TABLES[name][:0] for name in ("condition_occurrence", "measurement")}
        )
        connection.execute(
            "INSERT INTO condition_occurrence SELECT hash(i) % 3000, hash(i + 7) % 100000 + 1,"
            " DATE '2020-01-01' + CAST(hash(i + 3) % 9000 AS INTEGER), NULL, NULL"
            f" FROM range({len(rows)}) t(i)"
        )
    content = whole.read_bytes()
    out = tmp_path / "store"
    assert read(whole, out).n_patients == 3000
    seen: set[str] = set()
    for share in (0.02, 0.3, 0.6, 0.9):
        cut = tmp_path / "cut.duckdb"
        cut.write_bytes(content[: int(share * len(content))])
        with pytest.raises(
            (OSError, ValueError), match=r"cut\.duckdb|table .*(persons|cannot be read)"
        ):
            read(cut, tmp_path / "cut")
        damaged = bytearray(content)
        at = int(share * len(content))
        damaged[at : at + 4096] = bytes(255 - byte for byte in damaged[at : at + 4096])
        cut.write_bytes(damaged)
        message = _error_of(cut, tmp_path / f"damaged{share}")
        if message is None:  # what was damaged is not read
            found = EventStore(tmp_path / f"damaged{share}").header
            assert found["content_sha256"] == EventStore(out).header["content_sha256"]
        else:
            assert re.search(r"cut\.duckdb|table ", message)
            seen.add(message)
    assert seen


def _error_of(path, out):
    try:
        read(path, out)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def test_no_rows(connection, tmp_path):
    empty = {table: [] for table in TABLES}
    fill(connection, empty)
    message = r"expected rows that have a person_id, got none in condition_occurrence \(0 rows\), "
    refused(connection, tmp_path / "out", ValueError, message)
    connection.execute("INSERT INTO measurement VALUES (NULL, 40, '2020-01-01', NULL, NULL, 1)")
    refused(connection, tmp_path / "out", ValueError, r"measurement \(1 rows\)")
    connection.execute("INSERT INTO measurement VALUES (5, 40, '2020-01-01', NULL, NULL, 1)")
    store = read(connection, tmp_path / "one")
    assert list(contents(store)) == [5]
    assert store.n_visits == 1


def test_rows_that_are_all_left_out(connection, tmp_path):
    fill(connection, {"condition_occurrence": [(1, 0, DAY), (2, 40, None)], "measurement": []})
    store = read(connection, tmp_path / "store")
    assert (store.n_patients, store.n_visits) == (0, 0)
    assert store.left_out["persons whose rows are all left out"] == 2


def test_options_that_do_not_go_together(connection, tmp_path, path):
    fill(connection, TABLES)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"out, outcome_concept_id: expected one, .* got neither"):
        read_omop(connection)
    with pytest.raises(ValueError, match=r"out, outcome_concept_id: expected one, .* got both"):
        read_omop(connection, out, outcome_concept_id=40)
    with pytest.raises(ValueError, match="visits, workers: expected out"):
        read_omop(connection, outcome_concept_id=40, visits="time", workers=2)
    refused(connection, out, ValueError, "a connection with workers=2", workers=2)
    refused(connection, out, ValueError, "memory_limit: expected none with", memory_limit="1GB")
    refused(path, out, ValueError, "memory_limit: expected a size as '512MB'", memory_limit="much")
    refused(path, out, ValueError, "memory_limit: expected a size as '512MB'", memory_limit=512)
    refused(path, out, ValueError, "visits: expected 'day'.*got 'visit_id'", visits="visit_id")
    refused(path, out, ValueError, "visits: expected .*got 'week'", visits="week")
    refused(path, out, ValueError, "visits: expected .*got -1", visits=-1)
    refused(path, out, ValueError, "outside_periods: expected .*got 'drop'", outside_periods="drop")
    refused(path, out, ValueError, "workers: expected .*got 0", workers=0)
    refused(path, out, ValueError, "rows_per_part: expected .*got 0", rows_per_part=0)
    refused(path, out, ValueError, "min_count", min_count=0)
    refused(path, out, ValueError, "train", split={"a": 1.0})
    for wrong in (None, 5, ["path"]):
        with pytest.raises(TypeError, match="database: expected a DuckDB connection or a path"):
            read(wrong, out)


def test_a_store_is_replaced_only_when_asked(path, tmp_path):
    out = tmp_path / "store"
    store = read(path, out)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        read(path, out)
    again = read(path, out, visits="time", overwrite=True)
    assert again.visit_rule == "time"
    assert store.n_visits == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not an EventStore"):
        read(path, tmp_path / "other", overwrite=True)
