"""Calls of the losses that nothing watches: the operator checks their tensors, before the checks in
Python, which have the last word on what is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    competing_risks_nll,
    deephit_competing_ranking_loss,
    deephit_ranking_loss,
    discrete_time_survival_nll,
    fixed_horizon_bce,
    packed_competing_risks_nll,
    packed_survival_nll,
    piecewise_hazard_nll,
    pmf_competing_risks_nll,
    pmf_nll,
    use_backend,
    visit_cross_entropy,
)
from ehrseq_fast.losses import FixedHorizonProgressionLoss
from ehrseq_fast.survival_nll import fused, op

PATIENTS, SLOTS, CAUSES, VISITS = 3, 4, 2, 7

OUTCOMES = {
    "event_times": torch.tensor([1, 0, 2]),
    "event_indicators": torch.tensor([1, 0, 1]),
    "entry_times": torch.tensor([0, 0, 1]),
    "sample_weight": torch.tensor([1.0, 2.0, 0.5]),
}
MASK = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
HAZARDS = torch.linspace(0.1, 0.9, PATIENTS * SLOTS).view(PATIENTS, SLOTS)
OF_CAUSES = torch.linspace(0.1, 0.4, PATIENTS * SLOTS * CAUSES).view(PATIENTS, SLOTS, CAUSES)
WEIGHTS = torch.linspace(0.5, 2.0, PATIENTS * SLOTS).view(PATIENTS, SLOTS)
DAYS = torch.arange(PATIENTS * SLOTS, dtype=torch.float32).view(PATIENTS, SLOTS) % SLOTS
OF_TYPES = {**OUTCOMES, "event_types": torch.tensor([1, 0, 2])}
del OF_TYPES["event_indicators"]
SURVIVAL = {"link": "sigmoid", "censored_visit": "included", "reduction": "mean"}
BATCH = PackedVisits.from_lists(
    [[[1], [2]], [[3]], [[1], [2], [3], [1]]],
    event_times=[1, 0, 2],
    event_indicators=[1, 0, 1],
    event_types=[1, 0, 2],
)
ROWS = torch.linspace(0.1, 0.9, VISITS)


def _with_labels(**given: Any) -> Tensor:
    return FixedHorizonProgressionLoss(3)(**given)


def _of_rows(function: Callable[..., Tensor], name: str = "logits") -> Callable[..., Tensor]:
    def loss(**given: Any) -> Tensor:
        return function(**{name: PackedRows(given.pop("rows"), BATCH)}, **given)

    loss.__name__ = f"{function.__name__} of rows"
    return loss


def _calls() -> Iterator[tuple[Callable[..., Tensor], dict[str, Any]]]:
    padded = {**OUTCOMES, "sequence_mask": MASK}
    of_types = {**OF_TYPES, "sequence_mask": MASK}
    eps = {"eps": 1e-6}
    logits = {**SURVIVAL, "from_logits": True}
    yield discrete_time_survival_nll, {"hazards": HAZARDS, **padded, **SURVIVAL, **eps}
    yield discrete_time_survival_nll, {"hazards": HAZARDS, **padded, **logits}
    weighted = {"hazards": HAZARDS, **padded, **SURVIVAL, "visit_weight": WEIGHTS}
    yield discrete_time_survival_nll, weighted
    yield competing_risks_nll, {"hazards": OF_CAUSES, **of_types, **SURVIVAL, **eps}
    classes = {"hazards": torch.cat([OF_CAUSES, OF_CAUSES], 2)[..., :3], "link": "softmax"}
    yield competing_risks_nll, {**of_types, **logits, **classes}
    weighted = {"hazards": OF_CAUSES, **of_types, **SURVIVAL, "visit_weight": WEIGHTS}
    yield competing_risks_nll, weighted
    yield packed_survival_nll, {"hazards": ROWS, "batch": BATCH, **OUTCOMES, **SURVIVAL}
    yield packed_survival_nll, {"hazards": ROWS, "batch": BATCH, "visit_weight": ROWS, **logits}
    of_rows = {"hazards": ROWS[:, None].expand(-1, 2), "batch": BATCH}
    yield packed_competing_risks_nll, {**of_rows, **OF_TYPES, **logits}
    del (weights := {**OUTCOMES})["event_times"], weights["event_indicators"]
    yield _of_rows(discrete_time_survival_nll, "hazards"), {"rows": ROWS, **weights, **logits}
    reduced = {"censored_visit": "included", "reduction": "none"}
    yield pmf_nll, {"logits": HAZARDS, **padded, **reduced}
    yield pmf_competing_risks_nll, {"logits": OF_CAUSES, **of_types, **reduced}
    yield _of_rows(pmf_nll), {"rows": ROWS, **weights, **reduced}
    ranked = {"censored_visit": "included", "sigma": 0.2}
    yield deephit_ranking_loss, {"logits": HAZARDS, **padded, **ranked}
    yield deephit_competing_ranking_loss, {"logits": OF_CAUSES, **of_types, **ranked}
    yield _of_rows(deephit_ranking_loss), {"rows": ROWS, **weights, **ranked}
    fraction = {"fraction": torch.tensor([0.5, 0.25, 1.0]), "link": "exp", "reduction": "sum"}
    yield piecewise_hazard_nll, {"logits": HAZARDS, **padded, **fraction, "visit_weight": WEIGHTS}
    yield _of_rows(piecewise_hazard_nll), {"rows": ROWS, **weights, **fraction}
    del (horizon := {**padded, "horizon": 2, "pos_weight": 1.5})["entry_times"]
    yield fixed_horizon_bce, {"logits": HAZARDS, **horizon, "visit_weight": WEIGHTS}
    yield fixed_horizon_bce, {"logits": HAZARDS, **horizon, "visit_times": DAYS}
    del (horizon := {**weights, "horizon": 2.0, "reduction": "none"})["entry_times"]
    yield _of_rows(fixed_horizon_bce), {"rows": ROWS, **horizon, "visit_weight": ROWS}
    yield _with_labels, {"logits": HAZARDS, "labels": MASK, "valid_mask": WEIGHTS}
    weights = {"class_weight": torch.tensor([1.0, 0.5]), "sample_weight": OUTCOMES["sample_weight"]}
    entropy = {**weights, "label_smoothing": 0.1, "ignore_index": -1, "reduction": "sum"}
    given = {"logits": OF_CAUSES, "labels": MASK.long(), "sequence_mask": MASK}
    yield visit_cross_entropy, {**given, **entropy, "visit_weight": WEIGHTS}
    given = {"rows": ROWS[:, None].expand(-1, 2), "labels": torch.ones(VISITS).long()}
    yield _of_rows(visit_cross_entropy), {**given, **entropy}


CALLS = list(_calls())
DTYPES = (
    *(torch.bool, torch.uint8, torch.uint16, torch.int16, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
)


class Derived(Tensor):
    """A class of tensors of its own."""


def _other_tensors(given: Tensor) -> Iterator[Any]:
    tensor = given.detach().clone()
    yield from (tensor.to(dtype) for dtype in DTYPES)
    yield from (tensor[:-1], tensor[None], tensor[..., None], tensor[..., 0], tensor[:0])
    yield from (tensor[0].flatten()[0], tensor.flatten(), tensor.mT if tensor.dim() > 1 else tensor)
    yield from (tensor.repeat_interleave(2, -1)[..., ::2], tensor.expand(2, *tensor.shape))
    yield from (tensor.to("meta"), tensor.to_sparse(), tensor.as_subclass(Derived))
    yield from (tensor.float().clone().requires_grad_(), torch.nn.Parameter(tensor.float()))
    yield from (-tensor.float(), tensor.float() + 7, tensor.float() * float("nan"))
    yield from (None, tensor.numpy(), tensor.tolist(), 0.5, BATCH, PackedRows(ROWS, BATCH))


def _other_options(value: Any) -> Iterator[Any]:
    yield from (None, "", "none", "sum", "softmax", "sigmoid", "cloglog", "exp", "probabilities")
    yield from (True, -1, 0, 1, 0.3, 7, float("nan"), float("inf"), "0.1", np.float32(0.25), [])
    yield from (np.str_(value), torch.tensor(0.1), b"mean", {"mean"}, value)


def _outcome(call: Callable[[], Tensor], leaf: Any) -> Any:
    """The bits of loss and gradient, or the error."""
    try:
        loss = call()
        if not loss.requires_grad or loss.is_meta or not isinstance(leaf, Tensor):
            return type(loss), loss.dtype, loss.detach().tolist() if not loss.is_meta else None
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    except Exception as error:
        return type(error), str(error)
    bits = gradient.contiguous().view(torch.uint8) if gradient.layout == torch.strided else None
    return repr(loss.dtype), repr(loss.tolist()), None if bits is None else bits.tolist()


def _with_gradient(given: dict[str, Any]) -> Tensor | None:
    """The hazards, which ``given`` then holds as a leaf."""
    name = next(name for name in ("hazards", "logits", "rows") if name in given)
    if type(given[name]) is not Tensor or not given[name].is_floating_point():
        return None
    given[name] = given[name].detach().requires_grad_()
    return given[name]


each_call = pytest.mark.parametrize(
    "at", range(len(CALLS)), ids=lambda at: f"{at} {CALLS[at][0].__name__}"
)
pytestmark = pytest.mark.usefixtures("compiled")


@each_call
def test_what_the_operator_refuses_is_refused_in_the_words_of_the_checks(at, monkeypatch):
    function, given = CALLS[at]

    def outcome(changed: dict[str, Any]) -> Any:
        leaf = _with_gradient(changed)
        return _outcome(lambda: function(**changed), leaf)

    for name, value in given.items():
        others = _other_tensors if isinstance(value, Tensor) else _other_options
        for other in others(value):
            changed = {**given, name: other}
            found = outcome(changed)
            with monkeypatch.context() as patch:
                patch.setattr(fused, "nothing_watches", lambda: False)
                assert outcome(changed) == found, (name, other)


@each_call
def test_a_call_that_nothing_watches_goes_to_the_operator_at_once(at, monkeypatch):
    function, given = CALLS[at]
    leaf = _with_gradient(given := {**given})
    with monkeypatch.context() as patch:
        patch.setattr(fused, "operators", None)  # which the long way takes it from
        loss = function(**given)
        with torch.no_grad():
            assert not function(**given).requires_grad
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert gradient.shape == leaf.shape


class Stopped(Exception):
    """What a hook raises, as that of a checkpoint which has computed all that it needs."""


@each_call
def test_what_hooks_of_saved_tensors_raise_is_theirs(at):
    function, given = CALLS[at]
    leaf = _with_gradient(given := {**given})
    (expected,) = torch.autograd.grad(function(**given).sum(), leaf)

    def of_leaf(again: Tensor) -> Tensor:
        return function(**{k: again if v is leaf else v for k, v in given.items()}).sum()

    loss = checkpoint(of_leaf, leaf, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        raise Stopped

    packed: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, pytest.raises(Stopped):
        function(**given)
    assert len(packed) == 1


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Computing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "watch",
    [
        Watching,
        Computing,
        lambda: FakeTensorMode(allow_non_fake_inputs=True),
        forward_ad.dual_level,
        lambda: torch.device("cpu"),
        lambda: use_backend("reference"),
    ],
)
def test_what_may_watch_a_call_makes_it_go_the_long_way(watch, monkeypatch):
    monkeypatch.setattr(fused.backend, "unwatched_operators", None)
    given = (HAZARDS.clone().requires_grad_(), *list(OUTCOMES.values())[:2], MASK)
    long_way = []
    monkeypatch.setattr(op, "nll", lambda *rest: long_way.append(rest) or fused.nll(*rest))
    with watch() as watching:
        loss = discrete_time_survival_nll(*given)
    if isinstance(watching, Computing):
        assert "ehrseq_fast.survival_nll.default" in watching.seen
    assert len(long_way) == 1
    assert loss.shape == ()


def test_a_tensor_that_a_transform_left_behind_is_taken_as_what_it_wraps():
    times, seen = list(OUTCOMES.values())[:2]
    kept = []

    def loss(hazards: Tensor) -> Tensor:
        kept.append(hazards)
        return discrete_time_survival_nll(hazards, times, seen, MASK)

    leaf = HAZARDS.clone().requires_grad_()
    gradient = torch.func.grad(loss)(leaf)
    value = loss(kept[0])
    torch.testing.assert_close(value, loss(leaf))
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], gradient)


def test_other_threads_run_while_the_operator_computes():
    hazards = torch.rand(20000, 400, requires_grad=True)
    times = torch.full((20000,), 399)
    turns, done = [], threading.Event()

    def take_turns() -> None:
        while not done.wait(1e-4):
            turns.append(time.perf_counter())

    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        begin = time.perf_counter()
        discrete_time_survival_nll(hazards, times, times * 0 + 1)
        end = time.perf_counter()
    finally:
        done.set()
        thread.join()
    assert sum(begin < turn < end for turn in turns) > 1
