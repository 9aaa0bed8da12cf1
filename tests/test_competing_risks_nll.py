"""competing_risks_nll on every backend, against its reference in float64 and the formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ehrseq_fast.survival_nll import (
    CompetingRisksSurvivalLoss,
    competing_risks_nll,
    discrete_time_survival_nll,
)

from .conftest import is_emulated
from .survival_cases import (
    definition,
    draw_hazards,
    draw_patients,
    nll_of_patient,
    nll_of_softmax_patient,
    on_default_device,
    value_and_grad,
)
from .tolerances import assert_close, assert_matches

pytestmark = pytest.mark.operation("survival_nll")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CONVENTIONS = ("excluded", "included")
# from_logits, link: the three ways from a value to a likelihood
WAYS = {
    "probabilities": {"from_logits": False},
    "sigmoid": {"from_logits": True, "link": "sigmoid"},
    "softmax": {"from_logits": True, "link": "softmax"},
}


def draw(count, slots, causes, dtype, way, seed=0):
    classes = causes + (way == "softmax")
    patients = draw_patients(count, slots, causes, seed)
    return patients, draw_hazards((count, slots, classes), dtype, way != "probabilities", seed)


def assert_as_reference(hazards, *args, terms=40, **options):
    """Loss and gradient against the reference on the same numbers in float64."""
    value, grad = value_and_grad(competing_risks_nll, hazards, *args, **options)
    oracle, oracle_grad = value_and_grad(definition, hazards.double(), *args, **options)
    assert value.dtype == (torch.float64 if hazards.dtype == torch.float64 else torch.float32)
    assert grad.dtype == hazards.dtype
    assert grad.shape == hazards.shape
    assert_close(value, oracle, terms)
    if grad.is_cuda:
        # quotients there are less exact, and a class's derivative is a difference of two numbers
        # of the size of its patient's weight
        weight = torch.arange(1.0, value.numel() + 1).reshape(value.shape)
        weight = weight.view(-1, *(1,) * (grad.dim() - 1)) if value.dim() else weight
        assert_matches(grad, oracle_grad, scale=weight, terms=terms)
    else:
        assert_close(grad, oracle_grad, terms)
    assert (grad[oracle_grad == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("slots", "causes"), [(1, 1), (3, 5), (5, 2), (101, 3), (7, 33)])
def test_agrees_with_reference(backend, dtype, convention, way, slots, causes):
    patients, hazards = draw(70, slots, causes, dtype, way)
    for reduction in ("mean", "sum", "none"):
        assert_as_reference(
            hazards,
            patients.times,
            patients.types,
            patients.mask,
            censored_visit=convention,
            entry_times=patients.entries,
            sample_weight=patients.weights,
            reduction=reduction,
            **WAYS[way],
        )


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_sigmoid_agrees_with_the_formula_term_by_term(backend, convention):
    patients, hazards = draw(15, 7, 3, torch.float64, "probabilities")
    nll = competing_risks_nll(
        hazards,
        patients.times,
        patients.types,
        patients.mask,
        entry_times=patients.entries,
        censored_visit=convention,
        reduction="none",
    )
    included = convention == "included"
    for i, (time, kind, entry, mask) in enumerate(
        zip(
            patients.times.tolist(),
            patients.types.tolist(),
            patients.entries.tolist(),
            patients.mask.tolist(),
            strict=True,
        )
    ):
        expected = sum(
            nll_of_patient(hazards[i, :, k].tolist(), time, kind == k + 1, entry, included, mask)
            for k in range(3)
        )
        assert abs(nll[i].item() - expected) < 1e-13 * max(1, expected)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_softmax_agrees_with_the_formula_term_by_term(backend, convention):
    patients, logits = draw(15, 7, 3, torch.float64, "softmax")
    nll = competing_risks_nll(
        logits,
        patients.times,
        patients.types,
        patients.mask,
        from_logits=True,
        link="softmax",
        entry_times=patients.entries,
        censored_visit=convention,
        reduction="none",
    )
    for i, (time, kind, entry) in enumerate(
        zip(
            patients.times.tolist(), patients.types.tolist(), patients.entries.tolist(), strict=True
        )
    ):
        expected = nll_of_softmax_patient(
            logits[i].tolist(), time, kind, entry, convention == "included"
        )
        assert abs(nll[i].item() - expected) < 1e-13 * max(1, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_one_cause_is_the_single_risk_loss(backend, way, convention):
    """With softmax, its logit is the cause's minus that of no event."""
    patients, hazards = draw(40, 21, 1, torch.float64, way)
    args = patients.times, patients.types, patients.mask
    competing = competing_risks_nll(hazards, *args, censored_visit=convention, **WAYS[way])
    single = hazards[..., 1] - hazards[..., 0] if way == "softmax" else hazards[..., 0]
    expected = discrete_time_survival_nll(
        single, *args, censored_visit=convention, from_logits=way != "probabilities"
    )
    assert_close(competing, expected, terms=60)


