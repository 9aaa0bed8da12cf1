"""What is true of the CUDA kernels and of no other backend: launches, orders, impossible input.

On the host, by the emulator; values are compared in the operations' own tests.
"""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast import (
    PackedVisits,
    deephit_competing_ranking_loss,
    deephit_ranking_loss,
    discrete_time_survival_nll,
    fixed_horizon_bce,
    packed_survival_nll,
    packed_visit_pool,
    piecewise_hazard_nll,
    pmf_nll,
    visit_cross_entropy,
)
from ehrseq_fast import backend as backends
from ehrseq_fast.survival_nll import competing_risks_nll

from . import cuda_on_cpu, next_codes_cases
from .cuda_on_cpu import Counts
from .gpu_cases import CASES, Step, equal
from .survival_cases import assert_ranks_as_defined, definition, draw_hazards, draw_patients

pytestmark = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=str(cuda_on_cpu.why_not())
)


@pytest.fixture
def shim():
    loaded = cuda_on_cpu.load()
    with backends.emulating("cuda", cuda_on_cpu.KERNELS), backends.use_backend("cuda"):
        yield loaded


def ops():
    return getattr(torch.ops, cuda_on_cpu.NAMESPACE)


def counted(shim, call):
    shim.reset_counts()
    result = call()
    return result, shim.counts()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("count", [3, 3000])
