"""``scale_grad_by_freq`` divides a code's gradient by how often it was looked up: masked slots are
looked up by plain PyTorch, and are no part of a packed batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ehrseq_fast import PackedVisits
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM, LSTMBaseline
from ehrseq_fast.models.base import PATHS

CODES = torch.tensor([[[3, 5, 3], [3, 0, 0]], [[5, 2, 0], [0, 0, 0]]])
REAL = CODES != 0
VISITS = REAL.any(2)
# What stands in a masked slot: 3 stands in three real slots, and 5 in two.
HELD = CODES.masked_fill(~REAL, 3)


def model(kind, path):
    torch.manual_seed(0)
    made = (
        DiscreteTimeSurvivalLSTM(8, 4, 6, path=path)
        if kind == "survival"
        else LSTMBaseline(8, 4, 6, visit_aggregation=kind, path=path)
    ).eval()
    made.embedding.scale_grad_by_freq = True
    return made


def gradient(kind, path, *given):
    made = model(kind, path)
    out = made(*given)
    out = out["logits"] if isinstance(out, dict) else out
    (out.to_padded() if hasattr(out, "to_padded") else out).square().sum().backward()
    return made.embedding.weight.grad


@pytest.mark.parametrize("kind", ["survival", "mean", "sum", "max", "attention"])
def test_paths_agree_where_padding_holds_the_padding_code(kind):
    expected = gradient(kind, "padded", CODES, REAL, VISITS)
    assert expected[3].any()
    packed = PackedVisits.from_padded(CODES, REAL, VISITS)
    for path in PATHS:
        for given in ((CODES, REAL, VISITS), (packed,)):
            torch.testing.assert_close(gradient(kind, path, *given), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["survival", "mean", "sum", "max", "attention"])
def test_padding_that_holds_codes_is_counted_by_plain_pytorch_alone(kind):
    real = gradient(kind, "fused", CODES, REAL, VISITS)
    torch.testing.assert_close(gradient(kind, "fused", HELD, REAL, VISITS), real)
    for path in ("packed", "padded"):
        counted = gradient(kind, path, HELD, REAL, VISITS)
        expected = real.clone()
        expected[3] *= 3 / (3 + int((~REAL).sum()))
        torch.testing.assert_close(counted, expected, rtol=1e-5, atol=1e-7)


def test_plain_pytorch_counts_every_slot_that_it_looks_up():
    weight = torch.ones(8, 4, requires_grad=True)
    rows = F.embedding(HELD, weight, padding_idx=0, scale_grad_by_freq=True)
    rows.masked_fill(~REAL[..., None], 0).sum().backward()
    assert torch.equal(weight.grad[3], torch.full((4,), 3 / (3 + int((~REAL).sum()))))
    assert torch.equal(weight.grad[5], torch.ones(4))
