"""How often the Triton kernels are launched, and that what surrounds a launch holds."""

from __future__ import annotations

import contextvars
import re
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    backend,
    competing_risks_nll,
    deephit_competing_ranking_loss,
    deephit_ranking_loss,
    discrete_time_survival_nll,
    fixed_horizon_bce,
    operations,
    packed_competing_risks_nll,
    packed_survival_nll,
    piecewise_hazard_nll,
    pmf_competing_risks_nll,
    pmf_nll,
    use_backend,
    visit_cross_entropy,
    warmup,
)
from ehrseq_fast.triton_support import watching_launches

from .survival_cases import draw_hazards, draw_patients

pytestmark = [
    pytest.mark.skipif(
        backend.why_not_loaded("triton") is not None, reason=str(backend.why_not_loaded("triton"))
    )
]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)  # there they are not interpreted


@pytest.fixture(autouse=True)
def _on_triton():
    device = "cpu" if backend.why_not_loaded("triton") else backend.kernels("triton").device
    torch.set_default_device(device)
    with use_backend("triton"):
        yield
    torch.set_default_device(None)


def padded(**options):
    patients = draw_patients(300, 21)
    x = draw_hazards((300, 21), torch.float32, False).t().contiguous().t().requires_grad_()
    more = {"entry_times": patients.entries, "sample_weight": patients.weights}
    args = patients.times, patients.types.to(torch.float16), patients.mask.float()
    return x, lambda: discrete_time_survival_nll(x, *args, **more, **options)


def competing(**options):
    patients = draw_patients(300, 21, causes=3)
    x = draw_hazards((300, 21, 4), torch.float16, True).requires_grad_()
    args = patients.times, patients.types, patients.mask
    more = {"from_logits": True, "link": "softmax"}
    return x, lambda: competing_risks_nll(x, *args, **more, **options)


def records():
    return PackedVisits.from_lists(
        [[[1]] * (1 + i % 9) for i in range(300)],
        event_times=[i % 9 for i in range(300)],
        event_indicators=[i % 2 for i in range(300)],
        event_types=[i % 3 for i in range(300)],
    ).to(torch.get_default_device())


def packed(**options):
    batch = records()
    x = torch.full((batch.n_visits,), 0.25, requires_grad=True)
    return x, lambda: packed_survival_nll(x, batch, **options)


def packed_competing(**options):
    batch = records()
    x = torch.full((batch.n_visits, 2), 0.25, requires_grad=True)
    return x, lambda: packed_competing_risks_nll(x, batch, **options)


def weighted(**options):
    patients = draw_patients(12, 21, causes=3)
    x = draw_hazards((12, 21, 4), torch.float32, True).requires_grad_()
    args = patients.times, patients.types, patients.mask.float()
    more = {"from_logits": True, "link": "softmax", "visit_weight": torch.rand(12, 21)}
    return x, lambda: competing_risks_nll(x, *args, **more, **options)


def packed_weighted(**options):
    batch = records()
    x = torch.full((batch.n_visits,), 0.25, requires_grad=True)
    weight = torch.rand(batch.n_visits)
    return x, lambda: packed_survival_nll(x, batch, visit_weight=weight, **options)


def mass(**options):
    patients = draw_patients(60, 21)
    x = torch.randn(60, 21, requires_grad=True)
    args = patients.times, patients.types.to(torch.float16), patients.mask.float()
    return x, lambda: pmf_nll(x, *args, entry_times=patients.entries, **options)


def packed_competing_mass(**options):
    batch = records()
    x = torch.full((batch.n_visits, 2), 0.25, requires_grad=True)
    return x, lambda: pmf_competing_risks_nll(PackedRows(x, batch), **options)


def rates(**options):
    patients = draw_patients(60, 21)
    x = torch.randn(60, 21, requires_grad=True)
    args = patients.times, patients.types.to(torch.float16), torch.rand(60), patients.mask.float()
    return x, lambda: piecewise_hazard_nll(x, *args, entry_times=patients.entries, **options)


def packed_rates(**options):
    batch = records()
    x = torch.full((batch.n_visits,), 0.25, requires_grad=True)
    return x, lambda: piecewise_hazard_nll(PackedRows(x, batch), link="exp", **options)


def weighted_rates(**options):
    patients = draw_patients(60, 21)
    x, weight = torch.randn(60, 21, requires_grad=True), torch.rand(60, 21)
    args = patients.times, patients.types, torch.rand(60), patients.mask
    return x, lambda: piecewise_hazard_nll(x, *args, visit_weight=weight, **options)


