"""discrete_time_survival_nll on every backend, against its reference in float64 and the formula."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ehrseq_fast import backend as backends
from ehrseq_fast.survival_nll import DiscreteTimeSurvivalLoss, discrete_time_survival_nll

from .conftest import is_emulated
from .survival_cases import (
    definition,
    draw_hazards,
    draw_patients,
    nll_of_patient,
    on_default_device,
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
    hazards = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 1.0], [-0.5, 1.5, 0.0]], dtype=dtype)
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


def test_long_masks_are_counted_right(backend):
    """Beyond what one byte of a word-wise count can hold."""
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

        assert torch.autograd.gradcheck(loss, (hazards,))
    assert torch.autograd.gradgradcheck(loss, (hazards,))


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


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("link", [0, 1])
def test_opcheck(compiled, needs_grad, reduction, link):
    patients = draw_patients(6, 11)
    for dtype in (torch.float32, DTYPES[1 + reduction]):
        hazards = draw_hazards((6, 11), dtype, logits=link == 1)
        torch.library.opcheck(
            torch.ops.ehrseq_fast.survival_nll.default,
            (hazards, patients.times, patients.types, patients.mask, patients.entries,
             patients.weights, link, True, 1e-7, reduction, needs_grad),
        )  # fmt: skip


def test_compiles_whole_with_dynamic_shapes(backend):
    def step(x, times, seen, mask, weight):
        nll = discrete_time_survival_nll(
            x.sigmoid(), times, seen, mask, sample_weight=weight, reduction="none"
        )
        return nll.square().mean()

    torch._dynamo.reset()
    # Inductor once; its C++ compiler takes most of this file's time.
    compiler = "inductor" if backend == "cpu" else "aot_eager"
    compiled_step = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for count, slots in ((7, 13), (20, 33)):
        patients = draw_patients(count, slots)
        x = draw_hazards((count, slots), torch.float32, logits=True)
        args = patients.times, patients.types, patients.mask, patients.weights
        expected, expected_grad = value_and_grad(step, x, *args)
        actual, grad = value_and_grad(compiled_step, x, *args)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(grad, expected_grad)


def test_compiled_graphs_refuse_impossible_patients_too(compiled):
    step = torch.compile(discrete_time_survival_nll, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="event time 9 and 3 visits"):
        step(torch.rand(2, 3), torch.tensor([0, 9]), torch.tensor([1, 1]))


def test_a_thousand_repeats_are_bitwise_equal(backend):
    patients = draw_patients(130, 25)
    hazards = draw_hazards((130, 25), torch.float32, logits=False)
    args = hazards, patients.times, patients.types, patients.mask
    first, first_grad = value_and_grad(discrete_time_survival_nll, *args)
    # the reference is torch's own to keep, and an emulator runs one program after another
    for _ in range(20 if backend == "reference" or is_emulated(backend) else 1000):
        value, grad = value_and_grad(discrete_time_survival_nll, *args)
        assert torch.equal(value, first)
        assert torch.equal(grad, first_grad)


@pytest.mark.parametrize("logits", [False, True])
def test_any_number_of_threads_gives_the_same_bits(compiled, logits):
    patients = draw_patients(3000, 60)
    hazards = draw_hazards((3000, 60), torch.float32, logits)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(
                value_and_grad(
                    discrete_time_survival_nll,
                    hazards,
                    patients.times,
                    patients.types,
                    patients.mask,
                    from_logits=logits,
                )
            )
    finally:
        torch.set_num_threads(threads)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


ON_ONE_INSTRUCTION_SET = """
import torch
from tests.survival_cases import definition, draw_hazards, draw_patients, value_and_grad
from tests.tolerances import assert_close
from ehrseq_fast import PackedVisits, packed_competing_risks_nll
from ehrseq_fast.survival_nll import competing_risks_nll

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for options in ({}, {"from_logits": True}, {"from_logits": True, "link": "softmax"}):
        patients = draw_patients(70, 45, 3)
        classes = 3 + ("link" in options)
        hazards = draw_hazards((70, 45, classes), dtype, bool(options))
        args = patients.times, patients.types, patients.mask.to(dtype)
        oracle, oracle_grad = value_and_grad(
            definition, hazards.double(), *args, **options
        )
        batch = PackedVisits.from_lists(
            [[[1]] * n for n in patients.lengths.tolist()],
            event_times=patients.times, event_types=patients.types,
        )
        def packed(h, *args, **options):
            return packed_competing_risks_nll(batch.pack(h), batch, **options)
        for loss in (competing_risks_nll, packed):
            value, grad = value_and_grad(loss, hazards, *args, **options)
            assert_close(value, oracle, terms=40)
            assert_close(grad, oracle_grad, terms=40)
