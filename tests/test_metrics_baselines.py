"""Both baselines against loops and the package's losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehrseq_fast import discrete_time_survival_nll
from ehrseq_fast.metrics import TrainingOutcomes, day_baselines, evaluate, visit_baselines

from .metric_cases import CONVENTIONS


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
@pytest.mark.parametrize("late", [False, True])
def test_hazards_are_events_per_visit_at_risk(censored_visit, late):
    rng = np.random.default_rng(0)
    times, seen = rng.integers(0, 9, 300), rng.random(300) < 0.4
    entry = np.minimum(rng.integers(0, 3, 300), times) if late else None
    fitted = visit_baselines(times, seen, entry, censored_visit=censored_visit)
    events, visits = np.zeros(9), np.zeros(9)
    for i, (time, event) in enumerate(zip(times, seen, strict=True)):
        for t in range(0 if entry is None else entry[i], time + 1):
            if t < time or event or censored_visit == "included":
                visits[t] += 1
            events[t] += t == time and event
    assert fitted.constant == pytest.approx(events.sum() / visits.sum())
    wanted = (events + fitted.constant) / (visits + 1)
    np.testing.assert_allclose(fitted.by_visit, wanted)
    assert fitted.hazards(np.array([0, 8, 9])).tolist() == pytest.approx(
        [wanted[0], wanted[8], fitted.constant]
    )


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
@pytest.mark.parametrize("late", [False, True])
def test_the_nll_is_the_losses(censored_visit, late):
    rng = np.random.default_rng(1)
    fitted = visit_baselines(
        rng.integers(0, 6, 200), rng.random(200) < 0.4, censored_visit=censored_visit
    )
    times, seen = rng.integers(0, 9, 50), rng.random(50) < 0.5  # some later than any in training
    entry = np.minimum(rng.integers(0, 3, 50), times) if late else None
    found = fitted.nll(times, seen, entry)
    for nll, hazards in zip(
        found, (np.full(9, fitted.constant), fitted.hazards(np.arange(9))), strict=True
    ):
        loss = discrete_time_survival_nll(
            torch.tensor(hazards).expand(50, 9).contiguous(),
            torch.tensor(times),
            torch.tensor(seen),
            censored_visit=censored_visit,
            entry_times=None if entry is None else torch.tensor(entry),
        )
        assert nll == pytest.approx(float(loss), rel=1e-9)


def test_without_events_no_hazard_is_zero():
    fitted = visit_baselines([0, 1, 2], [0, 0, 0])
    assert 0 < fitted.constant < 1
    assert np.isfinite(fitted.nll([1], [1])).all()
    full = visit_baselines([0, 0], [1, 1])
    assert np.isfinite(full.nll([1], [0])).all()


def test_risks_in_days_are_the_truth():
    """Constant rates by visit index."""
    rng = np.random.default_rng(2)
    n, rates = 20_000, np.array([0.001, 0.004])
    lengths = np.full(n, 2)
    event, end = rng.exponential(1 / rates, (n, 2)), rng.uniform(0, 800, (n, 2))
    days = np.minimum(event, end)
    # one indicator per patient: keep those whose two visits agree on it
    seen = event <= end
    agree = seen[:, 0] == seen[:, 1]
    fitted = day_baselines(days[agree].ravel(), seen[agree, 0], lengths[agree], (100, 365))
    assert fitted.by_visit.shape == (2, 2)
    assert fitted.risks(np.array([0, 1, 7])).tolist() == [
        *fitted.by_visit.tolist(),
        fitted.by_visit[1].tolist(),
    ]
    only = day_baselines(event[:, 1], np.ones(n), np.ones(n, int), (100, 365))
    truth = -np.expm1(-rates[1] * np.array([100, 365]))
    np.testing.assert_allclose(only.constant, truth, atol=0.01)
    np.testing.assert_allclose(only.by_visit[0], truth, atol=0.01)


def test_visits_before_the_entry_are_not_at_risk():
    """One rate for all; who is in the study had no event before the entry visit."""
    rng = np.random.default_rng(3)
    n, rate, gap, horizons = 30_000, 0.001, 100, (30, 90, 365)
    entry = rng.integers(2, 6, n)
    event = entry * gap + rng.exponential(1 / rate, n)
    end = entry * gap + rng.uniform(1, 1500, n)
    stop, seen = np.minimum(event, end), event <= end
    lengths = entry + 1
    patient = np.repeat(np.arange(n), lengths)
    visit = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    days = stop[patient] - visit * gap
    truth = -np.expm1(-rate * np.array(horizons))
    fitted = day_baselines(days, seen, lengths, horizons, entry)
    np.testing.assert_allclose(fitted.constant, truth, rtol=0.1)
    np.testing.assert_allclose(fitted.risks(np.array([2, 5])), [truth] * 2, rtol=0.2)
    assert (fitted.risks(np.array([0])) == fitted.constant).all()  # nobody is at risk there
    train = TrainingOutcomes(entry, seen, entry, days, lengths)
    found = evaluate(
        risks=np.tile(truth, (len(days), 1)),
        event_times=entry,
        event_indicators=seen,
        horizons_days=horizons,
        days_to_end=days,
        lengths=lengths,
        entry_times=entry,
        landmarks_days=(0.0,),
        train=train,
    )
    brier = next(m for m in found.metrics if m.name == "brier" and m.horizon_days == 365)
    assert abs(brier.constant - brier.model) < 1e-4


def test_few_visits_share_one_risk():
    lengths = np.array([1] * 60 + [3])
    days = np.linspace(1, 500, lengths.sum())
    fitted = day_baselines(days, np.ones(61), lengths, (90,))
    assert fitted.by_visit.shape == (1, 1)


def test_refuses():
    with pytest.raises(ValueError, match="expected at least one training patient, got none"):
        visit_baselines([], [])
    with pytest.raises(ValueError, match="patient 1 has entry time 2 and event time 1"):
        visit_baselines([0, 1], [1, 0], [0, 2])
    with pytest.raises(ValueError, match=r"times from 0, got -1 \(patient 0"):
        visit_baselines([-1, 1], [1, 0])
    with pytest.raises(ValueError, match="days_to_end: expected days from 0, got -5 at 1"):
        day_baselines([1.0, -5.0], [1, 0], [1, 1], (30,))
    with pytest.raises(ValueError, match=r"one row per visit \(3 by lengths\), got 2"):
        day_baselines([1.0, 5.0], [1, 0], [1, 2], (30,))
