"""DeepHit's ranking loss, of all pairs of patients, against the pairs one by one and pycox."""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast import (
    DeepHitLoss,
    DeepHitRankingLoss,
    PackedRows,
    PackedVisits,
    deephit_competing_ranking_loss,
    deephit_ranking_loss,
    pmf_competing_risks_nll,
    pmf_nll,
)

from . import pycox_files
from .survival_cases import draw_patients, value_and_grad
from .tolerances import assert_matches

pytestmark = pytest.mark.operation("pmf_nll")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(patients, slots, causes=None, dtype=torch.float64, scale=1.0):
    p = draw_patients(patients, slots, causes or 1)
    shape = (patients, slots) if causes is None else (patients, slots, causes)
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype), p


def loss_of(causes):
    return deephit_ranking_loss if causes is None else deephit_competing_ranking_loss


def pairs(x, times, types, mask, entries, weights, sigma, included):
    """Every pair on its own."""
    x = x if x.dim() == 3 else x[:, :, None]
    kept = mask & (torch.arange(x.shape[1]) >= entries[:, None])
    x = torch.where(kept[:, :, None], x, -torch.inf)
    mass = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1).softmax(1)[:, :-1]
    incidence = mass.view(x.shape).cumsum(1)
    total = x.new_zeros(())
    for i in range(len(x)):
        if not types[i]:
            continue
        t, cause = times[i], int(types[i]) - 1
        for j in range(len(x)):
            tied = times[j] == t and not types[j] and included
            if (times[j] > t or tied) and entries[j] <= t:
                apart = incidence[j, t, cause] - incidence[i, t, cause]
                total = total + weights[i] * weights[j] * (apart / sigma).exp()
    return total / len(x) ** 2


@pytest.mark.parametrize("causes", [None, 3])
@pytest.mark.parametrize("included", [True, False])
@pytest.mark.parametrize("sigma", [10.0, 0.1, 1e-2])
def test_every_pair(unemulated, causes, included, sigma):
    x, p = draw(23, 7, causes)
    more = {"entry_times": p.entries, "sample_weight": p.weights, "sigma": sigma}
    more["censored_visit"] = "included" if included else "excluded"
    got = value_and_grad(loss_of(causes), x, p.times, p.types, p.mask, **more)
    rest = (p.times, p.types, p.mask, p.entries, p.weights.double(), sigma, included)
    expected = value_and_grad(pairs, x, *rest)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(unemulated, dtype):
    x, p = draw(40, 9, None, dtype)
    value, grad = value_and_grad(deephit_ranking_loss, x, p.times, p.types, p.mask)
    wide = value_and_grad(deephit_ranking_loss, x.double(), p.times, p.types, p.mask)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert_matches(value, wide[0], scale=10 * wide[0], terms=40)
    assert_matches(grad, wide[1], scale=10, terms=40)


