"""The hazard head as one function: the numbers of its modules, with and without dropout."""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast import PackedVisits, use_backend
from ehrseq_fast import backend as backends
from ehrseq_fast.hazard_head import op
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
from ehrseq_fast.models.head import hazards_of
from ehrseq_fast.models.survival_lstm import hazard_head
from tests.tolerances import ROUNDOFF

pytestmark = pytest.mark.operation("hazard_head")


def results(run, head, rows):
    logits = run(rows)
    inputs = [rows, *head.parameters()]
    return logits.detach(), *torch.autograd.grad(logits.sin().sum(), inputs)


@pytest.mark.parametrize(("visits", "width", "hidden"), [(1, 1, 1), (7, 5, 3), (300, 64, 33)])
def test_logits_and_gradients_are_those_of_the_modules(visits, width, hidden):
    head = hazard_head(width, hidden, 0.0)
    rows = torch.randn(visits, width, requires_grad=True)
    ours = results(lambda x: hazards_of(head, x), head, rows)
    theirs = results(head, head, rows)
    if backends.why_not_loaded("cpu") is None:
        node = hazards_of(head, rows).grad_fn.next_functions[0][0]
        assert type(node).__name__ == "_HeadBackward"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dropout_zeroes_and_scales():
    """Ones in, identity weights: every hidden unit is 0 or 1 / (1 - p), and so is its gradient."""
    torch.manual_seed(0)
    head = hazard_head(400, 400, 0.25).train()
    with torch.no_grad():
        head[0].weight.copy_(torch.eye(400))
        head[0].bias.zero_()
        head[3].weight.fill_(1 / 400)
        head[3].bias.zero_()
    rows = torch.ones(200, 400, requires_grad=True)
    logits = hazards_of(head, rows).logit()
    (grad,) = torch.autograd.grad(logits.sum(), rows)
    kept = grad != 0
    assert abs(kept.float().mean() - 0.75) < 0.01
    torch.testing.assert_close(400 * grad[kept], torch.full_like(grad[kept], 1 / 0.75))
    torch.testing.assert_close(logits.squeeze(1), kept.float().mean(1) / 0.75)


@pytest.mark.parametrize("training", [False, True])
def test_the_dropout_module_says_whether_it_drops(training):
    """Dropout may be on in an evaluated model (Monte Carlo), and frozen in a trained one."""
    head = hazard_head(8, 64, 0.5).train(not training)
    head[2].train(training)
    rows = torch.randn(5, 8)
    assert torch.equal(hazards_of(head, rows), hazards_of(head, rows)) is not training


def test_any_byte_but_zero_keeps_a_unit(compiled):
    layers = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4), torch.ones(1, 4), torch.ones(1)
    kept = torch.tensor([[0, 1, 2, 255]] * 3, dtype=torch.uint8)  # a copy would make them 0 and 1
    odd, usual = (op.hazard_head(*layers, x, 2.0) for x in (kept.view(torch.bool), kept != 0))
    assert torch.equal(odd, usual)


def test_all_dropped():
    head = hazard_head(4, 4, 1.0).train()
    rows = torch.randn(3, 4, requires_grad=True)
    hazards = hazards_of(head, rows)
    assert torch.equal(hazards, head[3].bias.sigmoid().expand(3, 1))
    assert (torch.autograd.grad(hazards.sum(), rows)[0] == 0).all()


def test_changed_and_watched_heads_run_as_modules():
    rows = torch.randn(3, 4)
    for place in (None, 1):
        head, seen = hazard_head(4, 4, 0.0), []
        watched = head if place is None else head[place]
        watched.register_forward_hook(lambda *call, seen=seen: seen.append(call))
        hazards_of(head, rows)
        assert len(seen) == 1
    head = hazard_head(4, 4, 0.0)
    head[1] = torch.nn.GELU()
    assert torch.equal(hazards_of(head, rows), head(rows))


def test_no_term_of_a_double_backward_is_lost():
    """Refused by whatever the gradient depends on; right on the backend ``reference``."""
    batch = PackedVisits.from_lists(
        [[[1, 2], [3]], [[4]]], event_times=[1, 0], event_indicators=[1, 1]
    )

    def penalty(model):
        loss = model.loss(batch)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        total = sum(gradient.square().sum() for gradient in gradients)
        return torch.autograd.grad(total, parameters)

    model = DiscreteTimeSurvivalLSTM(5, 3, 4, dropout=0.0)
    if backends.why_not_loaded("cpu") is None:
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            penalty(model)
    with use_backend("reference"):
        ours = penalty(model)
        model.path = "padded"
        for mine, theirs in zip(ours, penalty(model), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def spoilt_results(model, batch):
    hazards = model(batch).values
    gradients = torch.autograd.grad(hazards.sum(), list(model.parameters()))
    return [model.loss(batch).detach(), hazards.detach(), *gradients]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_any_parameter_shows(value):
    """A model that has diverged says so: on the fused path as on the packed one."""
    torch.manual_seed(0)
    batch = PackedVisits.from_lists(
        [[[1, 2], [3]], [[4]], [[2], [1], [3, 4]]],
        event_times=[1, 0, 2],
        event_indicators=[1, 1, 0],
    )
    model = DiscreteTimeSurvivalLSTM(5, 3, 6, dropout=0.0)
    for name, parameter in model.named_parameters():
        for at in range(parameter.numel()):
            if name == "embedding.weight" and at < 3:
                continue  # code 0 is padding
            flat = parameter.detach().view(-1)
            before, flat[at] = flat[at].item(), value
            model.path = "fused"
            ours = spoilt_results(model, batch)
            model.path = "packed"
            theirs = spoilt_results(model, batch)
            flat[at] = before
            for mine, plain in zip(ours, theirs, strict=True):
                assert torch.equal(mine.isnan(), plain.isnan()), (name, at)


def test_new_tensors_go_where_the_rows_are():
    """Whatever the default device is."""
    head = hazard_head(4, 8, 0.5).train()
    rows = torch.randn(5, 4)
    torch.set_default_device("meta")
    try:
        hazards = hazards_of(head, rows)
    finally:
        torch.set_default_device(None)
    assert hazards.device.type == "cpu"
    assert hazards.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_are_those_of_the_modules(dtype, autocast):
    head = hazard_head(8, 16, 0.0)
    rows = torch.randn(50, 8)
    if not autocast:
        head, rows = head.to(dtype), rows.to(dtype)
    elif dtype == torch.float64:
        head, rows = head.double(), rows.double()
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float64):
        ours, theirs = hazards_of(head, rows), head(rows)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * ROUNDOFF.get(dtype, 1e-13))
    ours.sum().backward()
    assert all(p.grad.dtype == p.dtype for p in head.parameters())
