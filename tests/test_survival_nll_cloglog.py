"""The complementary log-log link: h = 1 − exp(−e^x), against loops, the reference and the
continuous time that it groups."""

from __future__ import annotations

import math

import pytest
import torch

from ehrseq_fast import (
    CompetingRisksSurvivalLoss,
    DiscreteTimeSurvivalLoss,
    competing_risks_nll,
    discrete_time_survival_nll,
    packed_competing_risks_nll,
    packed_survival_nll,
)

from .batches import from_lists
from .conftest import is_emulated
from .survival_cases import definition, draw_hazards, draw_patients, value_and_grad
from .tolerances import assert_close

pytestmark = pytest.mark.operation("survival_nll")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CONVENTIONS = ("excluded", "included")
CLOGLOG = {"from_logits": True, "link": "cloglog"}


def log_hazard(x):
    """log(1 − e^−m), m = e^x, in float64."""
    m = math.exp(x)
    return math.log(-math.expm1(-m)) if x < 0 else math.log1p(-math.exp(-m))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_agrees_with_the_formula_term_by_term(backend, convention):
    patients = draw_patients(12, 7)
    x = draw_hazards((12, 7), torch.float64, logits=True).clamp(max=2)  # no hazard rounds to 1
    nll = discrete_time_survival_nll(
        x,
        patients.times,
        patients.types,
        patients.mask,
        entry_times=patients.entries,
        censored_visit=convention,
        reduction="none",
        **CLOGLOG,
    )
    expected = []
    for i, row in enumerate(x.tolist()):
        time, event = int(patients.times[i]), bool(patients.types[i])
        total = sum(math.exp(row[t]) for t in range(int(patients.entries[i]), time))
        if event:
            total -= log_hazard(row[time])
        elif convention == "included":
            total += math.exp(row[time])
        expected.append(total)
    assert_close(nll, torch.tensor(expected, dtype=torch.float64), terms=20)
    hazards = -torch.expm1(-x.exp())
    by_hazards = discrete_time_survival_nll(
        hazards,
        patients.times,
        patients.types,
        patients.mask,
        entry_times=patients.entries,
        censored_visit=convention,
        reduction="none",
        eps=0,
    )
    assert_close(nll, by_hazards, terms=40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("causes", [None, 3])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_agrees_with_the_reference(backend, layout, causes, convention, dtype):
    patients = draw_patients(37, 41, causes or 1)
    shape = (37, 41) if causes is None else (37, 41, causes)
    x = draw_hazards(shape, dtype, logits=True)
    outcomes = (patients.times, patients.types)
    name = "event_indicators" if causes is None else "event_types"
    batch = from_lists(
        [[[1]] * int(n) for n in patients.lengths],
        event_times=patients.times,
        **{name: patients.types},
    )
    options = {
        "entry_times": patients.entries,
        "sample_weight": patients.weights,
        "censored_visit": convention,
        **CLOGLOG,
    }
    for reduction in ("mean", "none"):
        options["reduction"] = reduction
        if layout == "padded":
            loss = discrete_time_survival_nll if causes is None else competing_risks_nll
            found = value_and_grad(loss, x, *outcomes, patients.mask, **options)
        else:
            loss = packed_survival_nll if causes is None else packed_competing_risks_nll
            value, grad = value_and_grad(loss, batch.pack(x), batch, **options)
            found = value, batch.pad(grad, 0, 41)
        oracle = value_and_grad(definition, x.double(), *outcomes, patients.mask, **options)
        assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found[1].dtype == dtype
        for ours, theirs in zip(found, oracle, strict=True):
            assert_close(ours, theirs, terms=60)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(backend, dtype):
    """An event at any logit, and a survived visit wherever e^x is a number of the loss's dtype."""
    most = {torch.float64: 700.0, torch.float16: 8.0}.get(dtype, 80.0)
    values = [-1e4, -200.0, -90.0, -30.0, -8.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 3.0, 6.5, 8.0]
    events = torch.tensor([*values, 200.0, 1e4], dtype=torch.float64).to(dtype)
    survived = torch.tensor([*values, most], dtype=torch.float64).to(dtype)
    for x, seen in ((events[:, None], 1), (survived[:, None], 0)):
        outcomes = torch.zeros(len(x), dtype=torch.long), torch.full((len(x),), seen)
        options = {"reduction": "none", "censored_visit": "included", **CLOGLOG}
        value, grad = value_and_grad(discrete_time_survival_nll, x, *outcomes, **options)
        oracle, oracle_grad = value_and_grad(definition, x.double(), *outcomes, **options)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert_close(value, oracle, terms=20)
        assert_close(grad, oracle_grad, terms=20)
    assert float(value[0]) == 0  # e^-10000
    tiny = torch.tensor([[-40.0]], dtype=torch.float64)
    nll = discrete_time_survival_nll(tiny, torch.tensor([0]), torch.tensor([1]), **CLOGLOG)
    assert float(nll) == pytest.approx(40, rel=1e-15)


def test_nan_and_infinity_are_the_references(backend):
    times, seen = torch.tensor([1, 1, 1, 1, 1]), torch.tensor([1, 1, 0, 0, 1])
    for value in (math.nan, math.inf, -math.inf):
        for place in ((0, 0), (1, 1), (2, 1), (3, 2)):
            x = torch.zeros(5, 3, dtype=torch.float64)
            x[place] = value
            options = {"reduction": "none", "censored_visit": "included", **CLOGLOG}
            ours = value_and_grad(discrete_time_survival_nll, x, times, seen, **options)
            theirs = value_and_grad(definition, x, times, seen, **options)
            torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
            others = torch.ones(5, dtype=torch.bool)
            others[place[0]] = False
            torch.testing.assert_close(ours[1][others], theirs[1][others])


@pytest.mark.parametrize("causes", [None, 2])
def test_derivatives(backend, causes):
    torch.manual_seed(0)
    shape = (4, 5) if causes is None else (4, 5, causes)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    loss = discrete_time_survival_nll if causes is None else competing_risks_nll
    outcomes = torch.tensor([0, 4, 2, 3]), torch.tensor([1, 0, 1, 0])

    def function(x):
        return loss(x, *outcomes, censored_visit="included", reduction="none", **CLOGLOG)

    fast = is_emulated(backend)
    assert torch.autograd.gradcheck(function, x, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=fast)


def test_it_is_proportional_hazards_in_continuous_time():
    """Times of a rate e^(a + b z), grouped into intervals of length 1: a and b are found again,
    which the sigmoid link's are not."""
    torch.manual_seed(1)
    n, a, b = 20_000, -0.5, 0.8
    z = torch.randn(n)
    event = torch.distributions.Exponential((a + b * z).exp()).sample().floor().long()
    times, seen = event.clamp(max=3), event < 4
    found = {}
    for link in ("cloglog", "sigmoid"):
        weights = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=50)

        def closure(weights=weights, optimizer=optimizer, link=link):
            optimizer.zero_grad()
            x = (weights[0] + weights[1] * z)[:, None].expand(n, 4)
            loss = discrete_time_survival_nll(
                x, times, seen, from_logits=True, link=link, censored_visit="included"
            )
            loss.backward()
            return loss

        optimizer.step(closure)
        found[link] = weights.detach().tolist()
    assert found["cloglog"] == pytest.approx([a, b], abs=0.04)
    assert abs(found["sigmoid"][1] - b) > 0.2


def test_refusals_and_modules():
    x, outcomes = torch.randn(3, 4), (torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="link: expected one of 'sigmoid', 'cloglog', got 'soft"):
        discrete_time_survival_nll(x, *outcomes, from_logits=True, link="softmax")
    with pytest.raises(ValueError, match="from_logits: expected True with link='cloglog', got Fal"):
        discrete_time_survival_nll(x, *outcomes, link="cloglog")
    with pytest.raises(ValueError, match="from_logits: expected True with link='cloglog', got Fal"):
        competing_risks_nll(x[..., None].sigmoid(), *outcomes, link="cloglog")
    module = DiscreteTimeSurvivalLoss(**CLOGLOG)
    assert torch.equal(module(x, *outcomes), discrete_time_survival_nll(x, *outcomes, **CLOGLOG))
    assert "link='cloglog'" in repr(module)
    several = CompetingRisksSurvivalLoss(**CLOGLOG)
    expected = competing_risks_nll(x[..., None], *outcomes, **CLOGLOG)
    assert torch.equal(several(x[..., None], *outcomes), expected)
    torch.testing.assert_close(expected, module(x, *outcomes))
