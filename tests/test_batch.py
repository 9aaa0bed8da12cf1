"""What a batch holds, however it was built. On both builders."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from ehrseq_fast import backend as backends
from ehrseq_fast.batch import PackedVisits

from .batch_cases import (
    PATIENTS,
    REFERENCE,
    SOME_PATIENTS,
    assert_holds,
    assert_same,
    flat,
    full_batch,
    many,
    not_compiled,
    padded,
)


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
