"""Cumulative incidences against Aalen–Johansen, loops and what they must sum to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedRows, PackedVisits
from ehrseq_fast.metrics import cumulative_incidence


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
