"""What the tests of batches share: patients, an oracle, the ways to write them down."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ehrseq_fast import backend as backends
from ehrseq_fast.batch import PackedVisits

REFERENCE = "reference"


def not_compiled() -> str | None:
    return backends.compiled_batching.reason


VISIT = st.lists(st.integers(0, 12), max_size=5)
PATIENTS = st.lists(st.lists(VISIT, min_size=1, max_size=7), max_size=7)
SOME_PATIENTS = st.lists(st.lists(VISIT, min_size=1, max_size=7), min_size=1, max_size=7)

# One fixture value per test function is enough: nothing in the fixtures changes between examples.
many = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def oracle(patients):
    """What a batch must hold, written out slowly."""
    lengths = [len(visits) for visits in patients]
    order = sorted(range(len(patients)), key=lambda p: (-lengths[p], p))
    max_visits = max(lengths, default=0)
    places = [(p, t) for t in range(max_visits) for p in order if t < lengths[p]]
    rows = [patients[p][t] for p, t in places]
    distinct = sorted({code for row in rows for code in row})
    holders = [[r for r, row in enumerate(rows) for c in row if c == code] for code in distinct]
    return {
        "codes": [code for row in rows for code in row],
        "code_offsets": running_sum(map(len, rows)),
        "batch_sizes": [sum(length > t for length in lengths) for t in range(max_visits)],
        "lengths": lengths,
        "sorted_indices": order,
        "unsorted_indices": [order.index(p) for p in range(len(patients))],
        "row_starts": running_sum(sum(length > t for length in lengths) for t in range(max_visits)),
        "last_rows": [places.index((p, lengths[p] - 1)) for p in range(len(patients))],
        "index_codes": distinct,
        "index_offsets": running_sum(map(len, holders)),
        "index_visits": [row for rows_of_code in holders for row in rows_of_code],
        "patient_of_row": [p for p, _ in places],
        "time_of_row": [t for _, t in places],
        "row_of_code": [r for r, row in enumerate(rows) for _ in row],
    }


def running_sum(counts):
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums


INT32 = ("codes", "code_offsets", "index_codes", "index_offsets", "index_visits")
OUTCOMES = ("event_times", "event_indicators", "event_types")
FIELDS = (
    *INT32,
    "batch_sizes",
    "lengths",
    "sorted_indices",
    "unsorted_indices",
    "row_starts",
    "last_rows",
)


def assert_holds(batch, patients):
    for name, expected in oracle(patients).items():
        field = getattr(batch, name)
        assert field.dtype == (torch.int32 if name in INT32 else torch.int64), name
        assert field.tolist() == expected, name
    assert len(batch) == batch.n_patients == len(patients)
    assert batch.n_visits == sum(map(len, patients))
    assert batch.n_codes == sum(len(codes) for visits in patients for codes in visits)
    assert batch.max_visits == max(map(len, patients), default=0)


def assert_same(ours, theirs):
    """Bit for bit, in everything that a batch holds."""
    assert ours._layout == theirs._layout
    assert ours.vocab_size == theirs.vocab_size
    for name in (*FIELDS, *OUTCOMES, "visit_features"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True, msg=name)
    for mine, other in ((ours.targets, theirs.targets), (ours.visit_targets, theirs.visit_targets)):
        assert mine.keys() == other.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=0, msg=name)


def flat(patients, code_dtype=np.int64, offset_dtype=np.int64):
    codes = [code for visits in patients for codes in visits for code in codes]
    visit_offsets = running_sum(len(codes) for visits in patients for codes in visits)
    return (
        np.array(codes, code_dtype),
        np.array(visit_offsets, offset_dtype),
        np.array(running_sum(map(len, patients)), offset_dtype),
    )


def padded(patients, extra_visits=0, extra_codes=0, garbage=-77):
    """Codes and both masks, with padding to spare, and garbage in all of it."""
    n_visits = max(map(len, patients), default=0) + extra_visits
    n_codes = max((len(codes) for p in patients for codes in p), default=0) + extra_codes
    visit_codes = torch.full((len(patients), n_visits, n_codes), garbage)
    visit_mask = torch.zeros(visit_codes.shape, dtype=torch.bool)
    sequence_mask = torch.zeros(visit_codes.shape[:2], dtype=torch.bool)
    for p, visits in enumerate(patients):
        visit_mask[p, len(visits) :] = True  # codes beyond a patient's visits are not its own
        sequence_mask[p, : len(visits)] = True
        for v, codes in enumerate(visits):
            visit_codes[p, v, : len(codes)] = torch.tensor(codes)
            visit_mask[p, v, : len(codes)] = True
    return visit_codes, visit_mask, sequence_mask


def full_batch(patients, seed=0):
    """A batch with everything that one can hold."""
    random = np.random.default_rng(seed)
    n_visits = sum(map(len, patients))
    lengths = np.array([len(visits) for visits in patients], np.int64)
    return PackedVisits.from_lists(
        patients,
        vocab_size=13,
        event_times=lengths - 1,
        event_indicators=np.arange(len(patients)) % 2,
        event_types=np.arange(len(patients)) % 3,
        visit_features=random.standard_normal((n_visits, 3)).astype(np.float32),
        targets={"age": torch.arange(len(patients)).float()},
        visit_targets={"cost": np.arange(n_visits)},
    )


FLAT = flat([[[1], [2, 3]], [[4]], [[5], [6], [7]]])


def broken(which, at, value):
    arrays = [array.copy() for array in FLAT]
    arrays[which][at] = value
    return arrays


def masks(holes=(), fractions=(), visit_value=0.5):
    visit_codes, visit_mask, sequence_mask = padded([[[1], [2, 3]], [[4]], [[5], [6], [7]]])
    visit_mask, sequence_mask = visit_mask.float(), sequence_mask.float()
    for place in holes:
        sequence_mask[place] = 0
    for place in fractions:
        (visit_mask if len(place) == 3 else sequence_mask)[place] = visit_value
    return visit_codes, visit_mask, sequence_mask