def test_a_small_sigma_does_not_overflow_where_the_result_is_finite(unemulated):
    # both incidences are near 1: e^(F / sigma) alone would be e^1000
    x = torch.tensor([[9.0, 0.0], [8.9995, 0.0]])
    times, seen = torch.tensor([0, 1]), torch.tensor([1, 0])
    value, grad = value_and_grad(deephit_ranking_loss, x, times, seen, sigma=1e-3)
    wide = value_and_grad(deephit_ranking_loss, x.double(), times, seen, sigma=1e-3)
    assert value.isfinite()
    assert grad.isfinite().all()
    torch.testing.assert_close(value.double(), wide[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("causes", [None, 2])
def test_packed_rows_and_padding(unemulated, causes):
    x, p = draw(30, 8, causes)
    loss = loss_of(causes)
    expected = value_and_grad(loss, x, p.times, p.types, p.mask)
    mask = p.mask if causes is None else p.mask[:, :, None]
    got = value_and_grad(loss, torch.where(mask, x, torch.nan), p.times, p.types, p.mask)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    lists = [[[1]] * length for length in p.lengths.tolist()]
    types = {"event_indicators" if causes is None else "event_types": p.types}
    batch = PackedVisits.from_lists(lists, event_times=p.times, **types)
    values = batch.pack(x).detach().requires_grad_()
    packed = loss(PackedRows(values, batch))
    torch.testing.assert_close(packed, expected[0])
    (grad,) = torch.autograd.grad(packed, values)
    torch.testing.assert_close(grad, batch.pack(expected[1]))


def test_a_nan_of_a_patient_at_risk_is_seen(unemulated):
    x = torch.zeros(3, 2)
    times, seen = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
    for patient in range(3):
        broken = x.clone()
        broken[patient, 1] = torch.nan
        assert deephit_ranking_loss(broken, times, seen).isnan()


@pytest.mark.parametrize("causes", [None, 2])
def test_derivatives(unemulated, causes):
    x, p = draw(6, 4, causes)
    weights = p.weights.double().requires_grad_()
    x.requires_grad_()

    def run(x, weights):
        more = {"entry_times": p.entries, "sample_weight": weights, "sigma": 0.5}
        return loss_of(causes)(x, p.times, p.types, p.mask, **more)

    assert torch.autograd.gradcheck(run, (x, weights))
    assert torch.autograd.gradgradcheck(run, (x, weights))
    given = (x.detach(), weights.detach())
    tangent = torch.func.jvp(run, given, tuple(torch.ones_like(v) for v in given))[1]
    grads = torch.autograd.grad(run(x, weights), (x, weights))
    torch.testing.assert_close(tangent, sum(grad.sum() for grad in grads))


def test_pycox(monkeypatch):
    losses = pycox_files.load(monkeypatch, "models.loss")
    x, p = draw(40, 6, None, torch.float32)
    rank = torch.zeros(40, 40)
    for i in range(40):
        tied = (p.times == p.times[i]) & (p.types == 0)
        rank[i] = ((p.times > p.times[i]) | tied) & (p.types[i] != 0)
    theirs = losses.rank_loss_deephit_single(x, p.times, p.types, rank, 0.3)
    torch.testing.assert_close(deephit_ranking_loss(x, p.times, p.types, sigma=0.3), theirs)
    x, p = draw(40, 6, 2, torch.float32)
    for i in range(40):
        tied = (p.times == p.times[i]) & (p.types == 0)
        rank[i] = ((p.times > p.times[i]) | tied) & (p.types[i] != 0)
    phi = x.transpose(1, 2).contiguous()
    theirs = losses.rank_loss_deephit_cr(phi, p.times, p.types, rank, 0.3)
    ours = deephit_competing_ranking_loss(x, p.times, p.types, sigma=0.3)
    torch.testing.assert_close(ours, theirs)


def test_same_bits_for_any_number_of_threads():
    x, p = draw(5000, 30, None, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = value_and_grad(deephit_ranking_loss, x, p.times, p.types, p.mask)
        torch.set_num_threads(2)
        second = value_and_grad(deephit_ranking_loss, x, p.times, p.types, p.mask)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_linear_in_patients():
    """No tensor of the graph has as many values as there are pairs."""
    x, p = draw(300, 3, None, torch.float32)
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        deephit_ranking_loss(x.requires_grad_(), p.times, p.types).backward()
    assert max(sizes) <= 300 * 4


def test_modules_and_empty_batches(unemulated):
    none = torch.zeros(0, dtype=torch.int64)
    assert deephit_ranking_loss(torch.zeros(0, 3), none, none).isnan()
    x, p = draw(9, 5)
    given = (x, p.times, p.types, p.mask)
    ranking = DeepHitRankingLoss(0.3, censored_visit="excluded")
    more = {"sigma": 0.3, "censored_visit": "excluded"}
    assert torch.equal(ranking(*given), deephit_ranking_loss(*given, **more))
    both = DeepHitLoss(0.25, 0.3)(*given)
    expected = 0.25 * pmf_nll(*given) + 0.75 * deephit_ranking_loss(*given, sigma=0.3)
    torch.testing.assert_close(both, expected)
    x, p = draw(9, 5, 2)
    given = (x, p.times, p.types, p.mask)
    expected = 0.2 * pmf_competing_risks_nll(*given) + 0.8 * deephit_competing_ranking_loss(*given)
    torch.testing.assert_close(DeepHitLoss()(*given), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sigma": 0.0}, "sigma: expected a finite number above 0, got 0.0"),
        ({"sigma": float("nan")}, "sigma: expected a finite number above 0, got nan"),
        ({"censored_visit": "maybe"}, "censored_visit: expected one of"),
        ({"event_times": torch.tensor([0, 3])}, "patient 1 has event time 3 and 3"),
        ({"event_indicators": torch.tensor([0, 2])}, "patient 1 has 2"),
        ({"entry_times": torch.tensor([1, 0])}, "patient 0 has entry time 1"),
        ({"logits": torch.zeros(2, 3, 1)}, r"logits: expected shape \[B, V\]"),
        ({"sample_weight": torch.ones(3)}, "sample_weight: expected shape"),
    ],
)
def test_errors(change, match):
    given = {
        "logits": torch.zeros(2, 3),
        "event_times": torch.tensor([0, 1]),
        "event_indicators": torch.tensor([1, 0]),
    }
    with pytest.raises(ValueError, match=match):
        deephit_ranking_loss(**{**given, **change})
    with pytest.raises(ValueError, match="alpha: expected"):
        DeepHitLoss(1.5)
