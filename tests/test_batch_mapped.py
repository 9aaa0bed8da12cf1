"""The first visits of patients, their codes mapped as they are packed: both builders."""

from __future__ import annotations

import numpy as np
import pytest

from ehrseq_fast import backend
from ehrseq_fast.batch import reference

from .batch_cases import not_compiled


@pytest.fixture(params=["compiled", "reference"])
def module(request):
    if request.param == "compiled" and not_compiled() is not None:
        pytest.skip(f"no compiled builder: {not_compiled()}")
    return backend.batching if request.param == "compiled" else reference


def random_records(rng, n_patients=50, n_codes=20):
    """Patients of 0 to 8 visits of 0 to 5 codes, ascending and distinct within a visit."""
    patient_offsets = np.append(0, np.cumsum(rng.integers(0, 9, n_patients)))
    widths = rng.integers(0, 6, patient_offsets[-1])
    codes = [np.sort(rng.choice(n_codes, width, replace=False)) for width in widths]
    visit_offsets = np.append(0, np.cumsum(widths))
    return np.concatenate(codes).astype(np.int32), visit_offsets, patient_offsets


@pytest.mark.parametrize("size", [2, 5, 1000, 2**31 - 2])
def test_a_visit_has_each_mapped_code_once(module, size):
    rng = np.random.default_rng(size)
    codes, visit_offsets, patient_offsets = random_records(rng)
    lengths = np.diff(patient_offsets)
    for _ in range(20):
        patients = rng.choice(np.flatnonzero(lengths), rng.integers(0, 30))
        n_visits = rng.integers(1, lengths[patients] + 1)
        code_map = rng.integers(0, size, 20).astype(np.int32)
        arguments = (codes, visit_offsets, patient_offsets, patients, n_visits, code_map, size)
        packed = module.pack_mapped(*arguments, n_visits - 1, None, None, True)
        # the same records, mapped and cut off beforehand
        visits = [
            np.unique(code_map[codes[visit_offsets[visit] : visit_offsets[visit + 1]]])
            for patient, n in zip(patients.tolist(), n_visits.tolist(), strict=True)
            for visit in range(patient_offsets[patient], patient_offsets[patient] + n)
        ]
        expected = reference.pack_flat(
            np.concatenate([np.zeros(0, np.int32), *visits]),
            np.append(0, np.cumsum([len(visit) for visit in visits], dtype=np.int64)),
            np.append(0, np.cumsum(n_visits)),
            None,
            size,
            n_visits - 1,
            None,
            None,
            True,
        )
        assert packed[0] == expected[0]
        np.testing.assert_array_equal(packed[1], expected[1])
        np.testing.assert_array_equal(packed[2], expected[2])
        of_visit = np.concatenate(
            [np.zeros(0, np.int64)]
            + [
                np.arange(patient_offsets[patient], patient_offsets[patient] + n)
                for patient, n in zip(patients.tolist(), n_visits.tolist(), strict=True)
            ]
        )
        np.testing.assert_array_equal(packed[3], of_visit[expected[3]])


def mapped(**changed):
    return {
        "codes": np.array([0, 2, 1, 2], np.int32),
        "visit_offsets": np.array([0, 2, 3, 4]),
        "patient_offsets": np.array([0, 2, 3]),
        "patients": np.array([1, 0]),
        "n_visits": np.array([1, 2]),
        "code_map": np.array([3, 1, 1], np.int32),
        "vocab_size": 4,
        "event_times": None,
        "event_indicators": None,
        "event_types": None,
        "with_source_rows": True,
        **changed,
    }


HOSTILE = {
    "a code beyond the dictionary": (
        {"codes": np.array([0, 2, 3, -1], np.int32)},
        IndexError,
        r"Found 2 codes outside the dictionary: expected 0 <= code < 3. The first is -1: "
        r"patient 0 \(record 1\), visit 0, code 0",
    ),
    "a map beyond the vocabulary": (
        {"code_map": np.array([4, 1, 1], np.int32)},
        IndexError,
        r"Found 1 codes that code_map takes outside the vocabulary: expected 0 <= code_map\[code\] "
        r"< 4. The first is 0: patient 1 \(record 0\), visit 0, code 0",
    ),
    "no dictionary": ({"code_map": np.zeros(0, np.int32)}, IndexError, "expected 0 <= code < 0"),
    "too many visits": (
        {"n_visits": np.array([2, 2])},
        ValueError,
        r"n_visits: expected 1 to the patient's number of visits. Found 1 others. The first is 2: "
        r"patient 0 \(record 1\), with 1 visits",
    ),
    "no visits": ({"n_visits": np.array([1, 0])}, ValueError, "The first is 0: patient 1"),
    "a patient outside": ({"patients": np.array([1, 5])}, IndexError, "The first is 5"),
    "another length": ({"n_visits": np.array([1])}, ValueError, "n_visits: expected shape"),
    "offsets that fall": (
        {"visit_offsets": np.array([0, 2, 1, 4])},
        ValueError,
        r"visit_offsets must rise within \[0, 4\]",
    ),
    "an event after the visits": (
        {"event_times": np.array([1, 0])},
        ValueError,
        "with 1 visits",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_the_builders_refuse(module, changed, error, message):
    with pytest.raises(error, match=message):
        module.pack_mapped(**mapped(**changed))


def test_codes_of_any_width_and_stride(module):
    codes = np.array([[0, 9], [2, 9], [1, 9], [2, 9]])
    whole = module.pack_mapped(**mapped())
    for column in (codes[:, 0], codes.astype(np.int32)[:, 0]):
        strided = module.pack_mapped(**mapped(codes=column))
        np.testing.assert_array_equal(strided[2], whole[2])
