"""Derivatives of the survival losses: every mode, and nothing shared with what is kept for them."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from ehrseq_fast import (
    CompetingRisksSurvivalLoss,
    DiscreteTimeSurvivalLoss,
    PackedRows,
    competing_risks_nll,
    discrete_time_survival_nll,
    packed_competing_risks_nll,
    packed_survival_nll,
)

from .batches import from_lists
from .checkpointed import checkpoint
from .survival_cases import definition

pytestmark = pytest.mark.operation("survival_nll")

LENGTHS = [5, 1, 3, 4]
WAYS = ("probabilities", "sigmoid", "softmax")
KINDS = [kind for kind in itertools.product(WAYS, (None, 2)) if kind != ("softmax", None)]
LAYOUTS = ("padded", "packed")


class Case:
    """A loss as a function of its hazards, its definition, and the definition's derivatives."""

    def __init__(self, layout, way, causes, dtype=torch.float64):
        self.times, self.types = torch.tensor([4, 0, 2, 1]), torch.tensor([1, 0, 1, 0])
        self.mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
        self.weights = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
        name = "event_indicators" if causes is None else "event_types"
        self.batch = from_lists(
            [[[1]] * n for n in LENGTHS], event_times=self.times, **{name: self.types}
        )
        self.options = {"from_logits": way != "probabilities", "sample_weight": self.weights}
        if causes is not None:
            self.options["link"] = "softmax" if way == "softmax" else "sigmoid"
        self.packed, self.competing = layout == "packed", causes is not None
        shape = (4, 5) if causes is None else (4, 5, causes + (way == "softmax"))
        padded = torch.rand(shape, dtype=dtype) * 0.8 + 0.1
        self.hazards = self.batch.pack(padded) if self.packed else padded

    def loss(self, hazards, **options):
        options = self.options | options
        if self.packed:
            loss = packed_competing_risks_nll if self.competing else packed_survival_nll
            return loss(hazards, self.batch, **options)
        loss = competing_risks_nll if self.competing else discrete_time_survival_nll
        return loss(hazards, self.times, self.types, self.mask, **options)

    def definition(self, hazards, **options):
        hazards = self.batch.pad(hazards) if self.packed else hazards
        return definition(hazards, self.times, self.types, self.mask, **(self.options | options))

    def jacobian(self):
        return torch.autograd.functional.jacobian(self.definition, self.hazards)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("way", "causes"), KINDS)
