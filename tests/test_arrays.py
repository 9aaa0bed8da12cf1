"""What NumPy would convert with a loss is refused, at every entrance of batches and records."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ehrseq_fast.arrays import integer, integers, longs, selection, truth, whole
from ehrseq_fast.batch import PackedVisits

pandas = pytest.importorskip("pandas", reason="pip install pandas")

LISTS = [[[1]], [[2], [3]], [[4]]]
FLAT = (np.array([1, 2, 3, 4]), np.arange(5), np.array([0, 1, 3, 4]))
MASKED = np.ma.array([0, 1, 0], mask=[False, True, False])
DIRTY = torch.tensor([0, 2, 255], dtype=torch.uint8).view(torch.bool)

LOSSY = {
    "masked": (MASKED, ValueError, "without masked values, got 1 masked of 3"),
    "masked in a list": ([0, np.ma.masked, 0], ValueError, "without masked values"),
    "object": (np.array([0, None, 0]), TypeError, "got object, with None of type NoneType at"),
    "text": (["0", "0", "0"], TypeError, "got <U1"),
    "bytes": ([b"0", b"0", b"0"], TypeError, "got |S1"),
    "complex": (np.zeros(3, complex), TypeError, "got complex128"),
    "dates": (np.zeros(3, "datetime64[D]"), TypeError, "got datetime64[D]"),
    "durations": (np.zeros(3, "timedelta64[D]"), TypeError, "got timedelta64[D]"),
    "a nullable column": (pandas.array([0, None, 0], dtype="Int64"), (TypeError, ValueError), ""),
    "too large for int64": ([0, 2**63, 0], ValueError, "9223372036854775808, at"),
    "far too large": ([0, 2**70, 0], ValueError, "1180591620717411303424, at 1"),
    "unsigned": (
        np.array([0, 2**63, 0], np.uint64),
        (TypeError, ValueError, IndexError),  # a code may be unsigned: this one is too large
        "",
    ),
    "booleans beside integers": ([0, True, 0], TypeError, "got bool beside int"),
    "lists of other lengths": ([[0], [0, 1], 0], ValueError, "lists of equal lengths"),
    "too deep": ([[0], [0], [0]], ValueError, "shape"),
    "a number": (0, ValueError, "shape"),
    "a generator": (iter(range(3)), (TypeError, ValueError), ""),
    "sparse": (torch.zeros(3).to_sparse(), TypeError, "a dense tensor, got a sparse one"),
    "meta": (torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "meta"),
}
FLOATS = {
    "fractions": (np.array([0, 0.5, 0]), "0.5, at 1"),
    "NaN": (np.array([0, np.nan, 0]), "nan, at 1"),
    "infinity": (np.array([0, np.inf, 0]), "inf, at 1"),
    "not whole any more": (np.array([0, 2.0**60, 0]), "1.15"),
    "bfloat16": (torch.tensor([0, 0.5, 0], dtype=torch.bfloat16), "0.5, at 1"),
}


def event_times(values):
    return PackedVisits.from_lists(LISTS, event_times=values)


ENTRANCES = {
    "event_times of lists": event_times,
    "event_indicators of lists": lambda v: PackedVisits.from_lists(LISTS, event_indicators=v),
    "event_types of lists": lambda v: PackedVisits.from_lists(LISTS, event_types=v),
    "event_times of records": lambda v: PackedVisits.from_flat(*FLAT, event_times=v),
    "event_times of some": lambda v: PackedVisits.from_flat(*FLAT, [0, 1, 2], event_times=v),
    "event_indicators of some": lambda v: PackedVisits.from_flat(*FLAT, [1, 1], event_indicators=v),
    "event_times of padded": lambda v: PackedVisits.from_padded(
        torch.ones(3, 1, 1, dtype=torch.int64), event_times=v
    ),
    "with_outcomes": lambda v: PackedVisits.from_lists(LISTS).with_outcomes(event_times=v),
    "patients": lambda v: PackedVisits.from_flat(*FLAT, v),
    "codes": lambda v: PackedVisits.from_flat(v, [0, 1, 2, 3], [0, 3]),
    "visit_offsets": lambda v: PackedVisits.from_flat(FLAT[0], v, [0, 2]),
    "patient_offsets": lambda v: PackedVisits.from_flat(FLAT[0], FLAT[1], v),
    "lengths": lambda v: PackedVisits.from_padded(
        torch.ones(3, 2, 1, dtype=torch.int64), lengths=v
    ),
    "with_codes": lambda v: PackedVisits.from_lists([[[1, 2, 3]]]).with_codes(v),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("what", LOSSY)
@pytest.mark.filterwarnings("error")
def test_lossy_input_is_refused(builder, entrance, what):
    values, error, message = LOSSY[what]
    kinds = error if isinstance(error, tuple) else (error,)
    with pytest.raises((*kinds, TypeError)) as refused:
        ENTRANCES[entrance](values)
    if not isinstance(values, torch.Tensor):
        assert message in str(refused.value)


@pytest.mark.parametrize("what", FLOATS)
@pytest.mark.parametrize("name", ["event_indicators", "event_types"])
@pytest.mark.filterwarnings("error")
def test_floats_must_be_whole(builder, name, what):
    values, message = FLOATS[what]
    with pytest.raises(ValueError, match="whole numbers") as refused:
        PackedVisits.from_flat(*FLAT, **{name: values})
    assert message in str(refused.value)
    with pytest.raises(ValueError, match="whole numbers"):
        PackedVisits.from_flat(*FLAT, [1], **{name: values})


def test_booleans_are_no_event_times(builder):
    with pytest.raises(TypeError, match="event_times: expected integers, got bool"):
        event_times([False, False, False])


def test_what_is_exact_is_taken(builder):
    expected = event_times([0, 1, 0])
    for values in (
        np.array([0, 1, 0], np.uint64),
        np.array([0, 1, 0], np.int8),
        np.array([0, 1, 0], ">i4"),
        np.ma.array([0, 1, 0]),
        pandas.Series([0, 1, 0]),
        pandas.array([0, 1, 0], dtype="Int64"),
        torch.tensor([0, 1, 0], dtype=torch.int16),
        (0, 1, 0),
    ):
        assert torch.equal(event_times(values).event_times, expected.event_times)
    seen = PackedVisits.from_lists(LISTS, event_indicators=DIRTY).event_indicators
    assert seen.tolist() == [0, 1, 1]
    seen = PackedVisits.from_lists(LISTS, event_indicators=torch.tensor([0, 1, 1]).bfloat16())
    assert seen.event_indicators.tolist() == [0, 1, 1]


def test_a_boolean_mask_chooses_patients(builder):
    mask = np.array([False, True, True])
    expected = PackedVisits.from_flat(*FLAT, [1, 2])
    for given in (mask, torch.from_numpy(mask), DIRTY, mask.tolist()):
        assert PackedVisits.from_flat(*FLAT, given).codes.tolist() == expected.codes.tolist()
        assert expected.codes.tolist() == PackedVisits.from_flat(*FLAT)[given].codes.tolist()
    with pytest.raises(ValueError, match="one boolean for each of 3 records, got 2"):
        PackedVisits.from_flat(*FLAT, [True, False])


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (MASKED, ValueError),
        ([1, True], TypeError),
        (np.array([2**63], np.uint64), ValueError),
        ([2**70], TypeError),
        ([0.0], TypeError),
        (["0"], TypeError),
        ([[0]], TypeError),
        (None, TypeError),
    ],
)
def test_an_index_is_not_converted(index, error):
    with pytest.raises(error):
        PackedVisits.from_lists(LISTS)[index]


# Features and targets -----------------------------------------------------------------------------


def per_patient(*lengths, width=(2,)):
    return [np.ones((length, *width), np.float32) for length in lengths]


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_lengths_per_patient_are_those_of_the_patients(builder, convert):
    """Lengths of the right sum would hand rows to other patients."""
    wrong = [convert(part) for part in per_patient(2, 1, 1)]
    expected = r"one row per visit, 4 in all; patient 0: expected 1, got 2"
    with pytest.raises(ValueError, match="visit_features: expected " + expected):
        PackedVisits.from_lists(LISTS, visit_features=wrong)
    with pytest.raises(ValueError, match=r"visit_targets\['y'\]: expected " + expected):
        PackedVisits.from_lists(LISTS, visit_targets={"y": wrong})
    with pytest.raises(ValueError, match="one array for each of 3 patients, got 2"):
        PackedVisits.from_lists(LISTS, visit_features=wrong[:2])
    with pytest.raises(ValueError, match="rows of one shape; patient 0:"):
        PackedVisits.from_lists(
            LISTS, visit_features=[*per_patient(1, 2), *per_patient(1, width=(3,))]
        )
    with pytest.raises(ValueError, match="patient 0: expected 1, got a number"):
        PackedVisits.from_lists(LISTS, visit_targets={"y": [1.0, 2.0, 3.0]})
    mixed = [np.ones((1, 2)), torch.ones(2, 2), np.ones((1, 2))]
    assert PackedVisits.from_lists(LISTS, visit_features=mixed).visit_features.shape == (4, 2)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (np.ma.array(np.ones((3, 1)), mask=np.eye(3, 1)), ValueError),
        (np.array(["a", "b", "c"]), TypeError),
        (np.array([1, None, 2]), TypeError),
        (np.zeros(3, "datetime64[D]"), TypeError),
        (np.zeros(3, ">f4"), TypeError),
        (np.zeros(3, np.longdouble), TypeError),
        (torch.zeros(3).to_sparse(), TypeError),
        (torch.zeros(3, device="meta"), ValueError),
        ([[1], [2, 3], [4]], ValueError),
    ],
)
def test_targets_that_a_tensor_cannot_hold(builder, values, error):
    with pytest.raises(error, match=r"targets\['y'\]"):
        PackedVisits.from_lists(LISTS, targets={"y": values})
    with pytest.raises(error, match=r"targets\['y'\]"):
        PackedVisits.from_flat(*FLAT, [1], targets={"y": values})


def test_a_target_is_a_copy(builder):
    mine = torch.zeros(3)
    batch = PackedVisits.from_lists(LISTS, targets={"y": mine})
    mine.fill_(1)
    assert batch.targets["y"].tolist() == [0, 0, 0]


def test_padded_input_must_be_tensors(builder):
    codes = torch.ones(1, 1, 1, dtype=torch.int64)
    for arguments in ((codes.numpy(),), (codes, codes.numpy()), (codes, None, [[1]])):
        with pytest.raises(TypeError, match="expected a tensor, got"):
            PackedVisits.from_padded(*arguments)
    with pytest.raises(TypeError, match="visit_codes: expected a dense tensor"):
        PackedVisits.from_padded(codes.to_sparse())
    with pytest.raises(ValueError, match="visit_codes: expected values"):
        PackedVisits.from_padded(codes.to("meta"))


@pytest.mark.parametrize("size", [True, 2.0, "9", None, 0, -1, 2**31])
def test_a_vocabulary_size_is_an_integer(builder, size):
    if size is None:
        assert PackedVisits.from_lists(LISTS, vocab_size=size).vocab_size is None
        return
    with pytest.raises((TypeError, ValueError), match="vocab_size: expected"):
        PackedVisits.from_lists(LISTS, vocab_size=size)


# Masks whose bytes are not 0 or 1 -----------------------------------------------------------------


@pytest.mark.parametrize("byte", [2, 3, 4, 255])
def test_a_byte_of_a_mask_is_true_where_it_is_not_zero(builder, byte):
    codes = torch.arange(12).view(2, 3, 2)
    visit_mask = torch.tensor([[[1, 0]] * 3] * 2, dtype=torch.uint8)
    sequence_mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.uint8)
    expected = PackedVisits.from_padded(codes, visit_mask.bool(), sequence_mask.bool())
    dirty = [(mask * byte).view(torch.bool) for mask in (visit_mask, sequence_mask)]
    batch = PackedVisits.from_padded(codes, *dirty)
    assert batch.codes.tolist() == expected.codes.tolist() == [6, 0, 8, 2, 10]
    assert batch.lengths.tolist() == [2, 3]
    strided = [mask.transpose(0, 1).contiguous().transpose(0, 1) for mask in dirty]
    assert PackedVisits.from_padded(codes, *strided).codes.tolist() == expected.codes.tolist()


# The module itself --------------------------------------------------------------------------------


def test_a_file_that_became_shorter_is_noticed(builder, tmp_path):
    for values, name in zip(FLAT, ("codes", "visits", "patients"), strict=True):
        values.tofile(tmp_path / name)
    arrays = [np.memmap(tmp_path / n, np.int64, "r") for n in ("codes", "visits", "patients")]
    whole_batch = PackedVisits.from_flat(*arrays)
    with open(tmp_path / "codes", "r+b") as file:
        file.truncate(8)
    with pytest.raises(ValueError, match="codes: the memory-mapped file was truncated"):
        PackedVisits.from_flat(*arrays)
    with pytest.raises(ValueError, match="truncated"):
        PackedVisits.from_flat(arrays[0][::-1], *arrays[1:])
    assert pickle.loads(pickle.dumps(whole_batch)).codes.tolist() == whole_batch.codes.tolist()


def test_readers():
    assert integers("x", []).dtype == np.int64
    assert longs("x", np.array([1, 2], np.uint8)).tolist() == [1, 2]
    assert whole("x", [1.0, 2.0]).tolist() == [1, 2]
    assert truth(np.array([0, 2], np.uint8).view(bool)).tolist() == [False, True]
    assert selection("x", [2, 0, 2], 3, "rows").tolist() == [2, 0, 2]
    with pytest.raises(IndexError, match=r"x: expected numbers in \[0, 3\).*first is -1, at 1"):
        selection("x", [0, -1], 3, "rows")
    assert integer("x", np.int64(3), 0, 5) == 3
    with pytest.raises(TypeError, match="x: expected an integer, got SimpleNamespace"):
        integer("x", SimpleNamespace(), 0, 5)
