"""Stores as MEDS datasets, and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="pip install 'ehrseq_fast[meds]'")
pq = pytest.importorskip("pyarrow.parquet")

from ehrseq_fast.data import (  # noqa: E402  (after what may be missing)
    PartWriter,
    SubjectChunk,
    read_meds,
    to_meds,
    write_store,
)

from .generated_meds import write_generated_meds  # noqa: E402
from .test_event_store import chunk, contents, days  # noqa: E402


def exported(tmp_path, store, **options):
    to_meds(store, tmp_path / "back", **options)
    return read_meds(tmp_path / "back", tmp_path / "again")


def assert_same(store, again):
    assert again.header["content_sha256"] == store.header["content_sha256"]
    for name, data in contents(store.path).items():
        if name != "store.json":
            assert (again.path / name).read_bytes() == data, name
    for key in ("visit_rule", "split", "vocabulary", "arrays"):
        assert again.header[key] == store.header[key]


@pytest.mark.parametrize("visits", ["day", "time", 36])
def test_a_store_goes_to_meds_and_back(tmp_path, visits):
    write_generated_meds(tmp_path / "meds", 300)
    store = read_meds(
        tmp_path / "meds", tmp_path / "store", visits=visits, min_count=3,
        split={"train": 0.6, "b": 0.4}, seed=5,
    )  # fmt: skip
    assert_same(store, exported(tmp_path, store, events_per_file=1000))
    assert len(list((tmp_path / "back" / "data").iterdir())) > 3


def test_every_array_goes_to_meds_and_back(tmp_path):
    """Periods, deaths, statics, a subject of whom nothing is known, visits of one time, splits of
    the source."""
    writer = PartWriter(tmp_path / "part", visit_rule="visit_occurrence", with_values=True)
    writer.add(chunk(event_visits=np.array([1, 2, 3, 4, 5, 6]), visit_starts=days(*["2020"] * 6)))
    writer.add(
        SubjectChunk(
            np.array([2**62, 11]),
            np.array([0]),
            days("NaT"),
            ["SEX"],
            event_values=np.array([2], np.float32),
        )
    )
    writer.finish({"rows": 3})
    store = write_store(
        tmp_path / "store",
        [tmp_path / "part"],
        source={"kind": "x"},
        descriptions={"A": "ä"},
        subject_splits={9: "zeta", 4: "train", 7: "alpha"},
    )
    again = exported(tmp_path, store, events_per_file=2)
    assert_same(store, again)
    assert again.visit_rule == "visit_occurrence"
    assert again.header["source"]["exported"]["left_out"]["rows"] == 3
    with pytest.raises(FileExistsError, match="overwrite=True"):
        to_meds(store, tmp_path / "back")
    to_meds(store.path, tmp_path / "back", overwrite=True)
    with pytest.raises(FileExistsError, match="is not a MEDS dataset that ehrseq_fast wrote"):
        to_meds(store, tmp_path / "part", overwrite=True)


def test_a_store_without_patients_is_a_dataset(tmp_path):
    store = write_store(tmp_path / "store", [], source={})
    to_meds(store, tmp_path / "back")
    assert pq.read_table(tmp_path / "back" / "data" / "0.parquet").num_rows == 0


def test_codes_with_a_meaning_of_their_own_are_not_exported(tmp_path):
    writer = PartWriter(tmp_path / "part")
    writer.add(SubjectChunk(np.array([1]), np.array([0]), days("2020"), ["MEDS_DEATH//X"]))
    writer.finish()
    store = write_store(tmp_path / "store", [tmp_path / "part"], source={}, split={"train": 1})
    with pytest.raises(ValueError, match=r"without a meaning of their own.*'MEDS_DEATH//X'"):
        to_meds(store, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_export_is_meds(tmp_path):
    """Sorted by subject and time, with the standard's columns and metadata."""
    write_generated_meds(tmp_path / "meds", 50)
    store = read_meds(tmp_path / "meds", tmp_path / "store")
    folder = to_meds(store, tmp_path / "back")
    written = pq.read_table(folder / "data" / "0.parquet")
    assert written.schema.field("subject_id") == pa.field("subject_id", pa.int64(), nullable=False)
    assert written.schema.field("time").type == pa.timestamp("us")
    assert written.schema.field("code").type == pa.string()
    assert written.schema.field("numeric_value").type == pa.float32()
    codes = pq.read_table(folder / "metadata" / "codes.parquet")
    assert set(written["code"].to_pylist()) <= set(codes["code"].to_pylist())
    metadata = json.loads((folder / "metadata" / "dataset.json").read_text())
    assert metadata["meds_version"] == "0.4.1"
    assert metadata["ehrseq_fast"]["content_sha256"] == store.header["content_sha256"]
