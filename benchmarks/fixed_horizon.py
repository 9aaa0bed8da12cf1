"""The event within a horizon of each visit: labels made of event times, and given ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ehrseq_fast import fixed_horizon_bce, fixed_horizon_labels
from ehrseq_fast.fixed_horizon import reference
from ehrseq_fast.losses import FixedHorizonProgressionLoss
from ehrseq_fast.visitwise import Visits

from .jobs import Benchmark
from .modes import DTYPES, NUMERIC_MASKS, Mode, Size, Ways

HORIZON_DAYS = 90.0


def _of_mode(mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    patients, slots = size.loss_patients, size.loss_visits
    lengths = torch.randint(1, slots + 1, (patients,), generator=generator)
    mask = torch.arange(slots) < lengths[:, None]
    days = (torch.rand(patients, slots, generator=generator) * 30).cumsum(1)
    last = (torch.rand(patients, generator=generator) * lengths).long()
    times = days.gather(1, last[:, None]).squeeze(1).to(device)
    seen = torch.randint(0, 2, (patients,), generator=generator).to(device)
    drawn = torch.randn(patients, slots, generator=generator)
    logits = drawn.to(device, mode.dtype).requires_grad_()
    days, mask = days.to(device), mask.to(device, mode.mask)
    if mode.function == "masked_bce":
        labels, known = fixed_horizon_labels(times, seen, HORIZON_DAYS, mask, visit_times=days)
        loss = FixedHorizonProgressionLoss(HORIZON_DAYS)
        return Ways(
            lambda: reference.masked_bce(logits, labels, known),
            lambda: loss(logits, labels, known).to(torch.float32),
            [logits],
            patients,
        )
    return Ways(
        lambda: reference.fixed_horizon_bce(logits, times, seen, Visits(mask), days, HORIZON_DAYS),
        lambda: fixed_horizon_bce(logits, times, seen, HORIZON_DAYS, mask, visit_times=days),
        [logits],
        patients,
    )


def modes() -> Iterator[Mode]:
    name = "fixed_horizon_bce"
    for dtype in DTYPES:
        yield Mode(name, "default", dtype, name, _of_mode, torch.bool)
    for mask in NUMERIC_MASKS:
        yield Mode(name, "default", torch.float32, name, _of_mode, mask)
    yield Mode("masked_bce", "default", torch.float32, "masked_bce", _of_mode)


BENCHMARK = Benchmark(modes=tuple(modes()))