def ranking():
    patients = draw_patients(100, 21)
    x = torch.randn(100, 21, requires_grad=True)
    args = patients.times, patients.types.to(torch.float16), patients.mask.float()
    more = {"entry_times": patients.entries, "sample_weight": patients.weights}
    return x, lambda: deephit_ranking_loss(x, *args, **more)


def packed_competing_ranking():
    batch = records()
    x = torch.randn(batch.n_visits, 2, requires_grad=True)
    return x, lambda: deephit_competing_ranking_loss(PackedRows(x, batch))


def classes(**options):
    labels = torch.arange(12 * 21).view(12, 21) % 5
    weights = {"class_weight": torch.rand(5), "sample_weight": torch.rand(12)}
    x = torch.randn(12, 21, 5, requires_grad=True)
    mask = torch.arange(21) < torch.arange(12)[:, None] % 22
    options = {"label_smoothing": 0.1, **weights, **options}
    return x, lambda: visit_cross_entropy(x, labels.short(), mask.float(), **options)


def packed_classes(**options):
    batch = records()
    x = torch.randn(batch.n_visits, 6, requires_grad=True)
    labels = torch.arange(batch.n_visits) % 6
    return x, lambda: visit_cross_entropy(PackedRows(x, batch), labels, **options)


def horizon(**options):
    x = torch.randn(40, 21, requires_grad=True)
    days = torch.arange(21.0).expand(40, 21)
    outcomes = (torch.arange(40) % 21, torch.arange(40) % 2, 3.5)
    options = {"visit_times": days, "visit_weight": torch.rand(40, 21), **options}
    return x, lambda: fixed_horizon_bce(x, *outcomes, **options)


def packed_horizon(**options):
    batch = records()
    x = torch.randn(batch.n_visits, requires_grad=True)
    return x, lambda: fixed_horizon_bce(PackedRows(x, batch), horizon=3, **options)


LOSSES_OF_VISITS = (classes, packed_classes, horizon, packed_horizon)
KERNELS = {
    padded: "survival_nll_kernel",
    competing: "survival_nll_kernel",
    packed: "survival_nll_kernel",
    packed_competing: "survival_nll_kernel",
    weighted: "survival_nll_kernel",
    packed_weighted: "survival_nll_kernel",
    mass: "pmf_nll_kernel",
    packed_competing_mass: "pmf_nll_kernel",
    rates: "piecewise_hazard_kernel",
    packed_rates: "piecewise_hazard_kernel",
    weighted_rates: "piecewise_hazard_kernel",
}


