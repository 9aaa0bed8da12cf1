"""Padded tensors with padding on the left or in between, and codes of every integer dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ehrseq_fast.batch import PackedVisits

from .batch_cases import SOME_PATIENTS, assert_holds, assert_same, flat, many, padded


def scattered(patients, places, garbage=-77):
    """The padded triple with patient p's visits in the slots ``places[p]``, and what is of them."""
    visits = max(map(max, places)) + 1
    widest = max((len(codes) for one in patients for codes in one), default=0) + 1
    codes = torch.full((len(patients), visits, widest), garbage)
    code_mask = torch.ones(codes.shape, dtype=torch.bool)  # of padding it must not matter
    mask = torch.zeros(codes.shape[:2], dtype=torch.bool)
    features = torch.full((*mask.shape, 1), float("nan"))
    number = 0
    for p, slots in enumerate(places):
        for slot, visit in zip(slots, patients[p], strict=True):
            codes[p, slot, : len(visit)] = torch.tensor(visit, dtype=torch.long)
            code_mask[p, slot] = torch.arange(widest) < len(visit)
            mask[p, slot] = True
            features[p, slot] = number
            number += 1
    return (codes, code_mask, mask), features


@many
@given(SOME_PATIENTS, st.data(), st.sampled_from(["left", "holes"]))
def test_visits_anywhere(builder, patients, data, where):
    visits = max(map(len, patients)) + data.draw(st.integers(0, 2))
    if where == "left":
        places = [list(range(visits - len(one), visits)) for one in patients]
        options = {"side": "left"}
    else:
        places = [sorted(data.draw(st.permutations(range(visits)))[: len(one)]) for one in patients]
        options = {"holes": "pack", "side": data.draw(st.sampled_from(["left", "right"]))}
    triple, features = scattered(patients, places)
    of_visits = {"visit_features": features, "visit_targets": {"number": features[..., 0]}}
    found = PackedVisits.from_padded(*triple, **options, vocab_size=13, **of_visits)
    assert_holds(found, patients)
    numbers = torch.arange(float(found.n_visits))
    expected = PackedVisits.from_lists(
        patients,
        vocab_size=13,
        visit_features=numbers[:, None],
        visit_targets={"number": numbers},
    )
    assert_same(found, expected)
    lengths = [len(one) for one in patients]
    assert_same(
        PackedVisits.from_padded(*triple, lengths, **options, vocab_size=13, **of_visits), expected
    )
    if where == "left":
        alone = PackedVisits.from_padded(*triple[:2], None, lengths, side="left", vocab_size=13)
        assert_holds(alone, patients)


