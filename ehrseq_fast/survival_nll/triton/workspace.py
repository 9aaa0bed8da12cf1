"""Memory that launches of the survival losses' kernel use again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ...triton_support import current
from .sums import MOST_PROGRAMS

_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _fresh_workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    partials = torch.empty(MOST_PROGRAMS.value, dtype=torch.float64, device=device)
    return partials, torch.zeros(1, dtype=torch.int32, device=device)


def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the programs' sums, and a counter that is zero.

    Launches of one stream follow one another, so they can share both: each leaves the counter at
    zero for the next, and no launch is spent on clearing it. Launches of different streams can
    overlap and must not.

    A captured CUDA graph may be replayed on any stream, beside launches that use that stream's
    workspace, so its launches get one of their own, cleared inside the graph.
    It is allocated in the graph's memory, which other graphs of that pool use again, so it must
    not be kept.
    """
    if device.type != "cuda":
        return _fresh_workspace(device)
    with current(device):
        if torch.cuda.is_current_stream_capturing():
            return _fresh_workspace(device)
        stream = torch.cuda.current_stream(device)
        key = (device.index, stream.cuda_stream)
        workspace = _workspaces.get(key)
        if workspace is None:
            # torch.compile's warm-up before a capture sends this thread's allocations to the
            # graph's pool and refuses those that stay. Those of another thread are ordinary ones.
            with ThreadPoolExecutor(1) as elsewhere:
                workspace = elsewhere.submit(_unset_workspace, device, stream).result()
            workspace[1].zero_()
            _workspaces[key] = workspace
    return workspace


def _unset_workspace(device: torch.device, stream: Any) -> tuple[Tensor, Tensor]:
    # on the stream that will use it: what another stream freed, it may still be writing to
    with torch.cuda.stream(stream):
        partials = torch.empty(MOST_PROGRAMS.value, dtype=torch.float64, device=device)
        return partials, torch.empty(1, dtype=torch.int32, device=device)
