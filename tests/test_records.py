"""Flat records: what they must be, and what batches, splits and descriptions take of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ehrseq_fast.data import (
    EventRecords,
    PatientDataset,
    Vocabulary,
    describe,
    packed_batch,
    padded_batch,
    select,
    split_by_person,
)


def records(**changed):
    fields = {
        "codes": np.array([1, 2, 1, 2, 1], np.int32),
        "visit_offsets": np.array([0, 2, 3, 4, 5]),
        "patient_offsets": np.array([0, 1, 3, 4]),
        "visit_days": np.array(["2020-01-01", "2019-01-01", "2019-01-02", "2018-01-01"], "M8[D]"),
        "person_ids": np.array([7, 8, 9]),
        "event_times": np.array([0, 1, 0]),
        "event_indicators": np.array([1, 0, 0], np.uint8),
        "vocabulary": Vocabulary(np.array([0, 40, 41]), ("", "a", "b")),
        **changed,
    }
    return EventRecords(**fields)


BAD = {
    "masked codes": (
        {"codes": np.ma.array([1, 2, 1, 2, 1], mask=[0, 1, 0, 0, 0])},
        ValueError,
        "codes: expected an array without masked values, got 1",
    ),
    "float codes": ({"codes": np.ones(5)}, TypeError, "codes: expected integers, got float64"),
    "padding as a code": (
        {"codes": np.array([1, 2, 0, 2, 1])},
        IndexError,
        "codes: expected 1 <= code < 3.*first is 0, at 2",
    ),
    "a code outside": ({"codes": np.array([1, 2, 1, 2, 3])}, IndexError, "first is 3, at 4"),
    "offsets that fall": (
        {"visit_offsets": np.array([0, 3, 2, 4, 5])},
        ValueError,
        "visit_offsets: .*the first is visit 1: from 3 to 2",
    ),
    "offsets outside": ({"visit_offsets": np.array([0, 2, 3, 4, 9])}, ValueError, "from 4 to 9"),
    "too few offsets": ({"patient_offsets": np.array([0, 1, 4])}, ValueError, "patient_offsets"),
    "a patient without visits": (
        {"patient_offsets": np.array([0, 0, 3, 4])},
        ValueError,
        "patients: expected at least one visit of each",
    ),
    "days that fall": (
        {"visit_days": np.array(["2020-01-01", "2019-01-03", "2019-01-02", "2018-01-01"], "M8[D]")},
        ValueError,
        "visit_days: expected days that do not fall within a patient",
    ),
    "days in seconds": (
        {"visit_days": np.zeros(4, "M8[s]")},
        TypeError,
        r"visit_days: expected datetime64\[D\], got datetime64\[s\]",
    ),
    "no day": (
        {"visit_days": np.array(["2020-01-01", "NaT", "2019-01-02", "2018-01-01"], "M8[D]")},
        ValueError,
        "visit_days: expected days",
    ),
    "late events": ({"event_times": [0, 2, 0]}, ValueError, "event_times: .*first is 2, at 1"),
    "indicators": ({"event_indicators": [1, 0, 2]}, ValueError, "event_indicators: .*2, at 2"),
    "float indicators": ({"event_indicators": [1.0, 0, 0]}, TypeError, "event_indicators"),
    "persons by name": ({"person_ids": ["7", "8", "9"]}, TypeError, "person_ids"),
    "codes of no visit": (
        {"visit_offsets": np.array([0, 2, 3, 4, 4])},
        ValueError,
        "visit_offsets: expected offsets from 0 to 5, the number of codes, got 0 to 4: 1 codes",
    ),
    "a first code of no visit": (
        {"visit_offsets": np.array([1, 2, 3, 4, 5])},
        ValueError,
        "visit_offsets: .*got 1 to 5: 1 codes belong to no visit",
    ),
    "visits of no patient": (
        {"patient_offsets": np.array([0, 1, 2, 3])},
        ValueError,
        "patient_offsets: .*from 0 to 4, the number of visits, got 0 to 3: 1 visits belong to no p",
    ),
    "too few persons": ({"person_ids": [7, 8]}, ValueError, "patient_offsets"),
}


@pytest.mark.parametrize("what", BAD)
def test_records_that_do_not_belong_together_are_refused(what):
    changed, error, message = BAD[what]
    with pytest.raises(error, match=message):
        records(**changed)
    with pytest.raises(error, match=message):
        replace(records(), **changed)


def test_a_vocabulary_takes_names_from_any_iterable():
    names = ["", "a", "b"]
    assert Vocabulary(np.array([0, 40, 41]), iter(names)).names == ("", "a", "b")
    vocabulary = Vocabulary(np.array([0, 40, 41]), names)
    names.clear()
    assert len(vocabulary) == 3


def test_a_vocabulary_is_ascending():
    with pytest.raises(ValueError, match="ascending"):
        Vocabulary(np.array([0, 41, 40]), ("", "b", "a"))
    with pytest.raises(TypeError, match="concept_ids: expected integers"):
        Vocabulary(np.array([0.0, 40.5]), ("", "a"))


MASK = np.array([False, True, True])
TAKES = {
    "packed_batch": lambda patients: packed_batch(records(), patients).lengths.tolist(),
    "padded_batch": lambda patients: (
        padded_batch(records(), patients).sequence_mask.sum(1).tolist()
    ),
    "select": lambda patients: select(records(), patients).visits_per_patient.tolist(),
    "PatientDataset": lambda patients: [
        int(records().visits_per_patient[p]) for p in PatientDataset(records(), patients)
    ],
}


@pytest.mark.parametrize("take", TAKES)
def test_a_boolean_mask_is_a_mask(take):
    for mask in (MASK, MASK.tolist(), torch.from_numpy(MASK), (MASK * 2).astype("u1").view(bool)):
        assert TAKES[take](mask) == TAKES[take]([1, 2]) == [2, 1]
    assert TAKES[take]([2, 1, 1]) == [1, 2, 2]


@pytest.mark.parametrize("take", TAKES)
@pytest.mark.parametrize(
    ("patients", "error"),
    [
        (MASK[:2], ValueError),
        ([0.5, 1.0], TypeError),
        (["0", "1"], TypeError),
        ([0, None], TypeError),
        ([0, True], TypeError),
        ([[0, 1]], ValueError),
        ([-1], IndexError),
        ([3], IndexError),
        (np.array([2**63], np.uint64), (IndexError, ValueError)),
        (np.ma.array([0, 1], mask=[False, True]), ValueError),
        (np.array(["2020-01-01"], "M8[D]"), TypeError),
        (1, ValueError),
    ],
)
def test_patients_that_are_none_are_refused(take, patients, error):
    with pytest.raises(error):
        TAKES[take](patients)


def test_a_dataset_has_the_patients_that_were_named():
    data = PatientDataset(records(), MASK)
    assert (len(data), [data[i] for i in range(len(data))]) == (2, [1, 2])
    assert len(PatientDataset(records(), [])) == 0
    for index in (0.0, "0", slice(2), [0]):
        with pytest.raises(TypeError):
            data[index]


def test_a_split_takes_integers_alone():
    for ids, error in (
        ([7.5, 8.5], TypeError),
        (["7", "8"], TypeError),
        (np.ma.array([7, 8], mask=[0, 1]), ValueError),
        ([None, 7], TypeError),
        ([[7, 8]], ValueError),
    ):
        with pytest.raises(error, match="person_ids"):
            split_by_person(ids)
    for seed, error in ((1.5, TypeError), (-1, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="seed"):
            split_by_person([7, 8], seed=seed)
    with pytest.raises(TypeError, match="fractions"):
        split_by_person([7, 8], {"train": "0.8", "test": "0.2"})
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_person([7, 8], {"train": math.nan, "test": 1.0})
    ids = np.array([2**63 + 1, 5], np.uint64)
    assert sum(map(len, split_by_person(ids).values())) == 2
    given = split_by_person(np.arange(100), seed=3)
    assert split_by_person(list(range(100)), seed=np.int64(3))["train"].tolist() == (
        given["train"].tolist()
    )


def test_time_features_that_are_written_to_change_no_batch():
    given = records()
    features = given.time_features()
    expected = features.copy()
    features.fill(99.0)
    batch = packed_batch(given, [0, 1, 2], with_time_features=True)
    np.testing.assert_array_equal(batch.visit_features[batch.rows_of(1)], expected[1:3])
    padded = padded_batch(given, [1])
    np.testing.assert_array_equal(padded.time_features[0], expected[1:3])


@pytest.mark.filterwarnings("error")
def test_nobody_can_be_described():
    nobody = select(records(), [])
    description = describe(nobody)
    assert (description.patients, description.visits, description.codes) == (0, 0, 0)
    assert (description.visits_max, description.codes_max) == (0, 0)
    assert math.isnan(description.visits_mean)
    assert "patients            0" in str(description)
    assert nobody.time_features().shape == (0, 3)
    assert len(PatientDataset(nobody)) == 0
    uncoded = records(codes=np.array([], np.int32), visit_offsets=np.zeros(5, np.int64))
    assert math.isnan(describe(uncoded).real_codes)
    for size in (0, -1):
        with pytest.raises(ValueError, match="batch_size: expected"):
            describe(records(), batch_size=size)


def test_records_in_a_file_that_became_shorter(tmp_path):
    path = tmp_path / "codes"
    records().codes.tofile(path)
    mapped = records(codes=np.memmap(path, np.int32, "r"))
    assert packed_batch(mapped, [0, 1, 2]).n_codes == 5
    with open(path, "r+b") as file:
        file.truncate(4)
    for make in (packed_batch, padded_batch):
        with pytest.raises(ValueError, match="codes: the memory-mapped file was truncated"):
            make(mapped, [0, 1, 2])
