"""The loss of rates that are constant within intervals: the formula, layouts, edges, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    PiecewiseHazardLoss,
    piecewise_hazard_nll,
    use_backend,
)
from ehrseq_fast.piecewise_hazard import reference

from . import pycox_files
from .conftest import is_emulated
from .survival_cases import draw_patients, value_and_grad
from .tolerances import assert_matches

pytestmark = [pytest.mark.operation("survival_nll"), pytest.mark.operation("piecewise_hazard")]

LINKS = ["softplus", "exp"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(patients, slots, dtype=torch.float32, scale=2.0):
    p = draw_patients(patients, slots)
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    x = torch.randn(patients, slots, generator=generator, dtype=torch.float64) * scale
    fraction = torch.rand(patients, generator=generator)
    fraction[::5] = 0
    fraction[1::5] = 1
    return x.to(dtype), p, fraction


def by_hand(x, time, seen, fraction, entry, link):
    rate = (lambda v: math.log1p(math.exp(v))) if link == "softplus" else math.exp
    total = sum(rate(v) for v in x[entry:time]) + fraction * rate(x[time])
    return total - (math.log(rate(x[time])) if seen else 0)


@pytest.mark.parametrize("link", LINKS)
def test_the_formula_term_by_term(backend, link):
    x, p, fraction = draw(31, 9, torch.float64)
    given = (x, p.times, p.types, fraction, p.mask)
    more = {"entry_times": p.entries, "sample_weight": p.weights, "link": link}
    columns = (x, p.times, p.types, fraction, p.entries, p.weights)
    expected = [
        w * by_hand(*row, link) for *row, w in zip(*(c.tolist() for c in columns), strict=True)
    ]
    got = piecewise_hazard_nll(*given, **more, reduction="none")
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)  # fractions are float32
    torch.testing.assert_close(piecewise_hazard_nll(*given, **more), got.mean())
    torch.testing.assert_close(piecewise_hazard_nll(*given, **more, reduction="sum"), got.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("shape", [(1, 1), (70, 17)])
def test_agrees_with_the_reference(backend, shape, link, dtype):
    x, p, fraction = draw(*shape, dtype)
    given = (p.times, p.types, fraction, p.mask)
    more = {"entry_times": p.entries, "sample_weight": p.weights, "link": link}
    value, grad = value_and_grad(piecewise_hazard_nll, x, *given, **more, reduction="none")
    definition = reference.piecewise_hazard_nll
    wide = value_and_grad(definition, x.double(), *given, **more, reduction="none")
    assert grad.dtype == dtype
    size = wide[0].abs().max() + 10
    assert_matches(value, wide[0], scale=size, terms=shape[1])
    assert_matches(grad, wide[1], scale=size * shape[0], terms=shape[1])


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(backend, dtype, link):
    x = torch.tensor([[-1e4, -1e4], [-1e4, -50.0], [80.0, 60.0], [1e4, 1e4]]).to(dtype)
    times, seen = torch.tensor([1, 1, 1, 1]), torch.tensor([1, 0, 1, 0])
    rows = slice(None) if link == "softplus" else slice(0, 3)  # e^1e4 is infinite
    given = (times[rows], seen[rows], torch.full((len(x[rows]),), 0.5))
    value, grad = value_and_grad(piecewise_hazard_nll, x[rows], *given, link=link, reduction="none")
    assert value.isfinite().all()
    wide = x.double()
    rate = torch.where(wide > 30, wide, wide.exp().log1p()) if link == "softplus" else wide.exp()
    log_rate = torch.where(wide < -30, wide, rate.log()) if link == "softplus" else wide
    expected = (rate[:, 0] + rate[:, 1] / 2 - seen * log_rate[:, 1])[rows]
    assert_matches(value, expected, scale=expected.abs(), terms=80)  # x units in e^x
    if dtype != torch.float16 or link == "softplus":
        assert grad.isfinite().all()


def test_what_is_not_seen_is_not_read(backend):
    x, p, fraction = draw(40, 8)
    given = (p.times, p.types, fraction, p.mask)
    expected = value_and_grad(piecewise_hazard_nll, x, *given, reduction="none")
    slot = torch.arange(8)
    read = (fraction > 0) | (p.types != 0)
    unread = (slot > p.times[:, None]) | ((slot == p.times[:, None]) & ~read[:, None])
    for dirty in (torch.nan, torch.inf):
        broken = torch.where(unread, dirty, x)
        got = value_and_grad(piecewise_hazard_nll, broken, *given, reduction="none")
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    seen = x.clone()
    patients = torch.arange(40)
    seen[patients, p.times] = torch.nan
    nll = piecewise_hazard_nll(seen, *given, reduction="none")
    assert torch.equal(nll.isnan(), read)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_rows(backend, dtype, link):
    x, p, fraction = draw(40, 11, dtype)
    lists = [[[1]] * length for length in p.lengths.tolist()]
    batch = PackedVisits.from_lists(lists, event_times=p.times, event_indicators=p.types)
    batch = batch.to(x.device)
    values = batch.pack(x).detach().requires_grad_()
    more = {"entry_times": p.entries, "sample_weight": p.weights, "link": link}
    more["reduction"] = "none"
    packed = piecewise_hazard_nll(PackedRows(values, batch), fraction=fraction, **more)
    given = (p.times, p.types, fraction, p.mask)
    padded, grad = value_and_grad(piecewise_hazard_nll, x, *given, **more)
    # kernels sum the visits of packed rows in another order
    assert_matches(packed.detach(), padded.double(), scale=padded.abs().max() + 10, terms=11)
    scale = torch.arange(1.0, 41, dtype=packed.dtype)
    (of_rows,) = torch.autograd.grad(packed, values, scale)
    assert_matches(of_rows, batch.pack(grad).double(), scale=grad.abs().max() + 1)


@pytest.mark.parametrize("link", LINKS)
def test_padded_and_packed_are_the_same_bits(compiled, link):
    x, p, fraction = draw(70, 40)
    batch = PackedVisits.from_lists([[[1]] * length for length in p.lengths.tolist()])
    values = batch.pack(x).detach().requires_grad_()
    more = {"entry_times": p.entries, "sample_weight": p.weights, "link": link}
    more["reduction"] = "none"
    with use_backend("cpu"):
        rows = PackedRows(values, batch)
        packed = piecewise_hazard_nll(rows, p.times, p.types, fraction, **more)
        padded, grad = value_and_grad(
            piecewise_hazard_nll, x, p.times, p.types, fraction, p.mask, **more
        )
        (of_rows,) = torch.autograd.grad(packed, values, torch.arange(1.0, 71))
    assert torch.equal(packed, padded)
    assert torch.equal(of_rows, batch.pack(grad))


def test_columns_that_learn():
    x, p, fraction = draw(6, 4, torch.float64)
    columns = fraction.double().requires_grad_(), p.weights.double().requires_grad_()

    def run(fraction, weight):
        return piecewise_hazard_nll(x, p.times, p.types, fraction, p.mask, sample_weight=weight)

    inside = [columns[0].detach().clamp(0.1, 0.9).requires_grad_(), columns[1]]
    assert torch.autograd.gradcheck(run, inside)


@pytest.mark.parametrize("link", LINKS)
def test_the_derivative_by_a_fraction_of_0(link):
    """It is the interval's rate; what is not finite there is as little read as without."""
    x = torch.tensor([[0.3, -0.4, 9.0], [0.3, 2.0, 9.0], [0.3, torch.nan, 9.0], [0.3, 1e4, 9.0]])
    x, times, seen = x.double(), torch.ones(4).long(), torch.tensor([0, 1, 0, 0])
    fraction = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def run(fraction):
        return piecewise_hazard_nll(x, times, seen, fraction, link=link, reduction="none")

    rate = F.softplus(x[:, 1]) if link == "softplus" else x[:, 1].exp()
    expected = rate.where(rate.isfinite(), 0)
    assert torch.equal(run(fraction), run(fraction.detach()))
    (found,) = torch.autograd.grad(run(fraction).sum(), fraction)
    torch.testing.assert_close(found, expected)
    tangent = torch.func.jvp(run, (fraction.detach(),), (torch.ones(4).double(),))[1]
    torch.testing.assert_close(tangent, expected)


