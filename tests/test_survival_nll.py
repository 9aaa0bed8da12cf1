"""discrete_time_survival_nll on every backend, against its reference in float64 and the formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ehrseq_fast.survival_nll import DiscreteTimeSurvivalLoss, discrete_time_survival_nll

from .conftest import is_emulated
from .survival_cases import (
    definition,
    draw_hazards,
    draw_patients,
    nll_of_patient,
    value_and_grad,
)
from .tolerances import ROUNDOFF, assert_close

pytestmark = pytest.mark.operation("survival_nll")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CONVENTIONS = ("excluded", "included")


def assert_as_reference(hazards, *args, **options):
    """Loss and gradient against the reference on the same numbers in float64."""
    value, grad = value_and_grad(discrete_time_survival_nll, hazards, *args, **options)
    oracle, oracle_grad = value_and_grad(definition, hazards.double(), *args, **options)
    assert value.dtype == (torch.float64 if hazards.dtype == torch.float64 else torch.float32)
    assert grad.dtype == hazards.dtype
    assert grad.shape == hazards.shape
    assert_close(value, oracle, terms=20)
    assert_close(grad, oracle_grad, terms=20)
    assert (grad[oracle_grad == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 5, 101])
def test_agrees_with_reference(backend, dtype, convention, logits, slots):
    patients = draw_patients(70, slots)
    hazards = draw_hazards((70, slots), dtype, logits)
    for reduction in ("mean", "sum", "none"):
        assert_as_reference(
            hazards,
            patients.times,
            patients.types,
            patients.mask,
            from_logits=logits,
            censored_visit=convention,
            entry_times=patients.entries,
            sample_weight=patients.weights,
            reduction=reduction,
        )


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_agrees_with_the_formula_term_by_term(backend, convention):
    patients = draw_patients(12, 7)
    hazards = draw_hazards((12, 7), torch.float64, logits=False)
    nll = discrete_time_survival_nll(
        hazards,
        patients.times,
        patients.types,
        patients.mask,
        entry_times=patients.entries,
        censored_visit=convention,
        reduction="none",
    )
    expected = [
        nll_of_patient(h, time, bool(event), entry, convention == "included", mask)
        for h, time, event, entry, mask in zip(
            hazards.tolist(),
            patients.times.tolist(),
            patients.types.tolist(),
            patients.entries.tolist(),
            patients.mask.tolist(),
            strict=True,
        )
    ]
    assert_close(nll, torch.tensor(expected, dtype=torch.float64), terms=20)


def test_included_is_the_sum_of_binary_cross_entropies_up_to_the_time(backend):
    """The identity that pycox's nll_logistic_hazard is made of."""
    patients = draw_patients(40, 9)
    logits = draw_hazards((40, 9), torch.float64, logits=True)
    target = torch.zeros_like(logits)
    target[torch.arange(40), patients.times] = patients.types.double()
    up_to_time = torch.arange(9) <= patients.times[:, None]
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    nll = discrete_time_survival_nll(
        logits,
        patients.times,
        patients.types,
        from_logits=True,
        censored_visit="included",
        reduction="none",
    )
    assert_close(nll, (bce * up_to_time).sum(1), terms=20)


