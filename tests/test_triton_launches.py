"""How often the Triton kernels are launched, and that what surrounds a launch holds."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    backend,
    competing_risks_nll,
    deephit_competing_ranking_loss,
    deephit_ranking_loss,
    discrete_time_survival_nll,
    packed_competing_risks_nll,
    packed_survival_nll,
    pmf_competing_risks_nll,
    pmf_nll,
    use_backend,
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


def mass(**options):
    patients = draw_patients(60, 21)
    x = torch.randn(60, 21, requires_grad=True)
    args = patients.times, patients.types.to(torch.float16), patients.mask.float()
    return x, lambda: pmf_nll(x, *args, entry_times=patients.entries, **options)


def packed_competing_mass(**options):
    batch = records()
    x = torch.full((batch.n_visits, 2), 0.25, requires_grad=True)
    return x, lambda: pmf_competing_risks_nll(PackedRows(x, batch), **options)


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


LOSSES = (padded, competing, packed, packed_competing, mass, packed_competing_mass)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_launch_gives_loss_and_gradient_and_one_scales_it(loss, reduction):
    x, nll = loss(reduction=reduction)
    with watching_launches() as launches:
        value = nll()
    kernel = "pmf_nll_kernel" if "mass" in loss.__name__ else "survival_nll_kernel"
    assert [launch.name for launch in launches] == [kernel]
    grad_nll = torch.ones(()).expand(value.shape)  # of any strides
    with watching_launches() as launches:
        torch.autograd.grad(value, x, grad_nll)
    assert len(launches) == 1
    with watching_launches() as launches, torch.no_grad():
        nll()
    assert len(launches) == 1


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


def test_warmup_names_what_it_launched():
    names = warmup(
        patients=3, visits=2, codes=2, embedding_dim=4, vocab_size=9, modes=("max", "attention"),
        causes=2, next_codes=True, device=torch.get_default_device(),
    )  # fmt: skip
    assert {"survival_nll_kernel", "scale_by_one_kernel", "next_codes_rows"} < set(names)
    assert {
        "pool_masked",
        "pool_contiguous",
        "pool_attention",
        "sum_segments",
        "sum_attention",
    } < set(names)
    weighted = warmup(
        patients=3, visits=2, codes=2, embedding_dim=4, vocab_size=9, code_weights=True,
        device=torch.get_default_device(),
    )  # fmt: skip
    assert "weight_gradients" in weighted
    with use_backend("reference"):
        assert warmup(patients=3, visits=2, codes=2, embedding_dim=4) == []


def test_a_gpus_tiles_give_the_same_numbers(monkeypatch):
    """The interpreter takes larger ones, which a program of a GPU has no room for."""
    from ehrseq_fast.survival_nll.triton import tiles

    for loss in (*LOSSES, ranking, packed_competing_ranking):
        x, nll = loss()
        expected = nll()
        (expected_grad,) = torch.autograd.grad(expected, x)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "VALUES", 512)
            patch.setattr("ehrseq_fast.deephit_ranking.triton.launch.ROWS", 64)
            with watching_launches() as launches:
                value = nll()
            (grad,) = torch.autograd.grad(value, x)
        assert launches[0].grid[0] > 9
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, expected_grad)
