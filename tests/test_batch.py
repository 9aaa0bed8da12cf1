"""PackedVisits: what it holds, how it moves, what it refuses. On both builders."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from ehrseq_fast import backend as backends
from ehrseq_fast.batch import PackedVisits
from ehrseq_fast.batch.checks import mask_states
from ehrseq_fast.batch.device import pack_on_device

REFERENCE = "reference"


def not_compiled() -> str | None:
    return backends.compiled_batching.reason


@pytest.fixture(params=["compiled", REFERENCE])
def builder(request):
    """Run the test once with the compiled builder and once with its NumPy twin."""
    if request.param == "compiled" and not_compiled():
        pytest.skip(f"no compiled builder: {not_compiled()}")
    with backends.use_backend(REFERENCE if request.param == REFERENCE else None):
        yield request.param


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
    """The triple, with room to spare and garbage wherever nothing real stands."""
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


# What a batch holds -------------------------------------------------------------------------------


@many
@given(PATIENTS)
@example([])
@example([[[]]])
@example([[[3, 3]]])
def test_from_lists_holds_what_the_oracle_says(builder, patients):
    assert_holds(PackedVisits.from_lists(patients), patients)


@many
@given(
    SOME_PATIENTS,
    st.data(),
    st.sampled_from([np.int32, np.int64]),
    st.sampled_from([np.int32, np.int64]),
)
def test_from_flat_takes_the_chosen_patients(builder, patients, data, code_dtype, offset_dtype):
    chosen = data.draw(st.lists(st.integers(0, len(patients) - 1), max_size=9))
    arrays = flat(patients, code_dtype, offset_dtype)
    assert_holds(PackedVisits.from_flat(*arrays), patients)
    assert_holds(PackedVisits.from_flat(*arrays, chosen), [patients[p] for p in chosen])


@many
@given(PATIENTS, st.integers(0, 2), st.integers(0, 2))
def test_from_padded_ignores_all_that_is_padding(builder, patients, extra_visits, extra_codes):
    triple = padded(patients, extra_visits, extra_codes)
    lengths = [len(visits) for visits in patients]
    assert_holds(PackedVisits.from_padded(*triple, vocab_size=13), patients)
    assert_holds(PackedVisits.from_padded(*triple, lengths), patients)
    assert_holds(PackedVisits.from_padded(*triple[:2], lengths=torch.tensor(lengths)), patients)
    numeric = triple[0].int(), triple[1].float(), triple[2].double()
    assert_holds(PackedVisits.from_padded(*numeric), patients)
    if extra_visits == 0:
        return
    ignored = numeric[1].masked_fill(~triple[2][..., None], float("nan"))
    assert_holds(PackedVisits.from_padded(numeric[0], ignored, numeric[2]), patients)


def test_real_codes_may_stand_anywhere_in_a_visit(builder):
    visit_codes = torch.tensor([[[-1, 5, -1, 3], [2, -1, -1, 2]]])
    batch = PackedVisits.from_padded(visit_codes, visit_codes > 0, torch.ones(1, 2))
    assert_holds(batch, [[[5, 3], [2, 2]]])


def test_without_masks_every_slot_is_real(builder):
    visit_codes = torch.arange(12).view(2, 3, 2)
    assert_holds(PackedVisits.from_padded(visit_codes), visit_codes.tolist())
    assert_holds(
        PackedVisits.from_padded(visit_codes, lengths=[1, 3]),
        [visit_codes[0, :1].tolist(), visit_codes[1].tolist()],
    )


@many
@given(PATIENTS)
def test_round_trip_through_padding(builder, patients):
    batch = PackedVisits.from_lists(patients)
    visit_codes, visit_mask, sequence_mask = batch.to_padded()
    expected = padded(patients, garbage=0)
    assert torch.equal(visit_codes, expected[0])
    assert torch.equal(visit_mask, expected[1] & expected[2][..., None])
    assert torch.equal(sequence_mask, expected[2])
    assert visit_codes.dtype == torch.int64
    assert_same(PackedVisits.from_padded(visit_codes, visit_mask, sequence_mask), batch)
    wider = batch.to_padded(total_length=batch.max_visits + 2)
    assert wider[0].shape[1] == batch.max_visits + 2
    assert_same(PackedVisits.from_padded(*wider), batch)


@pytest.mark.skipif(not_compiled() is not None, reason=f"no compiled builder: {not_compiled()}")
@many
@given(SOME_PATIENTS, st.sampled_from([1, 17, 2**31 // 13]), st.integers(0, 100))
def test_both_builders_give_the_same_bits(patients, spread, seed):
    """Spread out, the codes take the compiled builder's other sort."""
    patients = [[[code * spread for code in codes] for codes in p] for p in patients]
    arrays, triple = flat(patients), padded(patients, 1, 1)
    random = np.random.default_rng(seed)
    features = random.standard_normal((len(arrays[1]) - 1, 2))

    def build():
        return (
            PackedVisits.from_lists(patients, visit_features=features),
            PackedVisits.from_flat(*arrays, [0, 0], visit_features=features),
            PackedVisits.from_padded(*triple),
        )

    compiled = build()
    with backends.use_backend(REFERENCE):
        reference = build()
    for ours, theirs in zip(compiled, reference, strict=True):
        assert_same(ours, theirs)


