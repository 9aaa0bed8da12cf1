"""Cross-entropy of one class per visit."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ehrseq_fast import visit_cross_entropy
from ehrseq_fast.visit_cross_entropy import reference
from ehrseq_fast.visitwise import Visits

from .jobs import Benchmark
from .modes import DTYPES, NUMERIC_MASKS, Mode, Size, Ways

CLASSES = 8


def _of_mode(mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    patients, slots = size.loss_patients, size.loss_visits
    lengths = torch.randint(1, slots + 1, (patients,), generator=generator)
    mask = (torch.arange(slots) < lengths[:, None]).to(device, mode.mask)
    labels = torch.randint(0, CLASSES, (patients, slots), generator=generator).to(device)
    drawn = torch.randn(patients, slots, CLASSES, generator=generator)
    logits = drawn.to(device, mode.dtype).requires_grad_()
    return Ways(
        lambda: reference.visit_cross_entropy(logits, labels, Visits(mask)),
        lambda: visit_cross_entropy(logits, labels, mask),
        [logits],
        patients,
    )


def modes() -> Iterator[Mode]:
    name = "visit_cross_entropy"
    for dtype in DTYPES:
        yield Mode(name, "default", dtype, name, _of_mode, torch.bool)
    for mask in NUMERIC_MASKS:
        yield Mode(name, "default", torch.float32, name, _of_mode, mask)


BENCHMARK = Benchmark(modes=tuple(modes()))
