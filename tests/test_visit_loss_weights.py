"""Weights that are not finite, of the losses whose terms are visits, show as in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ehrseq_fast import PackedRows, fixed_horizon_bce, use_backend, visit_cross_entropy
from ehrseq_fast.losses import FixedHorizonProgressionLoss

from .fixed_horizon_cases import REDUCTIONS, packed_of
from .survival_cases import value_and_grad
from .test_visit_cross_entropy import draw as draw_classes
from .tolerances import assert_matches


def assert_shows(actual: Tensor, expected: Tensor) -> None:
    """What is not finite is in the same places, and the rest agrees. An infinite weight makes the
    derivative of a softmax at the label (p - 1) * inf = -inf here, p * inf - inf = NaN in PyTorch.
    """
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), (actual, expected)
    assert_matches(actual[finite], expected[finite].double(), scale=4, terms=20)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
@pytest.mark.operation("visit_cross_entropy")
def test_weights_of_classes_visits_and_patients_that_are_not_finite_show(backend, layout, weight):
    """As in plain PyTorch. Those of visits that do not count are not read."""
    x, y, mask, weights = draw_classes(4, 3, 3)
    mask[:, 0] = True
    mask[2, 2] = False
    y[0, 0], y[1, 0], y[2] = 0, 1, -100
    y = torch.where(mask, y, 10**6)
    batch = packed_of(x, mask).batch

    def run(changed, **options):
        given = {**weights, **changed}
        leaf, labels = x.clone().requires_grad_(), y
        if layout == "padded":
            value = visit_cross_entropy(leaf, labels, mask, **given, **options)
        else:
            given["visit_weight"] = batch.pack(given["visit_weight"])
            rows = PackedRows(batch.pack(leaf), batch)
            value = visit_cross_entropy(rows, batch.pack(labels), **given, **options)
            value = batch.pad(value) if value.dim() else value
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    def with_weight(name, *at):
        values = weights[name].clone()
        values[at] = weight
        return {name: values}

    for reduction, smoothing in (("mean", 0.0), ("none", 0.1), ("sum", 0.0)):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        for changed in (
            with_weight("visit_weight", 1, 0),
            with_weight("sample_weight", 1),
            with_weight("class_weight", 1),
        ):
            value, grad = run(changed, **options)
            with use_backend("reference"):
                wanted, wanted_grad = run(changed, **options)
            assert_shows(value, wanted)
            assert_shows(grad, wanted_grad)
            assert not value.isfinite().all()
            assert not grad[1, 0].isfinite().any()
        expected = run({}, **options)
        for changed in (with_weight("visit_weight", 2), with_weight("sample_weight", 2)):
            got = run(changed, **options)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
@pytest.mark.operation("fixed_horizon")
def test_weights_of_visits_and_patients_that_are_not_finite_show(backend, layout, weight):
    """As in plain PyTorch. Those of visits that do not count are not read."""
    x, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    mask[2, 2:] = False
    outcomes = (torch.tensor([2, 4, 1]), torch.tensor([1, 0, 0]), 2.0)
    batch = packed_of(x, mask).batch
    days = torch.where(mask, torch.arange(4.0), torch.nan)

    def run(of_visits, of_patients, times, reduction):
        leaf = x.clone().requires_grad_()
        options = {"sample_weight": of_patients, "reduction": reduction, "pos_weight": 1.5}
        if layout == "padded":
            of = {"visit_weight": of_visits, "visit_times": times, "sequence_mask": mask}
            value = fixed_horizon_bce(leaf, *outcomes, **of, **options)
        else:
            of = {"visit_weight": of_visits, "visit_times": times}
            of = {name: None if given is None else batch.pack(given) for name, given in of.items()}
            value = fixed_horizon_bce(
                PackedRows(batch.pack(leaf), batch), *outcomes, **of, **options
            )
            value = batch.pad(value) if value.dim() else value
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    of_visits, of_patients = torch.rand(3, 4) + 0.5, torch.tensor([1.0, weight, 1])
    one, other = of_visits.clone(), of_visits.clone()
    # of a visit that counts; of one censored within the horizon, and of padding
    one[1, 1], other[1, 3], other[2, 3] = weight, weight, weight
    for reduction in REDUCTIONS:
        for given in ((one, None, None), (None, of_patients, None), (None, of_patients, days)):
            value, grad = run(*given, reduction)
            with use_backend("reference"):
                wanted, wanted_grad = run(*given, reduction)
            assert_shows(value, wanted)
            assert_shows(grad, wanted_grad)
            assert not value.isfinite().all()
            assert not grad[1, 1].isfinite()
        for changed, plain in (
            ((other, None, None), (of_visits, None, None)),
            ((None, of_patients.roll(1), None), (None, torch.ones(3), None)),
        ):
            got, expected = run(*changed, reduction), run(*plain, reduction)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
@pytest.mark.operation("fixed_horizon")
def test_weights_of_given_labels_that_are_not_finite_show(backend, weight):
    x, labels, weights = torch.randn(3, 4), torch.rand(3, 4), torch.ones(3, 4)
    weights[0, 1], weights[1, 2] = 0, weight
    got = value_and_grad(FixedHorizonProgressionLoss(), x, labels, weights)
    with use_backend("reference"):
        wanted = value_and_grad(FixedHorizonProgressionLoss(), x, labels, weights)
    for mine, theirs in zip(got, wanted, strict=True):
        assert_shows(mine, theirs)
    assert got[0].isnan()
    assert got[1][1, 2].isnan()
    assert got[1][0, 1] == 0


@pytest.mark.operation("visit_cross_entropy")
@pytest.mark.parametrize("incoming", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_zero_derivative_of_classes_times_what_is_not_finite_is_nan(backend, dtype, incoming):
    """A visit that does not count has none: there it stays 0."""
    x = torch.zeros(2, 3, 9)
    x[..., 4] = 2000
    labels, weights = torch.full((2, 3), 4), torch.ones(2, 3)
    labels[0, 1], weights[1, 0] = -100, 0
    for smoothing in (0.0, 0.5):
        leaf = x.to(dtype).requires_grad_()
        options = {"visit_weight": weights, "label_smoothing": smoothing, "reduction": "none"}
        loss = visit_cross_entropy(leaf, labels, **options)
        (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, incoming))
        assert not grad[0, 1].any()
        if smoothing == 0:
            counts = (labels == 4)[..., None].expand_as(grad)
            assert torch.equal(grad.isnan(), counts)
        else:
            assert grad[1, 0].isnan().all()


@pytest.mark.operation("fixed_horizon")
@pytest.mark.parametrize("incoming", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_zero_derivative_of_a_horizon_times_what_is_not_finite_is_nan(backend, dtype, incoming):
    weights = torch.ones(2, 12)
    weights[1, 0] = 0
    for weight in (None, weights):
        leaf = torch.full((2, 12), -2000.0).to(dtype).requires_grad_()
        outcomes = (torch.tensor([10, 12]), torch.tensor([0, 0]), 2)
        loss = fixed_horizon_bce(leaf, *outcomes, visit_weight=weight, reduction="none")
        (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, incoming))
        counts = torch.arange(12) <= torch.tensor([[8], [10]])
        assert torch.equal(grad.isnan(), counts)
        assert not grad[~counts].any()
