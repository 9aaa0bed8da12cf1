"""What is run on a GPU of each operation: a small case of every form, and one step of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    competing_risks_nll,
    deephit_competing_ranking_loss,
    deephit_ranking_loss,
    discrete_time_survival_nll,
    fixed_horizon_bce,
    masked_pool,
    next_codes_bce,
    packed_competing_risks_nll,
    packed_survival_nll,
    packed_visit_pool,
    piecewise_hazard_nll,
    pmf_competing_risks_nll,
    pmf_nll,
    use_backend,
    visit_cross_entropy,
    visit_mean_pool,
)
from ehrseq_fast.checks import accumulator
from ehrseq_fast.losses import FixedHorizonProgressionLoss

from .tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PATIENTS, VISITS, CODES, VOCABULARY, WIDTH = 70, 23, 9, 400, 128


@dataclass(frozen=True)
class Case:
    """A use of one operation on one device: what has a gradient, in float64, and the rest bound."""

    leaf: Tensor
    run: Callable[[Tensor], Tensor]


def _lengths() -> Tensor:
    return 1 + torch.arange(PATIENTS) * 7 % VISITS


def _records() -> tuple[list[list[list[int]]], dict[str, Tensor]]:
    """Ragged records in which one code is everywhere, and their outcomes."""
    visits = [
        [[1] + [2 + (p * 31 + t * 7 + c) % (VOCABULARY - 2) for c in range((p + t) % CODES)]
         for t in range(n)]
        for p, n in enumerate(_lengths().tolist())
    ]  # fmt: skip
    patient = torch.arange(PATIENTS)
    times = patient * 5 % _lengths()
    outcomes = {"event_times": times, "event_indicators": patient % 2, "event_types": patient % 3}
    return visits, outcomes


def make_batch(device: str) -> PackedVisits:
    visits, outcomes = _records()
    return PackedVisits.from_lists(visits, **outcomes).to(device)


def _outcomes(device: str, *names: str) -> list[Tensor]:
    outcomes = _records()[1]
    mask = torch.arange(VISITS) < _lengths()[:, None]
    return [outcomes[name].to(device) for name in names] + [mask.to(device)]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _table() -> Tensor:
    """In a column no two codes share a value, in 16 bits neither, so that a maximum is one code's;
    nor is any 0, which torch's index_reduce takes for a tie with what it starts from."""
    code, column = torch.arange(VOCABULARY)[:, None], torch.arange(WIDTH)
    whole = (code * 171 + column * 29) % 401 - 200
    return torch.where(whole < 0, whole, whole + 1).double() / 64


def hazards_of_shape(*shape: int) -> Tensor:
    return normal(*shape).sigmoid().clamp(0.01, 0.99)


def _padded_pool(mode: str) -> Callable[[str], Case]:
    def make(device: str) -> Case:
        codes, mask, _ = PackedVisits.from_lists(_records()[0]).to_padded()
        codes, mask = codes.to(device), mask.to(device)
        return Case(
            _table(),
            lambda weight: visit_mean_pool(codes, weight, mask, mode=mode),
        )

    return make


def _packed_pool(mode: str) -> Callable[[str], Case]:
    def make(device: str) -> Case:
        batch = make_batch(device)
        return Case(_table(), lambda weight: packed_visit_pool(batch, weight, mode=mode))

    return make


def _attention_pool(device: str) -> Case:
    batch = make_batch(device)
    # made beforehand, so that a call launches nothing but its own; exact in 16 bits
    scores = {d: (torch.arange(VOCABULARY) % 7 / 4).to(d).to(device) for d in DTYPES}
    return Case(
        _table(),
        lambda weight: packed_visit_pool(
            batch, weight, mode="attention", scores=scores[weight.dtype]
        ),
    )


def _weighted_pool(device: str) -> Case:
    batch = make_batch(device)
    batch = batch.with_code_weights(torch.linspace(0, 2, batch.n_codes, device=device))
    return Case(_table(), lambda weight: packed_visit_pool(batch, weight))


def _masked_pool(device: str) -> Case:
    mask = (torch.arange(CODES) < torch.arange(PATIENTS)[:, None] % (CODES + 1)).to(device)
    return Case(normal(PATIENTS, CODES, WIDTH), lambda embeddings: masked_pool(embeddings, mask))


def _loss(reduction: str) -> Callable[[str], Case]:
    def make(device: str) -> Case:
        args = _outcomes(device, "event_times", "event_indicators")
        return Case(
            hazards_of_shape(PATIENTS, VISITS),
            lambda h: discrete_time_survival_nll(h, *args, reduction=reduction),
        )

    return make


def _competing_loss(device: str) -> Case:
    args = _outcomes(device, "event_times", "event_types")
    options = {"from_logits": True, "link": "softmax"}
    return Case(normal(PATIENTS, VISITS, 3), lambda x: competing_risks_nll(x, *args, **options))


def _packed_loss(reduction: str) -> Callable[[str], Case]:
    def make(device: str) -> Case:
        batch = make_batch(device)
        return Case(
            hazards_of_shape(batch.n_visits),
            lambda h: packed_survival_nll(h, batch, reduction=reduction),
        )

    return make


