"""The hazard head as one function: the numbers of its modules, with and without dropout."""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast.models.head import head_logits
from ehrseq_fast.models.survival_lstm import hazard_head


def results(run, head, rows):
    logits = run(rows)
    inputs = [rows, *head.parameters()]
    return logits.detach(), *torch.autograd.grad(logits.sin().sum(), inputs)


@pytest.mark.parametrize(("visits", "width", "hidden"), [(1, 1, 1), (7, 5, 3), (300, 64, 33)])
def test_logits_and_gradients_are_those_of_the_modules(visits, width, hidden):
    head = hazard_head(width, hidden, 0.0)
    rows = torch.randn(visits, width, requires_grad=True)
    ours = results(lambda x: head_logits(head, x), head, rows)
    theirs = results(head[:4], head, rows)
    assert type(head_logits(head, rows).grad_fn).__name__ == "_HeadBackward"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dropout_zeroes_and_scales():
    """Ones in, identity weights: every hidden unit is 0 or 1 / (1 - p), and so is its gradient."""
    torch.manual_seed(0)
    head = hazard_head(400, 400, 0.25).train()
    with torch.no_grad():
        head[0].weight.copy_(torch.eye(400))
        head[0].bias.zero_()
        head[3].weight.fill_(1.0)
        head[3].bias.zero_()
    rows = torch.ones(200, 400, requires_grad=True)
    logits = head_logits(head, rows)
    (grad,) = torch.autograd.grad(logits.sum(), rows)
    kept = grad != 0
    assert abs(kept.float().mean() - 0.75) < 0.01
    torch.testing.assert_close(grad[kept], torch.full_like(grad[kept], 1 / 0.75))
    torch.testing.assert_close(logits.squeeze(1), kept.sum(1) / 0.75)
    head.eval()
    torch.testing.assert_close(head_logits(head, rows), head[:4](rows))


def test_all_dropped():
    head = hazard_head(4, 4, 1.0).train()
    rows = torch.randn(3, 4, requires_grad=True)
    logits = head_logits(head, rows)
    assert torch.equal(logits, head[3].bias.expand(3, 1))
    assert (torch.autograd.grad(logits.sum(), rows)[0] == 0).all()


def test_hooks_see_their_modules():
    head, seen = hazard_head(4, 4, 0.0), []
    head[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    head_logits(head, torch.randn(3, 4))
    assert len(seen) == 1


def test_double_backward_is_refused():
    head = hazard_head(4, 4, 0.0)
    rows = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(head_logits(head, rows).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