def test_a_large_batch_on_both_builders(builder):
    random = np.random.default_rng(3)
    lengths = np.minimum(random.lognormal(2, 1.1, 300).astype(int) + 1, 200)
    patients = [
        [random.integers(0, 10**6, random.integers(0, 6)).tolist() for _ in range(length)]
        for length in lengths
    ]
    batch = PackedVisits.from_lists(patients)
    visits = oracle_index(batch)
    assert torch.equal(batch.index_visits, visits)
    visit_codes, visit_mask, sequence_mask = batch.to_padded()
    unpadded = [
        [codes[mask].tolist() for codes, mask in zip(p_codes[real], p_mask[real], strict=True)]
        for p_codes, p_mask, real in zip(visit_codes, visit_mask, sequence_mask, strict=True)
    ]
    assert unpadded == patients


def oracle_index(batch):
    """Rows by code, from a stable sort."""
    return batch.row_of_code[batch.codes.argsort(stable=True)].int()


@many
@given(SOME_PATIENTS)
def test_order_is_that_of_pack_padded_sequence(builder, patients):
    batch = PackedVisits.from_lists(patients)
    visit_numbers = batch.pad(torch.arange(batch.n_visits).float()[:, None])
    order = torch.sort(batch.lengths, descending=True, stable=True).indices
    assert torch.equal(batch.sorted_indices, order)
    theirs = pack_padded_sequence(visit_numbers[order], batch.lengths[order], batch_first=True)
    assert torch.equal(batch.batch_sizes, theirs.batch_sizes)
    assert torch.equal(torch.arange(batch.n_visits).float()[:, None], theirs.data)
    if batch.lengths.unique().numel() == len(batch):
        theirs = pack_padded_sequence(
            visit_numbers, batch.lengths, batch_first=True, enforce_sorted=False
        )
        ours = batch.as_packed_sequence(torch.arange(batch.n_visits).float()[:, None])
        for name in ("data", "batch_sizes", "sorted_indices", "unsorted_indices"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_inputs_of_many_kinds(builder):
    patients = [[[1, 2], [3]], [[4]]]
    expected = PackedVisits.from_lists(patients)
    as_arrays = [[np.array(codes) for codes in visits] for visits in patients]
    as_tensors = [[torch.tensor(codes) for codes in visits] for visits in patients]
    as_tuples = tuple(tuple(map(tuple, visits)) for visits in patients)
    as_iterables = ((iter(codes) for codes in visits) for visits in patients)
    for others in (as_arrays, as_tensors, as_tuples, as_iterables):
        assert_same(PackedVisits.from_lists(others), expected)
    assert_same(PackedVisits.from_flat(*map(torch.from_numpy, flat(patients))), expected)
    assert_same(PackedVisits.from_flat(*(a.tolist() for a in flat(patients))), expected)


def test_inputs_that_are_not_contiguous(builder):
    patients = [[[1, 2], [3]], [[4]], [[5, 6, 7]]]
    expected = PackedVisits.from_lists(patients)
    columns = [np.stack([array, array - 99], axis=1)[:, 0] for array in flat(patients)]
    assert not any(column.flags.c_contiguous for column in columns)
    assert_same(PackedVisits.from_flat(*columns), expected)
    backwards = [array[::-1].copy()[::-1] for array in flat(patients, np.int32, np.int32)]
    assert_same(PackedVisits.from_flat(*backwards), expected)
    triple = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in padded(patients)]
    assert not triple[0].is_contiguous()
    assert_same(PackedVisits.from_padded(*triple), expected)
    chosen = np.array([2, 9, 0, 9])[::2]
    assert_same(PackedVisits.from_flat(*flat(patients), chosen), expected[[2, 0]])


def test_an_empty_batch(builder):
    batch = PackedVisits.from_lists([], event_times=[], targets={"age": torch.empty(0)})
    assert_holds(batch, [])
    assert batch.to_padded()[0].shape == (0, 0, 0)
    assert batch.pad(torch.empty(0, 4)).shape == (0, 0, 4)
    assert batch.pack(torch.empty(0, 0, 4)).shape == (0, 4)
    assert_holds(PackedVisits.from_flat([], [0], [0]), [])
    assert_holds(PackedVisits.from_flat(*flat([[[1]]]), []), [])
    assert_holds(PackedVisits.from_padded(torch.empty(0, 3, 2, dtype=torch.int64)), [])
    assert_holds(batch[[]], [])
    assert_same(PackedVisits.cat([batch, batch]), batch)
    assert_same(pickle.loads(pickle.dumps(batch)), batch)


def test_outcomes_features_and_targets_of_flat_records(builder):
    patients = [[[1], [2]], [[3]], [[4], [5], [6]]]
    features = np.arange(12, dtype=np.float16).reshape(6, 2)
    arrays = flat(patients)
    batch = PackedVisits.from_flat(
        *arrays,
        [2, 0],
        event_times=np.array([1, 0, 2], np.int32),
        event_indicators=np.array([True, False, False]),
        event_types=np.array([2.0, 0.0, 0.0]),
        visit_features=features,
        targets={"age": np.array([50, 60, 70]), "x": torch.eye(3)},
        visit_targets={"row": torch.arange(6)},
    )
    assert batch.event_times.tolist() == [2, 1]
    assert batch.event_indicators.tolist() == [0, 1]
    assert batch.event_types.tolist() == [0, 2]
    rows = [3, 0, 4, 1, 5]  # packed: patient 2's visits 3, 4, 5 and patient 0's visits 0, 1
    assert batch.visit_targets["row"].tolist() == rows
    assert batch.visit_features.dtype == torch.float16
    assert torch.equal(batch.visit_features, torch.from_numpy(features)[rows])
    assert batch.targets["age"].tolist() == [70, 50]
    assert torch.equal(batch.targets["x"], torch.eye(3)[[2, 0]])


