"""Small networks of linear layers on rows of visits: called, and read by the package."""

from __future__ import annotations

import torch
from torch import nn

from ehrseq_fast.models.head import run_network

from .jobs import Benchmark
from .modes import DTYPES, Mode, Size, Ways


def _of_mode(mode: Mode, size: Size, device: str) -> Ways:
    torch.manual_seed(0)
    width, visits = size.width, size.patients * size.visits
    network = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    network.to(device, mode.dtype)
    rows = torch.randn(visits, width).to(device, mode.dtype).requires_grad_()
    return Ways(
        lambda: network(rows),
        lambda: run_network(network, rows),
        [rows, *network.parameters()],
        size.patients,
    )


BENCHMARK = Benchmark(
    modes=tuple(Mode("run_network", "tanh", dtype, "linear", _of_mode) for dtype in DTYPES[:2])
)
