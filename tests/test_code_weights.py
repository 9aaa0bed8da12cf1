"""Weights per code in PackedVisits follow their codes through every constructor and change."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedVisits, packed_visit_pool, visit_mean_pool
from ehrseq_fast.batch.checks import mask_states
from ehrseq_fast.batch.device import pack_on_device

PATIENTS = [[[3, 1], [2]], [[5], [], [4, 4, 1]], [[7, 7]]]
# a weight says which code it belongs to: its patient, visit, place, and the code
WEIGHTS = [
    [[p + v / 10 + c / 100 + code / 1000 for c, code in enumerate(visit)] for v, visit in rows]
    for p, rows in ((p, list(enumerate(patient))) for p, patient in enumerate(PATIENTS))
]
NESTED = {"code_weights": WEIGHTS}


def flat():
    codes = np.array([code for patient in PATIENTS for visit in patient for code in visit])
    weights = np.array([w for patient in WEIGHTS for visit in patient for w in visit], np.float32)
    visits = np.cumsum([0, *[len(visit) for patient in PATIENTS for visit in patient]])
    patients = np.cumsum([0, *map(len, PATIENTS)])
    return codes, visits, patients, weights


def nested(batch):
    """The batch's weights as nested lists, by its rows."""
    weights = batch.code_weights.tolist()
    offsets = batch.code_offsets.tolist()
    return [
        [weights[offsets[row] : offsets[row + 1]] for row in batch.rows_of(patient).tolist()]
        for patient in range(len(batch))
    ]


def approx(patients=WEIGHTS):
    return [[pytest.approx(visit, abs=1e-6) for visit in patient] for patient in patients]


def test_lists_nested_and_flat(builder):
    batch = PackedVisits.from_lists(PATIENTS, **NESTED)
    assert batch.code_weights.dtype == torch.float32
    assert nested(batch) == approx()
    same = PackedVisits.from_lists(PATIENTS, code_weights=flat()[3])
    assert torch.equal(batch.code_weights, same.code_weights)
    of_arrays = [[np.array(visit, np.float64) for visit in patient] for patient in WEIGHTS]
    wide = PackedVisits.from_lists(PATIENTS, code_weights=of_arrays).code_weights
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), batch.code_weights)


def test_flat_arrays_and_some_patients(builder):
    *arrays, weights = flat()
    for dtype in (np.float16, np.float32, np.float64):
        batch = PackedVisits.from_flat(*arrays, code_weights=weights.astype(dtype))
        assert batch.code_weights.numpy().dtype == dtype
    batch = PackedVisits.from_flat(*arrays, [2, 0, 2], code_weights=torch.from_numpy(weights))
    assert nested(batch) == approx([WEIGHTS[2], WEIGHTS[0], WEIGHTS[2]])


def test_padded_and_back():
    batch = PackedVisits.from_lists(PATIENTS, **NESTED)
    codes, mask, sequence_mask = batch.to_padded()
    assert mask.dtype == torch.float32
    again = PackedVisits.from_padded(codes, mask, sequence_mask)
    # the weight of code 0 of visit 0 of patient 0 is not zero, so no code is lost
    assert nested(again) == approx()
    garbage = torch.where(mask == 0, float("nan"), mask)
    explicit = PackedVisits.from_padded(codes, mask != 0, sequence_mask, code_weights=garbage)
    assert torch.equal(explicit.code_weights, batch.code_weights)


def test_padded_weights_are_differentiable():
    codes = torch.tensor([[[1, 2], [3, 0]], [[4, 0], [0, 0]]])
    weights = torch.rand(2, 2, 2, dtype=torch.float64, requires_grad=True)
    lengths = [2, 1]
    batch = PackedVisits.from_padded(codes, codes != 0, lengths=lengths, code_weights=weights)
    batch.code_weights.square().sum().backward()
    assert torch.equal(weights.grad, 2 * weights.detach() * (codes != 0))


def test_a_mask_of_zeros_and_ones_is_no_weight():
    codes = torch.tensor([[[1, 2], [3, 0]], [[4, 0], [0, 0]]])
    mask = (codes != 0).float()
    mask[1, 1] = 0.5  # a padded visit
    batch = PackedVisits.from_padded(codes, mask, torch.tensor([[1, 1], [1, 0]]))
    assert batch.code_weights is None
    with pytest.raises(ValueError, match="visit_mask"):
        PackedVisits.from_padded(codes, 2 * (codes != 0).int(), lengths=[2, 1])
    with pytest.raises(ValueError, match="visit_mask"):
        PackedVisits.from_padded(codes, torch.full(codes.shape, float("nan")), lengths=[2, 1])
    with pytest.raises(ValueError, match="visit_mask"):
        PackedVisits.from_padded(codes, mask / 2, lengths=[2, 1], code_weights=mask)


@pytest.mark.parametrize("chosen", [[1], [2, 0], [0, 0, 1], []])
def test_indexing_and_concatenation(builder, chosen):
    batch = PackedVisits.from_lists(PATIENTS, **NESTED)
    some = batch[chosen]
    expected = [WEIGHTS[patient] for patient in chosen]
    assert nested(some) == approx(expected)
    assert nested(PackedVisits.cat([some, batch])) == approx([*expected, *WEIGHTS])
    with pytest.raises(ValueError, match="code weights"):
        PackedVisits.cat([batch, batch.with_code_weights(None)])


