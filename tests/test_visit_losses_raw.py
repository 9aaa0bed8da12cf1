"""The raw operators of the losses whose terms are visits, which export and torch.compile reach: all
arguments are checked, in the same words on every backend."""

from __future__ import annotations

import math

import pytest
import torch

from ehrseq_fast import PackedVisits
from ehrseq_fast import backend as backends

LONG = torch.zeros(9, dtype=torch.long)
COMPLEX = torch.cfloat
BATCH = PackedVisits.from_lists([[[1]], [[1]] * 3])
ROWS = {
    "row_starts": BATCH.row_starts,
    "unsorted_indices": BATCH.unsorted_indices,
    "last_rows": BATCH.last_rows,
}
OF_PATIENTS = [LONG, LONG[0], torch.ones(2, 3), torch.ones(2, dtype=COMPLEX)]
OF_VISITS = [torch.ones(2, 4), torch.ones(3, 3), torch.ones(6), torch.ones(2, 3, dtype=COMPLEX)]
COMMON = {
    "sequence_mask": OF_VISITS,
    "visit_weight": OF_VISITS,
    "sample_weight": OF_PATIENTS,
    "reduction": [-1, 3, 7],
}
CLASSES = {
    "logits": torch.zeros(2, 3, 4),
    "labels": torch.zeros(2, 3, dtype=torch.long),
    "sequence_mask": torch.ones(2, 3),
    **dict.fromkeys(ROWS),
    "class_weight": torch.ones(4),
    "visit_weight": torch.ones(2, 3),
    "sample_weight": torch.ones(2),
    "ignore_index": -100,
    "label_smoothing": 0.1,
    "reduction": 1,
    "needs_grad": True,
}
BAD_CLASSES = COMMON | {
    "logits": [torch.zeros(2, 3), torch.zeros(2, 3, 0), torch.zeros(2, 3, 4, dtype=COMPLEX)],
    "labels": [LONG[:6], LONG[:8].view(2, 4), torch.zeros(2, 3), torch.zeros(2, 3).bool()],
    "class_weight": [torch.ones(3), torch.ones(4, 1), torch.ones(4, dtype=COMPLEX)],
    "label_smoothing": [-0.1, 1.5, math.nan],
}
HORIZON = {
    "logits": torch.zeros(2, 3),
    "event_times": torch.tensor([2.0, 1.0]),
    "event_indicators": torch.ones(2),
    "sequence_mask": torch.ones(2, 3),
    **dict.fromkeys(ROWS),
    "visit_times": torch.zeros(2, 3),
    "visit_weight": torch.ones(2, 3),
    "sample_weight": torch.ones(2),
    "horizon": 2.0,
    "pos_weight": 1.0,
    "reduction": 1,
    "needs_grad": True,
}
BAD_HORIZON = COMMON | {
    "logits": [torch.zeros(2), torch.zeros(2, 3, 1), torch.zeros(2, 3, dtype=COMPLEX)],
    "event_times": OF_PATIENTS,
    "event_indicators": OF_PATIENTS,
    "visit_times": OF_VISITS,
    "horizon": [0.0, -1.0, math.nan],
    "pos_weight": [-1.0, math.inf, math.nan],
}
MASKED = {
    "logits": torch.zeros(2, 3),
    "labels": torch.zeros(2, 3),
    "weights": torch.ones(2, 3),
    "needs_grad": True,
}
BAD_MASKED = {"logits": BAD_HORIZON["logits"], "labels": OF_VISITS, "weights": OF_VISITS}
OPERATORS = {
    "visit_cross_entropy": (CLASSES, BAD_CLASSES),
    "fixed_horizon_bce": (HORIZON, BAD_HORIZON),
    "masked_bce": (MASKED, BAD_MASKED),
}
MARKS = {"masked_bce": "fixed_horizon", "fixed_horizon_bce": "fixed_horizon"}
EVERY = [
    pytest.param(name, marks=pytest.mark.operation(MARKS.get(name, name))) for name in OPERATORS
]