def test_outcomes_features_and_targets_agree_among_the_ways_to_build(builder):
    patients = [[[1], [2]], [[3]], [[4], [5], [6]]]
    expected = full_batch(patients)
    features = expected.pad(expected.visit_features, fill=float("nan"))
    triple = padded(patients)
    assert_same(
        PackedVisits.from_padded(
            *triple,
            vocab_size=13,
            event_times=[1, 0, 2],
            event_indicators=torch.tensor([0.0, 1.0, 0.0]),
            event_types=torch.tensor([0, 1, 2], dtype=torch.int32),
            visit_features=features,
            targets={"age": torch.arange(3.0)},
            visit_targets={"cost": expected.pad(expected.visit_targets["cost"], fill=-1)},
        ),
        expected,
    )
    per_patient = [features[p, : len(visits)] for p, visits in enumerate(patients)]
    again = PackedVisits.from_lists(patients, visit_features=per_patient)
    assert torch.equal(again.visit_features, expected.visit_features)
    again = PackedVisits.from_lists(patients, visit_features=[f.numpy() for f in per_patient])
    assert torch.equal(again.visit_features, expected.visit_features)


def test_gradients_reach_padded_features():
    patients = [[[1], [2]], [[3]]]
    features = torch.randn(2, 2, 3, requires_grad=True)
    batch = PackedVisits.from_padded(*padded(patients), visit_features=features)
    batch.visit_features.sum().backward()
    assert features.grad[:, :, 0].tolist() == [[1, 1], [1, 0]]


def test_the_callers_arrays_do_not_reach_into_the_batch(builder):
    arrays = flat([[[1], [2]]])
    times, features = np.array([1]), np.ones((2, 1))
    batch = PackedVisits.from_flat(
        *arrays, event_times=times, visit_features=features, targets={"t": times}
    )
    before = pickle.loads(pickle.dumps(batch))
    for array in (*arrays, times, features):
        array[...] = 0
    assert_same(batch, before)


# Rows, padding, slices ----------------------------------------------------------------------------


@many
@given(SOME_PATIENTS)
def test_pad_and_pack_are_inverse(patients):
    batch = PackedVisits.from_lists(patients)
    values = torch.randn(batch.n_visits, 2, 3)
    wide = batch.max_visits + 1
    assert torch.equal(batch.pack(batch.pad(values)), values)
    assert torch.equal(batch.pack(batch.pad(values, float("nan"), wide)), values)
    image = batch.pad(values, fill=7)
    for patient, visits in enumerate(patients):
        assert torch.equal(image[patient, : len(visits)], values[batch.rows_of(patient)])
        assert (image[patient, len(visits) :] == 7).all()
        assert batch.rows_of(patient)[-1] == batch.last_rows[patient]
        assert torch.equal(batch.rows_of(patient), batch.rows_of(patient - len(patients)))


def test_pad_and_pack_have_gradients():
    batch = PackedVisits.from_lists([[[1], [2]], [[3]], [[], [1], [2, 2]]])
    values = torch.randn(batch.n_visits, 2, dtype=torch.float64, requires_grad=True)
    image = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: batch.pad(v, 0.5, 4), values)
    assert torch.autograd.gradgradcheck(batch.pad, values)
    assert torch.autograd.gradcheck(batch.pack, image)
    assert torch.autograd.gradgradcheck(batch.pack, image)


def test_pad_and_pack_are_traced_whole():
    batch = PackedVisits.from_lists([[[1], [2]], [[3]]])

    def double(batch, values):
        return batch.pack(batch.pad(values) * 2) + values[batch.last_rows].sum(0)

    values = torch.randn(3, 2)
    compiled = torch.compile(double, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch, values), double(batch, values))


@many
@given(SOME_PATIENTS, st.data())
def test_slices_are_as_if_built_from_the_chosen_patients(builder, patients, data):
    batch = full_batch(patients)
    n = len(patients)
    chosen = data.draw(st.lists(st.integers(-n, n - 1), max_size=8))
    i, j = data.draw(st.tuples(st.integers(-n, n), st.integers(-n, n)))
    picked = batch[chosen]
    assert_holds(picked, [patients[p] for p in chosen])
    numbers = [p % n for p in chosen]
    assert picked.targets["age"].tolist() == numbers
    assert picked.event_times.tolist() == [len(patients[p]) - 1 for p in numbers]
    assert picked.event_types.tolist() == [p % 3 for p in numbers]
    for new, old in enumerate(numbers):
        for values in ("visit_features", "visit_targets"):
            ours, theirs = getattr(picked, values), getattr(batch, values)
            if isinstance(ours, dict):
                ours, theirs = ours["cost"], theirs["cost"]
            assert torch.equal(ours[picked.rows_of(new)], theirs[batch.rows_of(old)])
    for same in (torch.tensor(chosen, dtype=torch.int64), np.array(chosen, np.int32)):
        assert_same(batch[same], picked)
    assert_same(batch[i:j], batch[list(range(n)[i:j])])
    assert_same(batch[::-1], batch[list(range(n))[::-1]])
    assert_same(batch[n - 1], batch[[-1]])
    odd = [p % 2 == 1 for p in range(n)]
    assert_same(batch[odd], batch[1::2])
    assert_same(batch[torch.tensor(odd)], batch[1::2])