def _packed_competing_loss(device: str) -> Case:
    batch = make_batch(device)
    return Case(hazards_of_shape(batch.n_visits, 2), lambda h: packed_competing_risks_nll(h, batch))


def _weighted_loss(device: str) -> Case:
    args = _outcomes(device, "event_times", "event_indicators")
    # of every dtype of a loss, so that a call launches nothing but its own; exact in 16 bits
    visits = torch.arange(PATIENTS * VISITS, device=device).view(PATIENTS, VISITS) % 5 / 4
    weights = {dtype: visits.to(dtype) for dtype in (torch.float32, torch.float64)}
    return Case(
        hazards_of_shape(PATIENTS, VISITS),
        lambda h: discrete_time_survival_nll(h, *args, visit_weight=weights[accumulator(h.dtype)]),
    )


def _packed_weighted_loss(device: str) -> Case:
    batch = make_batch(device)
    weights = {
        dtype: torch.arange(batch.n_visits, device=device).to(dtype) % 5 / 4
        for dtype in (torch.float32, torch.float64)
    }
    options = {"from_logits": True, "link": "softmax", "reduction": "none"}
    return Case(
        normal(batch.n_visits, 3),
        lambda x: packed_competing_risks_nll(
            x, batch, visit_weight=weights[accumulator(x.dtype)], **options
        ),
    )


def _mass_loss(device: str) -> Case:
    args = _outcomes(device, "event_times", "event_indicators")
    return Case(normal(PATIENTS, VISITS), lambda x: pmf_nll(x, *args))


def _packed_competing_mass_loss(device: str) -> Case:
    batch = make_batch(device)
    return Case(
        normal(batch.n_visits, 2),
        lambda x: pmf_competing_risks_nll(PackedRows(x, batch), reduction="none"),
    )


def _rates_loss(device: str) -> Case:
    *outcomes, mask = _outcomes(device, "event_times", "event_indicators")
    return Case(normal(PATIENTS, VISITS), lambda x: piecewise_hazard_nll(x, *outcomes, None, mask))


def _packed_rates_loss(device: str) -> Case:
    batch = make_batch(device)
    fraction = (torch.arange(PATIENTS) % 5).to(device) / 4
    return Case(
        normal(batch.n_visits),
        lambda x: piecewise_hazard_nll(
            PackedRows(x, batch), fraction=fraction, link="exp", reduction="none"
        ),
    )


def _weighted_rates_loss(device: str) -> Case:
    *outcomes, mask = _outcomes(device, "event_times", "event_indicators")
    # of every dtype of a loss, so that a call launches nothing but its own; exact in 16 bits
    visits = torch.arange(PATIENTS * VISITS, device=device).view(PATIENTS, VISITS) % 7 / 4
    weights = {dtype: visits.to(dtype) for dtype in (torch.float32, torch.float64)}
    return Case(
        normal(PATIENTS, VISITS),
        lambda x: piecewise_hazard_nll(
            x, *outcomes, None, mask, visit_weight=weights[accumulator(x.dtype)]
        ),
    )


def _ranking_loss(device: str) -> Case:
    args = _outcomes(device, "event_times", "event_indicators")
    return Case(normal(PATIENTS, VISITS), lambda x: deephit_ranking_loss(x, *args))


def _packed_competing_ranking_loss(device: str) -> Case:
    batch = make_batch(device)
    return Case(
        normal(batch.n_visits, 2),
        lambda x: deephit_competing_ranking_loss(PackedRows(x, batch)),
    )


def _next_codes(reduction: str) -> Callable[[str], Case]:
    def make(device: str) -> Case:
        batch = make_batch(device)
        code, column = torch.arange(VOCABULARY)[:, None], torch.arange(WIDTH)
        weight = ((code * 171 + column * 29) % 9 - 4) / 64  # exact in 16 bits
        weights = {dtype: weight.to(dtype).to(device) for dtype in DTYPES}

        def run(states: Tensor) -> Tensor:
            rows = PackedRows(states, batch)
            return next_codes_bce(rows, weights[states.dtype], reduction=reduction)

        return Case(normal(batch.n_visits, WIDTH), run)

    return make


def _horizon_loss(device: str) -> Case:
    outcomes = _outcomes(device, "event_times", "event_indicators")
    return Case(normal(PATIENTS, VISITS), lambda x: fixed_horizon_bce(x, *outcomes[:2], 3))


def _packed_horizon_loss(device: str) -> Case:
    batch = make_batch(device)
    return Case(
        normal(batch.n_visits),
        lambda x: fixed_horizon_bce(PackedRows(x, batch), horizon=3, reduction="none"),
    )


def _given_labels(device: str) -> Case:
    visits = torch.arange(PATIENTS * VISITS).view(PATIENTS, VISITS)
    labels, valid = (visits % 3 == 0).to(device), (visits % 5 != 0).to(device)
    loss = FixedHorizonProgressionLoss()
    return Case(normal(PATIENTS, VISITS), lambda x: loss(x, labels, valid))


