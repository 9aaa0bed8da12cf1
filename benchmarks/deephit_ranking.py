"""DeepHit's ranking loss of all pairs of patients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ehrseq_fast import deephit_competing_ranking_loss, deephit_ranking_loss
from ehrseq_fast.deephit_ranking import reference

from .jobs import Benchmark
from .modes import DTYPES, NUMERIC_MASKS, Mode, Size, Ways

CAUSES = 3


def _of_mode(mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    patients, slots = size.loss_patients, size.loss_visits
    competing = mode.function == "deephit_competing_ranking_loss"
    lengths = torch.randint(1, slots + 1, (patients,), generator=generator)
    mask = (torch.arange(slots) < lengths[:, None]).to(device, mode.mask)
    times = (torch.rand(patients, generator=generator) * lengths).long().to(device)
    types = torch.randint(0, 1 + (CAUSES if competing else 1), (patients,), generator=generator)
    width = (CAUSES,) if competing else ()
    drawn = torch.randn(patients, slots, *width, generator=generator)
    logits = drawn.to(device, mode.dtype).requires_grad_()
    arguments = (logits, times, types.to(device), mask)
    loss = deephit_competing_ranking_loss if competing else deephit_ranking_loss
    return Ways(
        lambda: reference.deephit_ranking(*arguments),
        lambda: loss(*arguments),
        [logits],
        patients,
    )


def modes() -> Iterator[Mode]:
    for function in ("deephit_ranking_loss", "deephit_competing_ranking_loss"):
        for dtype in DTYPES:
            yield Mode(function, "default", dtype, "deephit_ranking", _of_mode, torch.bool)
        for mask in NUMERIC_MASKS:
            yield Mode(function, "default", torch.float32, "deephit_ranking", _of_mode, mask)


BENCHMARK = Benchmark(modes=tuple(modes()))