@many
@given(SOME_PATIENTS, SOME_PATIENTS)
def test_cat_undoes_slicing(builder, one, two):
    whole = full_batch(one + two)
    parts = [whole[: len(one)], whole[len(one) :]]
    assert_holds(parts[1], two)
    assert_same(PackedVisits.cat(parts), whole)
    assert_same(PackedVisits.cat([whole]), whole)


def test_iterating_gives_one_patient_at_a_time():
    batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
    assert [one.codes.tolist() for one in batch] == [[1], [2, 3]]


def test_slicing_keeps_gradients():
    features = torch.randn(3, 1, requires_grad=True)
    batch = PackedVisits.from_lists([[[1], [2]], [[3]]], visit_features=features)
    PackedVisits.cat([batch[[0]], batch[[0]]]).visit_features.sum().backward()
    assert features.grad.flatten().tolist() == [2, 2, 0]


# Moving -------------------------------------------------------------------------------------------


def test_pickling_carries_everything(builder):
    batch = full_batch([[[1], [2]], [[3]], [[], [4, 4]]])
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        assert_same(pickle.loads(pickle.dumps(batch, protocol)), batch)


def test_moving_to_where_it_is_gives_itself():
    batch = full_batch([[[1], [2]], [[3]]])
    assert batch.to("cpu") is batch
    assert batch.to(torch.device("cpu"), non_blocking=True) is batch
    assert not batch.is_pinned()
    assert repr(batch) == (
        "PackedVisits(patients=2, visits=3, codes=3, distinct_codes=3, max_visits=2, device=cpu)"
    )


def test_moving_leaves_host_fields_on_the_host():
    moved = full_batch([[[1], [2]], [[3]]]).to("meta")
    for name in (*FIELDS, *OUTCOMES, "visit_features"):
        expected = "cpu" if name in ("batch_sizes", "lengths") else "meta"
        assert getattr(moved, name).device.type == expected, name
    assert moved.targets["age"].is_meta
    assert moved.visit_targets["cost"].is_meta