for kind in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16,
             torch.bfloat16, torch.float32, torch.float64):
    patients = draw_patients(70, 200)
    hazards = draw_hazards((70, 200), torch.float32, False)[..., None]
    args = hazards, patients.times, patients.types
    expected = competing_risks_nll(*args, patients.mask)
    assert torch.equal(competing_risks_nll(*args, patients.mask.to(kind)), expected)
    wrong = patients.mask.to(kind)
    wrong[30, -2], wrong[30, -1] = 0, 1
    try:
        competing_risks_nll(*args, wrong)
    except ValueError as error:
        assert "patient 30 has 1 at visit 199, after a 0" in str(error)
    else:
        raise AssertionError("a hole was taken")
"""


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_on_every_instruction_set(compiled, instructions):
    environment = os.environ | {
        "EHRSEQ_FAST_CPU_CAPABILITY": instructions,
        "EHRSEQ_FAST_BACKEND": "cpu",
    }
    subprocess.run([sys.executable, "-c", ON_ONE_INSTRUCTION_SET], env=environment, check=True)


def test_fresh_memory_is_never_read(backend):
    patients = draw_patients(300, 40)
    hazards = draw_hazards((300, 40), torch.float32, logits=False)
    expected, expected_grad = value_and_grad(
        discrete_time_survival_nll, hazards, patients.times, patients.types, patients.mask
    )
    for _ in range(5):
        poison = [torch.full((300, 40), math.nan) for _ in range(8)]
        poison += [torch.full((300,), math.nan), torch.tensor(math.nan)]
        del poison
        value, grad = value_and_grad(
            discrete_time_survival_nll, hazards, patients.times, patients.types, patients.mask
        )
        assert torch.equal(value, expected)
        assert torch.equal(grad, expected_grad)


def test_without_grad_none_is_made(compiled):
    hazards = torch.rand(4, 6)
    args = torch.zeros(4, dtype=torch.long), torch.ones(4), None, None, None, 0, False, 1e-7, 1
    _, grad = torch.ops.ehrseq_fast.survival_nll(hazards, *args, False)
    assert grad.numel() == 0
    with torch.no_grad():
        nll = discrete_time_survival_nll(hazards.requires_grad_(), *args[:2])
    assert not nll.requires_grad


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


# What a good call is changed to, and how it is refused.
HOLE = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 0]])
BAD_INPUTS = {
    "hazards not a tensor": ({"hazards": [[0.5]]}, TypeError, "hazards: expected a tensor"),
    "hazards integer": (
        {"hazards": torch.ones(3, 4, dtype=torch.long)}, TypeError, "floating-point dtype"),
    "hazards [B, V, 1]": (
        {"hazards": torch.rand(3, 4, 1)}, ValueError, r"shape \[B, V\], got \[3, 4, 1\]"),
    "times float": (
        {"event_times": torch.tensor([0.0, 1, 2])}, TypeError, "event_times: expected an integer"),
    "times bool": (
        {"event_times": torch.ones(3, dtype=torch.bool)}, TypeError, "event_times: expected"),
    "times [B, 1]": (
        {"event_times": torch.zeros(3, 1, dtype=torch.long)}, ValueError,
        r"event_times: expected shape \[B\] = \[3\] .* got \[3, 1\]"),
    "indicators [2]": (
        {"event_indicators": torch.ones(2)}, ValueError, r"event_indicators: expected shape \[B\]"),
    "indicators complex": (
        {"event_indicators": torch.ones(3, dtype=torch.cfloat)}, TypeError, "event_indicators"),
    "mask [B, 3]": (
        {"sequence_mask": torch.ones(3, 3)}, ValueError,
        r"sequence_mask: expected shape \[B, V\] = \[3, 4\]"),
    "mask on another device": (
        {"sequence_mask": torch.ones(3, 4, device="meta")}, ValueError,
        "sequence_mask: expected on"),
    "entry float": (
        {"entry_times": torch.zeros(3)}, TypeError, "entry_times: expected an integer"),
    "weight [B, V]": (
        {"sample_weight": torch.ones(3, 4)}, ValueError, r"sample_weight: expected shape \[B\]"),
    "weight that learns": (
        {"sample_weight": torch.ones(3, requires_grad=True)}, ValueError,
        "sample_weight: expected no requires_grad"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: expected one of"),
    "censored_visit": ({"censored_visit": "both"}, ValueError, "censored_visit: expected one of"),
    "eps": ({"eps": 0.5}, ValueError, r"eps: expected 0 <= eps < 0.5"),
    "eps nan": ({"eps": math.nan}, ValueError, r"eps: expected 0 <= eps < 0.5"),
    "hole": (
        {"sequence_mask": HOLE}, ValueError,
        r"sequence_mask .* patient 1 has 1 at visit 2, after a 0 \(patients at fault: 1\)"),
    "hole in a bool mask": (
        {"sequence_mask": HOLE.bool()}, ValueError, "patient 1 has 1 at visit 2, after a 0"),
    "left-padded": (
        {"sequence_mask": torch.ones(3, 4).triu(2)}, ValueError,
        r"patient 0 has 1 at visit 2, after a 0 \(patients at fault: 2\)"),
    "half": (
        {"sequence_mask": HOLE[[0, 0, 2]] * 0.5}, ValueError,
        r"patient 0 has 0.5 at visit 0 \(patients at fault: 3\)"),
    "two": (
        {"sequence_mask": HOLE[[0, 2, 2]] * torch.tensor([1, 2, 1])[:, None]}, ValueError,
        r"patient 1 has 2 at visit 0 \(patients at fault: 1\)"),
    "nan mask": (
        {"sequence_mask": torch.full((3, 4), math.nan)}, ValueError, "patient 0 has nan at visit"),
    "no visits": (
        {"sequence_mask": torch.tensor([1, 0, 0])[:, None].expand(3, 4)}, ValueError,
        r"Found 2 sequences with zero length\. All sequences must have at least 1 visit\. The first"
        r" is patient 1\."),
    "no slots": ({"hazards": torch.rand(3, 0)}, ValueError, "Found 3 sequences with zero length"),
    "time in the padding": (
        {"event_times": torch.tensor([3, 1, 3]), "sequence_mask": HOLE[[0, 2, 2]]}, ValueError,
        r"event_times .* patient 2 has event time 3 and 3 visits \(patients at fault: 1\)"),
    "time past the slots": (
        {"event_times": torch.tensor([0, 4, 9])}, ValueError,
        r"patient 1 has event time 4 and 4 visits \(patients at fault: 2\)"),
    "time negative": (
        {"event_times": torch.tensor([0, 1, -1])}, ValueError, "patient 2 has event time -1"),
    "entry late": (
        {"entry_times": torch.tensor([0, 2, 0])}, ValueError,
        r"entry_times .* patient 1 has entry time 2 and event time 1 \(patients at fault: 1\)"),
    "entry negative": (
        {"entry_times": torch.tensor([0, 0, -2])}, ValueError, "patient 2 has entry time -2"),
    "indicator 2": (
        {"event_indicators": torch.tensor([1, 2, 2])}, ValueError,
        r"event_indicators must be 0 \(censored\) or 1 \(event\): patient 1 has 2 .*fault: 2\)"),
    "indicator half": (
        {"event_indicators": torch.tensor([0, 1, 0.5])}, ValueError, "patient 2 has 0.5"),
    "indicator nan": (
        {"event_indicators": torch.tensor([0, math.nan, 1])}, ValueError, "patient 1 has nan"),
}  # fmt: skip


def good_call():
    return {
        "hazards": torch.rand(3, 4),
        "event_times": torch.tensor([0, 1, 2]),
        "event_indicators": torch.tensor([1, 0, 1]),
    }


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(backend, name):
    change, error, message = BAD_INPUTS[name]
    change = on_default_device(change)
    discrete_time_survival_nll(**good_call())
    with pytest.raises(error, match=message):
        discrete_time_survival_nll(**(good_call() | change), validate=True)


def test_bad_input_late_in_a_large_batch(backend):
    """The first patient at fault is named whichever thread meets one first."""
    patients = draw_patients(3000, 60)
    patients.times[[1700, 2900]] = 60
    with pytest.raises(ValueError, match=r"patient 1700 has event time 60 .*at fault: 2\)"):
        discrete_time_survival_nll(
            torch.rand(3000, 60), patients.times, patients.types, patients.mask, validate=True
        )


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.rand(3), r"survival_nll: hazards: expected shape \[B, V\], got \[3\]"),
        (1, torch.zeros(2, dtype=torch.long), r"event_times: expected shape \[B\] = \[3\], got"),
        (1, torch.zeros(3), "event_times: expected uint8 or .*int64, got float32"),
        (2, torch.zeros(3, dtype=torch.cfloat), "event_indicators: expected bool or uint8 or"),
        (3, torch.ones(3, 5), r"sequence_mask: expected shape \[B, V\] = \[3, 4\]"),
        (4, torch.zeros(3), "entry_times: expected uint8 or .*int64, got float32"),
        (5, torch.ones(1), r"sample_weight: expected shape \[B\]"),
    ],
)
def test_the_raw_operator_defends_itself(compiled, position, value, message):
    args = [*good_call().values(), None, None, None, 0, False, 1e-7, 1, True]
    torch.ops.ehrseq_fast.survival_nll(*args)
    args[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.ehrseq_fast.survival_nll(*args)


def test_a_backend_that_cannot_run_is_an_error():
    with pytest.raises(RuntimeError, match="cannot run"), backends.use_backend("cuda"):
        discrete_time_survival_nll(**good_call())
