"""The losses of a probability mass over time: the definition's numbers, layouts, edges, errors."""

from __future__ import annotations

import math

import pytest
import torch

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    PMFCompetingRisksLoss,
    PMFLoss,
    pmf_competing_risks_nll,
    pmf_nll,
    predictions,
    use_backend,
)
from ehrseq_fast import backend as backends
from ehrseq_fast.pmf_nll import reference

from . import pycox_files
from .batches import from_lists
from .conftest import is_emulated
from .survival_cases import Patients, draw_patients, value_and_grad
from .tolerances import assert_matches

pytestmark = pytest.mark.operation("pmf_nll")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = [
    {"censored_visit": convention, "reduction": reduction}
    for convention in ("included", "excluded")
    for reduction in ("none", "mean", "sum")
]


def loss_of(causes):
    return pmf_nll if causes is None else pmf_competing_risks_nll


def draw(patients, slots, causes=None, dtype=torch.float32, scale=2.0, seed=0):
    drawn = draw_patients(patients, slots, causes or 1, seed=seed)
    shape = (patients, slots) if causes is None else (patients, slots, causes)
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed + 1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype), drawn


def by_hand(x, length, time, kind, entry, included):
    """The formula, term by term; x is a list of visits, each a list of causes."""
    at_risk = [v for visit in x[entry:length] for v in visit] + [0.0]
    if kind:
        outcome = [x[time][kind - 1]]
    else:
        later = x[time + 1 if included else time : length]
        outcome = [v for visit in later for v in visit] + [0.0]
    return math.log(sum(map(math.exp, at_risk))) - math.log(sum(map(math.exp, outcome)))


