"""The likelihood of intervals of days: boundaries, extremes, derivatives, and no bias."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ehrseq_fast.models import HorizonSurvivalLSTM
from ehrseq_fast.models.intervals import boundaries, interval_hazards, piecewise_nll, place

from . import pycox_files

VOCABULARY = 13
HORIZONS = (30, 90, 365)


def test_boundaries_belong_to_the_interval_that_ends_there():
    bounds = torch.tensor([0.0, *HORIZONS], dtype=torch.float64)
    days = torch.tensor([0, 30, 30.5, 90, 365, 365.25], dtype=torch.float64)
    interval, fraction, beyond = place(days, bounds)
    assert interval.tolist() == [0, 0, 1, 1, 2, 2]
    assert fraction.tolist() == pytest.approx([0, 1, 0.5 / 60, 1, 1, 1])
    assert beyond.tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_extreme_logits(dtype):
    """Finite, and right: for large |z| softplus(z) is z or e^z."""
    values = [-1e4, -200, -50, -21, -19.9, 0, 19, 200, 1e4]
    z = torch.tensor(values).to(dtype)[:, None].requires_grad_()
    rows = torch.zeros(len(values), dtype=torch.int64)
    part = torch.full((len(values),), 0.25, dtype=torch.float64)
    for event in (False, True):
        nll = piecewise_nll(z, rows, part, torch.full(rows.shape, event))
        exact = [
            0.25 * _softplus(v) - (_log_softplus(v) if event else 0)
            for v in z.detach().double().flatten().tolist()
        ]
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(
            nll.double(), torch.tensor(exact, dtype=torch.float64), rtol=tolerance, atol=tolerance
        )
        (grad,) = torch.autograd.grad(nll.sum(), z)
        assert grad.isfinite().all()


def _softplus(z):
    return math.log1p(math.exp(z)) if z < 30 else z + math.exp(-z) if z < 700 else z


def _log_softplus(z):
    return math.log(_softplus(z)) if z > -700 else z


def test_derivatives_to_second_order():
    torch.manual_seed(0)
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    interval = torch.tensor([0, 1, 2, 2, 1, 0])
    fraction = torch.tensor([0.0, 0.5, 1, 0.3, 0, 1], dtype=torch.float64)
    event = torch.tensor([True, False, False, True, False, True])
    function = lambda z: piecewise_nll(z, interval, fraction, event)  # noqa: E731
    assert torch.autograd.gradcheck(function, z)
    assert torch.autograd.gradgradcheck(function, z)


def test_pycox_has_the_same_likelihood(monkeypatch):
    """Its ``nll_pc_hazard_loss``."""
    loss = pycox_files.load(monkeypatch, "models.loss").nll_pc_hazard_loss
    torch.manual_seed(2)
    z = (3 * torch.randn(200, 5, dtype=torch.float64)).requires_grad_()
    interval, fraction = torch.randint(0, 5, (200,)), torch.rand(200, dtype=torch.float64)
    event = torch.rand(200) < 0.5
    expected = loss(z, interval, event.double(), fraction, reduction="none")
    found = piecewise_nll(z, interval, fraction, event)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(x.sum(), z)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_what_is_not_seen_is_not_read():
    z = torch.zeros(3, 3, requires_grad=True)
    broken = z.detach().clone()
    broken[0, 1:], broken[1], broken[2, 2] = math.nan, math.nan, math.nan
    broken.requires_grad_()
    interval, event = torch.tensor([0, 0, 1]), torch.tensor([True, False, False])
    fraction = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    expected = piecewise_nll(z, interval, fraction, event)
    found = piecewise_nll(broken, interval, fraction, event)
    assert torch.equal(found, expected)
    assert torch.autograd.grad(found.sum(), broken)[0].isfinite().all()
    broken.data[0, 0] = math.nan
    assert piecewise_nll(broken, interval, fraction, event).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("censored", [0.2, 0.5, 0.8])
def test_unbiased_with_censoring_inside_intervals(censored):
    """The maximum of the likelihood is the truth, within 4 standard errors of 1/√events."""
    rng = np.random.default_rng(7)
    bounds, rates = np.array([0.0, 30, 90, 365]), np.array([0.02, 0.008, 0.004])
    n = 200_000
    cumulative = np.concatenate([[0], np.cumsum(rates * np.diff(bounds))])
    wanted = rng.exponential(size=n)
    event = np.interp(wanted, cumulative, bounds, right=np.inf)
    # exponential censoring with the rate that leaves this share of events unseen
    end = rng.exponential({0.2: 450.0, 0.5: 80.0, 0.8: 15.0}[censored], size=n)
    days, seen = np.minimum(event, end), event <= end
    assert abs((~seen).mean() - censored) < 0.08
    truth = -np.expm1(-rates * np.diff(bounds))
    found = interval_hazards(days, seen, HORIZONS)
    counts = np.histogram(days[seen], bounds)[0]
    error = (1 - truth) * rates * np.diff(bounds) / np.sqrt(counts)
    assert (np.abs(found - truth) < 4 * error + 1e-9).all(), (found, truth, error)
    # and there the gradient of the loss is 0
    logits = torch.tensor(found).logit().requires_grad_()
    interval, fraction, beyond = place(torch.tensor(days), torch.tensor(bounds))
    nll = piecewise_nll(logits.expand(n, 3), interval, fraction, torch.tensor(seen) & ~beyond)
    (grad,) = torch.autograd.grad(nll.mean(), logits)
    assert grad.abs().max() < 2e-5


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([], "expected at least one"),
        ([0, 30], "expected positive and ascending days, got 0 at 0"),
        ([30, 30], "got 30 at 1, after 30"),
        ([30, math.nan], "got nan at 1"),
        ([math.inf], "got inf at 0"),
        (["30"], "expected numbers, got '30'"),
        ("30", "expected numbers, got"),
        (30, "expected numbers, got"),
        ([True], "expected numbers, got True"),
    ],
)
def test_refuses_horizons(given, error):
    with pytest.raises((ValueError, TypeError), match=error):
        boundaries(given)
    with pytest.raises((ValueError, TypeError), match=error):
        HorizonSurvivalLSTM(VOCABULARY, given)
