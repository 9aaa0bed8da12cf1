"""Batches from data frames, objects and nested ragged arrays, and torch's own collate function."""

from __future__ import annotations

import datetime

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

from ehrseq_fast.batch import PackedVisits

from .batch_cases import PATIENTS, assert_holds, assert_same, flat, full_batch, many

DAY = datetime.datetime(2020, 1, 1)
# bob's first row comes first; two rows of one time; rows that are not in order
ROWS = {
    "person_id": ["bob", "ann", "bob", "ann", "ann", "bob"],
    "time": [DAY + datetime.timedelta(days) for days in (9, 2, 1, 2, 1, 9)],
    "code": ["E11", "I10", "J45", "E11", "J45", "E11"],
    "value": [1.0, None, 2.0, 3.0, 4.0, 5.0],
}
VOCABULARY = {"E11": 1, "I10": 2, "J45": 3}
EXPECTED = [[[3], [1, 1]], [[3], [2, 1]]]  # bob, ann


def with_categories(frame):
    return frame.astype({"person_id": "category", "code": "category"})


def arrow_in_chunks():
    table = pyarrow.table(ROWS)
    return pyarrow.concat_tables([table.slice(0, 1), table.slice(1, 0), table.slice(1, 5)])


class Stream:
    """A table that has Arrow's stream alone, as a DuckDB relation."""

    def __arrow_c_stream__(self, requested_schema=None):
        return pyarrow.table(ROWS).__arrow_c_stream__(requested_schema)


FRAMES = {
    "mapping": lambda: ROWS,
    "pandas": lambda: pandas.DataFrame(ROWS),
    "pandas strings": lambda: pandas.DataFrame(ROWS).astype(
        {"person_id": "string", "code": "string[pyarrow]"}
    ),
    "pandas categories": lambda: with_categories(pandas.DataFrame(ROWS)),
    "pandas, part of it": lambda: pandas.concat([pandas.DataFrame(ROWS)] * 2).iloc[6:],
    "arrow": lambda: pyarrow.table(ROWS),
    "arrow, in chunks": arrow_in_chunks,
    "arrow, part of it": lambda: (
        pyarrow.concat_tables([pyarrow.table(ROWS)] * 2).combine_chunks().slice(6)
    ),
    "arrow, large strings": lambda: pyarrow.table(ROWS).set_column(
        2, "code", pyarrow.array(ROWS["code"], pyarrow.large_string())
    ),
    "arrow, dictionaries": lambda: pyarrow.table(ROWS).set_column(
        2, "code", pyarrow.array(ROWS["code"]).dictionary_encode()
    ),
    "arrow, dates": lambda: pyarrow.table(ROWS).set_column(
        1, "time", pyarrow.array([time.date() for time in ROWS["time"]])
    ),
    # as Polars gives its texts and categories
    "arrow, views": lambda: pyarrow.table(ROWS).set_column(
        2, "code", pyarrow.array(ROWS["code"]).cast(pyarrow.string_view())
    ),
    "arrow, categories of views": lambda: pyarrow.table(ROWS).set_column(
        2,
        "code",
        pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0, 1, 2, 0, 2, 0], pyarrow.uint32()),
            pyarrow.array(["E11", "I10", "J45"]).cast(pyarrow.string_view()),
        ),
    ),
    "arrow, milliseconds": lambda: pyarrow.table(ROWS).set_column(
        1, "time", pyarrow.array(ROWS["time"], pyarrow.timestamp("ms", "UTC"))
    ),
    "a stream": Stream,
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames(builder, name):
    frame = FRAMES[name]()
    assert_holds(PackedVisits.from_frame(frame, vocabulary=VOCABULARY), EXPECTED)
    chosen = PackedVisits.from_frame(
        frame,
        vocabulary=VOCABULARY,
        persons=["ann", "ann", "bob"],
        vocab_size=4,
        event_times=[0, 1, 1],
        event_indicators=[1, 0, 1],
        targets={"age": [50, 50, 60]},
    )
    assert_holds(chosen, [EXPECTED[p] for p in (1, 1, 0)])
    assert chosen.event_times.tolist() == [0, 1, 1]
    assert chosen.targets["age"].tolist() == [50, 50, 60]
    assert chosen.vocab_size == 4


