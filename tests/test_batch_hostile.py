"""Callers whose lists, arrays and threads change under the builder's hands. On both builders."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ehrseq_fast import backend as backends
from ehrseq_fast import packed_visit_pool
from ehrseq_fast.batch import PackedVisits
from ehrseq_fast.batch.builder import batch_builder

from .batch_cases import assert_holds, assert_same, flat

# Lists whose elements run Python ------------------------------------------------------------------


class Code:
    def __init__(self, act=lambda: None, value=3):
        self.act, self.value = act, value

    def __index__(self):
        self.act()
        return self.value


class Visits:
    def __init__(self, visits, act=lambda: None):
        self.visits, self.act = visits, act

    def __iter__(self):
        self.act()
        return iter(self.visits)


@pytest.mark.parametrize("emptied", ["visit", "patient", "patients"])
def test_lists_that_are_emptied_while_they_are_read(builder, emptied):
    """What was in the lists when the call began is packed."""
    visit = [1, None, 2, 5]
    patient = [[7], visit, [8]]
    patients = [patient, [[9]]]
    target = {"visit": visit, "patient": patient, "patients": patients}[emptied]
    visit[1] = Code(target.clear)
    assert_holds(PackedVisits.from_lists(patients), [[[7], [1, 3, 2, 5], [8]], [[9]]])
    assert not target


@pytest.mark.parametrize("level", ["patient", "visit"])
def test_lists_that_are_emptied_by_an_iterator(builder, level):
    patients = [[[7], [8]], [[9], [10]]]
    if level == "patient":
        patients[0] = Visits([[7], [8]], patients.clear)
    else:
        first = patients[0]
        first[0] = Visits([7], lambda: (first.clear(), patients.clear()))
    assert_holds(PackedVisits.from_lists(patients), [[[7], [8]], [[9], [10]]])


def test_lists_that_grow_while_they_are_read(builder):
    visit = [1]
    visit.append(Code(lambda: visit.append(visit[-1])))
    assert_holds(PackedVisits.from_lists([[visit]]), [[[1, 3]]])


ERRORS = [KeyboardInterrupt, MemoryError, ValueError, RecursionError, SystemExit, ZeroDivisionError]


@pytest.mark.parametrize("error", ERRORS)
def test_foreign_errors_pass(builder, error):
    def fail():
        raise error("mine")

    for patients in ([[[1, Code(fail)]]], [Visits([[1]], fail)], [[Visits([1], fail)]]):
        with pytest.raises(error, match="mine"):
            PackedVisits.from_lists(patients)
    with pytest.raises(error, match="mine"):
        PackedVisits.from_lists(Visits([[[1]]], fail))


def test_a_type_error_is_the_cause_of_ours(builder):
    def fail():
        raise TypeError("mine")

    with pytest.raises(TypeError, match="code 1: expected an integer code, got Code") as refused:
        PackedVisits.from_lists([[[1, Code(fail)]]])
    assert str(refused.value.__cause__) == "mine"


@pytest.mark.parametrize(
    "code",
    [
        True,
        np.True_,
        torch.tensor(True),
        torch.tensor([5]),
        torch.tensor([[5]]),
        np.array([5]),
        2.0,
        np.float64(2),
        torch.tensor(2.0),
        1j,
        "1",
        b"1",
        None,
        np.ma.masked,
        np.datetime64("2020-01-01"),
        [1],
    ],
)
def test_what_is_no_code(builder, code):
    expected = f"patient 0, visit 0, code 1: expected an integer code, got {type(code).__name__}."
    with pytest.raises(TypeError) as refused:
        PackedVisits.from_lists([[[1, code]]])
    assert str(refused.value) == expected


@pytest.mark.parametrize("items", ["", "12", b"", b"12", bytearray(b"1"), {}, {1: 2}, 5, None, 1.5])
def test_what_is_no_sequence(builder, items):
    for patients, where, what in (
        (items, "patients", "patients"),
        ([items], "patient 0", "visits"),
        ([[[1], items]], "patient 0, visit 1", "codes"),
    ):
        with pytest.raises(TypeError) as refused:
            PackedVisits.from_lists(patients)
        assert str(refused.value) == (
            f"{where}: expected a sequence of {what}, got {type(items).__name__}."
        )


def test_a_masked_visit_keeps_its_mask(builder):
    visit = np.ma.array([1, 2], mask=[False, True])
    with pytest.raises(TypeError, match="visit 0, code 1: expected an integer code, got Masked"):
        PackedVisits.from_lists([[visit]])


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (2**63, "9223372036854775808"),
        (-(2**63) - 1, "-9223372036854775809"),
        (2**64 + 3, "18446744073709551619"),
        (2**63 - 1, "9223372036854775807"),
        pytest.param(10**5000, "an integer of 16610 bits", id="more digits than Python prints"),
    ],
)
def test_the_message_tells_the_code_that_was_given(builder, code, text):
    for patients in ([[[1], [2, code]]], [[[1], [np.int8(2), code, 2**70]]]):
        with pytest.raises(IndexError, match=rf"The first is {text}: patient 0, visit 1, code 1\."):
            PackedVisits.from_lists(patients)
    with pytest.raises(IndexError, match="The first is -7: patient 0, visit 0, code 0"):
        PackedVisits.from_lists([[[-7], [code]]])


# Arrays that other threads write to ---------------------------------------------------------------


@pytest.mark.parametrize("which", ["visit_offsets", "patient_offsets", "patients"])
def test_offsets_that_another_thread_changes(which):
    """Every call gives a batch of what it read, or an error; none reads out of bounds."""
    n = 3000
    codes = np.ones(4 * n, np.int64)
    arrays = {
        "visit_offsets": np.arange(0, 4 * n + 1, 4),
        "patient_offsets": np.arange(n + 1),
        "patients": np.arange(n),
    }
    target, right, stop = arrays[which], arrays[which].copy(), threading.Event()

    def write():
        while not stop.is_set():
            target[:] = 2**40
            target[n // 2 :] = -(2**40)
            target[:] = right

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        built = 0
        try:
            for _ in range(60):
                try:
                    batch = PackedVisits.from_flat(codes, **arrays, vocab_size=2)
                    built += 1
                    assert batch.n_codes == int(batch.code_offsets[-1])
                except (ValueError, IndexError, RuntimeError):
                    pass
        finally:
            stop.set()
        writer.result()


def test_ten_threads_build_at_once(builder):
    patients = [[[p % 13, v % 13] for v in range(1 + p % 9)] for p in range(120)]
    arrays, table = flat(patients), torch.randn(13, 4)
    expected = [PackedVisits.from_lists(patients[k::10]) for k in range(10)]
    pooled = [packed_visit_pool(batch, table) for batch in expected]

    def build(k):
        chosen = batch_builder().__name__  # a thread of its own has its own choice
        for _ in range(6):
            for batch in (
                PackedVisits.from_flat(*arrays, range(k, 120, 10)),
                PackedVisits.from_lists(patients[k::10]),
                PackedVisits.from_padded(*expected[k].to_padded()),
                expected[k].with_codes(),
                expected[k][:],
            ):
                assert_same(batch, expected[k])
                assert torch.equal(packed_visit_pool(batch, table), pooled[k])
        return chosen

    with ThreadPoolExecutor(10) as pool:
        assert len(list(pool.map(build, range(10)))) == 10


# The compiled module and its NumPy implementation, called directly --------------------------------

INT = np.int64


def raw(name, *arguments):
    return getattr(batch_builder(), name)(*arguments)


def flat_arguments(**changed):
    arguments = {
        "codes": np.array([1, 2, 3]),
        "visit_offsets": np.array([0, 1, 3]),
        "patient_offsets": np.array([0, 1, 2]),
        "patients": None,
        "vocab_size": 9,
        "event_times": None,
        "event_indicators": None,
        "event_types": None,
        "with_source_rows": True,
        **changed,
    }
    return ("pack_flat", *arguments.values())


def padded_arguments(**changed):
    arguments = {
        "codes": np.ones((2, 3, 4), INT),
        "code_states": None,
        "visit_states": None,
        "lengths": None,
        "vocab_size": 9,
        "event_times": None,
        "event_indicators": None,
        "event_types": None,
        **changed,
    }
    return ("pack_padded", *arguments.values())


RAW = {
    "codes of another dtype": flat_arguments(codes=np.ones(3, np.bool_)),
    "float codes": flat_arguments(codes=np.ones(3)),
    "codes of two dimensions": flat_arguments(codes=np.ones((3, 1), INT)),
    "no dimension": flat_arguments(visit_offsets=np.array(3)),
    "no offsets": flat_arguments(visit_offsets=np.ones(0, INT)),
    "no patient offsets": flat_arguments(patient_offsets=np.ones(0, INT)),
    "small offsets": flat_arguments(patient_offsets=np.ones(3, np.int16)),
    "offsets at the ends": flat_arguments(visit_offsets=np.array([-(2**63), 2**63 - 1, 3])),
    "patients at the ends": flat_arguments(patient_offsets=np.array([-(2**63), 2**63 - 1, 3])),
    "patients of two dimensions": flat_arguments(patients=np.zeros((1, 2), INT)),
    "patients outside": flat_arguments(patients=np.array([2**62])),
    "a vocabulary of none": flat_arguments(vocab_size=0),
    "a huge vocabulary": flat_arguments(vocab_size=2**40, codes=np.array([2**33, 1, 1])),
    "too few outcomes": flat_arguments(event_times=np.zeros(1, INT)),
    "outcomes of two dimensions": flat_arguments(event_types=np.zeros((2, 1), INT)),
    "too many visits": flat_arguments(
        visit_offsets=np.broadcast_to(np.int64(0), 2**31 + 1),
        patient_offsets=np.array([0, 2**31]),
    ),
    "sums that wrap": flat_arguments(
        codes=np.broadcast_to(np.int32(1), 2**60),
        visit_offsets=np.array([0, 2**60]),
        patient_offsets=np.array([0, 1]),
        patients=np.zeros(9, INT),
    ),
    "padded codes of two dimensions": padded_arguments(codes=np.ones((2, 3), INT)),
    "padded float codes": padded_arguments(codes=np.ones((2, 3, 4))),
    "expanded codes": padded_arguments(codes=np.broadcast_to(np.int64(1), (2, 3, 4))),
    "states of another shape": padded_arguments(code_states=np.ones((2, 3, 3), np.uint8)),
    "visit states of another shape": padded_arguments(visit_states=np.ones((2, 2), np.uint8)),
    "too few lengths": padded_arguments(lengths=np.ones(1, INT)),
    "states above two": padded_arguments(code_states=np.full((2, 3, 4), 4, np.uint8)),
    "visit states above two": padded_arguments(visit_states=np.full((2, 3), 255, np.uint8)),
    "no visits": padded_arguments(codes=np.ones((2, 0, 4), INT)),
    "lists and no vocabulary": ("pack_lists", [[[1]]], 0, None, None, None, False),
    "lists and outcomes": ("pack_lists", [[[1]]], 9, np.zeros(2, INT), None, None, False),
}


def refusal(call):
    with pytest.raises((ValueError, TypeError, IndexError)) as refused:
        raw(*call)
    return refused.type, str(refused.value)


@pytest.mark.parametrize("what", RAW)
def test_both_builders_refuse_raw_calls_in_the_same_words(what):
    with backends.use_backend("reference"):
        expected = refusal(RAW[what])
    assert expected[1]
    if backends.compiled_batching.reason is None:
        assert refusal(RAW[what]) == expected


@pytest.mark.parametrize("call", [flat_arguments(), padded_arguments()])
def test_raw_calls_that_are_right_are_alike(call):
    with backends.use_backend("reference"):
        expected = raw(*call)
    for ours, theirs in zip(raw(*call), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_empty_shapes(builder):
    for shape in ((0, 0, 0), (0, 3, 2), (0, 0, 5)):
        assert len(PackedVisits.from_padded(torch.ones(shape, dtype=torch.int64))) == 0
    batch = PackedVisits.from_padded(torch.ones(2, 3, 0, dtype=torch.int64))
    assert_holds(batch, [[[], [], []]] * 2)
    codes = torch.tensor([[[5]]]).expand(2, 3, 4)
    assert_holds(PackedVisits.from_padded(codes), [[[5] * 4] * 3] * 2)
    assert ctypes.sizeof(ctypes.c_int64) == batch._fields.element_size()
