"""The rows of a batch: padding, packing, slices, joining."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ehrseq_fast.batch import PackedVisits

from .batch_cases import (
    SOME_PATIENTS,
    assert_holds,
    assert_same,
    full_batch,
    many,
)


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


@pytest.mark.parametrize(
    ("dtype", "fill", "error"),
    [
        (torch.int64, 0.5, ValueError),
        (torch.int64, float("nan"), ValueError),
        (torch.int8, 200, ValueError),
        (torch.uint8, -1, ValueError),
        (torch.bool, -1, ValueError),
        (torch.float16, 1e6, ValueError),
        (torch.int64, True, TypeError),
        (torch.float32, 1j, TypeError),
        (torch.float32, "0", TypeError),
        (torch.float32, torch.tensor(0.5), TypeError),
    ],
)
def test_a_fill_that_the_values_do_not_hold_is_refused(dtype, fill, error):
    batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
    with pytest.raises(error, match="fill: expected a number"):
        batch.pad(torch.ones(3, dtype=dtype), fill)


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.int64, -1),
        (torch.int64, 2.0),
        (torch.int32, np.int64(7)),
        (torch.uint8, 255),
        (torch.bool, True),
        (torch.bool, 1),
        (torch.float16, float("-inf")),
        (torch.float32, 0.1),
        (torch.complex64, 1j),
    ],
)
def test_a_fill_that_the_values_hold_is_taken(dtype, fill):
    batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
    padded = batch.pad(torch.ones(3, dtype=dtype), fill)
    assert padded.dtype == dtype
    assert padded[0, 1] == torch.tensor(fill, dtype=dtype)


def test_an_iterator_of_batches_is_joined():
    batches = [PackedVisits.from_lists([[[1]]]), PackedVisits.from_lists([[[2], [3]]])]
    assert PackedVisits.cat(iter(batches)).codes.tolist() == [2, 1, 3]
    with pytest.raises(ValueError, match="at least one batch, got none"):
        PackedVisits.cat(iter(()))
