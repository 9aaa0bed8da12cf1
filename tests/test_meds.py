"""MEDS datasets in and out of a store."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ehrseq_fast.data import EventStore, read_meds
from ehrseq_fast.data.meds import shard
from ehrseq_fast.data.store import by_hash

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from .generated_meds import OUTCOME, write_generated_meds  # noqa: E402  (needs pyarrow)
from .test_event_store import contents, days  # noqa: E402

ROWS = {  # subject, time, code, value
    "subject_id": [2**40, 2**40, 2**40, 2**40, 2**40, 3, -5, -5],
    "time": [
        None,
        "1950-03-01T00:00:00",
        "2020-01-01T10:00:00",
        "2020-01-01T12:00:00",
        "2021-01-01T00:00:00",
        None,
        "2999-12-31T00:00:00",
        "2999-12-31T00:00:00.000001",
    ],
    "code": ["SEX//F", "MEDS_BIRTH", "LAB", "LAB", "MEDS_DEATH//CARDIAC", "SEX//M", "X", "ÄÖ 😀"],
    "numeric_value": [None, None, 1.5, 2.5, None, 7.0, None, None],
}
TYPES = {
    "subject_id": pa.int64(),
    "time": pa.timestamp("us"),
    "code": pa.string(),
    "numeric_value": pa.float32(),
}


def table(**changed):
    """``ROWS``, with other columns (None: without)."""
    columns = {}
    for name, values in {**ROWS, **changed}.items():
        if values is None:
            continue
        if isinstance(values, (pa.Array, pa.ChunkedArray)):
            columns[name] = values
        elif name == "time":
            columns[name] = pa.array(values, pa.string()).cast(TYPES["time"])
        else:
            columns[name] = pa.array(values, TYPES.get(name))
    return pa.table(columns)


def dataset(folder, *tables, **files):
    """``data/0.parquet``, ``data/1.parquet``, ... and other files by their names."""
    (folder / "data").mkdir(parents=True)
    for number, one in enumerate(tables):
        pq.write_table(one, folder / "data" / f"{number}.parquet")
    for name, one in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        pq.write_table(one, path)
    return folder


def test_a_dataset_becomes_a_store(tmp_path):
    store = read_meds(dataset(tmp_path / "meds", table()), tmp_path / "store")
    assert store.subject_ids.tolist() == [2**40, 3, -5]
    assert store.patient_offsets.tolist() == [0, 1, 1, 2]
    assert store.visit_times.tolist() == days("2020-01-01T10", "2999-12-31").tolist()
    assert store.codes_of == ("LAB", "SEX//F", "SEX//M", "X", "ÄÖ 😀")
    assert store.codes.tolist() == [0, 3, 4]
    np.testing.assert_array_equal(store.values, np.array([2.5, np.nan, np.nan], np.float32))
    assert store.static_codes.tolist() == [1, 2]
    np.testing.assert_array_equal(store.static_values, np.array([np.nan, 7], np.float32))
    assert store.birth_times[0] == np.datetime64("1950-03-01")
    assert store.death_times[0] == np.datetime64("2021-01-01")
    assert np.isnat(store.birth_times[1:]).all()
    left_out = {reason: n for reason, n in store.left_out.items() if n}
    assert left_out == {
        "numeric values superseded by a later one of the same visit": 1,
        "what follows // in codes of births and deaths": 1,
    }
    assert store.header["source"]["files"] == 1
    EventStore(store.path, verify=True)


def test_settings_and_metadata(tmp_path):
    ids = pa.array([3, 2**40, 99], pa.int64())
    files = {
        "metadata/subject_splits.parquet": pa.table(
            {"subject_id": ids, "split": ["held_out", "train", "train"]}
        ),
        "metadata/codes.parquet": pa.table(
            {"code": ["LAB", "LAB", "Z"], "description": ["a test", "again", "none"]}
        ),
    }
    folder = dataset(tmp_path / "meds", table(text_value=["x"] * 8), **files)
    store = read_meds(folder, tmp_path / "store", visits="time")
    assert store.splits.tolist() == [0, 1, -1]
    assert store.descriptions == ("a test", "", "", "", "")
    assert store.vocabulary.tolist() == [2, 1, 1, 1, 1]
    assert store.n_visits == 4
    assert store.visit_rule == "time"
    assert store.header["source"]["columns_not_read"] == ["text_value"]
    assert store.left_out["subjects of metadata/subject_splits.parquet without a row in the data"]
    with pytest.warns(UserWarning, match="seed: not used, as .* assigns the subjects"):
        assert read_meds(folder, tmp_path / "seeded", seed=1).splits.tolist() == [0, 1, -1]
    hashed = read_meds(
        folder, tmp_path / "hashed", split={"train": 0.5, "x": 0.5}, seed=4, min_count=2
    )
    expected = by_hash({"train": 0.5, "x": 0.5}, seed=4).of(hashed.subject_ids)
    assert hashed.splits.tolist() == expected.tolist()
    with pytest.raises(
        FileExistsError, match=r"exists; overwrite=True \(--overwrite\) replaces it"
    ):
        read_meds(folder, tmp_path / "store")
    with pytest.raises(FileExistsError, match="is not an EventStore, so it is not replaced"):
        read_meds(folder, folder, overwrite=True)
    assert read_meds(folder, tmp_path / "store", overwrite=True).visit_rule == "day"


def test_extensions_in_capitals_are_read_and_other_files_listed(tmp_path):
    def one(subject, **more):
        columns = {name: values[2:3] for name, values in ROWS.items() if name != "subject_id"}
        return table(**columns, subject_id=[subject], **more)

    folder = dataset(tmp_path / "meds", one(1), one(2, text_value=["x"]))
    data = folder / "data"
    (data / "1.parquet").rename(data / "1.PARQUET")
    (data / ".checkpoints").mkdir()
    for name in (".0.parquet", ".checkpoints/0-copy.parquet"):
        (data / name).write_bytes((data / "0.parquet").read_bytes())
    for name in (".DS_Store", "_SUCCESS", "2.parquet.gz"):
        (data / name).write_text("")
    (folder / "metadata").mkdir()
    for name in ("dataset.json", "notes.txt"):
        (folder / "metadata" / name).write_text("{}")
    store = read_meds(folder, tmp_path / "store")
    assert store.subject_ids.tolist() == [1, 2]
    source = store.header["source"]
    assert set(source["files_not_read"]) == {
        "data/.0.parquet",
        "data/.checkpoints/0-copy.parquet",
        "data/2.parquet.gz",
        "data/_SUCCESS",
        "metadata/notes.txt",
    }
    assert source["columns_not_read"] == ["text_value"]
    described = store.describe()
    assert "not read            columns text_value" in described
    assert "metadata/notes.txt" in described


def test_shards_come_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "meds" / "data" / "b").mkdir(parents=True)
    for subject, name in enumerate(["2", "10", "b/1", "b/01x"]):
        one = table(
            **{n: v[2:3] for n, v in ROWS.items() if n != "subject_id"}, subject_id=[subject]
        )
        pq.write_table(one, tmp_path / "meds" / "data" / f"{name}.parquet")
    store = read_meds(tmp_path / "meds", tmp_path / "store")
    assert store.subject_ids.tolist() == [0, 1, 2, 3]


OTHER_TYPES = {
    "int32 subjects": {"subject_id": pa.array([1, 1, 1, 1, 1, 3, 5, 5], pa.int32())},
    "large strings": {"code": pa.array(ROWS["code"], pa.large_string())},
    "categories": {"code": pa.array(ROWS["code"]).dictionary_encode()},
    "float64 values": {"numeric_value": pa.array(ROWS["numeric_value"], pa.float64())},
    "zoned times": {"time": table()["time"].cast(pa.timestamp("us", "America/New_York"))},
    "milliseconds": {"time": table()["time"].cast(pa.timestamp("ms"), safe=False)},
    "days": {"time": table()["time"].cast(pa.date32(), safe=False)},
    "seconds": {"time": table()["time"].cast(pa.timestamp("s"), safe=False)},
    "no value column": {"numeric_value": None},
    "values that are null": {"numeric_value": pa.nulls(8)},
}


@pytest.mark.parametrize("changed", OTHER_TYPES.values(), ids=OTHER_TYPES)
def test_other_types_of_columns(tmp_path, changed):
    store = read_meds(dataset(tmp_path / "meds", table(**changed)), tmp_path / "store")
    assert store.codes_of == ("LAB", "SEX//F", "SEX//M", "X", "ÄÖ 😀")
    assert store.codes.tolist() == [0, 3, 4]
    assert (store.values is None) == (changed.get("numeric_value", 1) in (None, pa.nulls(8)))
    expected = days("2020-01-01T10", "2999-12-31").astype("M8[D]")
    assert store.visit_times.astype("M8[D]").tolist() == expected.tolist()


WRONG = {
    "no subject column": ({"subject_id": None}, ValueError, "expected the column 'subject_id'"),
    "no time column": ({"time": None}, ValueError, "expected the column 'time'; it has no such"),
    "no code column": ({"code": None}, ValueError, "0.parquet: expected the column 'code'"),
    "text subjects": ({"subject_id": pa.array(["a"] * 8)}, TypeError, "subject_id: expected int"),
    "float subjects": ({"subject_id": pa.array([1.0] * 8)}, TypeError, "integers, got double"),
    "text times": ({"time": pa.array(["2020"] * 8)}, TypeError, "time: expected timestamps"),
    "integer codes": ({"code": pa.array([1] * 8)}, TypeError, "code: expected strings, got int64"),
    "binary codes": ({"code": pa.array([b"a"] * 8)}, TypeError, "strings, got binary"),
    "text values": ({"numeric_value": pa.array(["1"] * 8)}, TypeError, "numbers, got string"),
    "a null subject": (
        {"subject_id": [1, 1, None, 1, 1, 3, 5, 5]},
        ValueError,
        "column subject_id, row 2: expected a subject, got null",
    ),
    "a subject beyond int64": (
        {"subject_id": pa.array([1, 1, 1, 1, 1, 3, 2**63, 2**63], pa.uint64())},
        ValueError,
        "row 6: expected what int64 holds, got 9223372036854775808",
    ),
    "a subject in two places": (
        {"subject_id": [1, 1, 3, 3, 3, 1, 5, 5]},
        ValueError,
        "expected the rows of a subject together, got subject 1 from row 0 and again from row 5",
    ),
    "times that fall": (
        {"time": [None, "1950-03-01", "2020-01-02", "2020-01-01", *ROWS["time"][4:]]},
        ValueError,
        r"row 3 \(subject 1099511627776\): expected times that do not fall .*, got 2020-01-01T",
    ),
    "the year 20000": (
        {"time": pa.array([569034000000000000] * 8, pa.timestamp("us"))},
        ValueError,
        "row 0 .*expected the years 1 to 9999",
    ),
    "the least timestamp": (
        {"time": pa.array([-(2**63)] * 8, pa.int64()).cast(pa.timestamp("us"))},
        ValueError,
        "expected the years 1 to 9999",
    ),
    "nanoseconds": (
        {"time": pa.array([1] * 8, pa.timestamp("ns"))},
        ValueError,
        "expected whole microseconds, got 1 ns",
    ),
    "values beyond float32": (
        {"numeric_value": pa.array([1e300] * 8)},
        ValueError,
        "numeric_value, row 0 .*expected what float32 holds, got 1e",
    ),
    "codes that are not UTF-8": (
        {"code": pa.array([b"a"] * 7 + [b"\xff"]).view(pa.string())},
        ValueError,
        r"column code, row 7: expected UTF-8, got b'\\xff'",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_columns_and_rows(tmp_path, changed, error, message):
    with pytest.raises(error, match=message):
        read_meds(dataset(tmp_path / "meds", table(**changed)), tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meds"]


COUNTED = {
    "null codes": ({"code": [None, *ROWS["code"][1:]]}, "rows without a code", 1),
    "only null codes": ({"code": pa.nulls(8)}, "rows without a code", 8),
    "empty codes": ({"code": ["", *ROWS["code"][1:]]}, "rows without a code", 1),
    "values not a number": (
        {"numeric_value": [None, None, 1.5, np.nan, None, 7.0, None, np.nan]},
        "numeric values that are not a number",
        2,
    ),
    "further births": (
        {"code": ["SEX//F", *["MEDS_BIRTH"] * 3, *ROWS["code"][4:]]},
        "further births of a subject",
        2,
    ),
    "a birth without a time": (
        {"code": ["MEDS_BIRTH", *ROWS["code"][1:]]},
        "births, deaths and observation periods without a time",
        1,
    ),
    "values of a birth": (
        {"numeric_value": [None, 3, 1, 1, None, 7, None, None]},
        "numeric values of births, deaths and observation periods",
        1,
    ),
    "half an observation period": (
        {"code": [*ROWS["code"][:2], "OBSERVATION_PERIOD_START", *ROWS["code"][3:]]},
        "starts or ends of observation periods without the other",
        1,
    ),
    "a period of no length": (
        {"code": [*ROWS["code"][:6], "OBSERVATION_PERIOD_START", "OBSERVATION_PERIOD_END"],
         "time": [*ROWS["time"][:6], "2020-01-01", "2020-01-01"]},
        "observation periods that end before they start",
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "reason", "n"), COUNTED.values(), ids=COUNTED)
def test_what_is_left_out_is_counted(tmp_path, changed, reason, n):
    store = read_meds(dataset(tmp_path / "meds", table(**changed)), tmp_path / "store")
    assert store.left_out[reason] == n
    assert store.n_patients == 3


def test_only_null_times(tmp_path):
    store = read_meds(dataset(tmp_path / "meds", table(time=pa.nulls(8))), tmp_path / "store")
    assert store.n_visits == 0
    assert store.header["counts"]["patients without visits"] == 3
    assert store.left_out["births, deaths and observation periods without a time"] == 2


def test_files_that_are_no_dataset(tmp_path):
    out = tmp_path / "store"
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        read_meds(tmp_path / "nowhere", out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="got a file"):
        read_meds(tmp_path / "file", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="it has no folder 'data'"):
        read_meds(empty, out)
    (empty / "data").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected .parquet files there or below"):
        read_meds(empty, out)
    bad = empty / "data" / "0.parquet"
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match=r"0.parquet: expected a Parquet file, it cannot be read"):
        read_meds(empty, out)
    bad.write_text("subject_id,time,code\n1,2,3\n")
    with pytest.raises(ValueError, match=r"0.parquet: expected a Parquet file, it cannot be read"):
        read_meds(empty, out)
    pq.write_table(table().slice(0, 0), bad)
    with pytest.raises(ValueError, match="expected events, got no row in 1 files"):
        read_meds(empty, out)
    with pytest.raises(ValueError, match="visits: expected 'day', 'time'"):
        read_meds(empty, out, visits="week")
    with pytest.raises(ValueError, match="got 'visit_occurrence'"):
        read_meds(empty, out, visits="visit_occurrence")
    with pytest.raises(ValueError, match="expected the column 'visit_id'"):
        read_meds(empty, out, visits="visit_id")
    pq.write_table(table(), bad)
    (empty / "metadata").mkdir()
    (empty / "metadata" / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset.json: expected the dataset's metadata as JSON"):
        read_meds(empty, out)
    (empty / "metadata" / "dataset.json").write_text("{}")
    splits = empty / "metadata" / "subject_splits.parquet"
    for content, error, message in (
        ({"subject_id": [1]}, ValueError, "splits.parquet: expected the column 'split'"),
        ({"subject_id": ["a"], "split": ["train"]}, TypeError, "subject_id: expected int64"),
        ({"subject_id": [1, 1], "split": ["train", "x"]}, ValueError, "subject 1 in 'train'"),
        ({"subject_id": [1, 1], "split": ["train", None]}, ValueError, "split, row 1: expected a"),
        ({"subject_id": [1], "split": ["dev"]}, ValueError, "parquet: .*split named 'train'"),
    ):
        pq.write_table(pa.table(content), splits)
        with pytest.raises(error, match=message):
            read_meds(empty, out)
    splits.unlink()
    (empty / "metadata" / "codes.parquet").write_text("code,description")
    with pytest.raises(ValueError, match=r"codes.parquet: expected a Parquet file"):
        read_meds(empty, out)
    for settings, message in (
        ([], r"ehrseq_fast: expected an object, got \[\]"),
        ({"visit_rule": "day", "min_count": 1}, "expected the entry 'split'"),
        ({"visit_rule": "day", "min_count": 1, "split": {"rule": "x"}}, "split: expected a rule"),
    ):
        (empty / "metadata" / "dataset.json").write_text(json.dumps({"ehrseq_fast": settings}))
        with pytest.raises(ValueError, match=message):
            read_meds(empty, out)
    assert not out.exists()


def test_links_to_folders_are_followed_once(tmp_path):
    folder = dataset(tmp_path / "meds", table())
    (tmp_path / "elsewhere").mkdir()
    one = table(**{name: values[2:3] for name, values in ROWS.items()})
    pq.write_table(
        one.set_column(0, "subject_id", pa.array([77])), tmp_path / "elsewhere/1.parquet"
    )
    (folder / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "data" / "above").symlink_to(folder / "data")
    assert read_meds(folder, tmp_path / "store").n_patients == 4


def test_a_subject_in_two_files(tmp_path):
    folder = dataset(tmp_path / "meds", table(), table())
    with pytest.raises(ValueError, match=r"subject -5: .* in data/0.parquet and again in data/1"):
        read_meds(folder, tmp_path / "store")


def test_damaged_files(tmp_path):
    """Cut off or overwritten anywhere: an error that names the file, or, where no checksum covers
    the bytes, another store; never a crash."""
    folder = dataset(tmp_path / "meds", table())
    path = folder / "data" / "0.parquet"
    whole = path.read_bytes()
    for size in range(0, len(whole), 401):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"0.parquet: "):
            read_meds(folder, tmp_path / "store")
    path.write_bytes(whole.replace(b"numeric_value", b"numeric_\xffalue"))
    with pytest.raises(ValueError, match=r"0.parquet: .*cannot be read: 'utf-8' codec"):
        read_meds(folder, tmp_path / "store")
    rng = np.random.default_rng(0)
    for at in rng.integers(4, len(whole) - 8, 40):
        damaged = bytearray(whole)
        damaged[at : at + 4] = rng.bytes(4)
        path.write_bytes(damaged)
        try:
            read_meds(folder, tmp_path / "store", overwrite=True)
        except (ValueError, TypeError) as error:
            assert "0.parquet" in str(error)  # noqa: PT017  (either outcome is right)


def test_batches_do_not_show(tmp_path, monkeypatch):
    generated = write_generated_meds(tmp_path / "meds", 60, shards=2)
    whole = read_meds(tmp_path / "meds", tmp_path / "whole")
    assert whole.subject_ids.tolist() == generated.subject_ids.tolist()
    for batch in (1, 7, 64):
        monkeypatch.setattr(shard, "BATCH", batch)
        again = read_meds(tmp_path / "meds", tmp_path / "again", overwrite=True)
        assert contents(again.path) == contents(whole.path)


def test_generated_patients_have_the_hazards_that_are_said(tmp_path):
    generated = write_generated_meds(tmp_path / "meds", 3000, seed=1)
    store = read_meds(tmp_path / "meds", tmp_path / "store")
    assert store.subject_ids.tolist() == generated.subject_ids.tolist()
    assert store.split_names == ("train", "tuning", "held_out")
    names = np.array(store.split_names)[store.splits]
    assert (names == generated.splits).all()
    outcome = store.code_index[OUTCOME]
    is_event = np.add.reduceat((store.codes == outcome).astype(int), store.visit_offsets[:-1])
    visits = np.diff(store.patient_offsets)
    last = store.patient_offsets[1:] - 1
    assert (is_event[last] == generated.events).all()
    assert is_event.sum() == generated.events.sum()
    assert (visits - generated.events == np.diff(generated.offsets)).all()
    # as many events as hazards add up to, within three standard deviations
    at_risk = np.ones(len(generated.hazards), bool)
    at_risk[generated.offsets[1:][generated.events == 0] - 1] = False
    hazards = generated.hazards[at_risk]
    off = generated.events.sum() - hazards.sum()
    assert abs(off) < 3 * np.sqrt((hazards * (1 - hazards)).sum())
    assert generated.loss() < 0.85 * generated.constant_loss()


def test_folders_named_as_splits_are_none(tmp_path):
    folder = dataset(tmp_path / "meds")
    (folder / "data" / "train").mkdir()
    pq.write_table(table(), folder / "data" / "train" / "0.parquet")
    with pytest.warns(UserWarning, match="split by hash, not by the names of the folders"):
        assert read_meds(folder, tmp_path / "store").header["split"]["rule"] == "hash"
