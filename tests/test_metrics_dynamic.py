"""C_td against its definition, the truth of simulations and every layout of values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedRows, PackedVisits
from ehrseq_fast.metrics import concordance_td

from . import pycox_files
from .metric_cases import CONVENTIONS, concordance_pairs, simulate


def ragged(seed, n=60, ties=True):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, n)
    times = (lengths - 1 - rng.integers(0, 2, n)).clip(0)
    risk = rng.normal(size=(n, 9))
    if ties:
        risk = risk.round(0)
    return risk, times, rng.random(n) < 0.5, lengths


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_definition(seed, ties, censored_visit):
    risk, times, seen, _ = ragged(seed, ties=ties)
    expected = concordance_pairs(risk, times, seen, censored_visit)
    assert concordance_td(risk, times, seen, censored_visit=censored_visit) == expected
    assert 0.2 < expected < 0.8
    entry = np.minimum(np.random.default_rng(seed).integers(0, 3, len(times)), times)
    expected = concordance_pairs(risk, times, seen, censored_visit, entry)
    found = concordance_td(risk, times, seen, entry_times=entry, censored_visit=censored_visit)
    assert found == expected


def test_layouts_are_alike_and_padding_is_not_read():
    risk, times, seen, lengths = ragged(5)
    expected = concordance_td(risk, times, seen)
    mask = np.arange(9) < lengths[:, None]
    padded = np.where(mask, risk, np.nan)
    assert concordance_td(padded, times, seen) == expected
    assert concordance_td(torch.tensor(padded), torch.tensor(times), torch.tensor(seen)) == expected
    assert concordance_td(padded, times, seen, lengths=lengths) == expected
    assert concordance_td(risk[mask], times, seen, lengths=lengths) == expected
    assert concordance_td(torch.tensor(risk).bfloat16(), times, seen) == expected
    batch = PackedVisits.from_lists(
        [[[1]] * n for n in lengths], event_times=times, event_indicators=seen.astype(int)
    )
    rows = PackedRows(batch.pack(torch.tensor(risk)), batch)
    assert concordance_td(rows) == expected
    assert concordance_td(rows, times, seen) == expected
    halves = [batch[:25], batch[25:]]
    parts = [
        PackedRows(half.pack(torch.tensor(risk)[chosen]), half)
        for half, chosen in zip(halves, (slice(0, 25), slice(25, None)), strict=True)
    ]
    assert concordance_td(parts) == expected


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
def test_a_score_of_the_visit_alone_is_chance_exactly(censored_visit):
    rng = np.random.default_rng(2)
    times, seen = rng.integers(0, 20, 5000), rng.random(5000) < 0.3
    for score in (np.arange(20.0), np.ones(20), rng.normal(size=20).astype(np.float32)):
        risk = np.broadcast_to(score, (5000, 20))
        assert concordance_td(risk, times, seen, censored_visit=censored_visit) == 0.5


def test_no_pair_is_chance():
    risk = np.random.default_rng(0).random((3, 3))
    assert concordance_td(risk, [0, 1, 2], [0, 0, 0]) == 0.5
    assert concordance_td(risk, [2, 2, 2], [1, 1, 1]) == 0.5
    assert concordance_td(risk, [1, 1, 0], [1, 0, 0]) == 0.5
    assert concordance_td(risk, [1, 1, 0], [1, 0, 0], censored_visit="included") in (0.0, 1.0)


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_truth_of_a_simulation(share, censored_visit):
    """Hazards are drawn anew at each visit, so every visit has the same concordance."""
    found = simulate(20_000, share, censored_visit, changing=True)
    assert abs((~found.seen).mean() - share) < 0.03
    everybody = np.ones(len(found.event), bool)
    rng = np.random.default_rng(1)
    # in closed form: P(h_i > h_j) with h_i drawn in proportion to h, h_j to 1 − h
    h = 1 / (1 + np.exp(2.6 - 1.2 * rng.normal(size=400_000)))
    cases = rng.choice(h, 200_000, p=h / h.sum())
    controls = np.sort(rng.choice(h, 200_000, p=(1 - h) / (1 - h).sum()))
    truth = np.searchsorted(controls, cases).mean() / len(controls)
    error = 4 * 0.3 / np.sqrt(found.seen.sum())
    without = concordance_td(found.hazard, found.event, everybody)
    assert without == pytest.approx(truth, abs=4 * 0.3 / np.sqrt(20_000) + 0.003)
    with_censoring = concordance_td(
        found.hazard, found.times, found.seen, censored_visit=censored_visit
    )
    assert with_censoring == pytest.approx(truth, abs=error + 0.003)


def test_pycox_has_the_same_number(monkeypatch):
    rng = np.random.default_rng(3)
    hazard = rng.random((120, 12)) / 3
    times, seen = rng.integers(0, 12, 120), rng.random(120) < 0.5
    # pycox compares survival at the event's time: of any risk that is 1 − survival
    survival = (1 - hazard).cumprod(1)
    of_pycox = pycox_files.load(monkeypatch, "evaluation.concordance").concordance_td
    expected = of_pycox(times, seen, survival.T.copy(), times, method="antolini")
    found = concordance_td(1 - survival, times, seen, censored_visit="included")
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"risk": np.zeros((3, 2, 1))}, r"risk: expected \[B, V\] or \[n_visits\], got shape"),
        ({"event_times": [0, 2, 1]}, "patient 1 has event time 2 and 2 visits"),
        ({"event_times": [0, -1, 1]}, r"times from 0, got -1 \(patient 1; 1 in all\)"),
        ({"event_times": [0.5, 1, 1]}, r"visit numbers, got 0.5 \(patient 0"),
        ({"event_times": [0, 1]}, r"event_times: expected \[B\] = \[3\], got shape \[2\]"),
        ({"event_indicators": [0, 1, 2]}, r"0 \(censored\) or 1 \(event\), got 2 \(patient 2"),
        ({"event_indicators": [0.0, np.nan, 1]}, r"got nan \(patient 1; 1 in all\)"),
        ({"entry_times": [0, 2, 0]}, "patient 1 has entry time 2 and event time 1"),
        ({"entry_times": [0, 2]}, r"entry_times: expected \[B\] = \[3\]"),
        ({"lengths": [1, 2, 3]}, "lengths: expected at most V = 2, got 3"),
        ({"lengths": [1, 0, 2]}, "lengths: expected 1 or more, got 0"),
        ({"lengths": [2, 2]}, r"lengths: expected \[B\] = \[3\]"),
        ({"risk": np.zeros(3), "lengths": [1, 1]}, r"one row per visit \(2 by lengths\), got 3"),
        ({"risk": [[0.1, 0.2], [np.nan, 0.1], [0.1, 0.2]]}, r"got NaN \(patient 1, visit 0; 1"),
        ({"censored_visit": "both"}, "censored_visit: expected one of 'excluded', 'included'"),
    ],
)
def test_refuses(changes, message):
    arguments = {
        "risk": np.zeros((3, 2)),
        "event_times": [0, 1, 1],
        "event_indicators": [1, 0, 0],
    } | changes
    with pytest.raises(ValueError, match=message):
        concordance_td(**arguments)


def test_refuses_types():
    batch = PackedVisits.from_lists([[[1]], [[1], [2]]])
    rows = PackedRows(torch.zeros(3), batch)
    with pytest.raises(TypeError, match="expected one per patient, got None"):
        concordance_td(rows)
    with pytest.raises(TypeError, match="lengths: expected None beside PackedRows"):
        concordance_td(rows, [0, 1], [1, 0], lengths=[1, 2])
    with pytest.raises(TypeError, match="risk: expected real numbers"):
        concordance_td(np.array([["a"]]), [0], [1])
