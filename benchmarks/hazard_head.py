"""The hazard head of the models: its network called, and its weights read by the fused kernel."""

from __future__ import annotations

import torch

from ehrseq_fast.models.head import hazards_of
from ehrseq_fast.models.survival_lstm import hazard_head

from .jobs import Benchmark
from .modes import DTYPES, Mode, Size, Ways


def _of_mode(mode: Mode, size: Size, device: str) -> Ways:
    torch.manual_seed(0)
    width, visits = size.width, size.patients * size.visits
    network = hazard_head(width, width, 0.0).to(device, mode.dtype)
    rows = torch.randn(visits, width).to(device, mode.dtype).requires_grad_()
    return Ways(
        lambda: network(rows),
        lambda: hazards_of(network, rows),
        [rows, *network.parameters()],
        size.patients,
    )


BENCHMARK = Benchmark(
    modes=tuple(Mode("hazards_of", "head", dtype, "hazard_head", _of_mode) for dtype in DTYPES[:2])
)
