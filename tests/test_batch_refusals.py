"""Bad input, and the words in which it is refused. On both builders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehrseq_fast.batch import PackedVisits

from .batch_cases import (
    FLAT,
    broken,
    masks,
)

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
    "offsets of patients without their first": (
        lambda: from_flat(FLAT[0], FLAT[1], FLAT[2][1:]),
        ValueError,
        f"patient_offsets: expected to begin with 0 and to end with {len(FLAT[1]) - 1}, the number "
        f"of visits, got {FLAT[2][1]} and {FLAT[2][-1]}",
    ),
    "offsets of visits without their last": (
        lambda: from_flat(FLAT[0], FLAT[1][:-1], [0, 2], [0]),
        ValueError,
        f"visit_offsets: expected to begin with 0 and to end with {len(FLAT[0])}, the number of "
        f"codes, got 0 and {FLAT[1][-2]}",
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
        "The first is 1000000000000000000000000000000: patient 0, visit 0, code 1.",
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
        "codes: expected integers, got float64",
    ),
    "foreign byte order": (
        lambda: from_flat(FLAT[0].astype(">i4"), *FLAT[1:]),
        TypeError,
        "codes: expected integers, got >i4",
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
    "visit mask of other integers": (
        lambda: from_padded(
            *(
                mask.int()
                for mask in masks(fractions=[(2, 1, 0), (0, 1, 1), (1, 2, 0)], visit_value=2)
            )
        ),
        ValueError,
        "visit_mask must be 0 or 1 to be packed. Found 2 other values. "
        "The first is at patient 0, visit 1, code 1. Weights go in as code_weights.",
    ),
    "visit mask that is not a number": (
        lambda: from_padded(*masks(fractions=[(2, 1, 0)], visit_value=float("nan"))),
        ValueError,
        "visit_mask must be 0 or 1 to be packed. Found 1 other values. "
        "The first is at patient 2, visit 1, code 0. Weights go in as code_weights.",
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
        "visit_codes: expected integers, got torch.float32",
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
        "sequence_mask: expected on cpu, where visit_codes is, got meta",
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
        "patient: expected a number in [0, 3), got 3",
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