@pytest.mark.parametrize("causes", [None, 1, 3])
@pytest.mark.parametrize("included", [True, False])
def test_the_formula_term_by_term(backend, causes, included):
    x, p = draw(23, 9, causes, torch.float64)
    got = loss_of(causes)(
        x,
        p.times,
        p.types,
        p.mask,
        entry_times=p.entries,
        sample_weight=p.weights,
        censored_visit="included" if included else "excluded",
        reduction="none",
    )
    rows = x.reshape(23, 9, causes or 1).tolist()
    expected = [
        w * by_hand(row, length, time, kind, entry, included)
        for row, w, length, time, kind, entry in zip(
            rows,
            p.weights.tolist(),
            p.lengths.tolist(),
            p.times.tolist(),
            p.types.tolist(),
            p.entries.tolist(),
            strict=True,
        )
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causes", [None, 2])
@pytest.mark.parametrize("shape", [(1, 1), (70, 5), (130, 33), (9, 300)])
@pytest.mark.parametrize("options", OPTIONS[::2] + OPTIONS[1:2])
def test_agrees_with_the_reference(backend, shape, causes, dtype, options):
    if is_emulated(backend):
        shape = {130: (21, 33), 9: (3, 300)}.get(shape[0], shape)
    x, p = draw(*shape, causes, dtype)
    given = (p.times, p.types, p.mask)
    more = {"entry_times": p.entries, "sample_weight": p.weights}
    value, grad = value_and_grad(loss_of(causes), x, *given, **more, **options)
    wide, wide_grad = value_and_grad(reference.pmf_nll, x.double(), *given, **more, **options)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    terms = x[0].numel()
    summed = wide.abs() if options["reduction"] == "none" else wide.abs() * math.sqrt(shape[0])
    assert_matches(value, wide, scale=summed + 1, terms=terms)
    assert_matches(grad, wide_grad, scale=2 * shape[0], terms=terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [20.0, 1e4])
def test_large_logits_are_finite_and_right(backend, scale, dtype):
    x, p = draw(40, 12, None, dtype, scale)
    value, grad = value_and_grad(pmf_nll, x, p.times, p.types, p.mask, reduction="none")
    wide, wide_grad = value_and_grad(
        reference.pmf_nll, x.double(), p.times, p.types, p.mask, reduction="none"
    )
    assert value.isfinite().all()
    assert_matches(value, wide, scale=wide.abs() + 1, terms=12)
    assert_matches(grad, wide_grad, scale=80 * scale, terms=12)


def test_small_losses_keep_their_digits(compiled):
    # the outcome is nearly certain: 1 - P is far below the roundoff of P
    x = torch.tensor([[-30.0, -50.0, 40.0]], dtype=torch.float64, requires_grad=True)
    loss = pmf_nll(x, torch.tensor([1]), torch.tensor([0]))
    odds = math.exp(-70.0) + math.exp(-90.0)
    torch.testing.assert_close(loss.item(), odds, rtol=1e-12, atol=0)
    loss.backward()
    torch.testing.assert_close(x.grad[0, 0].item(), math.exp(-70.0), rtol=1e-12, atol=0)


def packed_of(x: torch.Tensor, p: Patients, **outcomes) -> PackedRows:
    lists = [[[1]] * length for length in p.lengths.tolist()]
    batch = from_lists(lists, **outcomes)
    return PackedRows(batch.pack(x), batch)


@pytest.mark.parametrize("causes", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_has_the_bits_of_padded(backend, causes, dtype):
    """On a GPU as many lanes share a patient as the mean length asks for: other sums."""
    x, p = draw(150, 21, causes, dtype)
    types = {"event_indicators" if causes is None else "event_types": p.types}
    rows = packed_of(x, p, event_times=p.times, **types)
    more = {"entry_times": p.entries, "sample_weight": p.weights, "reduction": "none"}
    values = rows.values.detach().clone().requires_grad_()
    packed = loss_of(causes)(PackedRows(values, rows.batch), **more)
    padded, grad = value_and_grad(loss_of(causes), x, p.times, p.types, p.mask, **more)
    scale = torch.arange(1.0, 151, dtype=packed.dtype)
    (of_rows,) = torch.autograd.grad(packed, values, scale)
    pairs = ((packed.detach(), padded), (of_rows, rows.batch.pack(grad)))
    for of_packed, of_padded in pairs:
        if backend in ("cpu", "reference"):
            assert torch.equal(of_packed, of_padded)
        else:
            assert_matches(of_packed, of_padded.double(), scale=150, terms=x[0].numel())


def test_padding_is_never_read(backend):
    x, p = draw(30, 8)
    given = (p.times, p.types, p.mask)
    expected = value_and_grad(pmf_nll, x, *given, reduction="none")
    dirty = torch.where(p.mask, x, torch.nan)
    got = value_and_grad(pmf_nll, dirty, *given, reduction="none")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not got[1][~p.mask].any()
    early = torch.arange(8) < p.entries[:, None]
    dirty = torch.where(early, torch.inf, x)
    more = {"entry_times": p.entries, "reduction": "none"}
    got = value_and_grad(pmf_nll, dirty, *given, **more)
    expected = value_and_grad(pmf_nll, x, *given, **more)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("causes", [None, 2])
@pytest.mark.parametrize("seen", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen(backend, value, seen, causes):
    """By the loss of its own patient, and where the definition has it in the gradient."""
    x = torch.randn((5, 4) if causes is None else (5, 4, causes))
    for at in range(4):
        x[1 + at, at] = value
    times, types = torch.full((5,), 1), torch.full((5,), seen)
    loss, grad = value_and_grad(loss_of(causes), x, times, types, reduction="none")
    expected, wanted = value_and_grad(reference.pmf_nll, x, times, types, reduction="none")
    assert loss[0].isfinite()
    assert grad[0].isfinite().all()
    assert loss[1:].isfinite().any() == (value == -torch.inf)
    for mine, theirs in ((loss, expected), (grad, wanted)):
        assert_matches(mine, theirs.double(), scale=10, terms=10)


def test_visits_at_which_the_event_cannot_be(backend):
    x = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for time, seen, expected in ((1, 1, math.log(2)), (1, 0, math.log(2)), (0, 0, 0.0)):
        value, grad = value_and_grad(pmf_nll, x, torch.tensor([time]), torch.tensor([seen]))
        torch.testing.assert_close(value.item(), expected)
        assert grad.isfinite().all()
        assert grad[0, 0] == grad[0, 2] == 0
    assert pmf_nll(x, torch.tensor([0]), torch.tensor([1])) == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("repeated", [1, 20])  # less than a vector, and several
@pytest.mark.parametrize("incoming", [torch.nan, torch.inf])
@pytest.mark.parametrize("seen", [0, 1])
@pytest.mark.parametrize("far", [-torch.inf, -2000.0, 2000.0])
def test_incoming_gradients_that_are_not_finite_reach_what_is_at_risk(
    backend, incoming, seen, far, repeated, dtype
):
    """Also where the derivative is 0, as its probability is too small to be told from 0."""
    x = torch.tensor([[0.5, 1.0, -1.0, far, 3.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    x, mask = (values.repeat_interleave(repeated, 1) for values in (x, mask))
    times, entries = torch.tensor([1, 1]) * repeated, torch.tensor([1, 0]) * repeated
    outcomes = times, torch.tensor([seen, 1]), mask
    grads = {}
    for where in ("reference", backend):
        given = x.to(dtype).requires_grad_()
        with use_backend(where):
            loss = pmf_nll(given, *outcomes, entry_times=entries, reduction="none")
            loss.backward(torch.tensor([incoming, 1.0]))
        grads[where] = given.grad
    assert torch.equal(grads[backend].isfinite(), grads["reference"].isfinite())
    at_risk = (torch.arange(5 * repeated) >= repeated) & (mask[0] == 1)
    assert not grads[backend][0, at_risk].isfinite().any()
    assert not grads[backend][0, ~at_risk].any()


def test_a_certain_outcome_has_no_gradient(backend):
    # nothing else is at risk: censored at the entry, where the visit of censoring says nothing
    x = torch.randn(1, 3)
    more = {"entry_times": torch.tensor([1]), "censored_visit": "excluded"}
    value, grad = value_and_grad(pmf_nll, x, torch.tensor([1]), torch.tensor([0]), **more)
    assert value == 0
    assert not grad.any()


@pytest.mark.parametrize("causes", [None, 2])
def test_derivatives(unemulated, causes):
    x, p = draw(6, 4, causes, torch.float64)
    x.requires_grad_()
    loss = loss_of(causes)

    def run(x):
        return loss(x, p.times, p.types, p.mask, entry_times=p.entries, reduction="none")

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)
    tangent = torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))[1]
    (grad,) = torch.autograd.grad(run(x).sum(), x)
    torch.testing.assert_close(tangent.sum(), grad.sum())


@pytest.mark.parametrize("grad", ["stride 0", "strided"])
def test_gradients_of_any_strides(backend, grad):
    x, p = draw(12, 5)
    x = x.t().contiguous().t().requires_grad_()
    loss = pmf_nll(x, p.times, p.types, p.mask, reduction="none")
    given = torch.tensor(2.0).expand(12) if grad == "stride 0" else torch.randn(24)[::2]
    (got,) = torch.autograd.grad(loss, x, given)
    wide = x.detach().double().requires_grad_()
    expected = reference.pmf_nll(wide, p.times, p.types, p.mask, reduction="none")
    (wanted,) = torch.autograd.grad(expected, wide, given.double())
    assert_matches(got, wanted, scale=4, terms=5)


def test_same_bits_for_any_number_of_threads_and_every_time(unemulated):
    x, p = draw(3000, 40)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = value_and_grad(pmf_nll, x, p.times, p.types, p.mask)
        torch.set_num_threads(2)
        again = [value_and_grad(pmf_nll, x, p.times, p.types, p.mask) for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    for second in again:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("included", [True, False])
@pytest.mark.parametrize("causes", [None, 3])
def test_impossible_outcomes_stay_within_memory_and_the_formula(kernels, causes, included):
    """On a GPU nothing checks outcomes: times outside the visits, causes that do not exist, masks
    with holes."""
    if kernels == "cpu":
        pytest.skip("the host's kernels refuse them")
    shape = (8, 6) if causes is None else (8, 6, causes)
    times = torch.tensor([-(2**40), -1, 0, 3, 5, 6, 2**40, 4])
    types = torch.tensor([1, 0, 1, 0, 7, -3, 1, 2] if causes else [1, 0, 1, 0, 1, 0, 0, 1])
    entries = torch.tensor([0, 0, -5, 4, 2**40, 1, 2, -(2**40)])
    mask = torch.rand(8, 6) < 0.7
    mask[4] = False
    x = torch.where(mask if causes is None else mask[..., None], torch.randn(shape), torch.nan)
    options = {"censored_visit": "included" if included else "excluded", "reduction": "none"}
    value, grad = backends.operators(kernels).pmf_nll.default(
        *(x, times, types, mask, None, None, None, entries, None),
        *(causes is not None, included, 0, True),
    )
    x = x.double().requires_grad_()
    expected = reference.pmf_nll(x, times, types, mask, entry_times=entries, **options)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    assert_matches(value, expected.detach(), scale=4, terms=18)
    assert_matches(grad, wanted, terms=18)


def test_no_patients(backend):
    none = torch.zeros(0, dtype=torch.int64)
    x = torch.zeros(0, 3, requires_grad=True)
    assert pmf_nll(x, none, none).isnan()
    assert pmf_nll(x, none, none, reduction="sum") == 0
    assert pmf_nll(x, none, none, reduction="none").shape == (0,)


def test_operator_and_compile(compiled):
    x, p = draw(5, 4)
    operator = torch.ops.ehrseq_fast.pmf_nll.default
    rows = packed_of(x, p, event_times=p.times, event_indicators=p.types)
    batch = rows.batch
    layout = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
    torch.library.opcheck(
        operator, (x, p.times, p.types, p.mask, *[None] * 5, False, True, 0, True)
    )
    torch.library.opcheck(
        operator,
        (rows.values, p.times, p.types, None, *layout, None, p.weights, False, True, 1, False),
    )
    fast = torch.compile(pmf_nll, fullgraph=True, dynamic=True, backend="aot_eager")
    got = value_and_grad(fast, x, p.times, p.types, p.mask)
    expected = value_and_grad(pmf_nll, x, p.times, p.types, p.mask)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": torch.zeros(2)}, ValueError, r"logits: expected shape \[B, V\], got \[2\]"),
        ({"logits": torch.zeros(2, 3).int()}, TypeError, "logits: expected a floating-point"),
        ({"event_times": torch.tensor([0, 3])}, ValueError, "patient 1 has event time 3 and 3"),
        ({"event_times": torch.tensor([0.0, 1.0])}, TypeError, "event_times: expected an integer"),
        ({"event_times": torch.tensor([0])}, ValueError, r"\[B\] = \[2\] for logits \[2, 3\]"),
        ({"event_indicators": torch.tensor([0, 2])}, ValueError, "patient 1 has 2"),
        ({"event_indicators": None}, TypeError, "event_indicators: expected a tensor"),
        ({"entry_times": torch.tensor([1, 0])}, ValueError, "patient 0 has entry time 1"),
        ({"sequence_mask": torch.tensor([[1, 0, 1]] * 2)}, ValueError, "patient 0 has 1 at visit"),
        ({"censored_visit": "maybe"}, ValueError, "censored_visit: expected one of"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of"),
    ],
)
def test_errors(unemulated, change, error, match):
    given = {
        "logits": torch.zeros(2, 3),
        "event_times": torch.tensor([0, 1]),
        "event_indicators": torch.tensor([1, 0]),
    }
    moved = {k: v.to(torch.get_default_device()) if v is not None and not isinstance(v, str) else v
             for k, v in {**given, **change}.items()}  # fmt: skip
    with pytest.raises(error, match=match):
        pmf_nll(**moved, validate=True)


def test_a_cause_that_does_not_exist(unemulated):
    times, types = torch.tensor([0, 1]), torch.tensor([1, 3])
    with pytest.raises(ValueError, match=r"a cause 1..2: patient 1 has 3"):
        pmf_competing_risks_nll(torch.zeros(2, 3, 2), times, types, validate=True)


def test_modules():
    x, p = draw(7, 5, 2)
    module = PMFCompetingRisksLoss(censored_visit="excluded", reduction="sum")
    got = module(x, p.times, p.types, p.mask, sample_weight=p.weights)
    more = {"censored_visit": "excluded", "reduction": "sum", "sample_weight": p.weights}
    assert torch.equal(got, pmf_competing_risks_nll(x, p.times, p.types, p.mask, **more))
    assert "excluded" in repr(module)
    x, p = draw(7, 5)
    assert torch.equal(PMFLoss()(x, p.times, p.types), pmf_nll(x, p.times, p.types))


def test_pycox(monkeypatch):
    losses = pycox_files.load(monkeypatch, "models.loss")
    x, p = draw(50, 7, None, torch.float64, 1.0)
    theirs = losses.nll_pmf(x, p.times, p.types.double(), reduction="none")
    ours = pmf_nll(x, p.times, p.types, reduction="none")
    torch.testing.assert_close(ours, theirs.view(-1), rtol=0, atol=2e-4)  # 1e-7 / P
    x, p = draw(50, 7, 3, torch.float64, 1.0)
    theirs = losses.nll_pmf_cr(x.transpose(1, 2).contiguous(), p.times, p.types, reduction="none")
    ours = pmf_competing_risks_nll(x, p.times, p.types, reduction="none")
    torch.testing.assert_close(ours, theirs.view(-1), rtol=0, atol=2e-4)


def test_the_reference_serves_where_it_is_asked_for():
    x, p = draw(5, 4)
    with use_backend("reference"):
        asked = pmf_nll(x, p.times, p.types, p.mask)
    assert_matches(pmf_nll(x, p.times, p.types, p.mask), asked.double(), scale=4, terms=4)


@pytest.mark.parametrize("causes", [None, 2])
def test_the_hazards_give_the_mass(causes):
    x, p = draw(30, 7, causes, torch.float64)
    masked = x if causes else x[:, :, None]
    masked = torch.where(p.mask[:, :, None], masked, -torch.inf)
    mass = torch.cat([masked.flatten(1), torch.zeros(30, 1, dtype=x.dtype)], 1).softmax(1)
    mass = mass[:, :-1].view(masked.shape)
    dirty = torch.where(p.mask[:, :, None] if causes else p.mask, x, torch.nan).requires_grad_()
    hazards = predictions.hazards_from_pmf(dirty, p.mask)
    assert not hazards[~p.mask].any()
    if causes:
        found = predictions.cumulative_incidence(hazards, p.mask)
        torch.testing.assert_close(found, mass.cumsum(1))
    else:
        found = predictions.survival(hazards, p.mask)
        torch.testing.assert_close(found, 1 - mass[:, :, 0].cumsum(1))
    (grad,) = torch.autograd.grad(found.sum(), dirty)
    assert grad.isfinite().all()
    assert not grad[~p.mask].any()
    lists = [[[1]] * length for length in p.lengths.tolist()]
    batch = PackedVisits.from_lists(lists)
    packed = predictions.hazards_from_pmf(PackedRows(batch.pack(x), batch))
    torch.testing.assert_close(packed.values, batch.pack(hazards.detach()))


def test_hazards_of_large_logits():
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [-1e4, 50.0, -torch.inf]])
    hazards = predictions.hazards_from_pmf(x)
    expected = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(hazards, expected)
    with pytest.raises(ValueError, match=r"logits: expected \[B, V\] or \[B, V, K\], got"):
        predictions.hazards_from_pmf(torch.zeros(3))
    with pytest.raises(ValueError, match="sequence_mask: expected"):
        predictions.hazards_from_pmf(x, torch.ones(3, 2))