def test_logits_are_the_sigmoid_path(backend):
    patients = draw_patients(40, 30)
    logits = draw_hazards((40, 30), torch.float64, logits=True)
    outcomes = patients.times, patients.types, patients.mask
    direct, direct_grad = value_and_grad(
        discrete_time_survival_nll, logits, *outcomes, from_logits=True
    )
    through, through_grad = value_and_grad(
        lambda x: discrete_time_survival_nll(x.sigmoid(), *outcomes), logits
    )
    assert_close(direct, through, terms=60)
    assert_close(direct_grad, through_grad, terms=10)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    count=st.integers(0, 140),
    slots=st.integers(1, 70),
    seed=st.integers(0, 10_000),
    logits=st.booleans(),
    convention=st.sampled_from(CONVENTIONS),
    with_mask=st.booleans(),
)
def test_any_shape(backend, count, slots, seed, logits, convention, with_mask):
    patients = draw_patients(count, slots, seed=seed)
    hazards = draw_hazards((count, slots), torch.float32, logits, seed)
    assert_as_reference(
        hazards,
        patients.times,
        patients.types,
        patients.mask if with_mask else None,
        from_logits=logits,
        censored_visit=convention,
        entry_times=patients.entries,
        reduction="sum",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logits", [False, True])
def test_rows_longer_than_a_product_can_hold(backend, dtype, logits):
    """5,000 visits at the clamp: the running products must be split before they underflow."""
    hazards = torch.full((3, 5000), 80.0 if logits else 1 - 1e-4, dtype=dtype)
    hazards[1] = -3 if logits else 1e-3
    times, seen = torch.tensor([4999, 4999, 17]), torch.tensor([1, 0, 1])
    assert_as_reference(hazards, times, seen, from_logits=logits, reduction="none")


def test_small_losses_keep_their_digits(backend):
    """Hazards of a rare event: 1 - h, rounded to float32, would have lost most of them."""
    hazards = torch.full((1, 100), 1e-5)
    times, seen = torch.tensor([99]), torch.tensor([0])
    nll = discrete_time_survival_nll(hazards, times, seen).double()
    exact = -99 * math.log1p(-hazards[0, 0].item())
    assert abs(nll.item() / exact - 1) < 4 * ROUNDOFF[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_hazards_stay_finite(backend, dtype):
    """0 and 1, clamped in float32 even in 16 bits; outside the clamp the gradient is torch's 0."""
    hazards = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=dtype)
    times, seen = torch.tensor([2, 1, 2]), torch.tensor([1, 1, 1])
    value, grad = value_and_grad(discrete_time_survival_nll, hazards, times, seen, reduction="none")
    wide = hazards.double() if dtype == torch.float64 else hazards.float()
    oracle, oracle_grad = value_and_grad(definition, wide, times, seen, reduction="none")
    assert value.isfinite().all()
    assert_close(value, oracle.double(), terms=100)
    assert grad.isfinite().all()
    assert (grad[:, :2] == 0).all()
    assert_close(grad, oracle_grad.double(), terms=10)


def test_gradient_at_the_bounds_is_that_of_clamp(backend):
    eps = 0.125  # exact in binary, so the bounds are
    hazards = torch.tensor([[eps, 1 - eps, 0.1, 0.9, 0.5]])
    times, seen = torch.tensor([4]), torch.tensor([1])
    _, grad = value_and_grad(discrete_time_survival_nll, hazards, times, seen, eps=eps)
    torch.testing.assert_close(grad, torch.tensor([[1 / 0.875, 8.0, 0.0, 0.0, -2.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(backend, dtype):
    """Softplus, exact far out: no clamp, no overflow."""
    big = 60000.0 if dtype == torch.float16 else 1e30
    logits = torch.tensor([[100.0, -100, 100], [-100, 100, -100], [-big, big, 0]], dtype=dtype)
    times, seen = torch.tensor([2, 2, 1]), torch.tensor([1, 1, 1])
    assert_as_reference(logits, times, seen, from_logits=True, reduction="none")
    infinite = torch.tensor([[-math.inf, math.inf]], dtype=dtype)
    nll = discrete_time_survival_nll(
        infinite, torch.tensor([1]), torch.tensor([1]), from_logits=True
    )
    assert nll == 0


def test_logits_too_small_for_one_plus_them(backend):
    """softplus(-60) = e^-60, though 1 + e^-60 rounds to 1 even in double precision."""
    logits = torch.full((1, 9), -60.0, dtype=torch.float64)
    nll = discrete_time_survival_nll(logits, torch.tensor([8]), torch.tensor([0]), from_logits=True)
    assert abs(nll.item() / (8 * math.exp(-60)) - 1) < 1e-13


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("logits", [False, True])
def test_slots_that_are_not_at_risk_change_nothing(backend, poison, logits):
    patients = draw_patients(50, 37)
    clean = draw_hazards((50, 37), torch.float32, logits)
    at_risk = patients.at_risk()
    poisoned = clean.masked_fill(~at_risk, poison)
    options = {"from_logits": logits, "entry_times": patients.entries, "reduction": "none"}
    args = patients.times, patients.types, patients.mask
    value, grad = value_and_grad(discrete_time_survival_nll, clean, *args, **options)
    same_value, same_grad = value_and_grad(discrete_time_survival_nll, poisoned, *args, **options)
    assert torch.equal(value, same_value)
    assert torch.equal(grad, same_grad)
    assert (same_grad[~at_risk] == 0).all()


def test_a_nan_at_risk_reaches_the_loss(backend):
    hazards = torch.full((2, 20), 0.1)
    hazards[1, 3] = math.nan
    nll = discrete_time_survival_nll(
        hazards, torch.tensor([18, 18]), torch.tensor([0, 1]), reduction="none"
    )
    assert nll.isnan().tolist() == [False, True]


def test_no_clamp_at_all(backend):
    """eps=0: log(0) is infinite, as it is in torch."""
    hazards = torch.tensor([[1.0, 0.5], [0.5, 0.0]])
    nll = discrete_time_survival_nll(
        hazards, torch.tensor([1, 1]), torch.tensor([1, 1]), eps=0.0, reduction="none"
    )
    assert nll.tolist() == [math.inf, math.inf]


def test_empty_batch(backend):
    hazards = torch.empty(0, 4, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)

    def loss(reduction):
        return discrete_time_survival_nll(hazards, none, none, reduction=reduction)

    assert loss("mean").isnan()
    assert loss("sum") == 0
    assert loss("none").shape == (0,)
    loss("sum").backward()
    assert hazards.grad.shape == (0, 4)


@pytest.mark.parametrize(
    "kind", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32,
             torch.float64, torch.float16, torch.bfloat16]
)  # fmt: skip
@pytest.mark.parametrize("slots", [5, 8, 9, 64, 65, 200])
def test_masks_and_labels_of_any_dtype(backend, kind, slots):
    patients = draw_patients(20, slots)
    hazards = draw_hazards((20, slots), torch.float32, logits=False)
    expected = discrete_time_survival_nll(hazards, patients.times, patients.types, patients.mask)
    integer = torch.int16 if kind.is_floating_point or kind == torch.bool else kind
    small_enough = integer in (torch.int16, torch.int32, torch.int64) or slots < 128
    actual = discrete_time_survival_nll(
        hazards,
        patients.times.to(integer) if small_enough else patients.times,
        patients.types.to(kind),
        patients.mask.to(kind),
    )
    assert torch.equal(actual, expected)


def test_long_masks_are_counted_right(backend, monkeypatch):
    """Beyond what one byte of a word-wise count can hold."""
    monkeypatch.setenv("EHRSEQ_FAST_VALIDATE", "1")  # a GPU's values are checked on request
    lengths = torch.tensor([1, 20_000, 19_999, 8191, 8192, 8193, 16_385])
    mask = torch.arange(20_000) < lengths[:, None]
    hazards = torch.full(mask.shape, 0.5)
    seen = torch.ones(7, dtype=torch.bool)
    discrete_time_survival_nll(hazards, lengths - 1, seen, mask)
    with pytest.raises(ValueError, match=r"event time 8191 and 8191 visits .*at fault: 1\)"):
        discrete_time_survival_nll(hazards, lengths - 1 + (torch.arange(7) == 3).long(), seen, mask)


def test_inputs_that_are_not_contiguous(backend):
    patients = draw_patients(30, 20)
    hazards = draw_hazards((30, 20), torch.float32, logits=False)
    expected, expected_grad = value_and_grad(
        discrete_time_survival_nll, hazards, patients.times, patients.types, patients.mask
    )
    wide = torch.full((30, 44), math.nan)
    wide[:, 1:41:2] = hazards
    for same in (hazards.t().contiguous().t(), wide[:, 1:41:2]):
        x = same.requires_grad_()
        nll = discrete_time_survival_nll(
            x,
            torch.stack([patients.times] * 2, 1)[:, 0],
            torch.stack([patients.types] * 2, 1)[:, 1],
            patients.mask.t().contiguous().t(),
        )
        (grad,) = torch.autograd.grad(nll, x)
        assert torch.equal(nll, expected)
        assert torch.equal(grad, expected_grad)
    row = torch.tensor([[0.1, 0.2, 0.3]]).expand(4, 3)
    nll = discrete_time_survival_nll(row, torch.tensor([2] * 4), torch.tensor([1] * 4))
    assert_close(nll, torch.tensor(-math.log(0.9 * 0.8 * 0.3)), terms=4)


def test_incoming_gradients_of_any_layout(backend):
    patients = draw_patients(9, 20)
    hazards = draw_hazards((9, 20), torch.float32, logits=False).requires_grad_()
    args = patients.times, patients.types, patients.mask

    def nll():
        return discrete_time_survival_nll(hazards, *args, reduction="none")

    (of_sum,) = torch.autograd.grad(nll().sum(), hazards)  # a stride-0 gradient comes in
    (of_ones,) = torch.autograd.grad(nll(), hazards, torch.ones(9))
    assert torch.equal(of_sum, of_ones)
    scale = torch.arange(18.0)[::2]
    (of_strided,) = torch.autograd.grad(nll(), hazards, scale)
    torch.testing.assert_close(of_strided, of_ones * scale[:, None])
    (of_three,) = torch.autograd.grad(3 * nll().mean(), hazards)
    torch.testing.assert_close(of_three, of_ones / 3)


def test_the_graph_can_be_kept_and_used_again(backend):
    patients = draw_patients(9, 20)
    hazards = draw_hazards((9, 20), torch.float32, logits=False).requires_grad_()
    nll = discrete_time_survival_nll(hazards, patients.times, patients.types, patients.mask)
    nll.backward(retain_graph=True)
    once = hazards.grad.clone()
    hazards.grad.fill_(math.nan)  # the first gradient is the caller's to overwrite
    hazards.grad = None
    nll.backward(retain_graph=True)
    nll.backward()
    assert torch.equal(hazards.grad, once * 2)


@pytest.mark.parametrize("logits", [False, True])
def test_gradcheck_and_double_backward(backend, logits):
    patients = draw_patients(4, 5)
    hazards = draw_hazards((4, 5), torch.float64, logits).requires_grad_()
    for reduction in ("mean", "none"):

        def loss(x, reduction=reduction):
            return discrete_time_survival_nll(
                x,
                patients.times,
                patients.types,
                patients.mask,
                from_logits=logits,
                sample_weight=patients.weights,
                reduction=reduction,
            )

        assert torch.autograd.gradcheck(loss, (hazards,), fast_mode=is_emulated(backend))
    assert torch.autograd.gradgradcheck(loss, (hazards,), fast_mode=is_emulated(backend))


def test_a_gradient_penalty_has_its_gradient(backend):
    """A second derivative that was silently dropped would leave this one without the penalty's."""
    patients = draw_patients(4, 5)
    args = patients.times, patients.types, patients.mask

    def penalised(loss, x):
        nll = loss(x, *args)
        (grad,) = torch.autograd.grad(nll, x, create_graph=True)
        return torch.autograd.grad(nll + grad.square().sum(), x)[0]

    hazards = draw_hazards((4, 5), torch.float64, logits=False).requires_grad_()
    expected = penalised(definition, hazards)
    torch.testing.assert_close(penalised(discrete_time_survival_nll, hazards), expected)


def test_float16_gradients_survive_a_small_share(backend):
    """1/B of a gradient would be subnormal in float16 before the loss scale multiplies it."""
    count = 40_000
    hazards = torch.full((count, 2), 0.25, dtype=torch.float16).requires_grad_()
    times, seen = torch.ones(count, dtype=torch.long), torch.zeros(count)
    nll = discrete_time_survival_nll(hazards, times, seen)
    (grad,) = torch.autograd.grad(nll * 65536, hazards)
    exact = 65536 / count / 0.75
    assert abs(grad[0, 0].item() / exact - 1) < 2 * ROUNDOFF[torch.float16]


def test_module_holds_the_options(backend):
    patients = draw_patients(8, 6)
    logits = draw_hazards((8, 6), torch.float32, logits=True)
    module = DiscreteTimeSurvivalLoss(
        1e-3, from_logits=True, censored_visit="included", reduction="sum"
    )
    expected = discrete_time_survival_nll(
        logits,
        patients.times,
        patients.types,
        patients.mask,
        eps=1e-3,
        from_logits=True,
        censored_visit="included",
        reduction="sum",
        entry_times=patients.entries,
        sample_weight=patients.weights,
    )
    actual = module(
        logits,
        patients.times,
        patients.types,
        patients.mask,
        entry_times=patients.entries,
        sample_weight=patients.weights,
    )
    assert torch.equal(actual, expected)
    assert not list(module.parameters())
    assert "censored_visit='included'" in repr(module)