def test_every_transform_is_the_definitions(backend, layout, way, causes):
    case = Case(layout, way, causes)
    first = case.jacobian()
    second = torch.autograd.functional.hessian(case.definition, case.hazards)
    tangent = torch.rand_like(case.hazards)
    close = torch.testing.assert_close
    for transform in (grad, jacrev, jacfwd):
        close(transform(case.loss)(case.hazards), first)
    close(hessian(case.loss)(case.hazards), second)
    close(jvp(case.loss, (case.hazards,), (tangent,))[1], (first * tangent).sum())
    with forward_ad.dual_level():
        dual = case.loss(forward_ad.make_dual(case.hazards, tangent))
        close(forward_ad.unpack_dual(dual).tangent, (first * tangent).sum())
    both = torch.stack([case.hazards, case.hazards * 0.9])
    close(vmap(case.loss)(both), torch.stack([case.definition(x) for x in both]))
    close(vmap(grad(case.loss))(both)[0], first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_gradients_at_once(backend, layout):
    case = Case(layout, "probabilities", None)
    x = case.hazards.clone().requires_grad_()
    nll = case.loss(x, reduction="none")
    together = torch.autograd.grad(nll, x, torch.eye(4, dtype=nll.dtype), is_grads_batched=True)[0]
    torch.testing.assert_close(together.sum(0) / 4, case.jacobian())


def test_gradients_per_sample(backend):
    case = Case("padded", "probabilities", None)

    def one(hazards, time, seen, mask):
        return discrete_time_survival_nll(hazards[None], time[None], seen[None], mask[None])

    each = vmap(grad(one))(case.hazards, case.times, case.types, case.mask)
    torch.testing.assert_close(each * case.weights[:, None] / 4, case.jacobian())


def test_a_weight_has_its_derivative_or_is_refused(backend):
    case = Case("padded", "probabilities", None)
    each = case.definition(case.hazards, sample_weight=None, reduction="none")

    def of_weight(weight):
        return case.loss(case.hazards, sample_weight=weight)

    torch.testing.assert_close(grad(of_weight)(case.weights), each / 4)
    tangent = jvp(of_weight, (case.weights,), (case.weights,))[1]
    torch.testing.assert_close(tangent, (each * case.weights).mean())
    with pytest.raises(ValueError, match="sample_weight: expected no requires_grad"):
        of_weight(case.weights.clone().requires_grad_())


def test_modules_under_functional_call(backend):
    for module, causes in ((DiscreteTimeSurvivalLoss(), None), (CompetingRisksSurvivalLoss(), 2)):
        case = Case("padded", "probabilities", causes)
        arguments = case.times, case.types, case.mask
        weight = {"sample_weight": case.weights}

        def loss(x, module=module, arguments=arguments, weight=weight):
            return functional_call(module, {}, (x, *arguments), weight)

        torch.testing.assert_close(loss(case.hazards), case.definition(case.hazards))
        torch.testing.assert_close(grad(loss)(case.hazards), case.jacobian())
        torch.testing.assert_close(jacfwd(loss)(case.hazards), case.jacobian())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_gradient_is_nobody_elses(backend, layout, scale, dtype):
    """Whatever is done to one, through NumPy too, the next has its own numbers."""
    case = Case(layout, "probabilities", None, dtype)
    x = case.hazards.clone().requires_grad_()
    nll = case.loss(x) * scale
    results = []
    for keep in (True, True, False):
        (result,) = torch.autograd.grad(nll, x, retain_graph=keep)
        results.append((result, result.clone()))
        bits = result.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        (bits.numpy() if bits.is_cpu else bits)[:] = 7
    assert len({result.data_ptr() for result, _ in results}) == 3
    for _, kept in results[1:]:
        assert torch.equal(kept, results[0][1])
    assert results[0][1].any()


CHANGED = {
    "event_times": lambda case: case.times,
    "types": lambda case: case.types,
    "weights": lambda case: case.weights,
    "mask": lambda case: case.mask,
    "row_starts": lambda case: case.batch.row_starts,
    "unsorted_indices": lambda case: case.batch.unsorted_indices,
}
OF_LAYOUT = {"padded": list(CHANGED)[:4], "packed": [*list(CHANGED)[:3], *list(CHANGED)[4:]]}


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout in LAYOUTS for name in OF_LAYOUT[layout]]
)
@pytest.mark.parametrize("causes", [None, 2])
def test_what_changed_since_the_forward_pass_is_noticed(kernels, layout, name, causes):
    case = Case(layout, "probabilities", causes)
    x = case.hazards.clone().requires_grad_()
    outcomes = {}
    if layout == "packed":  # the batch's own are copies
        outcomes = {"event_times": case.times}
        outcomes["event_indicators" if causes is None else "event_types"] = case.types
    nll = case.loss(x, **outcomes)
    CHANGED[name](case).copy_(CHANGED[name](case).clone())
    for create_graph in (True, False):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(nll, x, retain_graph=True, create_graph=create_graph)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, layout, reentrant):
    case = Case(layout, "sigmoid", None)
    x = case.hazards.clone().requires_grad_()
    checkpoint(case.loss, x, use_reentrant=reentrant).backward()
    torch.testing.assert_close(x.grad, case.jacobian())


def test_anomaly_mode_finds_nothing(backend):
    case = Case("packed", "probabilities", 2)
    x = case.hazards.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            case.loss(x).backward()
    torch.testing.assert_close(x.grad, case.jacobian())


@pytest.mark.parametrize("causes", [None, 2])
def test_packed_rows_bring_their_batch(backend, causes):
    case = Case("packed", "probabilities", causes)
    rows = PackedRows(case.hazards, case.batch)
    module = DiscreteTimeSurvivalLoss() if causes is None else CompetingRisksSurvivalLoss()
    loss = discrete_time_survival_nll if causes is None else competing_risks_nll
    packed = packed_survival_nll if causes is None else packed_competing_risks_nll
    weight = {"sample_weight": case.weights}
    expected = case.loss(case.hazards)
    for value in (module(rows, **weight), loss(rows, **weight), packed(rows, **weight)):
        assert torch.equal(value, expected)
    assert torch.equal(packed(rows, case.batch, **weight), expected)
    later = torch.zeros_like(case.times)
    assert torch.equal(
        module(rows, later, case.types), packed(case.hazards, case.batch, event_times=later)
    )
    with pytest.raises(ValueError, match="sequence_mask: expected None, as"):
        loss(rows, sequence_mask=case.mask)
    with pytest.raises(TypeError, match=": expected a tensor with padded"):
        loss(torch.rand(4, 5) if causes is None else torch.rand(4, 5, 2))
    with pytest.raises(TypeError, match="batch: expected a PackedVisits"):
        packed(case.hazards)
    other = from_lists([[[1]] * n for n in LENGTHS], event_times=later)
    with pytest.raises(ValueError, match="batch: expected that of the PackedRows"):
        packed(rows, other)
    bare = PackedRows(case.hazards, other)
    with pytest.raises(ValueError, match=r"event_times and event_\w+: expected"):
        module(bare)