@pytest.mark.parametrize("loss", KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_launch_gives_loss_and_gradient_and_one_scales_it(loss, reduction):
    x, nll = loss(reduction=reduction)
    with watching_launches() as launches:
        value = nll()
    assert [launch.name for launch in launches] == [KERNELS[loss]]
    grad_nll = torch.ones(()).expand(value.shape)  # of any strides
    with watching_launches() as launches:
        torch.autograd.grad(value, x, grad_nll)
    assert len(launches) == 1
    with watching_launches() as launches, torch.no_grad():
        nll()
    assert len(launches) == 1


@pytest.mark.parametrize("loss", LOSSES_OF_VISITS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_of_visits_is_one_launch_and_for_a_mean_one_before_it(loss, reduction):
    x, run = loss(reduction=reduction)
    kernel = "cross_entropy_kernel" if "classes" in loss.__name__ else "horizon_kernel"
    names = [kernel] * (2 if reduction == "mean" else 1)
    with watching_launches() as launches:
        value = run()
    assert [launch.name for launch in launches] == names
    with watching_launches() as launches:
        torch.autograd.grad(value, x, torch.ones(()).expand(value.shape))
    assert len(launches) == 1
    with watching_launches() as launches, torch.no_grad():
        run()
    assert [launch.name for launch in launches] == names


@pytest.mark.parametrize("loss", [ranking, packed_competing_ranking])
def test_a_ranking_loss_is_three_launches_and_one_back(loss):
    x, ranked = loss()
    with watching_launches() as launches:
        value = ranked()
    names = ["sum_later_kernel", "join_later_kernel", "ranking_gradient_kernel"]
    assert [launch.name for launch in launches] == names
    with watching_launches() as launches:
        torch.autograd.grad(value, x)
    assert [launch.name for launch in launches] == ["scale_by_one_kernel"]
    with watching_launches() as launches, torch.no_grad():
        ranked()
    assert [launch.name for launch in launches] == names[:2]


def test_several_programs_add_up_in_their_order_and_leave_the_ticket_at_zero():
    _, nll = padded(reduction="sum")
    _, each = padded(reduction="none")
    with watching_launches() as launches:
        total = nll()
    (launch,) = launches
    ticket = [a for a in launch.arguments if isinstance(a, torch.Tensor)][-1]
    assert launch.grid[0] > 1
    assert ticket.dtype == torch.int32
    assert ticket.tolist() == [0]
    torch.testing.assert_close(total.double(), each().double().sum())


def test_watchers_that_saw_the_same_are_told_apart():
    _, loss = padded()
    with watching_launches() as outer:
        with watching_launches() as inner:
            pass
        loss()
    assert (len(outer), inner) == (1, [])


def test_other_threads_launches_are_not_held_back():
    _, loss = padded()
    expected, found = loss(), []
    thread = threading.Thread(
        target=contextvars.copy_context().run, args=(lambda: found.append(loss()),)
    )
    with watching_launches(held_back=True) as watched:
        thread.start()
        thread.join()
    assert len(watched) == 1
    assert torch.equal(found[0], expected)


def test_held_back_launches_do_not_run():
    _, nll = padded()
    with watching_launches(held_back=True) as held, watching_launches() as watched:
        nll()
    assert len(held) == len(watched) == 1
    with watching_launches() as after:
        pass
    assert after == []


class CalledOperators(TorchDispatchMode):
    """The names of this package's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == operations.TRITON:
            self.names.add(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


SMALL = {"patients": 3, "visits": 2, "codes": 2, "embedding_dim": 4, "vocab_size": 9}


def test_warmup_compiles_every_operation_that_has_kernels_in_triton():
    with CalledOperators() as called:
        names = warmup(
            **SMALL, modes=("mean", "max", "attention"), causes=2, next_codes=True,
            code_weights=True, visit_weights=True, sparse_grad=True, embeddings=True, classes=3,
            device=torch.get_default_device(),
            losses=(
                "pmf_nll", "deephit_ranking_loss", "piecewise_hazard_nll", "visit_cross_entropy",
                "fixed_horizon_bce",
            ),
        )  # fmt: skip
    folders = {x.folder for x in operations.registered() if "triton" in x.backends}
    every = {operator.name for operator in operations.operators() if operator.folder in folders}
    assert called.names == every
    launched = {
        name
        for file in Path(operations.__file__).parent.glob("*/triton/*.py")
        for name in re.findall(r"\blaunch\(\s*(?:\w+\.)?(\w+),", file.read_text())
    }
    # but for those of losses that are not reduced, and of codes that many visits have
    assert launched - set(names) == {"scale_by_patient_kernel", "sum_pieces"}


def test_warmup_compiles_what_it_is_asked_for():
    device = torch.get_default_device()
    names = warmup(**SMALL, device=device)
    assert {"survival_nll_kernel", "scale_by_one_kernel", "pool_masked"} < set(names)
    assert not {"pmf_nll_kernel", "cross_entropy_kernel", "next_codes_rows"} & set(names)
    assert "horizon_kernel" in warmup(**SMALL, losses=("fixed_horizon_bce",), device=device)
    with pytest.raises(ValueError, match=r"losses: expected one of 'pmf_nll', .* got 'cox'"):
        warmup(**SMALL, losses=("cox",), device=device)
    with use_backend("reference"):
        assert warmup(**SMALL) == []


def test_warmup_compiles_rates_with_weights_of_visits_where_asked():
    from ehrseq_fast.piecewise_hazard.triton.kernel import piecewise_hazard_kernel

    options = {"losses": ("piecewise_hazard_nll",), "device": torch.get_default_device()}
    for weighted in (False, True):
        with watching_launches() as launches:
            warmup(**SMALL, visit_weights=weighted, **options)
        of_rates = [launch for launch in launches if launch.name == "piecewise_hazard_kernel"]
        at = piecewise_hazard_kernel.arg_names.index("visit_weights")
        given = [launch for launch in of_rates if launch.arguments[at] is not None]
        assert len(given) == (4 if weighted else 0)
        assert len(of_rates) - len(given) == 4


def test_a_gpus_tiles_give_the_same_numbers(monkeypatch):
    """The interpreter takes larger ones, which a program of a GPU has no room for."""
    from ehrseq_fast.survival_nll.triton import tiles

    for loss in (*KERNELS, *LOSSES_OF_VISITS, ranking, packed_competing_ranking):
        x, nll = loss()
        expected = nll()
        (expected_grad,) = torch.autograd.grad(expected, x)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "VALUES", 512)
            patch.setattr("ehrseq_fast.deephit_ranking.triton.launch.ROWS", 64)
            # of more classes than a tile has
            patch.setattr("ehrseq_fast.survival_nll.triton.visit_losses.MOST_CLASSES", 4)
            with watching_launches() as launches:
                value = nll()
            (grad,) = torch.autograd.grad(value, x)
        assert launches[0].grid[0] > 9
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, expected_grad)
