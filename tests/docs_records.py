"""The records that the pages of docs/ speak of, under the names that they have there.

``docs/records.md`` reads ``meds-dataset`` and ``cdm.duckdb``; ``docs/tasks.md`` and
``docs/train.md`` begin with the ``store`` of the former.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from ehrseq_fast.data import FirstEvent, read_meds, write_labels

from . import omop_tables

OUTCOMES = ("I21", "192671")  # of docs/tasks.md, and of docs/train.md
SPLITS = ("train", "tuning", "held_out")


def write_meds(folder: Path, persons: int = 120) -> None:
    """Five to nine visits of each person, 100 days apart; half of them have an outcome."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    split = rng.choice(SPLITS, persons, p=[0.6, 0.2, 0.2])
    for name in SPLITS:
        rows = []
        for person in np.flatnonzero(split == name).tolist():
            day = datetime(2010, 1, 1) + timedelta(int(rng.integers(500)))
            for visit in range(int(rng.integers(5, 10))):
                codes = rng.choice(30, 3, replace=False)
                rows += [(person, day, f"ICD10CM//{code}") for code in codes]
                if visit > 2 and rng.random() < 0.2:
                    rows += [(person, day, code) for code in ("ICD10CM//I21", *OUTCOMES)]
                day += timedelta(100)
        columns = list(zip(*rows, strict=True))
        table = pa.table(
            {
                "subject_id": pa.array(columns[0], pa.int64()),
                "time": pa.array(columns[1], pa.timestamp("us")),
                "code": pa.array(columns[2], pa.string()),
                "numeric_value": pa.array([None] * len(rows), pa.float32()),
            }
        )
        path = folder / "data" / name / "0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table, path)
    (folder / "metadata").mkdir()
    pq.write_table(
        pa.table({"subject_id": np.arange(persons), "split": split}),
        folder / "metadata" / "subject_splits.parquet",
    )


def of_records(folder: Path) -> None:
    """``meds-dataset`` and ``cdm.duckdb``."""
    import duckdb

    write_meds(folder / "meds-dataset")
    with duckdb.connect(str(folder / "cdm.duckdb")) as connection:
        connection.execute("CREATE SCHEMA cdm.cdm")
        omop_tables.fill(connection, omop_tables.random_tables(0), schema="cdm.cdm")


def of_store(folder: Path) -> None:
    """``store``, of MEDS records, and a folder of labels, ``readmission``."""
    write_meds(folder / "meds-dataset")
    store = read_meds(folder / "meds-dataset", folder / "store")
    (folder / "readmission").mkdir()
    outcomes = FirstEvent("I21", washout_days=100).apply(store)
    write_labels(outcomes, store, folder / "readmission" / "0.parquet")