def test_gradients_go_to_the_slots_of_the_features():
    features = torch.ones(2, 3, 1, requires_grad=True)
    mask = torch.tensor([[0, 0, 1], [0, 1, 1]])
    codes = torch.ones(2, 3, 1, dtype=torch.long)
    batch = PackedVisits.from_padded(
        codes, None, mask, visit_features=features, side="left", event_times=[0, 1]
    )
    (batch.visit_features * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    assert features.grad[..., 0].tolist() == [[0, 0, 2], [0, 1, 3]]
    assert batch.event_times.tolist() == [0, 1]


REFUSED = {
    "padding on the right": (
        [[1, 1, 0], [0, 1, 1]],
        {"side": "left"},
        r'side="left" says; found 1 patients .* The first is patient 0, slot 0',
    ),
    "holes": (
        [[0, 1, 1], [1, 0, 1]],
        {"side": "left"},
        r"found 1 patients .* The first is patient 1, slot 0",
    ),
    "holes that are not asked to be packed": ([[1, 0, 1]], {}, "masks with holes"),
    "no visit": ([[0, 1, 1], [0, 0, 0]], {"side": "left"}, "zero length.*patient 1"),
    "no visit, packed": ([[0, 0, 0]], {"holes": "pack"}, "zero length.*patient 0"),
    "a weight": (
        [[0, 1, 0.5]],
        {"holes": "pack"},
        "sequence_mask must be 0 or 1.*patient 0, visit 2",
    ),
    "NaN": ([[0, 1, float("nan")]], {"side": "left"}, "sequence_mask must be 0 or 1.*visit 2"),
    "another side": ([[1, 1, 1]], {"side": "top"}, "side: expected one of 'right', 'left'"),
    "another way": ([[1, 1, 1]], {"holes": "fill"}, "holes: expected one of 'refuse', 'pack'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(builder, name):
    mask, options, message = REFUSED[name]
    mask = torch.tensor(mask)
    codes = torch.ones(*mask.shape, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        PackedVisits.from_padded(codes, None, mask, **options)


def test_lengths_that_disagree_are_refused(builder):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    codes = torch.ones(2, 3, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="lengths that disagree with sequence_mask"):
        PackedVisits.from_padded(codes, None, mask, [1, 3], side="left")
    for lengths in ([4, 3], [-1, 3]):
        with pytest.raises(ValueError, match="lengths outside"):
            PackedVisits.from_padded(codes, None, None, lengths, side="left")


NARROW = ["int8", "int16", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", NARROW)
@many
@given(patients=SOME_PATIENTS, data=st.data())
def test_codes_of_any_width(builder, dtype, patients, data):
    numbers = np.dtype(dtype)
    codes, *offsets = flat(patients, numbers)
    assert_holds(PackedVisits.from_flat(codes, *offsets), patients)
    chosen = data.draw(st.lists(st.integers(0, len(patients) - 1), max_size=9))
    strided = np.stack([codes, codes + 1], 1)[:, 0]
    assert_holds(PackedVisits.from_flat(strided, *offsets, chosen), [patients[p] for p in chosen])
    visit_codes, *masks = padded(patients, garbage=0)
    narrow = visit_codes.to(getattr(torch, dtype))
    whole = PackedVisits.from_padded(narrow, *masks)
    assert_holds(whole, patients)
    assert_same(whole.with_codes(whole.codes.to(getattr(torch, dtype))), whole)
    assert_same(whole.with_codes(whole.codes.numpy().astype(numbers)), whole)


@pytest.mark.parametrize(
    ("dtype", "code", "shown"),
    [
        ("int8", -1, "-1"),
        ("int16", -300, "-300"),
        ("uint8", 200, "200"),
        ("uint16", 65535, "65535"),
        ("uint32", 2**32 - 1, "4294967295"),
        ("uint64", 2**64 - 1, "9223372036854775807"),
        ("uint64", 2**63 + 5, "9223372036854775807"),
    ],
)
def test_codes_outside_the_vocabulary(builder, dtype, code, shown):
    codes = np.array([1, code], dtype)
    message = f"Found 1 codes outside the vocabulary: expected 0 <= code < 13. The first is {shown}"
    with pytest.raises(IndexError, match=message):
        PackedVisits.from_flat(codes, [0, 1, 2], [0, 2], vocab_size=13)
    with pytest.raises(IndexError, match=message):
        PackedVisits.from_padded(torch.from_numpy(codes)[None, :, None], vocab_size=13)
    batch = PackedVisits.from_lists([[[1], [2]]], vocab_size=13)
    for changed in (codes, torch.from_numpy(codes)):
        with pytest.raises(IndexError, match=message):
            batch.with_codes(changed)


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
def test_what_is_no_integer_is_refused(builder, dtype):
    codes = np.ones(2, dtype)
    for call in (
        lambda: PackedVisits.from_flat(codes, [0, 1, 2], [0, 2]),
        lambda: PackedVisits.from_padded(torch.from_numpy(codes)[None, :, None]),
        lambda: PackedVisits.from_lists([[[1], [2]]]).with_codes(codes),
        lambda: PackedVisits.from_lists([[[1], [2]]]).with_codes(torch.from_numpy(codes)),
    ):
        with pytest.raises(TypeError, match="codes: expected integers, got"):
            call()
