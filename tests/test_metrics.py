"""The C-index against its definition, pair by pair."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedRows, PackedVisits, discrete_time_survival_nll
from ehrseq_fast.metrics import concordance_index


def pair_by_pair(risk, times, events, censored_visit="excluded"):
    """Harrell's C over pairs whose earlier time is an event's, ties in risk counted half."""
    included = censored_visit == "included"
    score = pairs = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            together = times[i] == times[j] and not events[j] and included
            comparable = times[i] < times[j] or together
            if events[i] and comparable and i != j:
                pairs += 1
                score += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    return score / pairs if pairs else 0.5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("censored_visit", ["excluded", "included"])
def test_definition_with_ties_and_censoring(seed, censored_visit):
    torch.manual_seed(seed)
    hazards = (torch.rand(40, 6) * 4).round() / 8  # sums are exact and often equal
    times, events = torch.randint(0, 6, (40,)), torch.rand(40) < 0.6
    wanted = pair_by_pair(hazards.sum(1).tolist(), times.tolist(), events.tolist(), censored_visit)
    actual = concordance_index(hazards, times, events, censored_visit=censored_visit)
    assert actual == pytest.approx(wanted, abs=1e-12)
    in_days = times * 30.4 - 7.25
    actual = concordance_index(hazards, in_days, events, censored_visit=censored_visit)
    assert actual == pytest.approx(wanted, abs=1e-12)
    assert 0.2 < wanted < 0.8


def reference_concordance(risk, times, events):
    """As the public package counts: pairs of strictly later times, of which only larger risks
    are right."""
    right = pairs = 0
    for i in range(len(risk)):
        for j in range(len(risk)):
            if events[i] and times[j] > times[i]:
                pairs += 1
                right += risk[i] > risk[j]
    return right / pairs if pairs else 0.5


@pytest.mark.parametrize("seed", range(5))
def test_ties_as_in_the_reference(seed):
    torch.manual_seed(seed)
    hazards = (torch.rand(40, 6) * 4).round() / 8
    times, events = torch.randint(0, 6, (40,)), torch.rand(40) < 0.6
    risk = hazards.sum(1)
    found = concordance_index(hazards, times, events, ties="reference")
    wanted = reference_concordance(risk.tolist(), times.tolist(), events.tolist())
    assert found == pytest.approx(wanted, abs=1e-12)
    assert found < concordance_index(hazards, times, events) - 0.01
    constant = torch.ones(40, 1)
    assert concordance_index(constant, times, events, ties="reference") == 0.0
    assert concordance_index(constant, times, events) == 0.5
    # with pairs of one time, of which one is censored
    half = concordance_index(hazards, times, events, censored_visit="included")
    strict = concordance_index(hazards, times, events, censored_visit="included", ties="reference")
    other = concordance_index(-hazards, times, events, censored_visit="included", ties="reference")
    # right + wrong + ties are all pairs, and half counts half of the ties
    assert half == pytest.approx(strict + (1 - strict - other) / 2, abs=1e-12)


def test_risks_of_patients():
    torch.manual_seed(0)
    hazards, times, seen = torch.rand(20, 5), torch.randint(0, 5, (20,)), torch.rand(20) < 0.5
    expected = concordance_index(hazards, times, seen)
    risk = hazards.double().sum(1)
    assert concordance_index(risk, times, seen) == expected
    assert concordance_index(risk.numpy() - 50, times, seen) == expected  # any numbers


def test_rows_with_their_batch():
    batch = PackedVisits.from_lists(
        [[[1]], [[1], [2]], [[1], [2], [3]]], event_times=[0, 1, 2], event_indicators=[1, 1, 0]
    )
    rows = PackedRows(torch.rand(6), batch)
    assert concordance_index(rows, batch) == concordance_index(rows)
    other = batch.with_outcomes(event_times=[0, 0, 0], event_indicators=[1, 0, 0])
    assert concordance_index(rows, other) == concordance_index(PackedRows(rows.values, other))
    with pytest.raises(ValueError, match="expected the batch of the PackedRows in hazards"):
        concordance_index(rows, batch[:])


def test_a_censoring_at_the_time_of_an_event():
    """With "excluded" the censored patient may have had the event at that very visit."""
    hazards, times, seen = torch.tensor([[0.1], [0.9]]), torch.tensor([3, 3]), torch.tensor([1, 0])
    assert concordance_index(hazards, times, seen) == 0.5
    assert concordance_index(hazards, times, seen, censored_visit="included") == 0.0
    with pytest.raises(ValueError, match="censored_visit: expected one of 'excluded', 'included'"):
        concordance_index(hazards, times, seen, censored_visit="both")


def test_arrays_and_packed_rows():
    batch = PackedVisits.from_lists(
        [[[1]], [[1], [2]], [[1], [2], [3]]], event_times=[0, 1, 2], event_indicators=[1, 1, 0]
    )
    padded = torch.tensor([[0.9, 0, 0], [0.2, 0.4, 0], [0.1, 0.1, 0.1]])
    assert concordance_index(PackedRows(batch.pack(padded), batch)) == 1.0
    later = torch.tensor([2, 1, 0])
    assert concordance_index(PackedRows(batch.pack(padded), batch), later, torch.ones(3)) == 0.0
    arrays = padded.numpy(), np.array([0, 1, 2]), np.array([True, True, False])
    assert concordance_index(*arrays) == 1.0
    with pytest.raises((TypeError, ValueError), match=r"event_indicators: .* masked"):
        concordance_index(padded, arrays[1], np.ma.masked_array(arrays[2], [0, 1, 0]))
    with pytest.raises(TypeError, match="expected tensors, got None"):
        concordance_index(padded)


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_a_nan_indicator_is_a_value_error_where_warnings_are_errors(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match=r"event_indicators: .*got NaN \(patient 1; 1 in all\)"
        ):
            concordance_index(
                make([[0.5], [0.2], [0.1]]), make([0, 1, 2]), make([1.0, math.nan, 0.0])
            )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("make", [np.array, torch.tensor, list])
def test_a_nan_indicator_is_refused_by_batches_and_losses_too(make, dtype):
    indicators = np.array([1.0, math.nan], dtype)
    given = make(indicators) if make is not torch.tensor else torch.from_numpy(indicators)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match=r"event_indicators: expected whole numbers.*nan, at 1"
        ):
            PackedVisits.from_lists([[[1]], [[2]]], event_times=[0, 0], event_indicators=given)
        if isinstance(given, torch.Tensor):
            with pytest.raises(ValueError, match=r"event_indicators must be 0 .* 1 has nan"):
                discrete_time_survival_nll(torch.rand(2, 1), torch.tensor([0, 0]), given)


def test_under_another_default_device():
    hazards, times = torch.tensor([[0.9], [0.5], [0.1]]), torch.tensor([1, 2, 3])
    seen = torch.ones(3)
    with torch.device("meta"):
        assert concordance_index(hazards, times, seen) == 1.0
        assert concordance_index(hazards.numpy(), times.numpy(), seen.numpy()) == 1.0


@pytest.mark.parametrize("censored_visit", ["excluded", "included"])
@pytest.mark.parametrize("make", [torch.tensor, np.array, lambda times: np.array(times, np.uint64)])
def test_integer_times_that_no_float_holds(make, censored_visit):
    times = make([2**60, 2**60 + 1])
    found = concordance_index([[3.0], [1.0]], times, [1, 1], censored_visit=censored_visit)
    assert found == 1.0


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
        ({"hazards": torch.zeros(3, 2, 1)}, r"hazards: expected \[B, V\].*got shape \[3, 2, 1\]"),
        (
            {"hazards": torch.zeros(3), "sequence_mask": torch.ones(3, 3)},
            r"sequence_mask: expected \[B, V\] = \[3\]",
        ),
        ({"ties": "efron"}, "ties: expected one of 'lifelines', 'reference'"),
        ({"event_times": torch.zeros(2)}, r"event_times: expected \[B\] = \[3\], got shape \[2\]"),
        ({"event_indicators": torch.zeros(3, 1)}, r"event_indicators: expected \[B\] = \[3\]"),
        ({"sequence_mask": torch.ones(3, 3)}, r"sequence_mask: expected \[B, V\] = \[3, 2\]"),
        (
            {"hazards": torch.tensor([[0.1, 0.2], [0.1, torch.nan], [torch.nan, 0.0]])},
            r"hazards: expected numbers, got NaN \(patient 1; 2 in all\)",
        ),
        (
            {"event_times": torch.tensor([0.0, 1.0, torch.nan])},
            r"event_times: expected numbers, got NaN \(patient 2",
        ),
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
    import ehrseq_fast.metrics

    monkeypatch.setitem(sys.modules, "lifelines", None)
    # what the import sets too; all other tests are to see the metrics that they have
    monkeypatch.setattr(ehrseq_fast, "metrics", ehrseq_fast.metrics)
    for name in [name for name in sys.modules if name.startswith("ehrseq_fast.metrics")]:
        monkeypatch.delitem(sys.modules, name)
    import ehrseq_fast.metrics

    assert ehrseq_fast.metrics.concordance_index is not concordance_index
