"""What one eager call costs, from Python to the kernel, on inputs too small to cost anything.

On a GPU what counts is the host's column: how long until the call returned, its kernel launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ehrseq_fast import (
    PackedVisits,
    discrete_time_survival_nll,
    packed_survival_nll,
    packed_visit_pool,
    visit_mean_pool,
)

from .cases import Case, Tensors, Variant, our_backends, ours
from .ceilings import Work
from .devices import Device
from .jobs import Benchmark, Job, Settings, of_case

OPERATION = "one eager call"
EMPTY = "an empty call (add_ to one number)"
BAG = "F.embedding_bag"
CALLS = 100


def case(device: Device, *, phase: str = "forward", backend: str | None = None) -> Case:
    """Calls of the operations on two patients with two visits; nothing is compared."""
    variants = dict(_variants(device, phase == "forward+backward", backend))
    return Case(OPERATION, "tiny", 2, phase, "float32", variants, 0.0, work=Work(), calls=CALLS)


def _variants(device: Device, backward: bool, backend: str | None) -> Iterator[tuple[str, Variant]]:
    batch = PackedVisits.from_lists(
        [[[1, 2], [3]], [[2], [1]]], event_times=[1, 1], event_indicators=[1, 0]
    ).to(device.name)
    codes, mask, visits = batch.to_padded()
    weight = torch.ones(4, 16, device=device.name, requires_grad=backward)
    hazards = torch.full((2, 2), 0.5, device=device.name, requires_grad=backward)
    rows = torch.full((4,), 0.5, device=device.name, requires_grad=backward)
    flat, starts = batch.codes.long(), batch.code_offsets[:-1].long()
    one = torch.ones(1, device=device.name)

    def variant(forward: Callable[[], Tensor], leaf: Tensor) -> Variant:
        def both() -> Tensors:
            value = forward()
            return torch.autograd.grad(value, leaf, torch.ones_like(value))

        def forward_only() -> Tensors:
            with torch.no_grad():
                return (forward(),)

        return Variant(both if backward else forward_only, compared=False)

    yield EMPTY, Variant(lambda: (one.add_(0.0),), compared=False)
    yield BAG, variant(lambda: F.embedding_bag(flat, weight, starts, mode="mean"), weight)
    outcomes = (batch.event_times, batch.event_indicators)
    for operation, call, forward, leaf in (
        (
            "visit_pool",
            "visit_mean_pool",
            lambda: visit_mean_pool(codes, weight, mask),
            weight,
        ),
        (
            "packed_visit_pool",
            "packed_visit_pool",
            lambda: packed_visit_pool(batch, weight),
            weight,
        ),
        (
            "survival_nll",
            "discrete_time_survival_nll",
            lambda: discrete_time_survival_nll(hazards, *outcomes, visits),
            hazards,
        ),
        (
            "packed_survival_nll",
            "packed_survival_nll",
            lambda: packed_survival_nll(rows, batch),
            rows,
        ),
    ):
        on = our_backends(operation, device.name, torch.float32, backend)
        yield from ours(call, on, lambda f=forward, x=leaf: variant(f, x))


def jobs(settings: Settings) -> Iterator[Job]:
    for phase in ("forward", "forward+backward"):
        yield of_case(
            f"eager calls, {phase}",
            2,
            lambda session, p=phase: case(session.device, phase=p, backend=settings.backend),
        )


BENCHMARK = Benchmark(jobs={"ops": jobs})
