"""Where the OMOP reader finds its tables: as DuckDB finds the names in SQL."""

from __future__ import annotations

import numpy as np
import pytest

from ehrseq_fast.data import read_omop

from .test_omop import OUTCOME, duckdb, fill

CONDITIONS = (
    "(person_id BIGINT, condition_concept_id BIGINT, condition_start_date DATE); "
    "INSERT INTO {0} VALUES (7, 40, '2020-01-01'), (7, 99, '2020-02-01'), ({1}, 41, '2020-01-05')"
)


@pytest.fixture
def database():
    with duckdb.connect() as connection:
        yield connection


def conditions(connection, table, person, temporary=""):
    """A table in which ``person`` tells which one was read."""
    connection.execute(f"CREATE {temporary} TABLE {table} " + CONDITIONS.format(table, person))


def persons(connection, **options):
    records = read_omop(connection, outcome_concept_id=OUTCOME, tables=("condition",), **options)
    return records.person_ids.tolist()


def test_temporary_tables_come_first_as_in_sql(database):
    conditions(database, "condition_occurrence", 10, "TEMP")
    assert persons(database) == [7, 10]
    conditions(database, "memory.main.condition_occurrence", 11)
    assert persons(database) == persons(database, schema="temp") == [7, 10]
    assert persons(database, schema="memory.main") == [7, 11]
    for schema, first in ((None, "condition_occurrence"), ("main", "main.condition_occurrence")):
        rows = database.execute(f"SELECT max(person_id) FROM {first}").fetchone()
        assert persons(database, schema=schema)[-1] == rows[0]


def test_a_temporary_concept_table_gives_names(database):
    fill(database)
    database.execute("DROP TABLE concept")
    database.execute("CREATE SCHEMA cdm")
    fill(database, "cdm")
    database.execute("DROP TABLE cdm.concept")
    database.execute("CREATE TEMP TABLE concept AS SELECT 40 AS concept_id, 'x' AS concept_name")
    for schema in (None, "cdm"):
        records = read_omop(database, outcome_concept_id=OUTCOME, schema=schema)
        assert records.vocabulary.names[1:3] == ("x", "")


def test_registered_frames(database):
    frames = pytest.importorskip("pandas")
    days = np.array(["2020-01-01", "2020-02-01", "2020-01-05"], "datetime64[ns]")
    frame = frames.DataFrame(
        {
            "Person_ID": [7, 7, 12],
            "condition_concept_id": [40, 99, 41],
            "Condition_Start_Date": days,
        }
    )
    with pytest.raises(LookupError, match=r"connection\.register\('condition_occurrence', frame"):
        persons(database)
    database.register("Condition_Occurrence", frame)
    assert persons(database) == [7, 12]
    database.unregister("Condition_Occurrence")
    database.from_df(frame).create_view("condition_occurrence")
    assert persons(database) == [7, 12]


def test_a_local_variable_is_no_table(database):
    """DuckDB's own look-up would take one of the reader's for a table."""
    conditions(database, "condition_occurrence", 10)
    assert read_omop(database, outcome_concept_id=99, tables=("condition",)).vocabulary.names == (
        ("",) * 3
    )


@pytest.mark.parametrize(
    "path",
    [
        "main,second",
        "second",
        "memory.second",
        "omop.main,memory.second",
        'main,"My.Cdm"',
        "omop.second",
    ],
)
def test_every_schema_of_the_search_path(database, path):
    schema = '"My.Cdm"' if "My" in path else "second"
    catalog = "omop" if path == "omop.second" else "memory"
    database.execute("ATTACH ':memory:' AS omop")
    database.execute(f"CREATE SCHEMA {catalog}.{schema}")
    conditions(database, f"{catalog}.{schema}.condition_occurrence", 13)
    if path != "omop.second":
        with pytest.raises(LookupError, match=f'there is one in "memory".*{schema[1:-1]}'):
            persons(database)
    database.execute(f"SET search_path = '{path}'")
    assert persons(database) == [7, 13]


def test_the_earlier_schema_of_the_search_path_wins(database):
    for person, schema in enumerate(("first", "second"), 20):
        database.execute(f"CREATE SCHEMA {schema}")
        conditions(database, f"{schema}.condition_occurrence", person)
    database.execute("SET search_path = 'second,first'")
    assert persons(database) == [7, 21]
    assert persons(database, schema="first") == [7, 20]


def test_a_catalogue_alone(database):
    database.execute("ATTACH ':memory:' AS omop; CREATE SCHEMA omop.cdm")
    conditions(database, "omop.cdm.condition_occurrence", 15)
    with pytest.raises(LookupError, match=r'there is one in "omop"\."cdm" \(pass it as schema\)'):
        persons(database, schema="omop")
    assert persons(database, schema='"omop"."cdm"') == [7, 15]
    conditions(database, "omop.main.condition_occurrence", 16)
    assert persons(database, schema="omop") == persons(database, schema="OMOP") == [7, 16]
    assert persons(database, schema='"omop"') == [7, 16]
    database.execute("USE omop")
    assert persons(database) == persons(database, schema="omop") == [7, 16]


@pytest.mark.parametrize(
    "schema", ['"my.db"."The.Cdm"', "my.db.The.Cdm", '"MY.DB"."the.cdm"', "my.db.the.cdm"]
)
def test_dots_and_case_in_names(database, schema):
    database.execute("""ATTACH ':memory:' AS "my.db"; CREATE SCHEMA "my.db"."The.Cdm" """)
    conditions(database, '"my.db"."The.Cdm".condition_occurrence', 17)
    assert persons(database, schema=schema) == [7, 17]


def test_quotation_marks(database):
    database.execute('CREATE SCHEMA "a""b"; CREATE SCHEMA "Mixed"')
    conditions(database, '"a""b".condition_occurrence', 18)
    conditions(database, '"Mixed"."Condition_Occurrence"', 19)
    assert persons(database, schema='"a""b"') == [7, 18]
    assert persons(database, schema='"Mixed"') == persons(database, schema="mixed") == [7, 19]
    database.execute("""SET search_path = '"a""b"' """)
    assert persons(database) == [7, 18]
    with pytest.raises(ValueError, match="schema: expected quotation marks in pairs, got '\"Mixed"):
        persons(database, schema='"Mixed')


def test_what_is_missing_is_said_with_where_it_was_looked_for(database):
    with pytest.raises(
        LookupError, match=r'no OMOP table .* looked in "temp"\."main", "memory"\."main"; no attach'
    ):
        persons(database)