@pytest.mark.parametrize("ids", [[5, 3, 5], ["bob", "ann", "bob"]])
def test_outcomes_whose_order_is_not_clear(ids):
    """Of groupby they come in the order of ids, of drop_duplicates in that of rows."""
    frame = {"person_id": np.array(ids), "time": np.arange(3), "code": np.arange(3)}
    outcomes = {"event_times": [1, 0], "event_indicators": [1, 0]}
    for options in (outcomes, {"targets": {"age": [50, 60]}}):
        with pytest.raises(ValueError, match=rf"persons: .* \({ids[1]!r} comes after {ids[0]!r}"):
            PackedVisits.from_frame(frame, **options)
    assert PackedVisits.from_frame(frame).lengths.tolist() == [2, 1]
    named = PackedVisits.from_frame(frame, persons=ids[:2], **outcomes)
    ordered = PackedVisits.from_frame(
        {**frame, "person_id": np.sort(ids)[::-1][[2, 0, 0]]},
        **{name: values[::-1] for name, values in outcomes.items()},
    )
    assert named.event_times.tolist() == [1, 0]
    assert ordered.event_times.tolist() == [0, 1]


@pytest.mark.parametrize("ids", [[5, 3, 5], ["bob", "ann", "bob"]])
def test_outcomes_labelled_in_another_order(ids):
    """As of groupby, whose order is that of the ids; a Series is taken by position."""
    frame = pandas.DataFrame({"person_id": ids, "time": range(3), "code": range(3)})
    last = frame.groupby("person_id").size() - 1
    events = pandas.Series([0, 1], index=last.index)
    of_batch = {"persons": ids[:2], "event_times": last.loc[ids[:2]]}
    for name, options in (
        ("event_times", {**of_batch, "event_times": last, "event_indicators": [1, 0]}),
        ("event_indicators", {**of_batch, "event_indicators": events}),
        ("age", {"persons": ids[:2], "targets": {"age": events.to_frame()}}),
    ):
        with pytest.raises(ValueError, match=rf"{name}: .* index in another order .*{ids[1]!r} at"):
            PackedVisits.from_frame(frame, **options)
    for right in (
        events.loc[ids[:2]],
        events.to_numpy()[::-1],
        events[::-1].reset_index(drop=True),
    ):
        batch = PackedVisits.from_frame(frame, **of_batch, event_indicators=right)
        assert batch.event_times.tolist() == [1, 0]
        assert batch.event_indicators.tolist() == [1, 0]


@many
@given(PATIENTS, st.randoms())
def test_rows_in_any_order(patients, random):
    """Codes of a visit stay in the order of their rows; empty visits have no row."""
    given_ = [[visit for visit in visits if visit] for visits in patients]
    rows = [
        (1000 - p, 10 * t + 5, place, code)
        for p, visits in enumerate(given_)
        for t, visit in enumerate(visits)
        for place, code in enumerate(visit)
    ]
    visits = {}
    random.shuffle(rows)
    for person, time, _, code in rows:
        visits.setdefault(person, {}).setdefault(time, []).append(code)
    expected = [[visits[person][time] for time in sorted(visits[person])] for person in visits]
    columns = [np.array([row[i] for row in rows], np.int64) for i in range(4)]
    for of_time in (columns[1], columns[1] / 4, columns[1].astype("M8[D]")):
        for frame in (
            {"who": columns[0], "when": of_time, "what": columns[3].astype(np.uint16)},
            pandas.DataFrame(
                {"who": columns[0], "when": of_time.astype("M8[s]"), "what": columns[3]}
            )
            if of_time.dtype.kind == "M"
            else pyarrow.table({"who": columns[0], "when": of_time, "what": columns[3]}),
        ):
            assert_holds(PackedVisits.from_frame(frame, "who", "when", "what"), expected)


NUMBERS = {"person_id": [1, 1, 2], "time": [1.0, 2.0, 3.0], "code": [4, 5, 6]}


def changed(**columns):
    return NUMBERS | columns


