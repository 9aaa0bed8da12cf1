"""The loss of rates that are constant within intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ehrseq_fast import piecewise_hazard_nll
from ehrseq_fast.piecewise_hazard import reference

from .jobs import Benchmark
from .modes import DTYPES, NUMERIC_MASKS, Mode, Size, Ways

FUNCTION = "piecewise_hazard_nll"
WEIGHTED = "piecewise_hazard_nll with visit_weight"


def _of_mode(mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    patients, slots = size.loss_patients, size.loss_visits
    lengths = torch.randint(1, slots + 1, (patients,), generator=generator)
    mask = (torch.arange(slots) < lengths[:, None]).to(device, mode.mask or torch.bool)
    times = (torch.rand(patients, generator=generator) * lengths).long().to(device)
    seen = torch.randint(0, 2, (patients,), generator=generator).to(device)
    fraction = torch.rand(patients, generator=generator).to(device)
    drawn = torch.randn(patients, slots, generator=generator)
    logits = drawn.to(device, mode.dtype).requires_grad_()
    arguments = (logits, times, seen, fraction, mask)
    options: dict[str, Any] = {"link": mode.mode}
    if mode.function == WEIGHTED:
        options["visit_weight"] = torch.rand(patients, slots, generator=generator).to(device)
    return Ways(
        lambda: reference.piecewise_hazard_nll(*arguments, **options),
        lambda: piecewise_hazard_nll(*arguments, **options),
        [logits],
        patients,
    )


def modes() -> Iterator[Mode]:
    for link in ("softplus", "exp"):
        for dtype in DTYPES:
            yield Mode(FUNCTION, link, dtype, "piecewise_hazard", _of_mode, torch.bool)
    for mask in NUMERIC_MASKS:
        yield Mode(FUNCTION, "softplus", torch.float32, "piecewise_hazard", _of_mode, mask)
    yield Mode(WEIGHTED, "softplus", torch.float32, "piecewise_hazard", _of_mode)


BENCHMARK = Benchmark(modes=tuple(modes()))
