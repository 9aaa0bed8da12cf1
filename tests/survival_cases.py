"""Patients for the tests of the survival losses, and the formulas once more, as plain loops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ehrseq_fast.deephit_ranking import reference as ranking_reference
from ehrseq_fast.survival_nll import reference
from ehrseq_fast.survival_nll.options import Options


@dataclass
class Patients:
    """A padded batch: what a loss takes beside the hazards."""

    lengths: Tensor
    times: Tensor
    types: Tensor
    entries: Tensor
    weights: Tensor
    slots: int

    @property
    def mask(self) -> Tensor:
        return torch.arange(self.slots) < self.lengths[:, None]

    def at_risk(self) -> Tensor:
        """[B, V]: the visits from entry to event time, that one included."""
        visit = torch.arange(self.slots)
        return (visit >= self.entries[:, None]) & (visit <= self.times[:, None])


def draw_patients(patients: int, slots: int, causes: int = 1, seed: int = 0) -> Patients:
    """Random patients; the first two have their time at visit 0 and at the last slot."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def up_to(highest: Tensor) -> Tensor:  # whole numbers 0..highest
        drawn = torch.rand(patients, generator=generator) * (highest + 1)
        return drawn.long().clamp(max=highest)

    lengths = up_to(torch.full((patients,), slots - 1)) + 1
    lengths[1:2] = slots
    times = up_to(lengths - 1)
    times[:1], times[1:2] = 0, slots - 1
    return Patients(
        lengths=lengths,
        times=times,
        types=torch.randint(0, causes + 1, (patients,), generator=generator),
        entries=up_to(times),
        weights=torch.rand(patients, generator=generator) + 0.5,
        slots=slots,
    )


def draw_hazards(shape: tuple[int, ...], dtype: torch.dtype, logits: bool, seed: int = 0) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    # Away from 1, to which 16 bits would round: 1 - eps is another number in float64, the oracle's.
    return (x if logits else x.sigmoid().clamp(1e-3, 0.99)).to(dtype)


def nll_of_patient(
    h: list[float], time: int, event: bool, entry: int, included: bool, mask: list[bool]
) -> float:
    """The formula of the design, term by term, for one patient and one risk."""
    total = -sum(math.log(1 - h[t]) for t in range(entry, time) if mask[t])
    if event:
        total -= math.log(h[time])
    elif included:
        total -= math.log(1 - h[time])
    return total


def nll_of_softmax_patient(
    x: list[list[float]], time: int, kind: int, entry: int, included: bool
) -> float:
    """As above, for K + 1 classes per visit, of which 0 is no event."""

    def log_p(t: int, c: int) -> float:
        return x[t][c] - math.log(sum(math.exp(v) for v in x[t]))

    total = -sum(log_p(t, 0) for t in range(entry, time))
    if kind > 0 or included:
        total -= log_p(time, kind)
    return total


def value_and_grad(loss: Any, hazards: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """A loss and its gradient; a vector's with weights 1, 2, ... so that no row can hide."""
    x = hazards.detach().clone().requires_grad_()
    value = loss(x, *args, **options)
    scale = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
    (grad,) = torch.autograd.grad(value, x, scale)
    return value.detach(), grad


def on_default_device(arguments):
    """Arguments that were made when the tests were collected, where the backend under test is."""

    def moved(value):
        on_host = isinstance(value, Tensor) and value.device.type == "cpu"
        return value.to(torch.get_default_device()) if on_host else value

    return {name: moved(value) for name, value in arguments.items()}


def definition(hazards: Tensor, *args: Any, **options: Any) -> Tensor:
    """The reference, called as the public losses of padded hazards are."""
    names = ("entry_times", "sample_weight", "visit_weight")
    companions = {name: options.pop(name, None) for name in names}
    competing = hazards.dim() == 3
    loss = reference.competing_risks_nll if competing else reference.discrete_time_survival_nll
    mask = args[2] if len(args) > 2 else options.pop("sequence_mask", None)
    return loss(hazards, *args[:2], mask, Options.of(**options), **companions)


def assert_ranks_as_defined(
    operator: Any,
    logits: Tensor,
    times: Tensor,
    types: Tensor,
    mask: Tensor,
    entries: Tensor,
    weights: Tensor,
) -> None:
    """The raw operator of padded logits in float32, and the definition in float64."""
    competing = logits.dim() == 3
    rows = (None, None, None)
    got = operator(logits, times, types, mask, *rows, entries, weights, competing, True, 0.1, True)
    x = logits.double().requires_grad_()
    options = {"entry_times": entries, "sample_weight": weights}
    value = ranking_reference.deephit_ranking(x, times, types, mask, **options)
    (grad,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(got[0].double(), value.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[1].double(), grad, rtol=1e-4, atol=1e-7)