REFUSED = {
    "no such column": (
        lambda: {"person": [1]},
        ValueError,
        r"expected a column 'person_id', got no such column among \['person'\]",
    ),
    "two such columns": (
        lambda: pandas.DataFrame(NUMBERS).iloc[:, [0, 0, 1, 2]],
        ValueError,
        "several such columns",
    ),
    "other lengths": (
        lambda: changed(code=[4, 5]),
        ValueError,
        "column 'code': expected 3 rows as column 'person_id', got 2",
    ),
    "a null person": (
        lambda: pyarrow.table(changed(person_id=[1, None, 2])),
        ValueError,
        r"column 'person_id', row 1: expected a value, got null \(1 in these rows\)",
    ),
    "a null text": (
        lambda: pandas.DataFrame(changed(person_id=["a", "b", None])),
        ValueError,
        "column 'person_id', row 2: expected a value, got null",
    ),
    "a null in a category": (
        lambda: pandas.DataFrame(changed(person_id=["a", None, "b"])).astype("category"),
        ValueError,
        "column 'person_id', row 1: expected a value, got null",
    ),
    "a nullable column": (
        lambda: pandas.DataFrame(changed(code=[4, None, 6])).astype({"code": "Int64"}),
        ValueError,
        "column 'code', row 1: expected a value, got null",
    ),
    "a null in a list": (lambda: changed(code=[4, 5, None]), ValueError, "column 'code', row 2"),
    "a later chunk's null": (
        lambda: pyarrow.concat_tables(
            [pyarrow.table(NUMBERS), pyarrow.table(changed(time=[1.0, None, None]))]
        ),
        ValueError,
        r"column 'time', row 4: expected a value, got null \(2 in these rows\)",
    ),
    "NaN": (
        lambda: changed(time=[1.0, float("nan"), 2.0]),
        ValueError,
        "column 'time', row 1: expected a value, got null",
    ),
    "NaT": (
        lambda: pandas.DataFrame(changed(time=[pandas.NaT, DAY, DAY])),
        ValueError,
        "column 'time', row 0: expected a value, got null",
    ),
    "NaT in an array": (
        lambda: changed(time=np.array(["2020-01-01", "NaT", "2020-01-01"], "M8[D]")),
        ValueError,
        "column 'time', row 1: expected a value, got null",
    ),
    "persons in floats": (
        lambda: changed(person_id=[1.0, 1.0, 2.0]),
        TypeError,
        "column 'person_id': expected integers or text, got float64",
    ),
    "times in text": (
        lambda: pyarrow.table(changed(time=["1", "2", "3"])),
        TypeError,
        "column 'time': expected times or numbers, got text",
    ),
    "codes in text": (
        lambda: changed(code=["a", "b", "c"]),
        TypeError,
        "column 'code': expected integer codes, got text; vocabulary=",
    ),
    "booleans": (
        lambda: pandas.DataFrame(changed(code=[True, False, True])),
        TypeError,
        "column 'code': expected integers, floats, times or text",
    ),
    "a negative code": (
        lambda: changed(code=[4, -5, 6]),
        IndexError,
        "codes outside the vocabulary.*The first is -5: patient 0, visit 1",
    ),
    "objects": (
        lambda: pandas.DataFrame(changed(code=[4, "a", 6])),
        TypeError,
        "column 'code': expected integers, floats, times or text",
    ),
    "an Arrow column of lists": (
        lambda: pyarrow.table(changed(code=[[4], [5], [6]])),
        TypeError,
        "column 'code': expected integers, floats, times or text: ",
    ),
    "times of a zone in a list": (
        lambda: changed(time=[DAY.replace(tzinfo=datetime.timezone.utc)] * 3),
        TypeError,
        "column 'time', row 0: expected a time without a time zone",
    ),
    "a list": (lambda: [[1, 2, 3]], TypeError, "frame: expected a data frame"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_frames_are_refused(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        PackedVisits.from_frame(make())


def test_codes_that_are_not_in_the_vocabulary():
    frame = changed(code=["a", "x", "y"])
    message = r"column 'code', row 1: expected a code of the vocabulary, got 'x' \(2 codes"
    with pytest.raises(IndexError, match=message):
        PackedVisits.from_frame(frame, vocabulary={"a": 1})
    found = PackedVisits.from_frame(frame, vocabulary={"a": 1}, unknown=0)
    assert_holds(found, [[[1], [0]], [[0]]])
    with pytest.raises(ValueError, match="got 3, at 1, which has no row"):
        PackedVisits.from_frame(NUMBERS, persons=np.array([1, 3]))
    with pytest.raises(TypeError, match="persons: expected a list of ids"):
        PackedVisits.from_frame(NUMBERS, persons="12")
    with pytest.raises(TypeError, match="vocabulary: expected a mapping"):
        PackedVisits.from_frame(frame, vocabulary=["a"])


@pytest.mark.parametrize("make", [dict, pandas.DataFrame, pyarrow.table])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_values_are_weights_of_codes(builder, make, dtype):
    values = np.array([5, 4, 3, 2, 1, 0], dtype)
    frame = make({"p": [1, 2, 1, 1, 2, 1], "t": [3, 1, 1, 3, 1, 2], "c": np.arange(6), "v": values})
    found = PackedVisits.from_frame(frame, "p", "t", "c", "v")
    assert_holds(found, [[[2], [5], [0, 3]], [[1, 4]]])
    wide = torch.float32 if dtype == np.float32 else torch.float64
    assert found.code_weights.dtype == wide
    assert found.code_weights.tolist() == (5 - found.codes).tolist()
    chosen = PackedVisits.from_frame(frame, "p", "t", "c", "v", persons=[2, 1, 2])
    assert chosen.code_weights.tolist() == (5 - chosen.codes).tolist()
    assert chosen.last_visits(1).code_weights.tolist() == [4, 1, 5, 2, 4, 1]


def test_values_that_are_no_weights():
    with pytest.raises(ValueError, match="column 'value', row 1: expected a value, got null"):
        PackedVisits.from_frame(pandas.DataFrame(ROWS), value="value", vocabulary=VOCABULARY)
    with pytest.raises(TypeError, match="column 'value': expected numbers, got text"):
        PackedVisits.from_frame(changed(value=["a", "b", "c"]), value="value")
    with pytest.raises(ValueError, match="column 'value': expected integers that"):
        PackedVisits.from_frame(changed(value=[1, 2, 2**53 + 1]), value="value")


def test_no_rows():
    empty = {name: np.zeros(0, np.int64) for name in NUMBERS}
    for frame in (empty, pyarrow.table(empty), pandas.DataFrame(empty)):
        assert len(PackedVisits.from_frame(frame)) == 0


class Patient:
    def __init__(self, visits, number):
        self.visits = visits
        self.number = number


@many
@given(PATIENTS)
def test_objects(patients):
    expected = full_batch(patients)
    features = [expected.visit_features[expected.rows_of(p)] for p in range(len(patients))]
    cost = [expected.visit_targets["cost"][expected.rows_of(p)] for p in range(len(patients))]
    objects = [Patient(visits, p) for p, visits in enumerate(patients)]
    found = PackedVisits.from_objects(
        iter(objects),
        lambda patient: (tuple(visit) for visit in patient.visits),
        vocab_size=expected.vocab_size,
        event_times=lambda patient: len(patient.visits) - 1,
        event_indicators=expected.event_indicators,
        event_types=lambda patient: patient.number % 3,
        visit_features=(lambda patient: features[patient.number]) if patients else None,
        targets={"age": expected.targets["age"]},
        visit_targets={"cost": lambda patient: cost[patient.number]} if patients else {},
    )
    if patients:
        assert_same(found, expected)
    else:
        assert_holds(found, [])


def test_objects_are_read_by_a_function():
    found = PackedVisits.from_objects(
        [3, 4], lambda n: [[n]], targets={"half": lambda n: n / 2, "pair": lambda n: [n, n]}
    )
    assert found.targets["half"].tolist() == [1.5, 2.0]
    assert found.targets["pair"].tolist() == [[3, 3], [4, 4]]
    with pytest.raises(TypeError, match="codes: expected a function of a patient, got a list"):
        PackedVisits.from_objects([1], [[[1]]])
    with pytest.raises(IndexError, match="patient 1, visit 0, code 0"):
        PackedVisits.from_objects([1, 9], lambda n: [[n]], vocab_size=5)


def nested(patients, dtype=np.int64):
    codes, visit_offsets, patient_offsets = flat(patients, dtype)
    return {
        "dim0/age": np.arange(len(patients)),
        "dim1/lengths": np.diff(patient_offsets),
        "dim1/bounds": patient_offsets[1:].astype(np.uint16),
        "dim1/days": np.arange(len(visit_offsets) - 1) / 2,
        "dim2/lengths": np.diff(visit_offsets),
        "dim2/bounds": visit_offsets[1:],
        "dim2/code": codes,
    }


class Nested:
    def __init__(self, tensors):
        self.tensors = tensors


@many
@given(PATIENTS, st.sampled_from([np.int64, np.uint8]), st.data())
def test_nested_ragged_arrays(builder, patients, dtype, data):
    arrays = nested(patients, dtype)
    chosen = (
        data.draw(st.lists(st.integers(0, len(patients) - 1), max_size=5)) if patients else None
    )
    for tensors in (arrays, Nested(arrays)):
        found = PackedVisits.from_nested_ragged(
            tensors, patients=chosen, targets=["age"], visit_targets=["days"]
        )
        expected = PackedVisits.from_flat(
            *flat(patients),
            chosen,
            targets={"age": arrays["dim0/age"]},
            visit_targets={"days": arrays["dim1/days"]},
        )
        assert_same(found, expected)


def test_one_patients_nested_arrays():
    tensors = {
        "dim0/days": torch.tensor([0.0, 3.0]),
        "dim1/bounds": torch.tensor([1, 3]),
        "dim1/id": torch.tensor([5, 6, 7]),
    }
    found = PackedVisits.from_nested_ragged(tensors, "id", visit_targets=["days"])
    assert_holds(found, [[[5], [6, 7]]])
    assert found.visit_targets["days"].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"dim0/code": [1]}, ValueError, "expected 'dim2/code'"),
        ({"dim2/code": np.array([1])}, ValueError, "expected 'dim2/bounds', got"),
        (
            {"dim2/code": np.array([1]), "dim2/bounds": np.array([1])},
            ValueError,
            "expected 'dim1/bounds', got",
        ),
        (
            nested([[[1], [2]]]) | {"dim2/bounds": np.array([1, 3])},
            ValueError,
            "visit_offsets must rise within",
        ),
        ([1, 2], TypeError, "tensors: expected a mapping"),
    ],
)
def test_bad_nested_arrays_are_refused(arrays, error, message):
    with pytest.raises(error, match=message):
        PackedVisits.from_nested_ragged(arrays)


