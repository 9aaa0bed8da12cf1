"""The losses of a probability mass over time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ehrseq_fast import pmf_competing_risks_nll, pmf_nll
from ehrseq_fast.pmf_nll import reference

from .jobs import Benchmark
from .modes import DTYPES, NUMERIC_MASKS, Mode, Size, Ways

CAUSES = 3


def _of_mode(mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    patients, slots = size.loss_patients, size.loss_visits
    competing = mode.function == "pmf_competing_risks_nll"
    lengths = torch.randint(1, slots + 1, (patients,), generator=generator)
    mask = (torch.arange(slots) < lengths[:, None]).to(device, mode.mask)
    times = (torch.rand(patients, generator=generator) * lengths).long().to(device)
    types = torch.randint(0, 1 + (CAUSES if competing else 1), (patients,), generator=generator)
    width = (CAUSES,) if competing else ()
    drawn = torch.randn(patients, slots, *width, generator=generator)
    logits = drawn.to(device, mode.dtype).requires_grad_()
    arguments = (logits, times, types.to(device), mask)
    loss = pmf_competing_risks_nll if competing else pmf_nll
    return Ways(lambda: reference.pmf_nll(*arguments), lambda: loss(*arguments), [logits], patients)


def modes() -> Iterator[Mode]:
    for function in ("pmf_nll", "pmf_competing_risks_nll"):
        for dtype in DTYPES:
            yield Mode(function, "default", dtype, "pmf_nll", _of_mode, torch.bool)
        for mask in NUMERIC_MASKS:
            yield Mode(function, "default", torch.float32, "pmf_nll", _of_mode, mask)


BENCHMARK = Benchmark(modes=tuple(modes()))
