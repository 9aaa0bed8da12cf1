"""Predictions from hazards against loops, Aalen–Johansen and what they must sum to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedRows, PackedVisits
from ehrseq_fast.metrics import cumulative_incidence
from ehrseq_fast.predictions import (
    cumulative_hazard,
    hazards_from_incidence,
    hazards_from_pmf,
    incidence_frame,
    median_time,
    restricted_mean,
    risk_within,
    survival,
    survival_frame,
)


def hazards(seed=0, shape=(4, 6, 3)):
    torch.manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64).softmax(-1) * 0.7


def test_definition():
    h = hazards()
    found = cumulative_incidence(h)
    for b in range(4):
        survival, total = 1.0, torch.zeros(3, dtype=torch.float64)
        for t in range(6):
            total = total + survival * h[b, t]
            survival = survival * (1 - h[b, t].sum())
            torch.testing.assert_close(found[b, t], total)
            assert float(found[b, t].sum() + survival) == pytest.approx(1, abs=1e-12)
    assert torch.autograd.gradcheck(cumulative_incidence, h.requires_grad_())


def test_it_is_aalen_johansens():
    lifelines = pytest.importorskip("lifelines", reason="lifelines is the oracle")
    rng = np.random.default_rng(0)
    times = rng.exponential(1, 150)
    kinds = rng.integers(0, 3, 150)
    order = np.argsort(times)
    at_risk = np.arange(150, 0, -1)
    rates = np.stack([(kinds[order] == k) / at_risk for k in (1, 2)], 1)
    found = cumulative_incidence(torch.tensor(rates)[None])[0]
    for k in (1, 2):
        fitted = lifelines.AalenJohansenFitter(calculate_variance=False)
        fitted.fit(times, kinds, event_of_interest=k)
        expected = fitted.cumulative_density_.iloc[1:, 0].to_numpy()
        np.testing.assert_allclose(found[:, k - 1], expected, atol=1e-12)


def test_packed_and_masked():
    h = hazards().float()
    batch = PackedVisits.from_lists([[[1]] * n for n in (2, 6, 1, 4)])
    mask = torch.arange(6) < torch.tensor([2, 6, 1, 4])[:, None]
    broken = torch.where(mask[..., None], h, torch.nan)
    found = cumulative_incidence(broken, mask)
    assert found.dtype == torch.float32
    rows = cumulative_incidence(PackedRows(batch.pack(h), batch))
    torch.testing.assert_close(rows.values, batch.pack(found))
    torch.testing.assert_close(found[0, 1:], found[0, 1].expand(5, 3))
    narrow = cumulative_incidence(h.bfloat16())
    assert narrow.dtype == torch.float32


def test_a_certain_event_ends_it():
    h = torch.tensor([[[0.2, 0.3], [0.4, 0.6], [0.5, 0.5]]], requires_grad=True)
    found = cumulative_incidence(h)
    torch.testing.assert_close(found[0, 1:].sum(1), torch.ones(2))
    assert torch.equal(found[0, 1], found[0, 2])
    found.sum().backward()
    assert h.grad.isfinite().all()
    tiny = torch.full((1, 1000, 1), 1e-9)
    assert float(cumulative_incidence(tiny)[0, -1]) == pytest.approx(1e-6, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 3), r"hazards: expected \[B, V, K\], got shape \[2, 3\]"),
        (torch.tensor([[[0.1]], [[1.1]]]), r"got \[1.10.*\] \(patient 1, visit 0; 1 visits"),
        (torch.tensor([[[0.1, 0.1], [0.6, 0.5]]]), r"sum of at most 1 .* \(patient 0, visit 1"),
        (torch.tensor([[[-0.1]]]), r"\(patient 0, visit 0; 1 visits in all\)"),
    ],
)
def test_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        cumulative_incidence(given)


def test_refuses_masks_and_types():
    with pytest.raises(TypeError, match="hazards: expected float32, float64"):
        cumulative_incidence(torch.zeros(1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"sequence_mask: expected \[B, V\] = \[4, 6\]"):
        cumulative_incidence(hazards(), torch.ones(4, 5))
    batch = PackedVisits.from_lists([[[1]]])
    with pytest.raises(ValueError, match="hazards are PackedRows, got a mask"):
        cumulative_incidence(PackedRows(torch.zeros(1, 2), batch), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"expected PackedRows \[n_visits, K\], got \[1\]"):
        cumulative_incidence(PackedRows(torch.zeros(1), batch))


def single(seed=0, shape=(5, 7)):
    torch.manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64) * 0.5


def test_survival_and_cumulative_hazard():
    h = single()
    curve = survival(h)
    for b in range(5):
        left = 1.0
        for t in range(7):
            left *= 1 - float(h[b, t])
            assert float(curve[b, t]) == pytest.approx(left, rel=1e-12)
    torch.testing.assert_close((-cumulative_hazard(h)).exp(), curve)
    certain = torch.tensor([[0.5, 1.0, 0.3]])
    assert survival(certain).tolist() == [[0.5, 0.0, 0.0]]
    assert cumulative_hazard(certain)[0, 1:].tolist() == [torch.inf, torch.inf]
    small = torch.full((1, 3), 1e-9)
    torch.testing.assert_close(cumulative_hazard(small)[0], torch.tensor([1e-9, 2e-9, 3e-9]))
    kept = torch.tensor([[0.5, torch.nan, 0.5]])
    assert survival(kept).isnan().tolist() == [[False, True, True]]
    assert torch.autograd.gradcheck(survival, h.requires_grad_())


def test_layouts():
    lengths = torch.tensor([2, 6, 1, 4])
    mask = torch.arange(6) < lengths[:, None]
    h = single(shape=(4, 6)) * mask
    batch = PackedVisits.from_lists([[[1]] * int(n) for n in lengths])
    rows, broken = PackedRows(batch.pack(h), batch), torch.where(mask, h, torch.nan)
    for function in (survival, cumulative_hazard):
        expected = function(h)
        torch.testing.assert_close(function(broken, mask), expected)
        torch.testing.assert_close(function(rows).values, batch.pack(expected))
        assert function(h.bfloat16()).dtype == torch.float32
    for function in (restricted_mean, median_time, lambda *a: risk_within(a[0], [1, 3], *a[1:])):
        torch.testing.assert_close(function(broken, mask), function(h))
        torch.testing.assert_close(function(rows), function(h))


def test_risk_within():
    h = single()
    found = risk_within(h, [1, 3, 100], start=2)
    torch.testing.assert_close(found[:, 0], h[:, 2])
    torch.testing.assert_close(found[:, 1], 1 - (1 - h[:, 2:5]).prod(1))
    torch.testing.assert_close(found[:, 2], 1 - (1 - h[:, 2:]).prod(1))
    tiny = risk_within(torch.full((1, 4), 1e-18, dtype=torch.float64), [4])
    assert float(tiny) == pytest.approx(4e-18, rel=1e-9)
    assert risk_within(torch.tensor([[1.0, 0.5]]), [1, 2]).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("horizon", [None, 0.0, 2.5, 6.0])
def test_restricted_mean(horizon):
    """Against simulated events, and the area under the curve in small steps."""
    h = single()
    curve, end = survival(h), 6.0 if horizon is None else horizon
    found = restricted_mean(h, horizon=horizon)
    fine = np.linspace(0, end, 600, endpoint=False) + end / 1200
    steps = curve[:, np.floor(fine).astype(int)].mean(1) * end
    torch.testing.assert_close(found, steps, atol=2e-3, rtol=1e-2)
    if horizon is None:
        torch.testing.assert_close(found, curve[:, :-1].sum(1))
    linear = restricted_mean(h, horizon=horizon, interpolate=True)
    for b in range(5):
        line = np.interp(fine, np.arange(7), curve[b].numpy())
        assert float(linear[b]) == pytest.approx(line.mean() * end, abs=1e-3)
    times = torch.tensor([30.0, 90, 180, 365, 400, 500, 730])
    in_days = restricted_mean(h, times=times, horizon=365.0)
    before = torch.cat([torch.ones(5, 1, dtype=torch.float64), curve], 1)
    expected = before[:, 0] * 30 + before[:, 1] * 60 + before[:, 2] * 90 + before[:, 3] * 185
    torch.testing.assert_close(in_days, expected)


def test_median_time():
    h = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.2, 0.3], [0.1, 0.1, 0.1]])
    assert median_time(h).tolist() == [0.0, 2.0, torch.inf]
    times = torch.tensor([10.0, 20, 40])
    assert median_time(h, times=times).tolist() == [10.0, 40.0, torch.inf]
    # 0.64 at 20 and 0.448 at 40
    found = median_time(h, times=times, interpolate=True)
    assert found.tolist() == pytest.approx([10.0, 20 + 20 * 0.14 / 0.192, torch.inf])


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 2)])
def test_derivatives_of_the_hazards_of_masses(shape):
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for mask in (None, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])):

        def run(x, mask=mask):
            return hazards_from_pmf(x, mask)

        assert torch.autograd.gradcheck(run, logits)
        assert torch.autograd.gradgradcheck(run, logits)


def test_times_in_float64_stay_it():
    """Whatever the dtype of the hazards: a time is what was given, and the last one a horizon."""
    times = torch.tensor([19000.1, 19000.2, 19365.3], dtype=torch.float64)
    h = torch.tensor([[0.0, 0.5, 0.0], [0.75, 0.0, 0.0]])
    assert median_time(h, times=times).tolist() == [19000.2, 19000.1]
    assert median_time(h.bfloat16(), times=times.numpy()).tolist() == [19000.2, 19000.1]
    wide = restricted_mean(h.double(), times=times)
    for of in (h, h.half()):
        torch.testing.assert_close(restricted_mean(of, times=times), wide, rtol=1e-12, atol=0)
        torch.testing.assert_close(restricted_mean(of, times=times, horizon=19365.3), wide)
    narrow = [1.1, 1.2, 365.3]  # of which float32 has the one below
    assert restricted_mean(h, times=narrow, horizon=365.3).dtype == torch.float32
    pytest.importorskip("pandas", reason="a data frame needs pandas")
    assert survival_frame(h, times=times).index.tolist() == times.tolist()
    frame = incidence_frame(h[..., None] / 2, times=times, interpolate=2)
    assert frame.index[::2].tolist() == times.tolist()
    assert median_time(h, times=torch.tensor([1, 2, 3])).dtype == torch.float32


def test_nan_is_hidden_by_no_certain_event():
    h = torch.tensor([[0.1, torch.nan, 1.0], [0.1, 1.0, torch.nan], [0.6, torch.nan, 0.1]])
    expected = (1 - h).cumprod(1)
    torch.testing.assert_close(survival(h), expected, equal_nan=True)
    within = risk_within(h, [1, 2, 3])
    torch.testing.assert_close(within, 1 - expected, equal_nan=True)
    assert cumulative_incidence(h[..., None])[:, 2].isnan().all()
    for interpolate in (False, True):  # half are reached before the NaN, or not
        found = median_time(h, interpolate=interpolate)
        assert found.isnan().tolist() == [True, False, False]
    broken = torch.tensor([[[torch.nan, 0.1], [0.2, 0.3]]])
    assert hazards_from_incidence(broken)[0, 1].isnan().all()


def test_a_frame_of_survival():
    pandas = pytest.importorskip("pandas", reason="a data frame needs pandas")
    h = single(shape=(3, 4))
    found = survival_frame(h, times=torch.tensor([1.0, 2, 4, 8]))
    assert isinstance(found, pandas.DataFrame)
    assert found.index.tolist() == [1, 2, 4, 8]
    np.testing.assert_allclose(found.to_numpy(), survival(h).T)
    finer = survival_frame(h, times=torch.tensor([1.0, 2, 4, 8]), interpolate=4)
    assert len(finer) == 13
    np.testing.assert_allclose(finer.loc[found.index].to_numpy(), found.to_numpy())
    middle = (found.loc[4] + found.loc[8]) / 2
    np.testing.assert_allclose(finer.loc[6.0], middle)
    thirds = survival_frame(h, times=torch.tensor([0.0, 30, 60, 90]), interpolate=3)
    np.testing.assert_allclose(thirds.index, np.linspace(0, 90, 10), rtol=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: survival(torch.rand(3)), r"hazards: expected \[B, V\], got shape \[3\]"),
        (lambda: survival(torch.tensor([[0.1], [2.0]])), r"got 2.0 \(patient 1, visit 0; 1 visits"),
        (lambda: risk_within(single(), [0]), "horizons: expected 1 to"),
        (lambda: risk_within(single(), [1], start=7), "start: expected 0 to 6, got 7"),
        (lambda: restricted_mean(single(), horizon=9), "horizon: expected 0 to 6, the last time"),
        (lambda: restricted_mean(single(), times=[1.0]), r"times: expected \[V\] = \[7\]"),
        (lambda: median_time(single(), times=[1.0] * 7), "times: expected ascending from 0"),
        (lambda: median_time(torch.zeros(2, 0)), "expected at least one time, got none"),
        (lambda: survival_frame(single(), interpolate=0), "interpolate: expected 1 to"),
    ],
)
def test_refuses_of_one_risk(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_frame_of_incidences():
    pandas = pytest.importorskip("pandas", reason="frames need pandas")
    h = hazards().float()
    lengths = (2, 6, 1, 4)
    batch = PackedVisits.from_lists([[[1]] * n for n in lengths])
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    found = incidence_frame(torch.where(mask[..., None], h, torch.nan), mask)
    assert found.shape == (6, 12)
    expected = cumulative_incidence(h, mask)
    for cause in (1, 2, 3):
        np.testing.assert_array_equal(found[cause].to_numpy(), expected[..., cause - 1].T)
    assert found.columns.names == ["cause", "patient"]
    pandas.testing.assert_frame_equal(incidence_frame(PackedRows(batch.pack(h), batch)), found)
    times = torch.tensor([1.0, 2.0, 4.0, 8.0, 9.0, 10.0])
    fine = incidence_frame(h, mask, times=times, interpolate=2)
    assert fine.index.tolist()[:4] == [1.0, 1.5, 2.0, 3.0]
    np.testing.assert_allclose(fine.iloc[::2], found.to_numpy(), rtol=1e-6)
    halfway = (found.iloc[:-1].to_numpy() + found.iloc[1:].to_numpy()) / 2
    np.testing.assert_allclose(fine.iloc[1::2], halfway, rtol=1e-6)
    total = sum(fine[cause] for cause in (1, 2, 3)) + survival_frame(
        h.sum(2), mask, times=times, interpolate=2
    )
    np.testing.assert_allclose(total, 1, atol=1e-5)
    with pytest.raises(ValueError, match=r"hazards: expected PackedRows \[n_visits, K\]"):
        incidence_frame(PackedRows(torch.zeros(13), batch))
    with pytest.raises(ValueError, match="interpolate: expected 1"):
        incidence_frame(h, interpolate=0)


def test_hazards_of_incidences_are_the_inverse():
    h = hazards()
    torch.testing.assert_close(hazards_from_incidence(cumulative_incidence(h)), h)
    assert torch.autograd.gradcheck(
        hazards_from_incidence, cumulative_incidence(h).requires_grad_()
    )
    certain = torch.tensor([[[0.2, 0.3], [0.4, 0.6], [0.4, 0.6]]])
    found = hazards_from_incidence(certain)
    torch.testing.assert_close(found, torch.tensor([[[0.2, 0.3], [0.4, 0.6], [0.0, 0.0]]]))
    assert hazards_from_incidence(certain.bfloat16() / 2).dtype == torch.float32
    assert hazards_from_incidence(torch.zeros(0, 3, 2)).shape == (0, 3, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [[[0.1], [0.2]], [[0.3], [0.2]]],
            r"do not fall, got 0.3 and then 0.2 \(patient 1, visit 1",
        ),
        ([[[0.6, 0.5]]], r"incidences: expected .*sum of at most 1 .* \(patient 0, visit 0"),
        ([[[-0.1]]], r"incidences: .* \(patient 0, visit 0; 1 visits in all\)"),
        ([[0.1]], r"incidences: expected \[B, V, K\], got shape \[1, 1\]"),
    ],
)
def test_refuses_what_is_no_incidence(given, message):
    with pytest.raises(ValueError, match=message):
        hazards_from_incidence(torch.tensor(given))