def test_a_loss_is_one_launch_each_way(shim, reduction, count):
    patients = draw_patients(count, 50)
    hazards = draw_hazards((count, 50), torch.float32, logits=False).requires_grad_()
    args = patients.times, patients.types, patients.mask
    nll, launched = counted(
        shim, lambda: discrete_time_survival_nll(hazards, *args, reduction=reduction)
    )
    assert launched == Counts(kernels=1, memsets=0)
    grad_nll = torch.ones(()).expand(nll.shape)
    _, launched = counted(shim, lambda: torch.autograd.grad(nll, hazards, grad_nll))
    assert launched == Counts(kernels=1, memsets=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_of_a_mass_is_one_launch_each_way(shim, reduction):
    patients = draw_patients(300, 50)
    logits = torch.randn(300, 50).requires_grad_()
    args = patients.times, patients.types, patients.mask
    nll, launched = counted(shim, lambda: pmf_nll(logits, *args, reduction=reduction))
    assert launched == Counts(kernels=1, memsets=0)
    grad_nll = torch.ones(()).expand(nll.shape)
    _, launched = counted(shim, lambda: torch.autograd.grad(nll, logits, grad_nll))
    assert launched == Counts(kernels=1, memsets=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_of_rates_is_one_launch_each_way(shim, reduction, weighted):
    patients = draw_patients(300, 50)
    logits = torch.randn(300, 50).requires_grad_()
    args = patients.times, patients.types, torch.rand(300), patients.mask
    options = {"visit_weight": torch.rand(300, 50)} if weighted else {}
    options["reduction"] = reduction
    nll, launched = counted(shim, lambda: piecewise_hazard_nll(logits, *args, **options))
    assert launched == Counts(kernels=1, memsets=0)
    grad_nll = torch.ones(()).expand(nll.shape)
    _, launched = counted(shim, lambda: torch.autograd.grad(nll, logits, grad_nll))
    assert launched == Counts(kernels=1, memsets=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_with_weights_of_visits_is_one_launch_each_way(shim, reduction):
    patients = draw_patients(300, 50)
    logits = torch.randn(300, 50).requires_grad_()
    args = patients.times, patients.types, patients.mask
    options = {"from_logits": True, "visit_weight": torch.rand(300, 50), "reduction": reduction}
    nll, launched = counted(shim, lambda: discrete_time_survival_nll(logits, *args, **options))
    assert launched == Counts(kernels=1, memsets=0)
    grad_nll = torch.ones(()).expand(nll.shape)
    _, launched = counted(shim, lambda: torch.autograd.grad(nll, logits, grad_nll))
    assert launched == Counts(kernels=1, memsets=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_packed_loss_is_one_launch_each_way(shim, reduction):
    lengths = [1 + i % 37 for i in range(500)]
    batch = PackedVisits.from_lists(
        [[[1]] * n for n in lengths],
        event_times=torch.tensor(lengths) - 1,
        event_indicators=torch.tensor([i % 2 for i in range(500)]),
    )
    hazards = torch.rand(batch.n_visits).requires_grad_()
    nll, launched = counted(shim, lambda: packed_survival_nll(hazards, batch, reduction=reduction))
    assert launched == Counts(kernels=1, memsets=0)
    grad_nll = torch.rand(nll.shape)
    _, launched = counted(shim, lambda: torch.autograd.grad(nll, hazards, grad_nll))
    assert launched == Counts(kernels=1, memsets=0)


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_packed_pooling_is_one_launch_and_three_back(shim, mode):
    batch = PackedVisits.from_lists(
        [[[1 + (7 * i + c) % 90 for c in range(1 + i % 5)] for i in range(n)] for n in (3, 1, 40)]
    )
    weight = torch.randn(100, 64).requires_grad_()
    pooled, launched = counted(shim, lambda: packed_visit_pool(batch, weight, mode=mode))
    assert launched.kernels == 1
    _, launched = counted(shim, lambda: torch.autograd.grad(pooled.sum(), weight))
    assert launched.kernels + launched.memsets <= 3


def results(shim, call):
    """Under five orders of blocks, warps and lanes."""
    for seed in range(5):
        shim.set_seed(100 * seed)
        yield call()


@pytest.mark.parametrize(("loss", "count"), [(discrete_time_survival_nll, 3000), (pmf_nll, 600)])
def test_no_order_of_blocks_changes_a_bit(shim, loss, count):
    patients = draw_patients(count, 20)
    hazards = draw_hazards((count, 20), torch.float32, logits=False).requires_grad_()
    args = patients.times, patients.types, patients.mask

    def run():
        nll = loss(hazards, *args)
        return nll, *torch.autograd.grad(nll, hazards)

    first, *others = results(shim, run)
    assert not first[0].isnan()
    for other in others:
        assert all(map(torch.equal, first, other))


def test_a_captured_loss_has_a_ticket_of_its_own(shim):
    """A graph may be replayed on any stream, so it clears one of its own each time."""
    patients = draw_patients(3000, 20)
    hazards = draw_hazards((3000, 20), torch.float32, logits=False)
    args = hazards, patients.times, patients.types, patients.mask
    expected = discrete_time_survival_nll(*args)
    shim.set_capturing(True)
    try:
        captured, launched = counted(shim, lambda: discrete_time_survival_nll(*args))
    finally:
        shim.set_capturing(False)
    assert launched == Counts(kernels=1, memsets=1)
    assert torch.equal(captured, expected)
    assert torch.equal(discrete_time_survival_nll(*args), expected)


@pytest.mark.parametrize("case", {of[0]: case for case, of in CASES.items()}.values())
def test_the_first_launch_of_a_kernel_may_be_captured(shim, case):
    """It loads the kernel, which CUDA refuses to threads that have not said that they may."""
    step = Step(case, "cpu")
    expected = step()
    shim.set_capturing(True)
    try:
        captured = step()
    finally:
        shim.set_capturing(False)
    assert equal(captured, expected)


OPTIONS = [(link, included) for link in range(4) for included in (False, True)]


@pytest.mark.parametrize(("link", "included"), OPTIONS)
@pytest.mark.parametrize("classes", [1, 3])
def test_impossible_outcomes_stay_within_memory_and_the_formula(shim, link, included, classes):
    """Nothing checks outcomes on a GPU: times outside the visits, masks with holes."""
    competing = classes > 1
    if link == 2 and not competing:
        pytest.skip("softmax is for competing risks")
    values = torch.randn(8, 6, classes) if competing else torch.randn(8, 6)
    hazards = values if link else values.sigmoid()
    times = torch.tensor([-(2**40), -1, 0, 3, 5, 6, 2**40, 4])
    types = torch.tensor([1, 0, 1, 0, 7, -3, 1, 2] if competing else [1, 0, 1, 0, 1, 0, 1, 1])
    entries = torch.tensor([0, 0, -5, 4, 2**40, 1, 2, -(2**40)])
    mask = torch.rand(8, 6) < 0.7
    mask[4] = False
    hazards = torch.where(mask[..., None] if competing else mask, hazards, float("nan"))
    options = {
        "from_logits": link > 0,
        "censored_visit": "included" if included else "excluded",
        "entry_times": entries,
        "reduction": "none",
    }
    operator = ops().competing_risks_nll if competing else ops().survival_nll
    nll, grad = operator(hazards, times, types, mask, entries, None, link, included, 1e-7, 0, True)
    x = hazards.clone().requires_grad_()
    if link:
        options["link"] = ("probabilities", "sigmoid", "softmax", "cloglog")[link]
    expected = definition(x, times, types, mask, **options)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(nll, expected.detach())
    torch.testing.assert_close(grad, expected_grad)
    weight = torch.where(mask, torch.rand(8, 6), float("nan"))
    given = (hazards, times, types, mask, None, None, None, entries, None, weight)
    numbers = (competing, link, included, 1e-7, 0, True)
    nll, grad = ops().visit_weighted_nll(*given, *numbers)
    expected = definition(x, times, types, mask, visit_weight=weight, **options)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(nll, expected.detach())
    torch.testing.assert_close(grad, expected_grad)


def test_a_packed_time_past_the_visits_reads_no_other_patient(shim):
    batch = PackedVisits.from_lists([[[1]] * n for n in (3, 1, 5)])
    hazards = torch.rand(batch.n_visits)
    rows = batch.row_starts, batch.unsorted_indices, batch.last_rows
    seen = torch.ones(3, dtype=torch.long)
    nll, grad = ops().packed_survival_nll(
        hazards, *rows, torch.tensor([9, 1, 2**40]), seen, None, None, 0, False, 1e-7, 0, True
    )
    for patient, own in enumerate(batch.pad(hazards, 0.0)):
        torch.testing.assert_close(nll[patient], -torch.log1p(-own).sum())
    torch.testing.assert_close(grad, 1 / (1 - hazards))
    weight = torch.rand(batch.n_visits)
    times = torch.tensor([9, 1, 2**40])
    given = (hazards, times, seen, None, *rows, None, None, weight, False, 0, False, 1e-7, 0, True)
    nll, grad = ops().visit_weighted_nll(*given)
    terms = batch.pad(-torch.log1p(-hazards) * weight, 0.0)
    torch.testing.assert_close(nll, terms.sum(1))
    torch.testing.assert_close(grad, weight / (1 - hazards))


@pytest.mark.parametrize(
    "tampered",
    [
        {"row_starts": torch.tensor([0, 3, 5, 7, 8, 99])},
        {"row_starts": torch.tensor([0, 3, 2**40, 2**40 + 3, 8, 9])},
        {"unsorted_indices": torch.tensor([1, 2, -1])},
    ],
    ids=["past the end", "far out", "negative rank"],
)
def test_a_tampered_batch_ends_the_launch(shim, capfd, tampered):
    batch = PackedVisits.from_lists([[[1]] * n for n in (3, 1, 5)])
    rows = {name: getattr(batch, name) for name in ("row_starts", "unsorted_indices", "last_rows")}
    times, seen = torch.tensor([4, 4, 4]), torch.ones(3, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"__trap\(\)"):
        ops().packed_survival_nll(
            torch.rand(9), *(rows | tampered).values(), times, seen, None, None,
            0, False, 1e-7, 1, True,
        )  # fmt: skip


def test_the_raw_operators_refuse_shapes_that_do_not_fit(shim):
    hazards, times = torch.rand(4, 6), torch.zeros(4, dtype=torch.long)
    rest = (None, None, None, 0, False, 1e-7, 1, True)
    for bad in (
        (hazards[0], times, times),
        (hazards, times[:3], times),
        (hazards, times, times[:3]),
        (hazards, times.double(), times),
        (hazards.long(), times, times),
    ):
        with pytest.raises(ValueError, match="expected"):
            ops().survival_nll(*bad, *rest)
    with pytest.raises(ValueError, match="at least one cause"):
        ops().competing_risks_nll(torch.rand(4, 6, 1), times, times, None, None, None, 2, *rest[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_gradient_may_begin_anywhere(shim, dtype):
    """Whole packs of it would be misaligned, which a GPU refuses and the sanitizers see."""
    saved = torch.rand(1 + 4 * 16).to(dtype)[1:].view(4, 16)
    grad_nll = torch.rand(4).to(torch.float64 if dtype == torch.float64 else torch.float32)
    scaled = ops().survival_nll_scale(saved, grad_nll, None, None, None, dtype)
    torch.testing.assert_close(scaled, (saved * grad_nll[:, None]).to(dtype))


def test_competing_risks_take_many_blocks(shim):
    """A warp for each of more patients than the largest grid has warps: 1,024 blocks of 8."""
    count = 9000
    patients = draw_patients(count, 64, causes=2)
    hazards = draw_hazards((count, 64, 2), torch.float64, logits=True)
    value = competing_risks_nll(hazards, patients.times, patients.types, from_logits=True)
    expected = definition(hazards, patients.times, patients.types, from_logits=True)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("count", [3, 300])
def test_a_ranking_loss_is_three_launches_and_one_back(shim, count):
    patients = draw_patients(count, 50)
    logits = torch.randn(count, 50)
    args = patients.times, patients.types, patients.mask
    _, launched = counted(shim, lambda: deephit_ranking_loss(logits, *args))
    assert launched == Counts(kernels=2, memsets=0)
    logits.requires_grad_()
    value, launched = counted(shim, lambda: deephit_ranking_loss(logits, *args))
    assert launched == Counts(kernels=3, memsets=0)
    _, launched = counted(shim, lambda: torch.autograd.grad(value, logits))
    assert launched == Counts(kernels=1, memsets=0)


def test_no_order_of_blocks_changes_a_bit_of_a_ranking_loss(shim):
    patients = draw_patients(150, 40, causes=2)
    logits = torch.randn(150, 40, 2).requires_grad_()
    args = patients.times, patients.types, patients.mask

    def run():
        value = deephit_competing_ranking_loss(logits, *args, sigma=0.01)
        return value, *torch.autograd.grad(value, logits)

    first, *others = results(shim, run)
    assert not first[0].isnan()
    for other in others:
        assert all(map(torch.equal, first, other))


def test_a_ranking_loss_of_many_patients_and_of_many_visits(shim):
    """More than the groups and the blocks that there are at most."""
    for count, slots in ((8300, 2), (2, 33_000)):
        p = draw_patients(count, slots)
        rest = (p.times, p.types, p.mask, p.entries, p.weights)
        assert_ranks_as_defined(ops().deephit_ranking, torch.randn(count, slots), *rest)


def test_a_tampered_batch_ends_a_ranking_loss(shim, capfd):
    batch = PackedVisits.from_lists([[[1]] * n for n in (3, 1, 5)])
    starts = batch.row_starts.clone()
    starts[1:3] += 2**40
    times = torch.zeros(3, dtype=torch.long)
    rows = starts, batch.unsorted_indices, batch.last_rows
    with pytest.raises(RuntimeError, match="CUDA error"):
        ops().deephit_ranking(
            torch.zeros(9), times, times, None, *rows, None, None, False, True, 0.1, True
        )
    assert "__trap()" in capfd.readouterr().err


def losses_of_visits(count):
    """Losses whose terms are visits, as functions of logits and a reduction; and the logits."""
    p = draw_patients(count, 20)
    labels = torch.arange(count * 20).view(count, 20) % 5

    def within(x, reduction):
        outcomes = (p.times, p.types, 3)
        return fixed_horizon_bce(x, *outcomes, p.mask, sample_weight=p.weights, reduction=reduction)

    def classes(x, reduction):
        return visit_cross_entropy(x, labels, p.mask, reduction=reduction)

    return (
        (within, torch.randn(count, 20).requires_grad_()),
        (classes, torch.randn(count, 20, 5).requires_grad_()),
    )


@pytest.mark.parametrize(("reduction", "launches"), [("mean", 2), ("sum", 1), ("none", 1)])
def test_a_loss_of_visits_is_a_launch_and_one_for_the_mean(shim, reduction, launches):
    for loss, logits in losses_of_visits(100):
        value, launched = counted(shim, lambda loss=loss, x=logits: loss(x, reduction))
        assert launched == Counts(kernels=launches, memsets=0)
        incoming = torch.ones(()).expand(value.shape)
        _, launched = counted(
            shim, lambda v=value, x=logits, g=incoming: torch.autograd.grad(v, x, g)
        )
        assert launched == Counts(kernels=1, memsets=0)


def test_no_order_of_blocks_changes_a_bit_of_a_loss_of_visits(shim):
    for loss, logits in losses_of_visits(150):

        def run(loss=loss, logits=logits):
            value = loss(logits, "mean")
            return value, *torch.autograd.grad(value, logits)

        first, *others = results(shim, run)
        assert not first[0].isnan()
        for other in others:
            assert all(map(torch.equal, first, other))


def test_what_does_not_exist_is_nan_and_within_memory(shim):
    """On a GPU nothing checks labels; what is around the memory is the address sanitizer's."""
    labels = torch.tensor([[0, 2**40], [-(2**40), 3], [2, -100]])
    value, grad = ops().visit_cross_entropy(
        torch.zeros(3, 2, 3), labels, *(None,) * 7, -100, 0.1, 0, True
    )
    assert value.isnan().tolist() == [[False, True], [True, True], [False, False]]
    assert grad.isnan().any(-1).tolist() == value.isnan().tolist()


def test_the_orders_and_codes_of_next_codes(shim):
    """In chunks of a few rows; every code that is indexed by is checked."""
    given = next_codes_cases.make(9, 4, 40)
    first, *others = results(
        shim, lambda: next_codes_cases.with_gradients(next_codes_cases.ours, given, True, "sum")
    )
    for other in others:
        assert all(map(torch.equal, first, other))
    last = (None, None, None, True, False, True, True)
    for codes, offsets in (([40], [0, 1]), ([-1], [0, 1]), ([3], [0, 2]), ([3], [1, 0])):
        pair = torch.tensor(codes).int(), torch.tensor(offsets).int()
        with pytest.raises(RuntimeError, match=r"__trap\(\)"):
            ops().next_codes_bce(given.states[:1], *given.leaves[1:], *pair, *last)
