"""Padded tensors packed on a device: the same operations on the CPU, where they can be watched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ehrseq_fast.batch import PackedVisits
from ehrseq_fast.batch.checks import mask_states
from ehrseq_fast.batch.device import pack_on_device

from .batch_cases import (
    OUTCOMES,
    PATIENTS,
    assert_same,
    many,
    masks,
    padded,
)

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


from_padded = PackedVisits.from_padded
WRONG_ON_A_DEVICE = {
    "no visits": {"triple": masks(holes=[(1, 0)])},
    "no visits by length": {"lengths": [2, 0, 3]},
    "lengths past the padding": {"lengths": [2, 1, 4]},
    "holes": {"triple": masks(holes=[(0, 0)])},
    "fractional sequence mask": {"triple": masks(fractions=[(1, 0)])},
    "visit mask that is not a number": {
        "triple": masks(fractions=[(0, 1, 1)], visit_value=float("nan"))
    },
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