def call(operator, arguments):
    device = torch.get_default_device()
    return operator(
        *(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments.values())
    )


@pytest.mark.parametrize("name", EVERY)
def test_arguments_are_checked(kernels, name):
    operator = getattr(backends.operators(kernels), name).default
    good, bad = OPERATORS[name]
    value, grad = call(operator, good)
    assert value.isfinite()
    assert grad.shape == good["logits"].shape
    for argument, others in bad.items():
        for other in others:
            with pytest.raises((ValueError, RuntimeError)) as raised:
                call(operator, good | {argument: other})
            assert str(raised.value).startswith(f"{name}: {argument}: expected ")


@pytest.mark.parametrize("name", EVERY[:2])
def test_packed_rows_are_checked(kernels, name):
    operator = getattr(backends.operators(kernels), name).default
    good = dict(OPERATORS[name][0]) | ROWS | {"sequence_mask": None}
    for of_visits in ("logits", "labels", "visit_times", "visit_weight"):
        if of_visits in good:
            good[of_visits] = good[of_visits].flatten(0, 1)[:4]
    value, grad = call(operator, good)
    assert value.isfinite()
    assert grad.shape == good["logits"].shape
    for argument, other, wrong in (
        ("sequence_mask", torch.ones(2, 3), "sequence_mask"),
        ("last_rows", None, "row_starts, unsorted_indices, last_rows"),
        ("row_starts", ROWS["row_starts"].int(), "row_starts"),
        ("unsorted_indices", ROWS["unsorted_indices"][:, None], "unsorted_indices"),
        ("last_rows", ROWS["last_rows"][:1], "last_rows"),
        ("visit_weight", torch.ones(5), "visit_weight"),
        ("sample_weight", torch.ones(4), "sample_weight"),
        ("logits", good["logits"][None], "logits"),
    ):
        with pytest.raises((ValueError, RuntimeError)) as raised:
            call(operator, good | {argument: other})
        assert str(raised.value).startswith(f"{name}: {wrong}: expected ")


@pytest.mark.operation("visit_cross_entropy")
@pytest.mark.parametrize("label", [4, -1, 2**40])
def test_an_unchecked_label_that_is_no_class_makes_the_loss_nan(kernels, label):
    operator = backends.operators(kernels).visit_cross_entropy.default
    given = CLASSES | {"labels": torch.tensor([[0, 1, 2], [3, label, -100]]), "reduction": 0}
    if kernels == "cpu":
        with pytest.raises(ValueError, match=rf"patient 1 has {label} at visit 1 \(visits"):
            call(operator, given)
        return
    value, grad = call(operator, given)
    assert value.isnan().tolist() == [[False] * 3, [False, True, False]]
    assert torch.equal(grad.isnan(), value.isnan()[..., None].expand_as(grad))
    assert call(operator, given | {"reduction": 1})[0].isnan()


def strided(x):
    """The same numbers, not next to one another."""
    if x.dim() == 1:
        return torch.stack([x, x], 1)[:, 0]
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("name", EVERY)
def test_arguments_of_any_strides(kernels, name):
    operator = getattr(backends.operators(kernels), name).default
    torch.manual_seed(1)
    given = dict(OPERATORS[name][0])
    for argument, value in given.items():
        if isinstance(value, torch.Tensor) and argument != "sequence_mask":
            drawn = torch.rand(value.shape) if value.is_floating_point() else torch.arange(6) % 4
            given[argument] = drawn.view(value.shape).to(value.dtype)
    if name == "fixed_horizon_bce":
        given |= {"event_times": torch.tensor([1.0, 9.0]), "event_indicators": torch.tensor([1, 0])}
    expected = call(operator, given)
    tensors = {key: strided(x) for key, x in given.items() if isinstance(x, torch.Tensor)}
    got = call(operator, given | tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert expected[1].any()
