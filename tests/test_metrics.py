"""The C-index against its definition, pair by pair."""

from __future__ import annotations

import sys

import pytest
import torch

from ehrseq_fast.metrics import concordance_index


def pair_by_pair(risk, times, events):
    """Harrell's C over pairs whose earlier time is an event's, ties in risk counted half."""
    score = pairs = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            comparable = times[i] < times[j] or (times[i] == times[j] and not events[j])
            if events[i] and comparable and i != j:
                pairs += 1
                score += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    return score / pairs if pairs else 0.5


@pytest.mark.parametrize("seed", range(5))
def test_definition_with_ties_and_censoring(seed):
    torch.manual_seed(seed)
    hazards = (torch.rand(40, 6) * 4).round() / 8  # sums are exact and often equal
    times, events = torch.randint(0, 6, (40,)), torch.rand(40) < 0.6
    wanted = pair_by_pair(hazards.sum(1).tolist(), times.tolist(), events.tolist())
    assert concordance_index(hazards, times, events) == pytest.approx(wanted, abs=1e-12)
    assert 0.2 < wanted < 0.8


def test_higher_risk_means_earlier_event():
    hazards = torch.tensor([[0.9], [0.5], [0.1]])
    times, seen = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1])
    assert concordance_index(hazards, times, seen) == 1.0
    assert concordance_index(hazards.flip(0), times, seen) == 0.0
    assert concordance_index(torch.ones(3, 1), times, seen) == 0.5


def test_no_comparable_pair_is_chance():
    hazards = torch.rand(3, 2)
    assert concordance_index(hazards, torch.tensor([1, 2, 3]), torch.zeros(3)) == 0.5
    assert concordance_index(hazards, torch.tensor([2, 2, 2]), torch.ones(3)) == 0.5
    assert concordance_index(hazards, torch.tensor([1, 1, 3]), torch.tensor([0, 0, 1])) == 0.5


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_takes_padding_out(mask_dtype):
    hazards = torch.tensor([[0.9, torch.nan], [0.2, 0.3], [0.1, 5.0]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 0]]).to(mask_dtype)
    times, seen = torch.tensor([0, 1, 2]), torch.ones(3)
    assert concordance_index(hazards, times, seen, mask) == 1.0
    unmasked = hazards.nan_to_num(0.0)
    assert concordance_index(unmasked, times, seen) < 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_hazards_of_any_dtype_with_gradients(dtype):
    hazards = torch.tensor([[0.5], [0.25], [0.125]], dtype=dtype, requires_grad=True)
    assert concordance_index(hazards, torch.tensor([1, 2, 3]), torch.ones(3)) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hazards": torch.zeros(3)}, r"hazards must be \[B, V\], got shape \[3\]"),
        ({"event_times": torch.zeros(2)}, r"event_times must be \[B\] = \[3\], got shape \[2\]"),
        ({"event_indicators": torch.zeros(3, 1)}, r"event_indicators must be \[B\] = \[3\]"),
        ({"sequence_mask": torch.ones(3, 3)}, r"sequence_mask must be \[B, V\] = \[3, 2\]"),
        (
            {"hazards": torch.tensor([[0.1, 0.2], [0.1, torch.nan], [torch.nan, 0.0]])},
            "hazards of 2 patients hold NaN. The first is patient 1",
        ),
        ({"event_times": torch.tensor([0.0, 1.0, torch.nan])}, "event_times of 1 .* patient 2"),
    ],
)
def test_refuses(changes, message):
    arguments = {
        "hazards": torch.zeros(3, 2),
        "event_times": torch.zeros(3),
        "event_indicators": torch.ones(3),
    }
    with pytest.raises(ValueError, match=message):
        concordance_index(**(arguments | changes))


def test_without_lifelines_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lifelines.utils", None)
    with pytest.raises(ImportError, match=r"pip install ehrseq_fast\[metrics\]"):
        concordance_index(torch.zeros(2, 1), torch.zeros(2), torch.ones(2))


def test_importing_the_package_needs_no_lifelines(monkeypatch):
    monkeypatch.setitem(sys.modules, "lifelines", None)
    monkeypatch.delitem(sys.modules, "ehrseq_fast.metrics")
    import ehrseq_fast.metrics

    assert ehrseq_fast.metrics.concordance_index is not concordance_index