def _classes_loss(device: str) -> Case:
    labels = (torch.arange(PATIENTS * VISITS).view(PATIENTS, VISITS) % 5).to(device)
    return Case(normal(PATIENTS, VISITS, 5), lambda x: visit_cross_entropy(x, labels))


def _packed_classes_loss(device: str) -> Case:
    batch = make_batch(device)
    labels = (torch.arange(batch.n_visits) % 5).to(device)
    return Case(
        normal(batch.n_visits, 5),
        lambda x: visit_cross_entropy(PackedRows(x, batch), labels, reduction="none"),
    )


# name -> operation as the backends register it, how to make a case, kernels launched forward and
# (at most) backward, where that is promised
CASES: dict[str, tuple[str, Callable[[str], Case], int | None, int | None]] = {
    "padded mean": ("visit_pool", _padded_pool("mean"), 1, None),
    "padded max": ("visit_pool", _padded_pool("max"), 1, None),
    "packed mean": ("packed_visit_pool", _packed_pool("mean"), 1, 3),
    "packed max": ("packed_visit_pool", _packed_pool("max"), 1, 3),
    "packed weighted": ("packed_weighted_pool", _weighted_pool, 1, None),  # an index is sorted
    "packed attention": ("packed_attention_pool", _attention_pool, 1, 3),
    "masked": ("masked_pool", _masked_pool, 1, 1),
    "loss": ("survival_nll", _loss("mean"), 1, 1),
    "loss of each": ("survival_nll", _loss("none"), 1, 1),
    "competing": ("survival_nll", _competing_loss, 1, 1),
    "packed loss": ("packed_survival_nll", _packed_loss("mean"), 1, 1),
    "packed loss of each": ("packed_survival_nll", _packed_loss("none"), 1, 1),
    "packed competing": ("packed_survival_nll", _packed_competing_loss, 1, 1),
    "weighted": ("visit_weighted_nll", _weighted_loss, 1, 1),
    "packed weighted of each": ("visit_weighted_nll", _packed_weighted_loss, 1, 1),
    "mass": ("pmf_nll", _mass_loss, 1, 1),
    "packed competing mass": ("pmf_nll", _packed_competing_mass_loss, 1, 1),
    "rates": ("piecewise_hazard", _rates_loss, 1, 1),
    "packed rates of each": ("piecewise_hazard", _packed_rates_loss, 1, 1),
    "weighted rates": ("piecewise_hazard", _weighted_rates_loss, 1, 1),
    "ranking": ("deephit_ranking", _ranking_loss, 3, 1),
    "packed competing ranking": ("deephit_ranking", _packed_competing_ranking_loss, 3, 1),
    "horizon": ("fixed_horizon_bce", _horizon_loss, 2, 1),
    "packed horizon of each": ("fixed_horizon_bce", _packed_horizon_loss, 1, 1),
    "given labels": ("masked_bce", _given_labels, None, None),  # dtypes are converted
    "classes": ("visit_cross_entropy", _classes_loss, 2, 1),
    "packed classes of each": ("visit_cross_entropy", _packed_classes_loss, 1, 1),
    "next codes": ("next_codes", _next_codes("mean"), None, None),
    "next codes of each": ("next_codes", _next_codes("none"), None, None),
}


class Step:
    """Forward and backward of a case, with an incoming gradient that is made beforehand."""

    def __init__(self, name: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        case = CASES[name][1](device)
        self.run = case.run
        self.values = case.leaf.to(dtype).to(device)
        self.leaf = self.values.clone().requires_grad_()
        with torch.no_grad():
            like = self.run(self.leaf)
        self.incoming = torch.linspace(0.5, 1.5, like.numel(), dtype=torch.float64)
        self.incoming = self.incoming.reshape(like.shape).to(like.dtype).to(device)

    def forward(self) -> Tensor:
        return self.run(self.leaf)

    def backward(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.leaf, self.incoming)[0]

    def __call__(self) -> tuple[Tensor, Tensor]:
        value = self.forward()
        return value.detach(), self.backward(value)

    def fill(self, values: Tensor | float) -> None:
        with torch.no_grad():
            self.leaf.copy_(torch.as_tensor(values).expand_as(self.leaf))


def assert_agrees(name: str, step: Step) -> None:
    """Value and gradient against the reference in float64 on the host."""
    value, grad = step()
    oracle = CASES[name][1]("cpu")
    leaf = step.leaf.detach().cpu().double().requires_grad_()
    with use_backend("reference"):
        expected = oracle.run(leaf)
    incoming = step.incoming.cpu().double()
    (expected_grad,) = torch.autograd.grad(expected, leaf, incoming)
    assert grad.dtype == step.leaf.dtype
    assert_close(value.cpu(), expected.detach(), terms=200)
    assert_close(grad.cpu(), expected_grad, terms=1000)


def equal(results: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def provoke_errors(step: Step) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (each operation's words are its own tests')
        step.run(step.leaf[..., None, None])
    value = step.forward()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(value, step.leaf, torch.ones(3, 5, 7, device=value.device))
