"""When visits end: by every rule, from events in any order, to MEDS and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ehrseq_fast.data import (
    EventStore,
    FirstEvent,
    PartWriter,
    PatientDataset,
    SubjectChunk,
    labels,
    read_meds,
    to_meds,
    write_labels,
    write_store,
)
from ehrseq_fast.data.store import NO_VISIT, group_visits, merge
from ehrseq_fast.data.store.visits import HOUR

from .test_event_store import contents, days

RULES = ["day", "time", "visit_occurrence", "visit_id", 5, 30.5]
BY_KEY = ("visit_occurrence", "visit_id")

# A stay over a fortnight, another that begins within it and ends after it, and events without a
# stay, from the last to the first.
STAYS = {
    "subject_ids": np.array([5]),
    "event_subject": np.zeros(6, np.int64),
    "event_times": days(
        "2020-01-20T05", "2020-01-14T23", "2020-01-14T07", "2020-01-14T01", "2020-01-02T09",
        "2020-01-02T08",
    ),
    "event_codes": ["B", "A", "DAY", "DAY", "B", "A"],
    "event_visits": np.array([8, 9, NO_VISIT, NO_VISIT, 8, 9]),
    "visit_starts": days(
        "2020-01-02T09", "2020-01-01", "NaT", "NaT", "2020-01-02T09", "2020-01-01"
    ),
}  # fmt: skip


def store_of(folder, rule, *parts):
    paths = []
    for number, chunk in enumerate(parts):
        writer = PartWriter(folder / f"part {number}", visit_rule=rule)
        writer.add(chunk)
        writer.finish()
        paths.append(folder / f"part {number}")
    return write_store(folder / "store", paths, source={}, split={"train": 1.0})


@pytest.mark.parametrize(
    ("rule", "starts", "ends"),
    [
        (
            "visit_occurrence",
            ["2020-01-01", "2020-01-02T09", "2020-01-14T01"],
            ["2020-01-14T23", "2020-01-20T05", "2020-01-14T07"],
        ),
        (
            "day",
            ["2020-01-02T08", "2020-01-14T01", "2020-01-20T05"],
            ["2020-01-02T09", "2020-01-14T23", "2020-01-20T05"],
        ),
        (
            8,
            ["2020-01-02T08", "2020-01-14T01", "2020-01-14T23", "2020-01-20T05"],
            ["2020-01-02T09", "2020-01-14T07", "2020-01-14T23", "2020-01-20T05"],
        ),
        ("time", STAYS["event_times"][::-1], STAYS["event_times"][::-1]),
    ],
)
def test_stays_that_overlap(tmp_path, rule, starts, ends):
    store = store_of(tmp_path, rule, SubjectChunk(**STAYS))
    assert store.visit_times.tolist() == days(*starts).tolist()
    assert store.visit_ends.tolist() == days(*ends).tolist()


def test_days_to_the_event_count_from_the_end_of_all_that_is_seen(tmp_path):
    """A visit in the course of a longer stay: nobody could have the event before that ended."""
    others = {
        "subject_ids": np.array([5, 6]),
        "event_subject": np.array([0] * 7 + [1] * 2),
        "event_times": np.concatenate(
            [STAYS["event_times"], days("2020-02-01", "2020-01-03", "2020-01-05")]
        ),
        "event_codes": [*STAYS["event_codes"], "X", "A", "B"],
        "event_visits": np.append(STAYS["event_visits"], [NO_VISIT] * 3),
        "visit_starts": np.append(STAYS["visit_starts"], days("NaT", "NaT", "NaT")),
        "period_subject": np.array([0, 1]),
        "period_starts": days("2020-01-01", "2020-01-01"),
        "period_ends": days("2020-03-01", "2020-03-01"),
    }
    store = store_of(tmp_path, "visit_occurrence", SubjectChunk(**others))
    outcomes = FirstEvent("X").apply(store)
    assert outcomes.n_visits.tolist() == [3, 2]
    ends = days(*["2020-02-01"] * 3, *["2020-03-01"] * 2)
    seen = days("2020-01-14T23", "2020-01-20T05", "2020-01-20T05", "2020-01-03", "2020-01-05")
    expected = [*((ends - seen) / np.timedelta64(1, "D"))]
    np.testing.assert_allclose(outcomes.days_to_end(store), expected)
    data = PatientDataset(store, outcomes)
    batch = data.__getitems__([1, 0, 0])
    found = [x.tolist() for x in batch.pad(batch.visit_targets["days_to_end"])]
    np.testing.assert_allclose(found, [[*expected[3:], 0], expected[:3], expected[:3]], rtol=1e-6)
    pytest.importorskip("pyarrow", reason="pip install 'ehrseq_fast[meds]'")
    write_labels(outcomes, store, tmp_path / "labels.parquet")
    read = labels(tmp_path / "labels.parquet").apply(store)
    assert read.index_times.tolist() == seen.tolist()
    assert read.n_visits.tolist() == [1, 3, 3, 1, 2]


def test_a_visit_does_not_end_before_it_starts(tmp_path):
    """The source may have a visit start after all of its events."""
    late = days(*["2020-02-01"] * 6)
    store = store_of(tmp_path, "visit_id", SubjectChunk(**{**STAYS, "visit_starts": late}))
    assert (store.visit_ends[1:] == np.datetime64("2020-02-01")).all()
    assert (store.visit_times <= store.visit_ends).all()


def test_no_events_have_no_visits():
    none = np.empty(0, np.int64)
    for rule in RULES:
        assert len(group_visits(none, none, rule).end) == 0


def random_chunks(rng, subjects, rule, with_ends):
    """(subject, time, key, start, end) of events in any order, and chunks of them."""
    rows, chunks = [], []
    for ids in np.split(rng.permutation(10**6)[:subjects], 3):
        n = 6 * len(ids)
        subject = rng.integers(0, len(ids), n)
        times = rng.integers(-80, 80, n) * HOUR
        keys = rng.integers(0, 4, n)
        keys[rng.random(n) < 0.2] = NO_VISIT
        # a start for each (subject, key), which can be after the events, or none
        start_of = rng.integers(-120, 60, (len(ids), 4)) * HOUR
        starts = start_of[subject, np.maximum(keys, 0)]
        starts[(rng.random(n) < 0.3) | (keys == NO_VISIT)] = np.iinfo(np.int64).min
        ends = times + rng.integers(0, 100, n) * HOUR * (rng.random(n) < 0.5)
        static = rng.random(n) < 0.05
        times[static] = np.iinfo(np.int64).min
        given = ends.copy()
        given[static] = rng.integers(0, 9, static.sum()) * HOUR  # of no visit: says nothing
        given[ends == times] = np.iinfo(np.int64).min
        chunks.append(
            SubjectChunk(
                subject_ids=ids,
                event_subject=subject,
                event_times=times.view("M8[us]"),
                event_codes=rng.choice([*"abc"], n).tolist(),
                event_visits=keys if rule in BY_KEY else None,
                visit_starts=starts.view("M8[us]") if rule in BY_KEY else None,
                event_ends=given.view("M8[us]") if with_ends else None,
            )
        )
        columns = zip(ids[subject], times, keys, starts, ends if with_ends else times, strict=True)
        rows += [tuple(map(int, row)) for row, no in zip(columns, static, strict=True) if not no]
    return rows, chunks


def ends_plainly(rows, rule):
    """Of each subject its visits as sorted (start, end)."""
    found, none = {}, np.iinfo(np.int64).min
    for subject in {row[0] for row in rows}:
        groups, first = {}, None
        for _, at, key, start, end in sorted(row for row in rows if row[0] == subject):
            if rule == "time":
                visit = at
            elif rule == "day" or (rule in BY_KEY and key == NO_VISIT):
                visit = "day", at // (24 * HOUR)
            elif rule in BY_KEY:
                visit = "key", key
            else:
                first = at if first is None or at - first > rule * HOUR else first
                visit = first
            begins, ends = groups.setdefault(visit, ([], []))
            begins.append(start if rule in BY_KEY and start != none else at)
            ends.append(end)
        found[subject] = sorted((min(b), max(min(b), *e)) for b, e in groups.values())
    return found


def as_read(store):
    found = {}
    bounds = zip(store.patient_offsets[:-1], store.patient_offsets[1:], strict=True)
    for subject, (low, high) in zip(store.subject_ids.tolist(), bounds, strict=True):
        times = (a[low:high].view(np.int64).tolist() for a in (store.visit_times, store.visit_ends))
        if low < high:
            found[subject] = sorted(zip(*times, strict=True))
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_ends", [False, True])
def test_random_events(tmp_path, monkeypatch, rule, with_ends):
    rng = np.random.default_rng(len(str(rule)) + with_ends)
    rows, chunks = random_chunks(rng, 90, rule, with_ends)
    monkeypatch.setattr(merge, "PIECE", 7)
    store = store_of(tmp_path, rule, *chunks)
    assert as_read(store) == ends_plainly(rows, rule)
    if rule != "time" or with_ends:
        assert (store.visit_ends > store.visit_times).any()
    pytest.importorskip("pyarrow", reason="pip install 'ehrseq_fast[meds]'")

    to_meds(store, tmp_path / "meds", events_per_file=50)
    back = read_meds(tmp_path / "meds", tmp_path / "back")
    assert back.header["content_sha256"] == store.header["content_sha256"]
    written, kept = contents(back.path), contents(store.path)
    assert {**written, "store.json": b""} == {**kept, "store.json": b""}


@pytest.mark.parametrize(
    ("ends", "error", "message"),
    [
        (days(*["2020-01-20T04"] * 6), ValueError, r"got 2020-01-20T04:00.*, at 0 \(subject 5\)"),
        (days("2021"), ValueError, r"event_ends: expected shape \[6\], got \[1\]"),
        (np.arange(6), TypeError, "event_ends: expected datetime64"),
        (np.array(["12000"] * 6, "M8[us]"), ValueError, "event_ends: expected years 1 to 9999"),
    ],
)
def test_wrong_ends_are_refused(ends, error, message):
    with pytest.raises(error, match=message):
        SubjectChunk(**STAYS, event_ends=ends)


def test_ends_belong_to_the_content(tmp_path):
    """The same entries, seen until another time, are another store; a file cut off is refused."""
    later = days(*["2020-03-01"] * 6)
    (tmp_path / "later").mkdir()
    store = store_of(tmp_path, "day", SubjectChunk(**STAYS))
    other = store_of(tmp_path / "later", "day", SubjectChunk(**STAYS, event_ends=later))
    assert store.header["content_sha256"] != other.header["content_sha256"]
    path = store.path / "visit_ends.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"visit_ends\.npy: expected \d+ bytes, got \d+"):
        EventStore(store.path)
    header = json.loads((store.path / "store.json").read_text())
    del header["arrays"]["visit_ends"]
    (store.path / "store.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="expected the array 'visit_ends', it lists none"):
        EventStore(store.path)


def rewritten(folder, change):
    """The exported dataset with its table changed."""
    pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ehrseq_fast[meds]'")
    path = folder / "data" / "0.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def test_visit_end_of_an_export(tmp_path):
    """One value for each event of a visit; without, or before the event, it is refused; a dataset
    of others is not read by its ``visit_end``."""
    pa = pytest.importorskip("pyarrow", reason="pip install 'ehrseq_fast[meds]'")

    chunk = SubjectChunk(
        **{**STAYS, "event_times": np.append(STAYS["event_times"][:-1], days("NaT"))},
        birth_times=days("1950-01-01"),
    )
    store = store_of(tmp_path, "visit_id", chunk)
    to_meds(store, tmp_path / "meds")
    read = []
    rewritten(tmp_path / "meds", lambda table: read.append(table) or table)
    assert read[0]["visit_end"].type == pa.timestamp("us")
    assert [at and f"{at:%d %H}" for at in read[0]["visit_end"].to_pylist()] == [
        None, None, "14 23", "20 05", "14 07",
    ]  # fmt: skip
    metadata = json.loads((tmp_path / "meds/metadata/dataset.json").read_text())
    assert metadata["other_extension_columns"] == ["visit_id", "visit_end"]
    by_time = read_meds(tmp_path / "meds", tmp_path / "by time", visits="time")
    assert sorted(by_time.visit_ends.tolist()) == sorted(store.visit_ends.tolist())

    def changed(column):
        at = read[0].schema.get_field_index("visit_end")
        rewritten(tmp_path / "meds", lambda _: read[0].set_column(at, "visit_end", column))

    changed(pa.nulls(5))
    unknown = read_meds(tmp_path / "meds", tmp_path / "unknown")
    assert unknown.visit_ends.tolist() == unknown.visit_times.tolist()
    changed(pa.array([0] * 5).cast(pa.timestamp("us")))
    with pytest.raises(ValueError, match=r"column visit_end, row 2 \(subject 5\): expected no end"):
        read_meds(tmp_path / "meds", tmp_path / "wrong")
    changed(pa.array(["2020"] * 5))
    with pytest.raises(TypeError, match="column visit_end: expected timestamps or dates, got str"):
        read_meds(tmp_path / "meds", tmp_path / "wrong")
    rewritten(tmp_path / "meds", lambda _: read[0].drop_columns(["visit_end"]))
    with pytest.raises(ValueError, match="expected the column 'visit_end'"):
        read_meds(tmp_path / "meds", tmp_path / "wrong")
    rewritten(tmp_path / "meds", lambda _: read[0])
    (tmp_path / "meds/metadata/dataset.json").unlink()
    others = read_meds(tmp_path / "meds", tmp_path / "others", visits="visit_id")
    assert others.visit_ends.tolist() == others.visit_times.tolist()
    assert others.header["source"]["columns_not_read"] == ["visit_end"]
