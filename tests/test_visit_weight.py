"""Weights of visits in the losses whose terms are visits: padded and packed, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    competing_risks_nll,
    discrete_time_survival_nll,
    piecewise_hazard_nll,
)

from .survival_cases import draw_patients

pytestmark = pytest.mark.operation("survival_nll")

# the loss, how many causes, its options, whether a censored patient's last visit is read
CASES = {
    "probabilities": (discrete_time_survival_nll, None, {}, False),
    "included": (discrete_time_survival_nll, None, {"censored_visit": "included"}, True),
    "cloglog": (discrete_time_survival_nll, None, {"from_logits": True, "link": "cloglog"}, False),
    "causes": (competing_risks_nll, 2, {"from_logits": True}, False),
    "softmax": (competing_risks_nll, 3, {"from_logits": True, "link": "softmax"}, False),
    "softplus": (piecewise_hazard_nll, None, {}, True),
    "exp": (piecewise_hazard_nll, None, {"link": "exp"}, True),
}


def draw(name, patients=12, slots=6):
    loss, values, options, censored = CASES[name]
    causes = None if loss is not competing_risks_nll else 2
    p = draw_patients(patients, slots, causes or 1)
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    shape = (patients, slots, *((values,) if values else ()))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if loss is discrete_time_survival_nll and "from_logits" not in options:
        x = x.sigmoid()
    outcomes = {
        "event_times": p.times,
        "event_types" if causes else "event_indicators": p.types,
        "entry_times": p.entries,
        **options,
    }
    if loss is piecewise_hazard_nll:
        outcomes["fraction"] = torch.rand(patients, generator=generator) * 0.9 + 0.05
    visit = torch.arange(slots)
    read = (visit >= p.entries[:, None]) & (visit < p.times[:, None])
    at_time = (visit == p.times[:, None]) & (censored | (p.types != 0)[:, None])
    return loss, x, p, outcomes, read | at_time


def each(loss, x, p, outcomes, **more):
    return loss(x, sequence_mask=p.mask, reduction="none", **outcomes, **more)


@pytest.mark.parametrize("name", CASES)
def test_each_visits_term_is_weighted(unemulated, name):
    """A loss is the sum of its visits' terms, each times its weight."""
    loss, x, p, outcomes, read = draw(name)
    plain = each(loss, x, p, outcomes)
    ones = torch.where(read, 1.0, math.nan)
    torch.testing.assert_close(each(loss, x, p, outcomes, visit_weight=ones), plain)
    terms = [
        each(loss, x, p, outcomes, visit_weight=torch.where(read, torch.arange(6) == visit, -1.0))
        for visit in range(6)
    ]
    torch.testing.assert_close(sum(terms), plain)
    for visit, term in enumerate(terms):
        assert not term[~read[:, visit]].any()
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    weight = torch.rand(12, 6, generator=generator, dtype=torch.float64)
    expected = sum(weight[:, visit] * term for visit, term in enumerate(terms))
    got = each(loss, x, p, outcomes, visit_weight=torch.where(read, weight, math.nan))
    torch.testing.assert_close(got, expected)
    mean = loss(x, sequence_mask=p.mask, visit_weight=weight, sample_weight=p.weights, **outcomes)
    torch.testing.assert_close(mean, (expected * p.weights).mean())


@pytest.mark.parametrize("name", CASES)
def test_packed_rows(unemulated, name):
    loss, x, p, outcomes, read = draw(name)
    batch = PackedVisits.from_lists([[[1]] * length for length in p.lengths.tolist()]).to(
        torch.get_default_device()
    )
    weight = torch.where(read, torch.rand(12, 6, dtype=torch.float64), math.nan)
    x.requires_grad_()
    rows = PackedRows(batch.pack(x), batch)
    padded = each(loss, x, p, outcomes, visit_weight=weight)
    (grad,) = torch.autograd.grad(padded.sum(), x, retain_graph=True)
    for given in (batch.pack(weight), PackedRows(batch.pack(weight), batch)):
        packed = loss(rows, reduction="none", visit_weight=given, **outcomes)
        torch.testing.assert_close(packed, padded)
        (of_rows,) = torch.autograd.grad(packed.sum(), x, retain_graph=True)
        torch.testing.assert_close(of_rows, grad)
    other = PackedVisits.from_lists([[[1]] * length for length in p.lengths.flip(0).tolist()]).to(
        torch.get_default_device()
    )
    with pytest.raises(ValueError, match="visit_weight: expected rows of the same batch"):
        loss(rows, visit_weight=PackedRows(batch.pack(weight), other), **outcomes)


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name):
    loss, x, p, outcomes, _ = draw(name, 4, 3)
    if "fraction" in outcomes:
        outcomes["fraction"] = outcomes["fraction"].double()
    weight = torch.rand(4, 3, dtype=torch.float64) + 0.1

    def run(x, weight):
        return each(loss, x, p, outcomes, visit_weight=weight)

    given = (x.requires_grad_(), weight)
    if loss is piecewise_hazard_nll:
        weight.requires_grad_()
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused(backend, name):
    loss, x, p, outcomes, read = draw(name)
    patient, visit = read.nonzero()[5].tolist()
    weight = torch.where(read, 1.0, -1.0)
    weight[patient, visit] = weight[11, int(p.entries[11])] = -2
    count = 1 + ((patient, visit) != (11, int(p.entries[11]))) * int(read[11, p.entries[11]])
    batch = PackedVisits.from_lists([[[1]] * length for length in p.lengths.tolist()]).to(
        torch.get_default_device()
    )
    rows = PackedRows(batch.pack(x), batch)
    message = (
        rf"visit_weight must not be negative: patient {patient} has -2 at visit {visit} "
        rf"\(visits at fault: {count}\)"
    )
    with pytest.raises(ValueError, match=message):
        each(loss, x, p, outcomes, visit_weight=weight, validate=True)
    with pytest.raises(ValueError, match=message):
        loss(rows, visit_weight=batch.pack(weight), validate=True, **outcomes)
    with pytest.raises(TypeError, match="visit_weight: expected a floating-point dtype"):
        each(loss, x, p, outcomes, visit_weight=weight.long())
    with pytest.raises(ValueError, match=r"visit_weight: expected shape \[B, V\] = \[12, 6\]"):
        each(loss, x, p, outcomes, visit_weight=weight[:, :5])
    with pytest.raises(ValueError, match=r"visit_weight: expected shape \[n_visits\]"):
        loss(rows, visit_weight=weight[0], **outcomes)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("wrong", [1.5, -0.1])
@pytest.mark.parametrize("visit", [0, 2, 5])
def test_probabilities_outside_0_to_1(backend, visit, wrong, packed):
    """Of one patient among many, at any visit that is read."""
    hazards = torch.full((9, 6), 0.3)
    hazards[7, visit] = wrong
    hazards[2, 4] = wrong  # after the event: not read
    times, seen = torch.full((9,), 5), torch.ones(9, dtype=torch.long)
    times[2] = 3
    weights = torch.linspace(0.5, 1.5, 54).reshape(9, 6)
    if packed:
        batch = PackedVisits.from_lists([[[1]] * 6] * 9).to(torch.get_default_device())
        hazards, weights = PackedRows(batch.pack(hazards), batch), batch.pack(weights)
    with pytest.raises(ValueError, match=rf"patient 7 has {wrong} at visit {visit}"):
        discrete_time_survival_nll(hazards, times, seen, visit_weight=weights, validate=True)