def test_a_nan_fraction_shows_where_values_are_hidden():
    x, p, fraction = draw(6, 4)
    fraction[2] = torch.nan

    def one(x, time, part):
        return piecewise_hazard_nll(x[None], time[None], torch.zeros(1), part[None])

    each = torch.func.vmap(one)(x, p.times, fraction)
    assert each.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("link", LINKS)
def test_what_is_not_finite_shows_where_the_definition_shows_it(backend, link):
    values = [torch.nan, torch.inf, -torch.inf, 0.3]
    x = torch.tensor([[v, 0.1] for v in values] + [[0.1, v] for v in values])
    times = torch.ones(8, dtype=torch.int64)
    for kind, part in ((0, 0.5), (1, 0.5), (1, 0.0), (0, 0.0)):
        given = times, torch.full((8,), kind), torch.full((8,), part)
        ours = value_and_grad(piecewise_hazard_nll, x, *given, link=link, reduction="none")
        theirs = value_and_grad(
            reference.piecewise_hazard_nll, x, *given, link=link, reduction="none"
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("link", LINKS)
def test_a_zero_derivative_and_an_infinite_gradient(backend, link):
    """NaN where a logit is read, and 0 where it is not, as in the definition."""
    x = torch.tensor([[-1e4, -1e4, 0.0]])
    for part in (0.5, 0.0):
        given = torch.tensor([1]), torch.tensor([0]), torch.tensor([part])
        grads = []
        for loss in (piecewise_hazard_nll, reference.piecewise_hazard_nll):
            leaf = x.clone().requires_grad_()
            loss(leaf, *given, link=link, reduction="none").backward(torch.tensor([torch.inf]))
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(compiled, reduction):
    x, p, fraction = draw(5, 20)
    operator = torch.ops.ehrseq_fast.piecewise_hazard_nll.default
    none = (None,) * 3
    for link in (0, 1):
        arguments = (x, p.times, p.types, p.mask, *none, p.entries, p.weights, fraction, None)
        torch.library.opcheck(operator, (*arguments, link, reduction, True))


@pytest.mark.parametrize("link", LINKS)
def test_derivatives(backend, link):
    x, p, fraction = draw(6, 4, torch.float64, 1.0)
    fraction = fraction.double()

    def run(x):
        more = {"entry_times": p.entries, "link": link, "reduction": "none"}
        return piecewise_hazard_nll(x, p.times, p.types, fraction, p.mask, **more)

    x.requires_grad_()
    fast = is_emulated(backend)
    assert torch.autograd.gradcheck(run, x, fast_mode=fast)
    assert torch.autograd.gradgradcheck(run, x, fast_mode=fast)
    tangent = torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))[1]
    (grad,) = torch.autograd.grad(run(x).sum(), x)
    torch.testing.assert_close(tangent.sum(), grad.sum())


