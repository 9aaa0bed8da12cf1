"""The loss of a horizon where labels change and where digits end, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

from ehrseq_fast import fixed_horizon_bce

pytestmark = pytest.mark.operation("fixed_horizon")


def test_labels_at_the_ends_of_the_horizon(backend):
    """Event at the horizon's end: within. Censored there: nothing came. The event's visit: out."""
    outcomes = (torch.tensor([3, 3]), torch.tensor([1, 0]), 2)
    days = torch.arange(5.0).expand(2, 5)
    factor = torch.tensor([[1.0, 3, 3, 0, 0], [1, 1, 0, 0, 0]])
    for times in (None, days):
        options = {"visit_times": times, "pos_weight": 3.0, "reduction": "none"}
        loss = fixed_horizon_bce(torch.zeros(2, 5), *outcomes, **options)
        torch.testing.assert_close(loss, factor * math.log(2))


def test_small_losses_and_derivatives_keep_their_digits(kernels):
    """Of labels 0 and 1, each far on the label's side."""
    x = torch.tensor([[-15.0, -20.0, 15.0, 20.0]], requires_grad=True)
    outcomes = (torch.tensor([4]), torch.tensor([1]), 2)
    loss = fixed_horizon_bce(x, *outcomes, reduction="none")
    small = torch.tensor([[15.0, 20.0, 15.0, 20.0]]).neg().exp()
    torch.testing.assert_close(loss, small, rtol=1e-5, atol=0)
    loss.sum().backward()
    signs = torch.tensor([[1.0, 1, -1, -1]])
    torch.testing.assert_close(x.grad, signs * small, rtol=1e-5, atol=0)
