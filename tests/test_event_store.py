"""The store of records: what is written is what is read, whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from ehrseq_fast.data import EventStore, PartWriter, SubjectChunk, write_store
from ehrseq_fast.data.store import NO_VISIT, group_visits, merge
from ehrseq_fast.data.store.format import ARRAYS
from ehrseq_fast.data.store.parts import merged_periods
from ehrseq_fast.data.store.visits import HOUR, distinct_entries

NONE = np.datetime64("NaT", "us")


def days(*texts):
    return np.array(texts, "M8[us]")


def chunk(**changed):
    """Subject 9: two visits of a day each and a static event; subject 4: none; subject 7: one."""
    fields = {
        "subject_ids": np.array([9, 4, 7]),
        "event_subject": np.array([0, 0, 0, 0, 0, 2]),
        "event_times": days(
            "2020-01-02T10", "2020-01-02T09", "2020-01-02T08", "2020-03-01", "NaT", "2019-05-05"
        ),
        "event_codes": ["B", "B", "A", "A", "SEX", "C"],
        "event_values": np.array([2, 1, np.nan, 5, np.nan, np.nan], np.float32),
        "birth_times": days("1950-01-01", "NaT", "NaT"),
        "death_times": days("NaT", "2021-01-01", "NaT"),
        "period_subject": np.array([0, 0, 2]),
        "period_starts": days("2020-02-01", "2020-01-01", "2019-01-01"),
        "period_ends": days("2020-06-01", "2020-02-01", "2018-01-01"),
    }
    return SubjectChunk(**{**fields, **changed})


def part(folder, *chunks, name="", rule="day", with_values=True, left_out=None):
    writer = PartWriter(folder, visit_rule=rule, with_values=with_values, name=name)
    for one in chunks:
        writer.add(one)
    writer.finish(left_out)
    return folder


def store_of(folder, *chunks, **options):
    path = part(folder / "part", *chunks)
    split = options.pop("subject_splits", {9: "train", 7: "held_out", 4: "train"})
    return write_store(
        folder / "store", [path], source={"kind": "test"}, subject_splits=split, **options
    )


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(Path(path).iterdir())}


def test_what_is_written_is_what_is_read(tmp_path):
    store = store_of(tmp_path, chunk(), descriptions={"A": "alpha"})
    assert store.n_patients == 3
    assert store.subject_ids.tolist() == [9, 4, 7]
    assert store.patient_offsets.tolist() == [0, 2, 2, 3]
    assert store.visit_times.tolist() == days("2020-01-02T08", "2020-03-01", "2019-05-05").tolist()
    assert store.codes_of == ("A", "B", "C", "SEX")
    assert store.descriptions == ("alpha", "", "", "")
    assert store.visit_offsets.tolist() == [0, 2, 3, 4]
    assert store.codes.tolist() == [0, 1, 0, 2]
    np.testing.assert_array_equal(store.values, np.array([np.nan, 2, 5, np.nan], np.float32))
    assert store.left_out["numeric values superseded by a later one of the same visit"] == 1
    assert store.left_out["observation periods that end before they start"] == 1
    assert store.static_offsets.tolist() == [0, 1, 1, 1]
    assert store.static_codes.tolist() == [3]
    assert store.static_values is None  # the only value is none
    assert store.period_offsets.tolist() == [0, 1, 1, 1]
    assert store.period_starts.tolist() == days("2020-01-01").tolist()
    assert store.period_ends.tolist() == days("2020-06-01").tolist()
    assert np.isnat(store.birth_times).tolist() == [False, True, True]
    assert store.death_times[1] == np.datetime64("2021-01-01")
    assert store.split_names == ("train", "held_out")
    assert store.splits.tolist() == [0, 0, 1]
    assert store.vocabulary.tolist() == [2, 3, 1, 1]  # C only in held_out, SEX in no visit
    assert store.vocab_size == 4
    assert store.header["counts"]["patients without visits"] == 1
    assert store.header["counts"]["events"] == 6
    for name in ARRAYS:
        array = getattr(store, name)
        if array is not None:
            assert array.dtype.str == ARRAYS[name]
            with pytest.raises(ValueError, match="read-only"):
                array[:1] = array[:1]


def test_min_count_counts_entries_of_training_visits(tmp_path):
    store = store_of(tmp_path, chunk(), min_count=2)
    assert store.vocabulary.tolist() == [2, 1, 1, 1]


def test_patients_of_indices_of_matching(tmp_path):
    store = store_of(tmp_path, chunk())
    assert store.patients_of("train").tolist() == [0, 1]
    assert store.patients_of(None).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="expected one of 'train', 'held_out' or None, got 'x'"):
        store.patients_of("x")
    assert store.indices_of([7, 9]).tolist() == [2, 0]
    with pytest.raises(LookupError, match="got 8"):
        store.indices_of([7, 8])
    assert store.matching(["A", "SEX"]).tolist() == [True, False, False, True]
    assert store.matching(prefix="S").tolist() == [False, False, False, True]
    assert store.matching("B", prefix=["A"]).tolist() == [True, True, False, False]
    with pytest.raises(LookupError, match=r"got 'SEXX'.*near it: 'SEX'"):
        store.matching(["SEXX"])
    with pytest.raises(LookupError, match=r"prefix: .*got 'Q'"):
        store.matching(prefix="Q")
    with pytest.raises(ValueError, match="at least one"):
        store.matching()
    text = store.describe()
    assert "3 (1 without visits)" in text
    assert "1 observation periods that end before they start" in text


def test_a_store_is_pickled_by_its_path(tmp_path):
    store = store_of(tmp_path, chunk())
    data = pickle.dumps(store)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.path == store.path
    np.testing.assert_array_equal(again.codes, store.codes)
    write_store(tmp_path / "store", [], source={}, overwrite=True)
    with pytest.raises(RuntimeError, match="was replaced after it was opened"):
        pickle.loads(data)


def test_a_store_without_patients(tmp_path):
    store = write_store(tmp_path / "store", [], source={})
    assert store.n_patients == store.n_visits == store.n_codes == 0
    assert store.vocab_size == 2
    assert store.patients_of("train").tolist() == []
    assert store.indices_of([]).tolist() == []
    with pytest.raises(LookupError):
        store.indices_of([1])
    assert "patients            0" in store.describe()
    EventStore(store.path, verify=True)


def test_parts_and_chunks_do_not_show(tmp_path, monkeypatch):
    """One part of one chunk, two parts, and pieces of three entries give the same bytes."""
    rng = np.random.default_rng(0)
    n = 500
    fields = {
        "subject_ids": np.arange(40),
        "event_subject": np.sort(rng.integers(0, 40, n)),
        "event_times": days("2020-01-01") + rng.integers(0, 90 * 24, n) * np.timedelta64(1, "h"),
        "event_codes": rng.integers(0, 30, n),
        "event_values": np.where(rng.random(n) < 0.5, rng.random(n), np.nan).astype(np.float32),
    }
    names = [f"code {i}" for i in rng.permutation(30)]
    whole = SubjectChunk(**fields, chunk_codes=names)
    pieces = []
    for low, high in ((0, 7), (7, 25), (25, 40)):
        of = (fields["event_subject"] >= low) & (fields["event_subject"] < high)
        events = {k: v[of] for k, v in fields.items() if k != "subject_ids"}
        events["event_subject"] = events["event_subject"] - low
        pieces.append(SubjectChunk(np.arange(low, high), **events, chunk_codes=names))
    one = part(tmp_path / "one", whole)
    two = [part(tmp_path / "a", *pieces[:2]), part(tmp_path / "b", pieces[2])]
    first = write_store(tmp_path / "first", [one], source={}, seed=3)
    monkeypatch.setattr(merge, "PIECE", 3)
    second = write_store(tmp_path / "second", two, source={}, seed=3)
    assert contents(first.path) == contents(second.path)
    np.testing.assert_array_equal(
        first.vocabulary >= 2,
        np.bincount(
            first.codes[
                np.repeat(
                    np.repeat(first.splits, np.diff(first.patient_offsets)),
                    np.diff(first.visit_offsets),
                )
                == 0
            ],
            minlength=first.n_codes,
        )
        > 0,
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("day", [0, 0, 1, 2]),
        ("time", [0, 1, 2, 3]),
        (3, [0, 0, 1, 2]),
        (4, [0, 0, 0, 1]),
        (4.5, [0, 0, 0, 1]),
        (40, [0, 0, 0, 0]),
        (1e5, [0, 0, 0, 0]),
    ],
)
def test_rules_of_visits(rule, expected):
    times = np.array([20, 23, 24, 60]) * HOUR
    visits = group_visits(np.zeros(4, np.int64), times, rule)
    assert visits.of_event.tolist() == expected


def test_hours_count_from_the_first_event_of_the_visit():
    rng = np.random.default_rng(1)
    subject = np.sort(rng.integers(0, 20, 400))
    times = rng.integers(0, 200, 400) * HOUR
    order = np.lexsort((times, subject))
    times = times[order]
    visits = group_visits(subject, times, 7)
    expected, start, last = [], None, None
    visit = -1
    for s, t in zip(subject, times, strict=True):
        if s != last or t - start > 7 * HOUR:
            visit, start, last = visit + 1, t, s
        expected.append(visit)
    assert visits.of_event.tolist() == expected


def test_visits_by_key_start_at_their_start():
    """Keys in any order; an event without a key makes a visit of its day."""
    subject = np.array([0, 0, 0, 0, 0, 1])
    times = np.array([1, 2, 30, 31, 50, 1]) * HOUR
    keys = np.array([5, 9, 5, NO_VISIT, NO_VISIT, 5])
    starts = np.array([1, 0, 1, 0, 0, 1]) * HOUR
    visits = group_visits(subject, times, "visit_id", keys, starts)
    assert visits.of_event.tolist() == [1, 0, 1, 2, 3, 4]
    assert (visits.start // HOUR).tolist() == [0, 1, 31, 50, 1]
    assert visits.subject.tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="visits='visit_id': expected the visit of each event"):
        group_visits(subject, times, "visit_id")


@pytest.mark.parametrize("rule", ["week", 0, -1, True, None, np.nan])
def test_other_rules_are_refused(tmp_path, rule):
    with pytest.raises(ValueError, match="visits: expected 'day', 'time'"):
        PartWriter(tmp_path / "part", visit_rule=rule)


def test_of_several_values_the_last_is_kept():
    entries = distinct_entries(
        np.array([0, 0, 0, 1]),
        np.array([2, 1, 2, 2]),
        np.array([1, np.nan, 3, np.nan], np.float32),
        3,
    )
    assert entries.group.tolist() == [0, 0, 1]
    assert entries.codes.tolist() == [1, 2, 2]
    np.testing.assert_array_equal(entries.values, np.array([np.nan, 3, np.nan], np.float32))
    assert entries.superseded == 1


def test_periods_are_merged_within_a_subject():
    subject = np.array([1, 0, 0, 0, 1, 1])
    starts = np.array([0, 10, 0, 3, 1, 20])
    ends = np.array([30, 12, 5, 4, 2, 25])
    merged = merged_periods(subject, starts, ends)
    assert [column.tolist() for column in merged] == [[0, 0, 1], [0, 10, 0], [5, 12, 30]]


WRONG_CHUNKS = {
    "a subject twice": ({"subject_ids": [9, 9, 7]}, ValueError, "got subject 9 2 times"),
    "float identifiers": ({"subject_ids": [1.5, 2, 3]}, TypeError, "subject_ids: expected int"),
    "an identifier beyond int64": ({"subject_ids": [2**63, 1, 2]}, ValueError, "fit int64"),
    "a row outside": ({"event_subject": [0, 0, 0, 0, 0, 3]}, IndexError, "row < 3, got 3, at 5"),
    "too few rows": ({"event_subject": [0, 0]}, ValueError, r"expected shape \[6\], got \[2\]"),
    "times as integers": ({"event_times": np.arange(6)}, TypeError, "expected datetime64"),
    "the year 30000": (
        {"event_times": np.array(["30000-01-01"] * 6, "M8[us]")},
        ValueError,
        "expected years 1 to 9999, got the year 30000, at 0",
    ),
    "an empty code": ({"event_codes": ["A", "", "A", "A", "A", "A"]}, ValueError, "got ''"),
    "a code that is no string": ({"event_codes": [1, 2, 3, 4, 5, None]}, ValueError, "strings"),
    "values as text": ({"event_values": ["1"] * 6}, TypeError, "event_values: expected numbers"),
    "a period without an end": (
        {"period_ends": days("NaT", "NaT", "2020-01-01")},
        ValueError,
        "NaT for 2 periods, the first of subject 9",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_CHUNKS.values(), ids=WRONG_CHUNKS)
def test_wrong_chunks(changed, error, message):
    with pytest.raises(error, match=message):
        chunk(**changed)


def test_wrong_merges(tmp_path):
    parts = [part(tmp_path / "a", chunk(), name="first"), part(tmp_path / "b", chunk())]
    with pytest.raises(ValueError, match=r"subject 4: .* in first and again in .*\(3 such"):
        write_store(tmp_path / "store", parts, source={})
    unfinished = tmp_path / "c"
    PartWriter(unfinished)
    with pytest.raises(ValueError, match="expected a finished part"):
        write_store(tmp_path / "store", [unfinished], source={})
    by_time = part(tmp_path / "d", rule="time")
    with pytest.raises(ValueError, match="expected one visit rule, got"):
        write_store(tmp_path / "store", [parts[0], by_time], source={})
    with pytest.raises(ValueError, match=r"expected a split named 'train'.*'a', 'b'"):
        write_store(tmp_path / "store", parts[:1], source={}, split={"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="sum to 1"):
        write_store(tmp_path / "store", parts[:1], source={}, split={"train": 0.5})
    columns = [9, 9], ["train", "tuning"]
    with pytest.raises(ValueError, match="subject 9 in 'train' and 'tuning'"):
        write_store(tmp_path / "store", parts[:1], source={}, subject_splits=columns)
    with pytest.raises(ValueError, match="min_count: expected 1"):
        write_store(tmp_path / "store", parts[:1], source={}, min_count=0)
    assert not (tmp_path / "store").exists()
    with pytest.warns(UserWarning, match="no subject is in the split 'train'"):
        write_store(tmp_path / "store", parts[:1], source={}, split={"train": 0.0, "held_out": 1.0})


def test_subjects_without_a_split_are_in_none(tmp_path):
    store = store_of(tmp_path, chunk(), subject_splits={7: "train", 1: "tuning"})
    assert store.splits.tolist() == [-1, -1, 0]
    assert store.header["split"]["patients"] == {"train": 1, "tuning": 0, "none": 2}


def test_identifiers_whose_differences_overflow(tmp_path):
    """0 again after steps that are all positive in int64, wrapped around."""
    ids = np.array([0, 3 * 2**61, -(2**62), 0])
    fields = {"event_subject": [], "event_times": days(), "event_codes": []}
    with pytest.raises(ValueError, match="got subject 0 2 times"):
        SubjectChunk(ids, **fields)
    chunks = [SubjectChunk(ids[:2], **fields), SubjectChunk(ids[2:], **fields)]
    path = part(tmp_path / "part", *chunks, with_values=False)
    with pytest.raises(ValueError, match="subject 0: expected all its events in one place"):
        write_store(tmp_path / "store", [path], source={})