def test_per_sample():
    x, p, fraction = draw(6, 4)
    columns = (x, p.times, p.types, fraction)

    def one(x, time, seen, part):
        return piecewise_hazard_nll(x[None], time[None], seen[None], part[None])

    each = torch.func.vmap(one)(*columns)
    torch.testing.assert_close(each, piecewise_hazard_nll(*columns, reduction="none"))


def test_compiles(compiled):
    x, p, fraction = draw(9, 4)
    given = (x, p.times, p.types, fraction, p.mask)
    fast = torch.compile(piecewise_hazard_nll, fullgraph=True, dynamic=True, backend="aot_eager")
    got, expected = (value_and_grad(f, *given) for f in (fast, piecewise_hazard_nll))
    torch.testing.assert_close(got, expected)


def test_pycox(monkeypatch):
    loss = pycox_files.load(monkeypatch, "models.loss").nll_pc_hazard_loss
    x, p, fraction = draw(200, 5, torch.float64, 3.0)
    given = (p.times, p.types.double(), fraction.double())
    ours, theirs = (
        value_and_grad(f, x, *given, reduction="none") for f in (piecewise_hazard_nll, loss)
    )
    torch.testing.assert_close(ours[0], theirs[0].view(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-7)


def test_without_a_fraction_all_of_the_interval_was_seen(backend):
    x, p, _ = draw(10, 4)
    ours = piecewise_hazard_nll(x, p.times, p.types)
    assert torch.equal(ours, piecewise_hazard_nll(x, p.times, p.types, torch.ones(10)))


def test_no_patients(backend):
    none = torch.zeros(0, dtype=torch.int64)
    assert piecewise_hazard_nll(torch.zeros(0, 3), none, none, reduction="sum") == 0
    assert piecewise_hazard_nll(torch.zeros(0, 3), none, none).isnan()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"fraction": torch.tensor([0.5, 1.5])}, ValueError, r"be in \[0, 1\]: patient 1 has 1.5"),
        (
            {"fraction": torch.tensor([torch.nan, 0])},
            ValueError,
            "fraction .* patient 0 has nan",
        ),
        ({"fraction": torch.tensor([1, 0])}, TypeError, "fraction: expected a floating-point"),
        ({"fraction": torch.rand(3)}, ValueError, r"fraction: expected shape \[B\] = \[2\]"),
        ({"event_indicators": torch.tensor([0, 2])}, ValueError, "patient 1 has 2"),
        ({"event_times": torch.tensor([3, 0])}, ValueError, "patient 0 has event time 3 and 3"),
        ({"event_times": None}, TypeError, "event_times: expected a tensor"),
        ({"entry_times": torch.tensor([1, 0])}, ValueError, "patient 0 has entry time 1"),
        ({"sample_weight": torch.rand(3)}, ValueError, "sample_weight: expected shape"),
        ({"link": "log"}, ValueError, "link: expected one of 'softplus', 'exp', got 'log'"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of"),
    ],
)
def test_errors(unemulated, change, error, match):
    given = {
        "logits": torch.zeros(2, 3),
        "event_times": torch.tensor([0, 1]),
        "event_indicators": torch.tensor([1, 0]),
        "fraction": torch.tensor([0.5, 1.0]),
        **change,
    }
    device = torch.get_default_device()
    given = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    with pytest.raises(error, match=match):
        piecewise_hazard_nll(**given, validate=True)


def test_module():
    x, p, fraction = draw(7, 5)
    module = PiecewiseHazardLoss(link="exp", reduction="sum")
    got = module(x, p.times, p.types, fraction, p.mask, sample_weight=p.weights)
    more = {"link": "exp", "reduction": "sum", "sample_weight": p.weights}
    assert torch.equal(got, piecewise_hazard_nll(x, p.times, p.types, fraction, p.mask, **more))
    assert "exp" in repr(module)
