"""Visits and their codes for the tests of ``next_codes_bce``; the loss of dense targets."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ehrseq_fast import PackedVisits, next_codes_bce

from .tolerances import assert_matches


class Given(NamedTuple):
    states: Tensor
    weight: Tensor
    bias: Tensor
    codes: Tensor
    offsets: Tensor
    pos_weight: Tensor
    class_weight: Tensor
    visit_weight: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.states, self.weight, self.bias]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.codes, self.offsets

    def of(self, dtype: torch.dtype) -> Given:
        return Given(*(x.to(dtype) if x.is_floating_point() else x for x in self))


def make(n_visits: int, width: int, classes: int, dtype=torch.float32, seed=0) -> Given:
    """Visits of 0 to 6 codes, some of them twice."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    counts = torch.randint(0, 7, (n_visits,), generator=generator)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    codes = torch.randint(0, classes, (int(offsets[-1]),), generator=generator)
    rows = (normal(n_visits, width), normal(classes, width), normal(classes))
    weights = (normal(classes).abs(), normal(classes).abs(), normal(n_visits).abs())
    return Given(*(x.to(dtype) for x in rows), codes, offsets, *(x.to(dtype) for x in weights))


def dense_targets(codes: Tensor, offsets: Tensor, classes: int) -> Tensor:
    targets = torch.zeros(len(offsets) - 1, classes, dtype=torch.float64)
    for visit, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        for code in codes[begin:end].tolist():
            targets[visit, code] = 1
    return targets


def dense(given: Given, weighted: bool, reduction: str = "none") -> Tensor:
    """By PyTorch's loss of dense targets."""
    classes = len(given.weight)
    losses = F.binary_cross_entropy_with_logits(
        F.linear(given.states, given.weight, given.bias),
        dense_targets(given.codes, given.offsets, classes).to(given.states.dtype),
        weight=given.class_weight if weighted else None,
        pos_weight=given.pos_weight if weighted else None,
        reduction="none",
    ).sum(1)
    if weighted:
        losses = losses * given.visit_weight
    return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]


def ours(given: Given, weighted: bool, reduction: str = "none", **options) -> Tensor:
    if weighted:
        options["pos_weight"], options["class_weight"] = given.pos_weight, given.class_weight
        options["visit_weight"] = given.visit_weight
    return next_codes_bce(*given.leaves, given.pair, reduction=reduction, **options)


def with_gradients(loss, given: Given, *arguments, **options):
    leaves = [x.detach().clone().requires_grad_() for x in given.leaves]
    value = loss(given._replace(**dict(zip(Given._fields, leaves, strict=False))), *arguments,
                 **options)  # fmt: skip
    weights = torch.arange(1.0, 1 + value.numel()).view(value.shape) / max(1, value.numel())
    gradients = torch.autograd.grad(value, leaves, weights.to(value.dtype))
    return value.detach(), *gradients


def check(given: Given, weighted: bool, reduction: str):
    got = with_gradients(ours, given, weighted, reduction)
    wide = with_gradients(dense, given.of(torch.float64), weighted, reduction)
    n_visits, width = given.states.shape
    classes = len(given.weight)
    assert got[0].dtype == (torch.float64 if given.states.dtype == torch.float64 else torch.float32)
    for mine, expected, leaf in zip(got[1:], wide[1:], given.leaves, strict=True):
        assert mine.dtype == leaf.dtype
        assert mine.shape == leaf.shape
        summed = max(1, n_visits) if leaf is not given.states else classes
        size = 8 * summed / (max(1, n_visits) if reduction == "mean" else 1)
        assert_matches(mine, expected, scale=size, terms=width)
    assert_matches(got[0], wide[0], scale=(wide[0].abs() + 1) * 4, terms=width)


PATIENTS = [[[1], [0, 2, 2], []], [[2]], [[3, 1], [4]], [[], [1, 1], [0], [4, 3]]]


def by_visit(patients=PATIENTS, classes=5, width=3):
    batch = PackedVisits.from_lists(patients, vocab_size=classes)
    batch = batch.to(torch.get_default_device())
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    padded = torch.randn(len(patients), batch.max_visits, width, generator=generator)
    layer = torch.nn.Linear(width, classes)
    return batch, padded, layer