def test_changed_copies_keep_them():
    batch = PackedVisits.from_lists(PATIENTS, event_times=[0, 1, 0], **NESTED)
    keep = batch.codes != 4
    dropped = batch.with_codes(keep=keep)
    assert torch.equal(dropped.code_weights, batch.code_weights[keep])
    for changed in (
        batch.with_codes(batch.codes + 1),
        batch.with_outcomes(event_times=None),
        batch.with_features(torch.ones(batch.n_visits, 1)),
        copy.deepcopy(batch),
        pickle.loads(pickle.dumps(batch)),
        batch.to("cpu"),
    ):
        assert torch.equal(changed.code_weights, batch.code_weights)
    assert batch.with_code_weights(None).code_weights is None
    file = io.BytesIO()
    torch.serialization.add_safe_globals([PackedVisits])
    torch.save(batch, file)
    file.seek(0)
    assert torch.equal(torch.load(file).code_weights, batch.code_weights)


def test_other_weights():
    batch = PackedVisits.from_lists(PATIENTS)
    mine = torch.rand(batch.n_codes, requires_grad=True)
    weighted = batch.with_code_weights(mine)
    weighted.code_weights.sum().backward()
    assert torch.equal(mine.grad, torch.ones(batch.n_codes))
    with torch.no_grad():
        mine.zero_()
    assert (weighted.code_weights != 0).all()
    with pytest.raises(AttributeError, match="with_code_weights"):
        weighted.code_weights = None


@pytest.mark.parametrize(
    ("code_weights", "error", "message"),
    [
        (WEIGHTS[:2], ValueError, "each of 3 patients, got 2"),
        ([WEIGHTS[0], WEIGHTS[1][:2], WEIGHTS[2]], ValueError, "patient 1: expected 3, got 2"),
        (
            [WEIGHTS[0], [[1.0], [], [1.0]], WEIGHTS[2]],
            ValueError,
            "patient 1, visit 2: expected 3, got 1",
        ),
        ([WEIGHTS[0], [1.0, 2.0, 3.0], WEIGHTS[2]], ValueError, "patient 1, visit 0: expected 1"),
        ([[["a", "b"], [1.0]], WEIGHTS[1], WEIGHTS[2]], TypeError, "expected numbers"),
        ([1.0] * 3, ValueError, "got \\[3\\]"),
        (np.ones(9, np.int64), TypeError, "floating"),
    ],
)
def test_what_does_not_fit_is_refused(code_weights, error, message):
    with pytest.raises(error, match=message):
        PackedVisits.from_lists(PATIENTS, code_weights=code_weights)


def test_shapes_of_others():
    *arrays, weights = flat()
    batch = PackedVisits.from_lists(PATIENTS)
    with pytest.raises(ValueError, match=r"code_weights: .*shape \[9\], got \[8\]"):
        PackedVisits.from_flat(*arrays, code_weights=weights[:8])
    with pytest.raises(ValueError, match=r"code_weights: .*shape \[9\], got \[3\]"):
        batch.with_code_weights(torch.ones(3))
    with pytest.raises(TypeError, match=r"code_weights: .*floating"):
        batch.with_code_weights(torch.ones(9, dtype=torch.int64))


def test_a_weighted_batch_means_its_padded_triple():
    batch = PackedVisits.from_lists(PATIENTS, **NESTED)
    codes, mask, _ = batch.to_padded()
    table = torch.randn(8, 3)
    pooled = packed_visit_pool(batch, table)
    torch.testing.assert_close(pooled, batch.pack(visit_mean_pool(codes, table, mask)))


def test_a_fractional_mask_on_a_device_is_packed_on_the_host():
    """As pack_on_device refuses it: what the builder on the host makes is moved back."""
    batch = PackedVisits.from_lists(PATIENTS, **NESTED)
    triple = batch.to_padded()
    assert pack_on_device(triple[0], *map(mask_states, triple[1:]), None, None, (None,) * 3) is None
    assert PackedVisits.from_padded(*triple).device == triple[0].device


def test_first_and_last_visits_and_other_sources():
    batch = PackedVisits.from_lists(PATIENTS, **NESTED)
    assert nested(batch.first_visits(1)) == approx([patient[:1] for patient in WEIGHTS])
    assert nested(batch.last_visits(2)) == approx([patient[-2:] for patient in WEIGHTS])
    objects = list(zip(PATIENTS, WEIGHTS, strict=True))
    of_objects = PackedVisits.from_objects(
        objects, lambda each: each[0], code_weights=lambda each: each[1]
    )
    assert torch.equal(of_objects.code_weights, batch.code_weights)
    codes, visits, patients, weights = flat()
    ragged = {
        "dim1/bounds": patients[1:],
        "dim2/bounds": visits[1:],
        "dim2/code": codes,
        "dim2/value": weights,
    }
    of_ragged = PackedVisits.from_nested_ragged(ragged, code_weights="value")
    assert torch.equal(of_ragged.code_weights, batch.code_weights)


@pytest.mark.parametrize(
    ("side", "holes", "slots"),
    [
        ("left", "refuse", [[2, 0, 1], [0, 1, 2], [1, 2, 0]]),
        ("right", "pack", [[0, 2, 1], [0, 1, 2], [1, 0, 2]]),
    ],
)
def test_padded_on_the_left_and_with_holes(side, holes, slots):
    batch = PackedVisits.from_lists(PATIENTS, **NESTED)
    at = torch.arange(3).unsqueeze(1), torch.tensor(slots)
    codes, mask, real = (padded[at] for padded in batch.to_padded())
    again = PackedVisits.from_padded(codes, mask, real, side=side, holes=holes)
    assert torch.equal(again.codes, batch.codes)
    assert torch.equal(again.code_weights, batch.code_weights)