def test_softmax_hazards_sum_below_one_and_are_a_distribution(backend):
    """Summed over every (time, cause) and survival past the end, probabilities make 1."""
    slots, causes = 4, 2
    logits = draw_hazards((1, slots, causes + 1), torch.float64, logits=True)
    outcomes = [(t, k) for t in range(slots) for k in range(1, causes + 1)] + [(slots - 1, 0)]
    times, types = (torch.tensor(column) for column in zip(*outcomes, strict=True))
    nll = competing_risks_nll(
        logits.expand(len(outcomes), -1, -1),
        times,
        types,
        from_logits=True,
        link="softmax",
        censored_visit="included",
        reduction="none",
    )
    assert abs((-nll).exp().sum().item() - 1) < 1e-12


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    count=st.integers(0, 140),
    slots=st.integers(1, 40),
    causes=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    way=st.sampled_from(sorted(WAYS)),
    convention=st.sampled_from(CONVENTIONS),
    with_mask=st.booleans(),
)
def test_any_shape(backend, count, slots, causes, seed, way, convention, with_mask):
    patients, hazards = draw(count, slots, causes, torch.float32, way, seed)
    assert_as_reference(
        hazards,
        patients.times,
        patients.types,
        patients.mask if with_mask else None,
        censored_visit=convention,
        entry_times=patients.entries,
        reduction="sum",
        **WAYS[way],
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_longer_than_a_product_can_hold(backend, way, dtype):
    patients, hazards = draw(4, 3000, 3, dtype, way)
    assert_as_reference(
        hazards, patients.times, patients.types, reduction="none", terms=300, **WAYS[way]
    )


def test_many_classes(backend):
    patients, hazards = draw(3, 5, 1000, torch.float32, "softmax")
    assert_as_reference(
        hazards, patients.times, patients.types, reduction="none", terms=100, **WAYS["softmax"]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturation_stays_finite(backend, dtype):
    hazards = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=dtype)
    value, grad = value_and_grad(competing_risks_nll, hazards, torch.tensor([1]), torch.tensor([2]))
    assert value.isfinite()
    assert (grad == 0).all()
    logits = torch.tensor([[[100.0, -100, 0], [-100, 100, 0], [0, 100, -100]]], dtype=dtype)
    for kind in (0, 1, 2):
        assert_as_reference(
            logits,
            torch.tensor([2]),
            torch.tensor([kind]),
            censored_visit="included",
            **WAYS["softmax"],
        )


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_slots_that_are_not_at_risk_change_nothing(backend, poison, way):
    patients, clean = draw(50, 37, 3, torch.float32, way)
    at_risk = patients.at_risk()
    poisoned = clean.masked_fill(~at_risk[..., None], poison)
    options = {"entry_times": patients.entries, "reduction": "none", **WAYS[way]}
    args = patients.times, patients.types, patients.mask
    value, grad = value_and_grad(competing_risks_nll, clean, *args, **options)
    same_value, same_grad = value_and_grad(competing_risks_nll, poisoned, *args, **options)
    assert torch.equal(value, same_value)
    assert torch.equal(grad, same_grad)
    assert (same_grad[~at_risk] == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_censored_visit_left_out_may_hold_anything(backend, way):
    patients, hazards = draw(5, 4, 2, torch.float32, way)
    hazards[torch.arange(5), patients.times] = math.nan
    censored = torch.zeros(5, dtype=torch.long)
    value, grad = value_and_grad(
        competing_risks_nll, hazards, patients.times, censored, **WAYS[way]
    )
    assert value.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_at_risk_reaches_the_loss(backend, way):
    _, hazards = draw(3, 20, 2, torch.float32, way)
    hazards[1, 3, 1] = math.nan
    nll = competing_risks_nll(
        hazards, torch.tensor([18] * 3), torch.tensor([0, 1, 2]), reduction="none", **WAYS[way]
    )
    assert nll.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("way", WAYS)
def test_empty_batch(backend, way):
    hazards = torch.empty(0, 4, 3, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    assert competing_risks_nll(hazards, none, none, **WAYS[way]).isnan()
    nll = competing_risks_nll(hazards, none, none, reduction="sum", **WAYS[way])
    nll.backward()
    assert nll == 0
    assert hazards.grad.shape == (0, 4, 3)


@pytest.mark.parametrize("way", WAYS)
def test_layouts_of_inputs_and_gradients(backend, way):
    patients, hazards = draw(9, 20, 3, torch.float32, way)
    args = patients.times, patients.types, patients.mask
    expected, expected_grad = value_and_grad(
        competing_risks_nll, hazards, *args, reduction="none", **WAYS[way]
    )
    x = hazards.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    nll = competing_risks_nll(x, *args, reduction="none", **WAYS[way])
    (grad,) = torch.autograd.grad(nll, x, torch.arange(1.0, 19.0)[::2], retain_graph=True)
    (of_sum,) = torch.autograd.grad(nll.sum(), x)  # a stride-0 gradient comes in
    assert torch.equal(nll, expected)
    torch.testing.assert_close(of_sum * torch.arange(1.0, 10.0)[:, None, None], expected_grad)
    torch.testing.assert_close(grad, of_sum * torch.arange(1.0, 19.0)[::2][:, None, None])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradcheck_and_double_backward(backend, way, convention):
    patients, hazards = draw(3, 3, 2, torch.float64, way)

    def loss(x):
        return competing_risks_nll(
            x,
            patients.times,
            patients.types,
            patients.mask,
            censored_visit=convention,
            sample_weight=patients.weights,
            reduction="none",
            **WAYS[way],
        )

    fast = is_emulated(backend)
    assert torch.autograd.gradcheck(loss, (hazards.requires_grad_(),), fast_mode=fast)
    assert torch.autograd.gradgradcheck(loss, (hazards,), fast_mode=fast)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_opcheck(compiled, needs_grad, way):
    link = list(WAYS).index(way)
    for reduction, dtype in zip((0, 1, 2, 0), DTYPES, strict=True):
        patients, hazards = draw(6, 11, 3, dtype, way)
        torch.library.opcheck(
            torch.ops.ehrseq_fast.competing_risks_nll.default,
            (hazards, patients.times, patients.types, patients.mask, patients.entries,
             patients.weights, link, True, 1e-7, reduction, needs_grad),
        )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_compiles_whole_with_dynamic_shapes(backend, way):
    def step(x, times, types, mask):
        return competing_risks_nll(x * 0.5, times, types, mask, **WAYS[way]) * 2

    torch._dynamo.reset()
    compiled_step = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, slots in ((7, 13), (20, 33)):
        patients, x = draw(count, slots, 3, torch.float32, way)
        args = patients.times, patients.types, patients.mask
        expected, expected_grad = value_and_grad(step, x, *args)
        actual, grad = value_and_grad(compiled_step, x, *args)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_threads_gives_the_same_bits(compiled, way):
    patients, hazards = draw(1000, 60, 3, torch.float32, way)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for _ in range(10):
                results.append(
                    value_and_grad(
                        competing_risks_nll,
                        hazards,
                        patients.times,
                        patients.types,
                        patients.mask,
                        **WAYS[way],
                    )
                )
    finally:
        torch.set_num_threads(threads)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_fresh_memory_is_never_read(backend):
    patients, hazards = draw(300, 20, 3, torch.float32, "softmax")
    args = hazards, patients.times, patients.types, patients.mask
    expected, expected_grad = value_and_grad(competing_risks_nll, *args, **WAYS["softmax"])
    for _ in range(5):
        poison = [torch.full((300, 20, 4), math.nan) for _ in range(8)]
        del poison
        value, grad = value_and_grad(competing_risks_nll, *args, **WAYS["softmax"])
        assert torch.equal(value, expected)
        assert torch.equal(grad, expected_grad)


def test_module_holds_the_options(backend):
    patients, logits = draw(8, 6, 2, torch.float32, "softmax")
    args = logits, patients.times, patients.types, patients.mask
    module = CompetingRisksSurvivalLoss(
        from_logits=True, link="softmax", censored_visit="included", reduction="sum"
    )
    expected = competing_risks_nll(
        *args,
        from_logits=True,
        link="softmax",
        censored_visit="included",
        reduction="sum",
        entry_times=patients.entries,
        sample_weight=patients.weights,
    )
    actual = module(*args, entry_times=patients.entries, sample_weight=patients.weights)
    assert torch.equal(actual, expected)
    assert "link='softmax'" in repr(module)


SOFTMAX = WAYS["softmax"]
BAD_INPUTS = {
    "hazards [B, V]": (
        {"hazards": torch.rand(3, 4)}, ValueError, r"shape \[B, V, K\], got \[3, 4\]"),
    "logits [B, V]": (
        {"hazards": torch.rand(3, 4), **SOFTMAX}, ValueError, r"shape \[B, V, K \+ 1\]"),
    "no cause": ({"hazards": torch.rand(3, 4, 0)}, ValueError, "at least 1 values per visit"),
    "no event class alone": (
        {"hazards": torch.rand(3, 4, 1), **SOFTMAX}, ValueError, "at least 2 values per visit"),
    "link": (
        {"link": "probit"}, ValueError, "link: expected one of 'sigmoid', 'softmax', 'cloglog'"),
    "softmax of probabilities": (
        {"link": "softmax"}, ValueError, "from_logits: expected True"),
    "types float": ({"event_types": torch.ones(3)}, TypeError, "event_types: expected an integer"),
    "types [B, K]": (
        {"event_types": torch.ones(3, 2, dtype=torch.long)}, ValueError,
        r"event_types: expected shape \[B\] = \[3\]"),
    "type past K": (
        {"event_types": torch.tensor([0, 3, 4])}, ValueError,
        r"event_types must be 0 \(censored\) or a cause 1\.\.2: patient 1 has 3 \(.*fault: 2\)"),
    "type past K of softmax": (
        {"event_types": torch.tensor([0, 1, 2]), **SOFTMAX}, ValueError, "patient 2 has 2"),
    "type negative": (
        {"event_types": torch.tensor([0, 1, -1])}, ValueError, "patient 2 has -1"),
    "time": (
        {"event_times": torch.tensor([0, 4, 9])}, ValueError,
        r"patient 1 has event time 4 and 4 visits \(patients at fault: 2\)"),
    "hole": (
        {"sequence_mask": torch.tensor([[1, 0, 1, 0]] * 3)}, ValueError,
        r"patient 0 has 1 at visit 2, after a 0 \(patients at fault: 3\)"),
    "no visits": (
        {"sequence_mask": torch.tensor([1, 1, 0])[:, None].expand(3, 4)}, ValueError,
        r"Found 1 sequences with zero length\. .* The first is patient 2\."),
    "entry": (
        {"entry_times": torch.tensor([0, 2, 0])}, ValueError, "patient 1 has entry time 2"),
    "weight that learns": (
        {"sample_weight": torch.ones(3, requires_grad=True)}, ValueError,
        "expected no requires_grad"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(backend, name):
    change, error, message = BAD_INPUTS[name]
    change = on_default_device(change)
    good = {
        "hazards": torch.rand(3, 4, 2),
        "event_times": torch.tensor([0, 1, 2]),
        "event_types": torch.tensor([1, 0, 2]),
    }
    competing_risks_nll(**good)
    with pytest.raises(error, match=message):
        competing_risks_nll(**(good | change), validate=True)