def test_pinning_reaches_every_tensor_that_a_device_needs(monkeypatch):
    """The loader's own pinning calls ours; page-locking itself is tested where there is a GPU."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda t: pinned.append(t.clone()) or pinned[-1]
    )
    batch = full_batch([[[1], [2]], [[3]]])
    copy = pin_memory({"batch": batch})["batch"]
    assert_same(copy, batch)
    memory = {tensor.untyped_storage().data_ptr() for tensor in pinned}
    for name in (*FIELDS, *OUTCOMES, "visit_features"):
        if name not in ("batch_sizes", "lengths"):
            assert getattr(copy, name).untyped_storage().data_ptr() in memory, name
    assert copy.targets["age"].data_ptr() in memory
    assert copy.visit_targets["cost"].data_ptr() in memory


class FlatDataset(Dataset):
    """What a user writes: flat arrays on disk, opened where they are read."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, patients):
        codes, visits, people, times = (
            np.load(self.folder / f"{name}.npy", mmap_mode="r")
            for name in ("codes", "visit_offsets", "patient_offsets", "event_times")
        )
        return PackedVisits.from_flat(codes, visits, people, patients, event_times=times)

    def __len__(self):
        return len(np.load(self.folder / "event_times.npy", mmap_mode="r"))


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_data_loader_workers(tmp_path, start_method):
    random = np.random.default_rng(0)
    patients = [
        [random.integers(0, 50, random.integers(0, 4)).tolist() for _ in range(1 + p % 5)]
        for p in range(30)
    ]
    for name, array in zip(("codes", "visit_offsets", "patient_offsets"), flat(patients)):  # noqa: B905
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "event_times.npy", np.array([len(visits) - 1 for visits in patients]))
    dataset = FlatDataset(tmp_path)
    loader = DataLoader(
        dataset,
        sampler=BatchSampler(SequentialSampler(dataset), 8, drop_last=False),
        batch_size=None,
        num_workers=2 if start_method == "fork" else 1,
        multiprocessing_context=start_method,
        pin_memory=torch.cuda.is_available(),
    )
    batches = list(loader)
    assert [len(batch) for batch in batches] == [8, 8, 8, 6]
    for i, batch in enumerate(batches):
        assert_holds(batch, patients[8 * i : 8 * i + 8])
        assert batch.event_times.tolist() == [len(v) - 1 for v in patients[8 * i : 8 * i + 8]]
        assert batch.is_pinned() == torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_pinned_batches_move_without_a_wait():
    batch = full_batch([[[1], [2]], [[3]], [[], [4, 4]]])
    pinned = batch.pin_memory()
    assert pinned.is_pinned()
    assert_same(pinned, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = pinned.to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moved.codes.is_cuda
    assert not moved.lengths.is_cuda
    assert_same(moved.to("cpu"), batch)
    assert_same(moved[1:].to("cpu"), batch[1:])
    assert_same(PackedVisits.cat([moved, moved]).to("cpu"), PackedVisits.cat([batch, batch]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="counting waits needs a CUDA device")
@pytest.mark.parametrize("with_lengths", [True, False])
def test_padded_tensors_on_a_gpu_cost_one_wait(with_lengths):
    patients = [[[1], [2]], [[3]], [[], [4, 4]]]
    triple = [tensor.cuda() for tensor in padded(patients, 1, 1)]
    lengths = [2, 1, 2] if with_lengths else None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            batch = PackedVisits.from_padded(*triple, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1
    assert batch.codes.is_cuda
    assert_holds(batch.to("cpu"), patients)


# Padded tensors on a device: the same operations on the CPU, where they can be watched. -----------

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class RefuseWaits(TorchDispatchMode):
    """Refuses operations that, on a GPU, make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name.startswith(wait) for wait in WAITS), name
        if name == "index":
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), (
                "boolean index"
            )
        return func(*args, **(kwargs or {}))


@many
@given(PATIENTS, st.integers(0, 2), st.integers(0, 2), st.booleans(), st.booleans())
def test_packing_on_a_device_reads_once(patients, extra_visits, extra_codes, known, outcomes):
    codes, visit_mask, sequence_mask = padded(patients, extra_visits, extra_codes)
    lengths = np.array([len(visits) for visits in patients], np.int64)
    given = {}
    if outcomes:
        given = {"event_times": torch.from_numpy(lengths - 1), "event_indicators": lengths > 1}
    expected = PackedVisits.from_padded(codes, visit_mask, sequence_mask, vocab_size=13, **given)
    reads = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "cpu", "__bool__", "__int__"):
            original = getattr(torch.Tensor, name)

            def counted(self, *args, original=original, name=name):
                reads.append(name)
                return original(self, *args)

            patch.setattr(torch.Tensor, name, counted)
        with RefuseWaitsBeforeTheRead(reads):
            batch = pack_on_device(
                codes,
                visit_mask.view(torch.uint8),
                sequence_mask.view(torch.uint8),
                lengths if known else None,
                13,
                (given.get("event_times"), given.get("event_indicators"), None),
            )
    assert reads.count("tolist") == 1
    assert reads[0] == "tolist"
    assert_same(PackedVisits(*batch, 13), expected)


class RefuseWaitsBeforeTheRead(RefuseWaits):
    """After the one read the lengths are on the host, where reading them costs nothing."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.reads:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


# Threads and memory -------------------------------------------------------------------------------


@pytest.mark.skipif(not_compiled() is not None, reason=f"no compiled builder: {not_compiled()}")
def test_the_interpreter_runs_on_while_a_batch_is_built():
    n_patients, n_visits = 20_000, 1_000_000
    arrays = (
        np.random.default_rng(0).integers(0, 5000, 4 * n_visits, np.int32),
        np.arange(0, 4 * n_visits + 1, 4),
        np.arange(0, n_visits + 1, n_visits // n_patients),
    )
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        start = time.perf_counter()
        backends.batch_builder().pack_flat(*arrays, None, 5000, None, None, None, False)
        end = time.perf_counter()
    finally:
        done.set()
        thread.join()
    third = (end - start) / 3
    assert [t for t in ticks if start + third < t < end - third], "the lock was held throughout"


def test_two_threads_build_what_one_builds(builder):
    patients = [[[p % 13, v % 13] for v in range(1 + p % 9)] for p in range(200)]
    arrays = flat(patients)
    expected = [PackedVisits.from_flat(*arrays, range(k, 200, 2)) for k in range(2)]
    built: dict[int, list[PackedVisits]] = {0: [], 1: []}

    def build(k):
        for _ in range(20):
            built[k].append(PackedVisits.from_flat(*arrays, range(k, 200, 2)))

    threads = [threading.Thread(target=build, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert len(built[k]) == 20
        for batch in built[k]:
            assert_same(batch, expected[k])


def test_memory_mapped_arrays_are_neither_copied_nor_read_through(builder, tmp_path):
    n_codes = 50_000_000  # 200 MB on paper, and next to nothing on a disk that knows holes
    codes = np.memmap(tmp_path / "codes", np.int32, "w+", shape=(n_codes,))
    codes[-6:] = [1, 2, 3, 4, 5, 6]
    codes.flush()
    codes = np.memmap(tmp_path / "codes", np.int32, "r", shape=(n_codes,))
    visit_offsets = np.array([0, n_codes - 6, n_codes - 3, n_codes])
    patient_offsets = np.array([0, 1, 3])
    resident = psutil.Process().memory_info().rss
    tracemalloc.start()
    try:
        batch = PackedVisits.from_flat(codes, visit_offsets, patient_offsets, [1])
        allocated = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_holds(batch, [[[1, 2, 3], [4, 5, 6]]])
    assert allocated < 5e6
    assert psutil.Process().memory_info().rss - resident < 50e6


# What is refused ----------------------------------------------------------------------------------

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


lists, from_flat, from_padded = (
    PackedVisits.from_lists,
    PackedVisits.from_flat,
    PackedVisits.from_padded,
)
THREE = [[[1]], [[2], [3]], [[4]]]
BAD = {
    "no visits": (
        lambda: lists([[[1]], [], [[2]], []]),
        ValueError,
        "Found 2 sequences with zero length. All sequences must have at least 1 visit. "
        "The first is patient 1.",
    ),
    "no visits in flat records": (
        lambda: from_flat(FLAT[0], FLAT[1], np.array([0, 2, 2, 6]), [0, 1]),
        ValueError,
        "Found 1 sequences with zero length. All sequences must have at least 1 visit. "
        "The first is patient 1 (record 1).",
    ),
    "no visits in the mask": (
        lambda: from_padded(*masks(holes=[(1, 0)])),
        ValueError,
        "Found 1 sequences with zero length. All sequences must have at least 1 visit. "
        "The first is patient 1.",
    ),
    "no visits by length": (
        lambda: from_padded(*masks()[:2], lengths=[2, 0, 0]),
        ValueError,
        "Found 2 sequences with zero length. All sequences must have at least 1 visit. "
        "The first is patient 1.",
    ),
    "code below 0": (
        lambda: lists([[[1]], [[2], [3, -4], [-5]]]),
        IndexError,
        "Found 2 codes outside the vocabulary: expected 0 <= code < 2147483647. "
        "The first is -4: patient 1, visit 1, code 1.",
    ),
    "code above the vocabulary": (
        lambda: from_flat(*FLAT, [2, 0], vocab_size=6),
        IndexError,
        "Found 2 codes outside the vocabulary: expected 0 <= code < 6. "
        "The first is 6: patient 0 (record 2), visit 1, code 0.",
    ),
    "code above the vocabulary, padded": (
        lambda: from_padded(*masks(), vocab_size=4),
        IndexError,
        "Found 4 codes outside the vocabulary: expected 0 <= code < 4. "
        "The first is 4: patient 1, visit 0, code 0.",
    ),
    "code that no int32 holds": (
        lambda: from_flat(*broken(0, 3, 2**32 + 1)),
        IndexError,
        "Found 1 codes outside the vocabulary: expected 0 <= code < 2147483647. "
        "The first is 4294967297: patient 1, visit 0, code 0.",
    ),
    "code that no int64 holds": (
        lambda: lists([[[1, 10**30]]]),
        IndexError,
        "Found 1 codes outside the vocabulary: expected 0 <= code < 2147483647. "
        "The first is -1: patient 0, visit 0, code 1.",
    ),
    "visit offsets that fall": (
        lambda: from_flat(*broken(1, 4, 0)),
        ValueError,
        "visit_offsets must rise within [0, 7]. Found 1 visits where they do not. "
        "The first is patient 2, visit 0: from 4 to 0.",
    ),
    "visit offsets past the codes": (
        lambda: from_flat(*broken(1, 6, 8), [2]),
        ValueError,
        "visit_offsets must rise within [0, 7]. Found 1 visits where they do not. "
        "The first is patient 0 (record 2), visit 2: from 6 to 8.",
    ),
    "patient offsets that fall": (
        lambda: from_flat(*broken(2, 2, 1)[:2], np.array([0, 4, 3, 6])),
        ValueError,
        "patient_offsets must rise within [0, 6]. Found 1 patients where they do not. "
        "The first is patient 1: from 4 to 3.",
    ),
    "patient offsets past the visits": (
        lambda: from_flat(*broken(2, 3, 7)),
        ValueError,
        "patient_offsets must rise within [0, 6]. Found 1 patients where they do not. "
        "The first is patient 2: from 3 to 7.",
    ),
    "patient offsets below 0": (
        lambda: from_flat(*broken(2, 0, -1)),
        ValueError,
        "patient_offsets must rise within [0, 6]. Found 1 patients where they do not. "
        "The first is patient 0: from -1 to 2.",
    ),
    "more codes than int32 can count": (  # stride 0: as long as it says, and 4 bytes in memory
        lambda: from_flat(np.broadcast_to(np.int32(1), 2**31), [0, 2**31], [0, 1]),
        ValueError,
        "A batch holds at most 2147483646 codes and as many visits; this one has 2147483648 codes "
        "and 1 visits.",
    ),
    "no offsets": (
        lambda: from_flat(FLAT[0], [], FLAT[2]),
        ValueError,
        "visit_offsets: expected at least one offset (a 0), got an empty array",
    ),
    "patient number": (
        lambda: from_flat(*FLAT, [0, -1, 3], event_times=[0, 0, 0]),
        IndexError,
        "Found 2 patient numbers outside the 3 records. The first is -1, at position 1.",
    ),
    "patient numbers that are not integers": (
        lambda: from_flat(*FLAT, [0.0]),
        TypeError,
        "patients: expected int32 or int64, got float64",
    ),
    "float codes": (
        lambda: from_flat(FLAT[0].astype(float), *FLAT[1:]),
        TypeError,
        "codes: expected int32 or int64, got float64",
    ),
    "foreign byte order": (
        lambda: from_flat(FLAT[0].astype(">i4"), *FLAT[1:]),
        TypeError,
        "codes: expected int32 or int64, got >i4",
    ),
    "small integers as offsets": (
        lambda: from_flat(FLAT[0], FLAT[1].astype(np.int16), FLAT[2]),
        TypeError,
        "visit_offsets: expected int32 or int64, got int16",
    ),
    "codes of two dimensions": (
        lambda: from_flat(FLAT[0][None], *FLAT[1:]),
        ValueError,
        "codes: expected 1 dimension, got shape [1, 7]",
    ),
    "a float in a list": (
        lambda: lists([[[1]], [[2], [3, 4.0]]]),
        TypeError,
        "patient 1, visit 1, code 1: expected an integer code, got float.",
    ),
    "a visit that is no list": (
        lambda: lists([[[1]], [[2], 3]]),
        TypeError,
        "patient 1, visit 1: expected a sequence of codes, got int.",
    ),
    "a patient that is no list": (
        lambda: lists([[[1]], None]),
        TypeError,
        "patient 1: expected a sequence of visits, got NoneType.",
    ),
    "patients that are no list": (
        lambda: lists(3),
        TypeError,
        "patients: expected a sequence of patients, got int.",
    ),
    "vocabulary": (
        lambda: lists(THREE, vocab_size=0),
        ValueError,
        "vocab_size: expected 1 to 2147483647, got 0",
    ),
    "event after the last visit": (
        lambda: lists(THREE, event_times=[0, 2, 1]),
        ValueError,
        "Found 2 event times outside their patient's visits: expected 0 <= event_time < length. "
        "The first is 2: patient 1, with 2 visits.",
    ),
    "event before the first visit": (
        lambda: from_flat(*FLAT, [2, 1], event_times=[0, -1, 2]),
        ValueError,
        "Found 1 event times outside their patient's visits: expected 0 <= event_time < length. "
        "The first is -1: patient 1 (record 1), with 1 visits.",
    ),
    "event in padding": (
        lambda: from_padded(*masks(), event_times=torch.tensor([1, 1, 2])),
        ValueError,
        "Found 1 event times outside their patient's visits: expected 0 <= event_time < length. "
        "The first is 1: patient 1, with 1 visits.",
    ),
    "event indicator": (
        lambda: lists(THREE, event_indicators=[0, 1, 2]),
        ValueError,
        "Found 1 event indicators that are neither 0 (censored) nor 1 (event seen). "
        "The first is 2: patient 2.",
    ),
    "half an event": (
        lambda: lists(THREE, event_indicators=[0, 1, 0.5]),
        ValueError,
        "event_indicators: expected whole numbers; the first other is 0.5, at 2",
    ),
    "event type": (
        lambda: lists(THREE, event_types=[0, -3, 2]),
        ValueError,
        "Found 1 negative event types: expected 0 (censored), 1, 2, ... "
        "The first is -3: patient 1.",
    ),
    "float event times": (
        lambda: lists(THREE, event_times=[0.0, 1.0, 0.0]),
        TypeError,
        "event_times: expected integers, got float64",
    ),
    "too few event times": (
        lambda: lists(THREE, event_times=[0]),
        ValueError,
        "event_times: expected one per patient, shape [3], got [1]",
    ),
    "event times of the chosen alone": (
        lambda: from_flat(*FLAT, [0], event_times=[0]),
        ValueError,
        "event_times: expected one per patient, shape [3], got [1]",
    ),
    "features of another shape": (
        lambda: lists(THREE, visit_features=np.ones((3, 2))),
        ValueError,
        "visit_features: expected shape [4, F], got [3, 2]",
    ),
    "integer features": (
        lambda: lists(THREE, visit_features=np.ones((4, 2), int)),
        TypeError,
        "visit_features: expected a floating dtype, got int64",
    ),
    "padded features of another shape": (
        lambda: from_padded(*masks(), visit_features=torch.ones(3, 2, 1)),
        ValueError,
        "visit_features: expected shape [3, 3, F], got [3, 2, 1]",
    ),
    "targets": (
        lambda: lists(THREE, targets={"age": np.ones(4)}),
        ValueError,
        "targets['age']: expected one row for each of 3 patients, got shape [4]",
    ),
    "visit targets": (
        lambda: lists(THREE, visit_targets={"cost": np.ones(3)}),
        ValueError,
        "visit_targets['cost']: expected one row for each of 4 visits, got shape [3]",
    ),
    "padded visit targets": (
        lambda: from_padded(*masks(), visit_targets={"cost": torch.ones(3)}),
        ValueError,
        "visit_targets['cost']: expected shape [3, 3, ...], got [3]",
    ),
    "sequence mask with holes": (
        lambda: from_padded(*masks(holes=[(0, 0), (2, 1)])),
        ValueError,
        "Found 2 sequence masks with holes: a patient's real visits must come first. "
        "The first is patient 0, visit 0.",
    ),
    "fractional sequence mask": (
        lambda: from_padded(*masks(fractions=[(1, 0), (2, 2)])),
        ValueError,
        "sequence_mask must be 0 or 1. Found 2 other values. The first is at patient 1, visit 0.",
    ),
    "fractional visit mask": (
        lambda: from_padded(*masks(fractions=[(2, 1, 0), (0, 1, 1), (1, 2, 0)])),
        ValueError,
        "visit_mask must be 0 or 1 to be packed. Found 2 other values. "
        "The first is at patient 0, visit 1, code 1. Weighted masks need the padded tensors.",
    ),
    "visit mask that is not a number": (
        lambda: from_padded(*masks(fractions=[(2, 1, 0)], visit_value=float("nan"))),
        ValueError,
        "visit_mask must be 0 or 1 to be packed. Found 1 other values. "
        "The first is at patient 2, visit 1, code 0. Weighted masks need the padded tensors.",
    ),
    "lengths that disagree": (
        lambda: from_padded(*masks(), lengths=[2, 1, 2]),
        ValueError,
        "Found 1 lengths that disagree with sequence_mask. The first is patient 2: length 2, "
        "but 3 visits in the mask.",
    ),
    "lengths past the padding": (
        lambda: from_padded(*masks()[:2], lengths=[2, 4, -1]),
        ValueError,
        "Found 2 lengths outside [1, 3], the padded visits. The first is 4: patient 1.",
    ),
    "too few lengths": (
        lambda: from_padded(*masks(), lengths=[2]),
        ValueError,
        "lengths: expected shape [3], got [1]",
    ),
    "lengths elsewhere": (
        lambda: from_padded(*masks(), lengths=torch.empty(3, dtype=torch.int64, device="meta")),
        ValueError,
        "lengths: expected on the host, got a tensor on meta; leave them out, and they are read "
        "from sequence_mask",
    ),
    "padded codes of two dimensions": (
        lambda: from_padded(torch.ones(2, 3, dtype=torch.int64)),
        ValueError,
        "visit_codes: expected shape [B, V, C], got [2, 3]",
    ),
    "padded float codes": (
        lambda: from_padded(torch.ones(2, 3, 4)),
        TypeError,
        "visit_codes: expected int32 or int64, got torch.float32",
    ),
    "visit mask of another shape": (
        lambda: from_padded(masks()[0], torch.ones(3, 3)),
        ValueError,
        "visit_mask: expected shape [3, 3, 2], got [3, 3]",
    ),
    "sequence mask of another shape": (
        lambda: from_padded(masks()[0], None, torch.ones(3, 2)),
        ValueError,
        "sequence_mask: expected shape [3, 3], got [3, 2]",
    ),
    "masks elsewhere": (
        lambda: from_padded(masks()[0], None, torch.ones(3, 3, device="meta")),
        ValueError,
        "sequence_mask is on meta, but visit_codes is on cpu",
    ),
    "index past the end": (
        lambda: lists(THREE)[[0, 3, -4]],
        IndexError,
        "Found 2 patient numbers outside a batch of 3. The first is 3, at position 1.",
    ),
    "index of another type": (
        lambda: lists(THREE)["first"],
        TypeError,
        "expected an integer, a slice, or a list, array or tensor of integers or of 3 booleans, "
        "got <U5 of shape []",
    ),
    "booleans of another number": (
        lambda: lists(THREE)[[True, False]],
        TypeError,
        "expected an integer, a slice, or a list, array or tensor of integers or of 3 booleans, "
        "got bool of shape [2]",
    ),
    "nothing to join": (
        lambda: PackedVisits.cat([]),
        ValueError,
        "PackedVisits.cat expects at least one batch, got none",
    ),
    "rows of nobody": (
        lambda: lists(THREE).rows_of(3),
        IndexError,
        "there is no patient 3 in a batch of 3",
    ),
    "rows to pad": (
        lambda: lists(THREE).pad(torch.ones(3, 2)),
        ValueError,
        "values: expected one row per visit, [n_visits=4, ...], got [3, 2]",
    ),
    "rows of a packed sequence": (
        lambda: lists(THREE).as_packed_sequence(torch.ones(3, 2)),
        ValueError,
        "data: expected one row per visit, [n_visits=4, ...], got [3, 2]",
    ),
    "padded values to pack": (
        lambda: lists(THREE).pack(torch.ones(3, 1, 2)),
        ValueError,
        "padded: expected shape [B=3, V>=2, ...], got [3, 1, 2]",
    ),
    "total length": (
        lambda: lists(THREE).to_padded(total_length=1),
        ValueError,
        "total_length: expected at least max_visits=2, got 1",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(builder, what):
    make, error, message = BAD[what]
    with pytest.raises(error) as refused:
        make()
    assert str(refused.value) == message


def test_batches_that_hold_different_things_are_not_joined():
    with pytest.raises(ValueError, match="batch 1 "):
        PackedVisits.cat([lists(THREE), lists(THREE, event_times=[0, 0, 0])])


WRONG_ON_A_DEVICE = {
    "no visits": {"triple": masks(holes=[(1, 0)])},
    "no visits by length": {"lengths": [2, 0, 3]},
    "lengths past the padding": {"lengths": [2, 1, 4]},
    "holes": {"triple": masks(holes=[(0, 0)])},
    "fractional sequence mask": {"triple": masks(fractions=[(1, 0)])},
    "fractional visit mask": {"triple": masks(fractions=[(0, 1, 1)])},
    "code above the vocabulary": {"vocab_size": 7},
    "code below 0": {"triple": (masks()[0] - 2, *masks()[1:])},
    "event in padding": {"event_times": torch.tensor([1, 1, 2])},
    "float event times": {"event_times": torch.tensor([1.0, 0.0, 2.0])},
    "too few event times": {"event_times": torch.tensor([1])},
    "event indicator": {"event_indicators": torch.tensor([0, 2, 1])},
    "half an event": {"event_indicators": torch.tensor([0, 0.5, 1])},
    "event type": {"event_types": torch.tensor([0, -1, 1])},
}


@pytest.mark.parametrize("what", [None, *WRONG_ON_A_DEVICE])
def test_a_device_notices_what_the_host_refuses(what):
    """It gives up (None); the host's builder then says why."""
    wrong = dict(WRONG_ON_A_DEVICE.get(what, {}))
    codes, visit_mask, sequence_mask = wrong.pop("triple", masks())
    lengths, vocab_size = wrong.pop("lengths", None), wrong.pop("vocab_size", None)
    batch = pack_on_device(
        codes,
        mask_states(visit_mask),
        mask_states(sequence_mask),
        None if lengths is None else np.array(lengths),
        vocab_size,
        tuple(wrong.get(name) for name in OUTCOMES),
    )
    assert (batch is not None) == (what is None)
    if what is not None:
        with pytest.raises((ValueError, IndexError, TypeError)):
            from_padded(codes, visit_mask, sequence_mask, lengths, vocab_size=vocab_size, **wrong)


# Which builder is in use --------------------------------------------------------------------------


def test_the_builder_is_chosen_visibly():
    with backends.use_backend(REFERENCE):
        assert backends.batch_builder().__name__ == "ehrseq_fast.batch.reference"
    name = backends.batch_builder().__name__
    assert name == ("ehrseq_fast.batch.reference" if not_compiled() else "ehrseq_fast._batching")


def test_without_compiled_parts_the_twin_builds():
    program = (
        "from ehrseq_fast import backend; from ehrseq_fast.batch import PackedVisits\n"
        "print(backend.compiled_batching.reason, PackedVisits.from_lists([[[1]]]).codes.tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "EHRSEQ_FAST_NO_COMPILED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "EHRSEQ_FAST_NO_COMPILED is set [1]\n"
