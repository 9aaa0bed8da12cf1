"""Losses on visit-level predictions: equal to PyTorch's on the real rows, blind to padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from ehrseq_fast import (
    discrete_time_survival_nll,
    packed_survival_nll,
)
from ehrseq_fast.losses import (
    FixedHorizonProgressionLoss,
    MultiTaskSurvivalLoss,
    compute_masked_loss,
)

from .batches import from_lists

torch.manual_seed(0)  # for the labels below, made when the file is imported
LENGTHS = [3, 1, 4]
REAL = torch.arange(5) < torch.tensor(LENGTHS)[:, None]  # [B, T] = [3, 5]

# name: (criterion, predictions' last dimension, labels)
CRITERIA = {
    "[B, T] BCE": (nn.BCEWithLogitsLoss(), (), torch.rand(3, 5).round()),
    "[B, T] MSE": (nn.MSELoss(), (), torch.randn(3, 5)),
    "[B, T, K] class index": (nn.CrossEntropyLoss(), (4,), torch.randint(0, 4, (3, 5))),
    "[B, T, K] weighted class index": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0])),
        (4,),
        torch.randint(0, 4, (3, 5)),
    ),
    "[B, T, K] BCE": (nn.BCEWithLogitsLoss(), (4,), torch.rand(3, 5, 4).round()),
    "[B, T, K] class probabilities": (
        nn.CrossEntropyLoss(),
        (4,),
        torch.rand(3, 5, 4).softmax(-1),
    ),
    "[B, T, 1] BCE": (nn.BCEWithLogitsLoss(), (1,), torch.rand(3, 5, 1).round()),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_masked_loss_is_the_criterion_on_real_rows(name):
    criterion, last, labels = CRITERIA[name]
    predictions = torch.randn(3, 5, *last, requires_grad=True)
    loss = compute_masked_loss(criterion, predictions, labels, LENGTHS)
    wanted = criterion(predictions[REAL], labels[REAL])
    torch.testing.assert_close(loss, wanted)
    (grad,) = torch.autograd.grad(loss, predictions)
    (wanted_grad,) = torch.autograd.grad(wanted, predictions)
    torch.testing.assert_close(grad, wanted_grad)
    assert not torch.isclose(loss, criterion(predictions.flatten(0, 1), labels.flatten(0, 1)))


@pytest.mark.parametrize("name", CRITERIA)
def test_masked_loss_never_reads_padding(name):
    criterion, last, labels = CRITERIA[name]
    clean = torch.randn(3, 5, *last)
    poison = torch.nan if labels.is_floating_point() else 10**6
    results = []
    for predictions, targets in [(clean, labels), (clean.clone(), labels.clone())]:
        if results:
            predictions[~REAL], targets[~REAL] = torch.nan, poison
        predictions.requires_grad_()
        loss = compute_masked_loss(criterion, predictions, targets, torch.tensor(LENGTHS))
        results.append((loss, *torch.autograd.grad(loss, predictions)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[1][1][~REAL].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8])
def test_masked_loss_takes_whole_labels_of_any_dtype(dtype):
    scores = torch.randn(3, 5)
    binary = torch.rand(3, 5).round()
    torch.testing.assert_close(
        compute_masked_loss(nn.BCEWithLogitsLoss(), scores, binary.to(dtype), LENGTHS),
        compute_masked_loss(nn.BCEWithLogitsLoss(), scores, binary, LENGTHS),
    )
    classes = torch.randint(0, 2, (3, 5))
    torch.testing.assert_close(
        compute_masked_loss(
            nn.CrossEntropyLoss(), torch.stack([scores, -scores], -1), classes.to(dtype), LENGTHS
        ),
        compute_masked_loss(
            nn.CrossEntropyLoss(), torch.stack([scores, -scores], -1), classes, LENGTHS
        ),
    )


def test_masked_loss_averages_an_unreduced_criterion():
    scores, labels = torch.randn(3, 5, 4), torch.rand(3, 5, 4)
    torch.testing.assert_close(
        compute_masked_loss(nn.BCEWithLogitsLoss(reduction="none"), scores, labels, LENGTHS),
        compute_masked_loss(nn.BCEWithLogitsLoss(), scores, labels, LENGTHS),
    )


def test_masked_loss_of_non_contiguous_predictions():
    scores, labels = torch.randn(5, 3).T, torch.rand(5, 3).T
    torch.testing.assert_close(
        compute_masked_loss(F.mse_loss, scores, labels, LENGTHS),
        F.mse_loss(scores[REAL], labels[REAL]),
    )


@pytest.mark.parametrize(
    ("predictions", "labels", "lengths", "error", "message"),
    [
        ((3,), (3,), LENGTHS, ValueError, r"predictions: expected \[B, T\] or \[B, T, K\]"),
        ((3, 5), (3, 4), LENGTHS, ValueError, r"labels: expected the shape .*got shape \[3, 4\]"),
        ((3, 5, 2), (3, 5, 3), LENGTHS, ValueError, r"\[3, 5, 2\].*got shape \[3, 5, 3\]"),
        ((3, 5), (3, 5), [3, 1], ValueError, r"lengths: expected \[B\] = \[3\], got shape \[2\]"),
        ((3, 5), (3, 5), [3, 0, 0], ValueError, "Found 2 sequences with zero length.*patient 1"),
        ((3, 5), (3, 5), [3, 6, 1], ValueError, r"lengths outside \[1, T = 5\].* 6, of patient 1"),
        ((3, 5), (3, 5), [3, 1, -2], ValueError, "first is -2, of patient 2"),
        ((3, 5, 2), (3, 5), LENGTHS, TypeError, "expected integers, class indices"),
    ],
)
def test_masked_loss_refuses(predictions, labels, lengths, error, message):
    with pytest.raises(error, match=message):
        compute_masked_loss(nn.MSELoss(), torch.zeros(predictions), torch.zeros(labels), lengths)


@pytest.mark.parametrize("device", ["meta"])
def test_losses_under_another_default_device(device):
    scores, labels = torch.randn(3, 5), torch.rand(3, 5).round()
    wanted = compute_masked_loss(nn.BCEWithLogitsLoss(), scores, labels, LENGTHS)
    horizon = FixedHorizonProgressionLoss()(scores, labels, REAL)
    with torch.device(device):
        for lengths in (LENGTHS, torch.tensor(LENGTHS, device="cpu")):
            got = compute_masked_loss(nn.BCEWithLogitsLoss(), scores, labels, lengths)
            assert torch.equal(got, wanted)
        assert torch.equal(FixedHorizonProgressionLoss()(scores, labels, REAL), horizon)


def test_survival_losses_under_another_default_device(backend):
    hazards = torch.rand(3, 4) * 0.8 + 0.1
    times, seen = torch.tensor([1, 0, 3]), torch.tensor([1, 0, 1])
    batch = from_lists([[[1]] * 4] * 3, event_times=times, event_indicators=seen)
    rows = batch.pack(hazards)
    wanted = discrete_time_survival_nll(hazards, times, seen)
    with torch.device("meta"):
        x, y = hazards.clone().requires_grad_(), rows.clone().requires_grad_()
        for loss, given in (
            (discrete_time_survival_nll(x, times, seen), x),
            (packed_survival_nll(y, batch), y),
        ):
            torch.testing.assert_close(loss, wanted)
            assert torch.autograd.grad(loss, given, create_graph=True)[0].isfinite().all()
        torch.func.jacfwd(lambda h: packed_survival_nll(h, batch))(rows)


@pytest.mark.parametrize("lengths", [[2.5, 1, 4], [float("nan"), 1, 4]])
def test_masked_loss_refuses_lengths_that_are_not_whole(lengths):
    with pytest.raises(ValueError, match="lengths: expected whole numbers"):
        compute_masked_loss(nn.MSELoss(), torch.zeros(3, 5), torch.zeros(3, 5), lengths)


def horizon_case():
    logits = torch.randn(3, 5)
    labels = torch.rand(3, 5).round()
    valid = REAL.clone()
    valid[0, 2] = valid[2, 0] = False
    return logits, labels, valid


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("label_dtype", [torch.float32, torch.int64, torch.float64])
def test_horizon_loss_is_the_mean_over_valid_visits(mask_dtype, label_dtype):
    logits, labels, valid = horizon_case()
    logits.requires_grad_()
    loss = FixedHorizonProgressionLoss(180)(logits, labels.to(label_dtype), valid.to(mask_dtype))
    wanted = F.binary_cross_entropy_with_logits(logits[valid], labels[valid])
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(wanted, logits)
    )


def test_horizon_loss_never_reads_invalid_visits():
    logits, labels, valid = horizon_case()
    loss_fn = FixedHorizonProgressionLoss()
    wanted = loss_fn(logits, labels, valid)
    junk = logits.masked_fill(~valid, torch.nan).requires_grad_()
    for junk_label in (-1.0, torch.nan):
        loss = loss_fn(junk, labels.masked_fill(~valid, junk_label), valid)
        assert torch.equal(loss, wanted)
        (grad,) = torch.autograd.grad(loss, junk)
        assert grad.isfinite().all()
        assert not grad[~valid].any()


def test_horizon_loss_weights_by_fractions():
    logits, labels = torch.tensor([[0.3, -2.0]]), torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[0.5, 2.0]])
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    torch.testing.assert_close(
        FixedHorizonProgressionLoss()(logits, labels, weight), (each * weight).sum() / 2.5
    )


def test_horizon_loss_has_a_derivative_by_a_weight_of_0():
    """What such a visit would add, where it holds something; 0 where it does not."""
    logits = torch.tensor([[0.3, -2.0, 1.5, torch.nan, 0.2]]).double()
    labels = torch.tensor([[1.0, 0.0, 0.0, 0.0, -1.0]]).double()
    weight = torch.tensor([[0.5, 2.0, 0.0, 0.0, 0.0]]).double().requires_grad_()
    each = F.binary_cross_entropy_with_logits(logits[:, :3], labels[:, :3], reduction="none")
    expected = F.pad(each, (0, 2))
    expected = (expected - (each * weight[:, :3]).sum() / 2.5) / 2.5

    def run(weight):
        return FixedHorizonProgressionLoss()(logits, labels, weight)

    torch.testing.assert_close(torch.autograd.grad(run(weight), weight)[0], expected)
    torch.testing.assert_close(torch.func.grad(run)(weight.detach()), expected)
    torch.testing.assert_close(run(weight), run(weight.detach()))


def test_horizon_loss_of_no_valid_visit_is_zero():
    logits = torch.full((2, 3), torch.nan, requires_grad=True)
    loss = FixedHorizonProgressionLoss()(logits, torch.full((2, 3), -1), torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_horizon_loss_in_16_bits_sums_in_float32(dtype):
    logits = torch.full((64, 2048), 0.5, dtype=dtype)
    ones = torch.ones(64, 2048)
    loss = FixedHorizonProgressionLoss()(logits, ones, ones.to(dtype))
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.float(), F.softplus(torch.tensor(-0.5)), rtol=2**-8, atol=0.0)


@pytest.mark.parametrize("wrong", [-1.0, 2.0, torch.nan])
def test_horizon_loss_refuses_bad_labels_at_valid_visits(wrong):
    logits, labels, valid = horizon_case()
    labels[1, 0] = wrong
    with pytest.raises(ValueError, match=r"1 labels outside \[0, 1\] at valid.*= \[1, 0\]"):
        FixedHorizonProgressionLoss()(logits, labels, valid)


@pytest.mark.parametrize("name", ["labels", "valid_mask"])
def test_horizon_loss_refuses_other_shapes(name):
    arguments = {"logits": torch.zeros(3, 5), "labels": torch.zeros(3, 5), "valid_mask": REAL}
    arguments[name] = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=rf"{name}: expected the shape of logits, \[3, 5\]"):
        FixedHorizonProgressionLoss()(**arguments)


def test_multi_task_loss_is_the_weighted_sum():
    survival, readmission = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0))
    loss_fn = MultiTaskSurvivalLoss({"survival": 1.0, "readmission": 0.5, "absent": 9.0})
    loss = loss_fn({"survival": survival, "readmission": readmission, "logged": torch.tensor(7.0)})
    assert loss.item() == 3.5
    loss.backward()
    assert (survival.grad.item(), readmission.grad.item()) == (1.0, 0.5)


def test_multi_task_loss_refuses_tasks_none_of_which_has_a_weight():
    with pytest.raises(ValueError, match=r"one of \['survival'\], got \['survial'\]"):
        MultiTaskSurvivalLoss({"survival": 1.0})({"survial": torch.tensor(1.0)})


def test_losses_show_their_settings():
    assert "horizon_days=180" in repr(FixedHorizonProgressionLoss(180))
    assert "'survival': 1.0" in repr(MultiTaskSurvivalLoss({"survival": 1.0}))
    assert FixedHorizonProgressionLoss().horizon_days is None
    assert MultiTaskSurvivalLoss({"a": 2.0}).task_weights == {"a": 2.0}


@pytest.mark.parametrize("weight", ["2", None, True, [1.0], 1j])
def test_multi_task_loss_refuses_weights_that_are_no_numbers(weight):
    with pytest.raises(TypeError, match=r"task_weights\['a'\]: expected a number, got "):
        MultiTaskSurvivalLoss({"b": 1.0, "a": weight})


def test_multi_task_loss_takes_numbers_of_any_kind():
    learnt = torch.tensor(2.0, requires_grad=True)
    weights = {"a": 1, "b": np.float32(0.5), "c": learnt}
    loss = MultiTaskSurvivalLoss(weights)({name: torch.tensor(4.0) for name in weights})
    loss.backward()
    assert (loss.item(), learnt.grad.item()) == (14.0, 4.0)


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, 2, 0), (0, None, None)])
def test_horizon_loss_under_vmap(dims):
    given = (torch.randn(3, 2, 4), torch.randint(0, 2, (3, 2, 4)), torch.ones(3, 2, 4))
    given[2][1, 0, 2:] = 0.0
    inputs = [x[0] if dim is None else x for x, dim in zip(given, dims, strict=True)]
    mapped = [x if dim is None else x.movedim(0, dim) for x, dim in zip(inputs, dims, strict=True)]
    loss = FixedHorizonProgressionLoss()
    by_sample = [
        loss(*(x if dim is None else x[i] for x, dim in zip(inputs, dims, strict=True)))
        for i in range(3)
    ]
    torch.testing.assert_close(vmap(loss, dims)(*mapped), torch.stack(by_sample))


def test_horizon_loss_under_vmap_refuses_what_one_sample_holds():
    logits, labels, valid = torch.randn(3, 2, 4), torch.zeros(3, 2, 4), torch.ones(3, 2, 4)
    labels[1, 1, 2], valid[1, 1, 3] = 7.0, 0.0
    labels[1, 1, 3] = -1.0  # not valid
    mapped = vmap(FixedHorizonProgressionLoss())
    with pytest.raises(ValueError, match=r"Found 1 labels outside \[0, 1\] .*The first is 7\."):
        mapped(logits, labels, valid)
    valid[2, 0, 0] = -torch.inf
    with pytest.raises(ValueError, match=r"valid_mask: expected numbers .*1 others.* is -inf"):
        mapped(logits, labels, valid)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bfloat16])
def test_horizon_loss_refuses_negative_weights(dtype):
    """A weight of -1 would train towards the wrong label."""
    valid = torch.tensor([[1, 0], [1, -1]], dtype=dtype)
    with pytest.raises(ValueError, match=r"valid_mask: expected .*at least 0.* is -1 .*\[1, 1\]"):
        FixedHorizonProgressionLoss()(torch.zeros(2, 2), torch.zeros(2, 2), valid)


def test_masked_loss_under_vmap():
    """Over predictions and labels; over lengths it says so."""
    scores, labels = torch.randn(2, 3, 4), torch.ones(2, 3, 4)
    criterion = torch.nn.BCEWithLogitsLoss()

    def loss(scores, labels, lengths=(1, 2, 3)):
        return compute_masked_loss(criterion, scores, labels, lengths)

    by_sample = [loss(*one) for one in zip(scores, labels, strict=True)]
    torch.testing.assert_close(vmap(loss)(scores, labels), torch.stack(by_sample))
    same = torch.tensor([1, 2, 3])
    found = vmap(loss, (0, 0, None))(scores, labels, same)
    torch.testing.assert_close(found, torch.stack(by_sample))
    with pytest.raises(RuntimeError, match=r"lengths: .*vmap hides: give all patients in one call"):
        vmap(loss)(scores, labels, torch.tensor([[1, 2, 3], [1, 1, 1]]))


def test_weights_learned_by_uncertainty():
    module = MultiTaskSurvivalLoss({"a": 1.0, "b": 0.5}, learned=True)
    assert list(module.state_dict()) == ["log_variances.a", "log_variances.b"]
    assert "learned" in repr(module)
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(4.0), "unknown": torch.tensor(torch.nan)}
    total = module(losses)
    torch.testing.assert_close(total.item(), 2.0 + 0.5 * 4.0 + math.log(2) / 2)
    grads = torch.autograd.grad(total, list(module.parameters()))
    torch.testing.assert_close(torch.stack(grads), torch.tensor([0.5 - 2.0, 0.5 - 2.0]))
    # what is missing adds nothing, and has the gradient that a distributed module waits for
    module({"b": torch.tensor(4.0)}).backward()
    assert module.log_variances["a"].grad == 0
    # the least sum has exp(s) = 2 L
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        module(losses).backward()
        optimizer.step()
    learned = torch.stack(list(module.parameters())).exp()
    torch.testing.assert_close(learned, torch.tensor([4.0, 8.0]), rtol=1e-2, atol=0)
    # by name, not by order
    other = MultiTaskSurvivalLoss({"b": 1.0, "a": 1.0}, learned=True)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(losses), module(losses))
    with pytest.raises(RuntimeError, match=r"log_variances\.c"):
        MultiTaskSurvivalLoss({"c": 1.0, "a": 1.0}, learned=True).load_state_dict(
            other.state_dict()
        )


@pytest.mark.parametrize(
    ("name", "error"), [("a.b", ValueError), ("", ValueError), ("keys", ValueError), (1, TypeError)]
)
def test_names_that_cannot_be_learned(name, error):
    with pytest.raises(error, match="task_weights: expected names that"):
        MultiTaskSurvivalLoss({name: 1.0}, learned=True)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_cannot_be_learned(weight):
    with pytest.raises(ValueError, match=r"task_weights\['a'\]: expected a finite number above 0"):
        MultiTaskSurvivalLoss({"a": weight}, learned=True)