class OnePatientEach(torch.utils.data.Dataset):
    """A map-style data set whose items are batches of one patient."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch)

    def __getitem__(self, patient):
        return self.batch[[patient]]


SOME = [[[1], [2, 3]], [[4]], [[], [5], [6]], [[7]], [[8, 8]]]


@pytest.mark.parametrize(
    "options", [{}, {"collate_fn": PackedVisits.cat}, {"collate_fn": default_collate}]
)
def test_batches_of_one_patient_are_collated(options):
    whole = full_batch(SOME)
    loader = DataLoader(OnePatientEach(whole), batch_size=2, **options)
    for i, found in enumerate(loader):
        assert_same(found, whole[2 * i : 2 * i + 2])


def test_batches_within_other_samples_are_collated():
    whole = full_batch(SOME)
    samples = [{"record": whole[[p]], "weight": float(p)} for p in range(3)]
    found = default_collate(samples)
    assert_same(found["record"], whole[:3])
    assert found["weight"].tolist() == [0, 1, 2]
    pair = default_collate([(whole[[p]], p) for p in range(3)])
    assert_same(pair[0], whole[:3])


def test_two_workers_collate():
    whole = full_batch(SOME)
    loader = DataLoader(OnePatientEach(whole), batch_size=3, num_workers=2)
    found = list(loader)
    assert_same(found[0], whole[:3])
    assert_same(found[1], whole[3:])
