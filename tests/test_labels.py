"""MEDS label files: read as tasks and as index dates, written with times to event."""

from __future__ import annotations

import datetime as dt
import warnings

import numpy as np
import pytest

from ehrseq_fast.data import FirstEvent, PatientDataset, labels, write_labels
from ehrseq_fast.data.tasks import Labels, SameDayWarning

from .task_cases import random_people, slow_rows, store_of, us

pa = pytest.importorskip("pyarrow", reason="label files need pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="label files need pyarrow")

US = pa.timestamp("us")


@pytest.fixture
def store(tmp_path):
    return store_of(tmp_path / "of_records", random_people(np.random.default_rng(2), 40, fine=True))


def stamp(day, hour=0.0):
    return dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=us(day, hour))


def write(path, rows, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {
        "subject_id": pa.array([row[0] for row in rows], pa.int64()),
        "prediction_time": pa.array([row[1] for row in rows], US),
        **columns,
    }
    pq.write_table(pa.table({k: v for k, v in fields.items() if v is not None}), path)
    return path


def applied(task, store, split=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SameDayWarning)
        return task.apply(store, split)


def test_a_row_sees_the_visits_up_to_its_time(tmp_path):
    person = {"events": [(us(d, h), "A") for d, h in ((0, 8), (3, 8), (3, 9), (5, 1))]}
    store = store_of(tmp_path / "s", {4: person, 9: person}, visit_rule="time")
    rows = [(9, stamp(3, 8)), (4, stamp(3, 8.5)), (9, stamp(4)), (9, stamp(0, 7)), (77, stamp(9))]
    values = pa.array([True, False, None, True, True])
    path = write(tmp_path / "labels.parquet", rows, boolean_value=values)
    outcomes = labels(path).apply(store)
    assert outcomes.patients.tolist() == [1, 0]
    assert outcomes.n_visits.tolist() == [2, 2]
    assert outcomes.entry_times.tolist() == outcomes.event_times.tolist() == [1, 1]
    assert outcomes.labels.tolist() == [1.0, 0.0]
    assert outcomes.event_indicators.tolist() == [1, 0]
    assert np.isnat(outcomes.end_times).all()
    assert outcomes.left_out == {"labels of persons who are not in the store": 1}
    assert [tuple(rule) for rule in outcomes.attrition.rules] == [
        ("with a label", 2, 1, 4),
        ("with a value", 2, 1, 3),
        ("with a visit to predict from", 2, 1, 2),
    ]
    excluded = labels(path, prediction_day="excluded").apply(store)
    assert excluded.n_visits.tolist() == [1, 1]
    batch = PatientDataset(store, labels(path)).batch([0, 1])
    assert batch.targets["labels"].tolist() == [1.0, 0.0]
    assert batch.visit_targets["days_to_end"].isnan().all()


@pytest.mark.parametrize(
    ("rule", "hour", "seen"), [("day", 9, 1), ("time", 9, 2), (2, 9, 1), (2, 10.5, 2), (20, 9, 1)]
)
def test_a_visit_with_later_codes_is_not_seen(tmp_path, rule, hour, seen):
    person = {"events": [(us(2, 8), "A"), (us(3, 8), "A"), (us(3, 9.5), "B"), (us(9), "X")]}
    store = store_of(tmp_path / "s", {4: person}, visit_rule=rule)
    path = write(tmp_path / "l.parquet", [(4, stamp(3, hour))], boolean_value=pa.array([True]))
    for task in (labels(path), FirstEvent("X", index=labels(path))):
        outcomes = task.apply(store)
        assert outcomes.n_visits.tolist() == [seen]
        told = [text for text in outcomes.warnings if "1 predictions fall into a visit" in text]
        assert len(told) == (rule != "time" and seen == 1)
    excluded = applied(labels(path, prediction_day="excluded"), store)
    assert (excluded.warnings, excluded.n_visits.tolist()) == ((), [1])


def test_a_stay_that_goes_on_hides_later_visits(tmp_path):
    stay = [(us(1), "A", 0), (us(30), "LATE", 0)]
    person = {"events": [*stay, (us(5), "B", 1), (us(8), "X", 2), (us(0), "C", 3)]}
    store = store_of(tmp_path / "s", {4: person}, visit_rule="visit_id")
    outcomes = applied(FirstEvent("X"), store)
    assert outcomes.n_visits.tolist() == [1]  # C alone: the stay's codes reach beyond X
    path = write(tmp_path / "l.parquet", [(4, stamp(7))], boolean_value=pa.array([True]))
    assert labels(path).apply(store).n_visits.tolist() == [1]


def test_labels_of_a_split_in_the_files_order(store, tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.choice(store.subject_ids, 100).tolist()
    rows = [(subject, stamp(int(rng.integers(20, 40)))) for subject in ids]
    floats = pa.array(rng.random(100).astype(np.float32))
    write(tmp_path / "l/train/b.parquet", rows[:60], float_value=floats[:60])
    write(tmp_path / "l/train/c.parquet", rows[60:], float_value=floats[60:])
    read = labels(tmp_path / "l")
    assert read.subject_ids.tolist() == ids
    outcomes = applied(read, store, "train")
    in_split = set(store.subject_ids[store.patients_of("train")].tolist())
    first = {
        int(subject): times.view(np.int64)
        for subject, times in zip(
            store.subject_ids,
            np.split(store.visit_times, store.patient_offsets[1:-1]),
            strict=True,
        )
    }
    kept = [
        (subject, value)
        for (subject, time), value in zip(rows, floats.to_pylist(), strict=True)
        if subject in in_split
        and len(first[subject])
        and first[subject][0] <= np.datetime64(time, "us").astype(int)
    ]
    assert store.subject_ids[outcomes.patients].tolist() == [subject for subject, _ in kept]
    assert outcomes.labels.tolist() == [value for _, value in kept]
    assert not outcomes.event_indicators.any()


def test_categories(store, tmp_path):
    subject = int(store.subject_ids[np.argmax(np.diff(store.patient_offsets))])
    rows = [(subject, stamp(100))] * 4
    values = pa.array(["low", None, "high", "low"]).dictionary_encode()
    outcomes = applied(labels(write(tmp_path / "c.parquet", rows, categorical_value=values)), store)
    assert outcomes.categories == ("high", "low")
    assert outcomes.labels.tolist() == [1, 0, 1]
    batch = PatientDataset(store, outcomes).batch([0, 1, 2])
    assert batch.targets["labels"].tolist() == [1, 0, 1]
    assert not batch.targets["labels"].is_floating_point()


def test_label_files_as_index_dates(store, tmp_path):
    rng = np.random.default_rng(0)
    rows, slow = [], {}
    for patient, subject in enumerate(store.subject_ids.tolist()):
        for _ in range(int(rng.integers(0, 4))):
            day = int(rng.integers(0, 40))
            rows.append((subject, stamp(day, 11)))
            slow.setdefault(patient, []).append((us(day, 11), False))
    rng.shuffle(rows)
    path = write(tmp_path / "i.parquet", rows, boolean_value=pa.array([True] * len(rows)))
    task = FirstEvent("X", index=labels(path), time_at_risk_days=20, prior_outcome="allow")
    outcomes = applied(task, store)
    expected, left = slow_rows(task, store, dates=slow)
    assert outcomes.patients.tolist() == [row.patient for row in expected]
    assert outcomes.n_visits.tolist() == [row.n_visits for row in expected]
    assert outcomes.event_indicators.tolist() == [row.event for row in expected]
    assert outcomes.end_times.view(np.int64).tolist() == [row.end_time for row in expected]
    assert outcomes.attrition.rules[-1].persons == left["observed"] < len(expected)
    assert "predictions" in str(outcomes.attrition)
    by_path = FirstEvent.from_dict({**task.to_dict(), "index": {"labels": str(path)}})
    assert by_path == task


@pytest.mark.parametrize("index", ["each_visit", "first_visit"])
@pytest.mark.parametrize("horizon", [None, 9])
def test_what_is_written_is_read(store, tmp_path, index, horizon):
    outcomes = applied(FirstEvent("X", index=index, washout_days=0), store)
    path = tmp_path / "out" / "labels.parquet"
    n_rows = write_labels(outcomes, store, path, horizon_days=horizon)
    assert [file.name for file in path.parent.iterdir()] == ["labels.parquet"]
    table = pq.read_table(path)
    assert table.schema.names == [
        "subject_id",
        "prediction_time",
        "boolean_value",
        "event_time_days",
        "event_indicator",
    ]
    at_risk = int((outcomes.n_visits - outcomes.entry_times).sum())
    assert len(table) == n_rows == (at_risk if index == "each_visit" else len(outcomes))
    days = table["event_time_days"].to_numpy()
    seen = table["event_indicator"].to_numpy()
    label = table["boolean_value"].to_pylist()
    if horizon is None:
        assert label == seen.tolist()
    else:
        assert label == [
            (False if day > horizon else True if event else None)
            for day, event in zip(_whole_days(table).tolist(), seen.tolist(), strict=True)
        ]
    read = labels(path, value="event_indicator")
    again = applied(read, store)
    assert len(again) == n_rows
    row, visit = outcomes.visits(store)
    place = visit - store.patient_offsets[outcomes.patients[row]]
    if index == "each_visit":
        at_risk = place >= outcomes.entry_times[row]
        assert again.n_visits.tolist() == (place[at_risk] + 1).tolist()
        assert np.allclose(days, outcomes.days_to_end(store)[at_risk], atol=1e-9)
        ends = outcomes.end_times[row[at_risk]]
    else:
        assert again.n_visits.tolist() == outcomes.n_visits.tolist()
        ends = outcomes.end_times
    assert (again.end_times == ends).all()
    assert again.event_indicators.tolist() == seen.tolist()


def _whole_days(table):
    """Days in UTC from each prediction's to the event's, or to the first that is not observed."""
    times = table["prediction_time"].to_numpy().astype("M8[us]")
    days = table["event_time_days"].to_numpy()
    ends = times + np.rint(days * 86_400e6).astype("m8[us]")
    event = table["event_indicator"].to_numpy()
    last = np.where(event, ends, ends - np.timedelta64(1, "us")).astype("M8[D]")
    return (last - times.astype("M8[D]")).astype(int) + ~event


def test_dates_and_zones(tmp_path):
    zoned = pa.array([stamp(3, 8)], pa.timestamp("ns", "Europe/Berlin"))
    table = pa.table({"subject_id": pa.array([1], pa.int32()), "prediction_time": zoned})
    pq.write_table(table, tmp_path / "z.parquet")
    assert labels(tmp_path / "z.parquet").prediction_times.view(np.int64).tolist() == [us(3, 8)]


def test_index_dates_as_text_with_a_zone():
    zoned = ["2020-02-01T01:30+02:00", "2020-01-31 23:30Z", "2020-01-31T23:30:00.000000-00:00"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = FirstEvent("X", index=dict(enumerate(zoned)))
    assert set(task.index.times.tolist()) == {dt.datetime(2020, 1, 31, 23, 30)}
    assert not task.index.whole_days.any()
    nat = pytest.importorskip("pandas").NaT  # an instance of datetime
    with pytest.raises(ValueError, match=r"index\[1\]: expected a date, got NaT"):
        FirstEvent("X", index={1: nat})


def refused(tmp_path, **columns):
    return write(tmp_path / "bad.parquet", [(1, stamp(0)), (2, stamp(1))], **columns)


BAD = {
    "no person": ({"subject_id": None}, ValueError, "expected the columns subject_id and"),
    "persons as text": (
        {"subject_id": pa.array(["1", "2"])},
        TypeError,
        "column subject_id: expected int64, got string",
    ),
    "a null person": (
        {"subject_id": pa.array([1, None])},
        ValueError,
        "column subject_id: expected no nulls, got 1, the first in row 1",
    ),
    "a null time": (
        {"prediction_time": pa.array([None, stamp(1)], US)},
        ValueError,
        "column prediction_time: expected no nulls, got 1, the first in row 0",
    ),
    "times as text": (
        {"prediction_time": pa.array(["2020", "2021"])},
        TypeError,
        r"column prediction_time: expected timestamp\[us\], got string",
    ),
    "booleans as numbers": (
        {"boolean_value": pa.array([0, 1])},
        TypeError,
        "column boolean_value: expected booleans, got int64",
    ),
    "huge integers": (
        {"integer_value": pa.array([0, 2**60])},
        ValueError,
        r"column integer_value: expected integers within 2\*\*53",
    ),
    "an event before its prediction": (
        {"event_time_days": pa.array([3.0, -0.5])},
        ValueError,
        "column event_time_days, row 1: expected days from 0 to 365250, .* got -0.5",
    ),
    "an infinite time": (
        {"event_time_days": pa.array([np.inf, 2.0])},
        ValueError,
        r"column event_time_days, row 0: .* got inf \(1 such rows\)",
    ),
    "huge persons": (
        {"subject_id": pa.array([1, 2**64 - 1], pa.uint64())},
        ValueError,
        "column subject_id: expected int64",
    ),
}


@pytest.mark.parametrize(("columns", "error", "message"), BAD.values(), ids=list(BAD))
def test_files_are_refused(tmp_path, columns, error, message):
    with pytest.raises(error, match=rf"bad\.parquet.*{message}"):
        labels(refused(tmp_path, **columns))


def test_no_files(tmp_path, store):
    with pytest.raises(FileNotFoundError, match="expected a label file or a folder of them"):
        labels(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected Parquet files, found none"):
        labels(tmp_path / "empty")
    (tmp_path / "text.parquet").write_text("subject_id")
    with pytest.raises(ValueError, match=r"text\.parquet: not a readable Parquet file"):
        labels(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="expected a value in one of the columns boolean_value"):
        labels(refused(tmp_path)).apply(store)
    with pytest.raises(ValueError, match=r"value: expected a column of .*, none, got .score."):
        labels(refused(tmp_path), value="score")
    with pytest.raises(ValueError, match="prediction_day: expected one of"):
        labels(refused(tmp_path), prediction_day="same")


def test_rows_without_an_indicator_have_that_of_their_label(store, tmp_path):
    folder = tmp_path / "labels"
    rows = [(int(subject), stamp(60)) for subject in store.subject_ids[:6]]
    write(folder / "0.parquet", rows[:3], boolean_value=pa.array([True, True, False]))
    write(
        folder / "sub" / "1.PARQUET",  # read too
        rows[3:],
        boolean_value=pa.array([True, False, True]),
        event_indicator=pa.array([None, True, False]),
    )
    write(folder / ".0.parquet", rows, boolean_value=pa.array([True] * 6))  # hidden: not read
    outcomes = labels(folder).apply(store)
    there = np.diff(store.patient_offsets)[:6] > 0
    expected = np.array([1, 1, 0, 1, 1, 0])[there]
    assert outcomes.event_indicators.tolist() == expected.tolist()
    assert len(labels(folder)) == 6


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"float_value": pa.array([1.0, 0.25])}, r"got 0.25 in row 1 \(1 such rows\)"),
        ({"integer_value": pa.array([3, 1])}, "got 3 in row 0"),
        ({"categorical_value": pa.array(["b", "a"])}, "got those of the categories 'a', 'b'"),
    ],
)
def test_labels_that_a_boolean_does_not_hold_are_not_written(tmp_path, columns, message):
    person = {"events": [(us(0), "A")]}
    store = store_of(tmp_path / "s", {4: person, 9: person})
    path = write(tmp_path / "labels.parquet", [(4, stamp(3)), (9, stamp(3))], **columns)
    outcomes = labels(path).apply(store)
    with pytest.raises(ValueError, match=f"expected labels of 0 and 1, .* {message}"):
        write_labels(outcomes, store, tmp_path / "again.parquet")
    assert not (tmp_path / "again.parquet").exists()
    zeros = tmp_path / "of_days.parquet"
    assert write_labels(outcomes, store, zeros, horizon_days=9) == 2
    assert pq.read_table(zeros)["boolean_value"].null_count == 2  # when is not known


def test_integers_that_float32_does_not_hold_are_refused(tmp_path):
    store = store_of(tmp_path / "s", {4: {"events": [(us(0), "A")]}})
    for value in (2**24, 2**24 + 1):
        values = pa.array([value], pa.int64())
        path = write(tmp_path / "labels.parquet", [(4, stamp(3))], integer_value=values)
        if value == 2**24:
            assert labels(path).apply(store).labels.tolist() == [2**24]
            continue
        with pytest.raises(ValueError, match=r"integer_value: .* got 16777217 \(row 0\)"):
            labels(path).apply(store)


def test_nobody(store, tmp_path):
    path = write(tmp_path / "n.parquet", [], boolean_value=pa.array([], pa.bool_()))
    read = labels(path, value="boolean_value")
    assert isinstance(read, Labels)
    outcomes = read.apply(store)
    assert len(outcomes) == 0
    assert write_labels(outcomes, store, tmp_path / "again.parquet") == 0
    assert len(labels(tmp_path / "again.parquet")) == 0
