"""When the packed LSTM is computed by the package's CUDA kernels, and when by cuDNN.

The kernels are taken where they are asked for (``EHRSEQ_FAST_CUDA_LSTM=1``, or the backend
``cuda``). Otherwise results decide that were measured on a GPU and committed
(``ehrseq_fast/cuda_lstm.json``, written by ``python -m benchmarks cuda-lstm``): the kernels are
taken on GPUs of that name, for hidden sizes for which they were right, and faster than cuDNN for
every number of patients. ``EHRSEQ_FAST_CUDA_LSTM=0`` leaves everything to cuDNN, whatever is asked
for.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backend

RESULTS = Path(__file__).parent.parent / "cuda_lstm.json"
SWITCH = "EHRSEQ_FAST_CUDA_LSTM"

# csrc/packed_lstm/tile.cuh and tensor_tile.cuh: what a cluster's shared memory holds.
UNITS = 32
MOST_HIDDEN = {torch.float32: 288, torch.bfloat16: 416, torch.float16: 416}

#: What a run has to have found before its times count.
CHECKS = ("equal_to_float64", "same_bits_1000_times", "racecheck", "synccheck")

SERVES = (
    f"hidden sizes that are multiples of {UNITS}, up to {MOST_HIDDEN[torch.float32]} in float32 "
    f"(TF32 where torch.backends.cudnn.allow_tf32 is on) and {MOST_HIDDEN[torch.bfloat16]} in "
    "bfloat16 and float16, GPUs of compute capability 9.0 and 10.x, outside autocast and "
    "torch.compile"
)


def why_not(data: Tensor, hidden: int) -> str | None:
    """Why the kernels do not compute a layer of ``hidden`` units over these rows; None where they
    do."""
    if torch.compiler.is_compiling():
        return "torch.compile takes cuDNN"
    kernels = backend.kernels("cuda")
    if kernels.reason is not None:
        return kernels.reason
    if data.device.type != kernels.device:
        return f"they serve {kernels.device} tensors, and these are on {data.device.type}"
    reason = _why_not_asked_for(data, hidden, kernels.emulated)
    return reason or _why_not_served(data, hidden, kernels.emulated)


def _why_not_served(data: Tensor, hidden: int, emulated: bool) -> str | None:
    most = MOST_HIDDEN.get(data.dtype)
    if most is None:
        return f"they serve float32, bfloat16 and float16, and this is {data.dtype}"
    if torch.is_autocast_enabled(data.device.type):
        return "autocast takes cuDNN"
    if hidden % UNITS or hidden > most:
        return (
            f"they serve multiples of {UNITS} hidden units up to {most} in {data.dtype}, "
            f"got {hidden}"
        )
    return None if emulated else _why_not_on(data.device)


def takes_tf32(data: Tensor) -> bool:
    """Whether hidden states are multiplied as TF32, as cuDNN's recurrent layers would: in float32
    under ``torch.backends.cudnn.allow_tf32``, which is one name of this setting."""
    if data.dtype != torch.float32:
        return False
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]


def arithmetic(data: Tensor) -> str:
    """What hidden states of a layer over these rows are multiplied in, as results name it."""
    return "tf32" if takes_tf32(data) else str(data.dtype).removeprefix("torch.")


def _why_not_asked_for(data: Tensor, hidden: int, emulated: bool) -> str | None:
    switch = os.environ.get(SWITCH, "")
    if switch == "0":
        return f"{SWITCH} is 0"
    asked = backend.requested()
    if asked == "cuda":
        return None
    if asked is not None:
        return f"the backend {asked!r} was asked for"
    if emulated:
        return "they are emulated, and were not asked for"
    if switch or (committed_runs() and hidden in _faster_on(data.device, arithmetic(data))):
        return None
    return f"no committed results show them right and faster than cuDNN ({SWITCH}=1 takes them)"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _why_not_on(device: torch.device) -> str | None:
    index = torch.cuda.current_device() if device.index is None else device.index
    major, minor = _capability(index)
    if major in (9, 10):
        return None
    return f"they need compute capability 9.0 or 10.x, and this GPU has {major}.{minor}"


@functools.cache
def committed_runs() -> tuple[Mapping[str, Any], ...]:
    """The committed runs."""
    return tuple(json.loads(RESULTS.read_text()))


@functools.cache
def _faster_on(device: torch.device, arithmetic: str) -> set[int]:
    return faster_sizes(committed_runs(), torch.cuda.get_device_name(device), arithmetic)


def faster_sizes(
    runs: Sequence[Mapping[str, Any]], gpu: str, arithmetic: str = "float32"
) -> set[int]:
    """The hidden sizes for which the newest run on GPUs of that name shows the kernels right, and
    faster in that arithmetic than cuDNN on packed rows, forward and backward together, for all
    numbers of patients.

    Example:
        >>> row = {"arithmetic": "float32", "hidden": 256, "ours": 6.0, "cudnn_packed": 9.0}
        >>> run = {"gpu": "G", "measured_at": "2026-01-01", "rows": [row]}
        >>> faster_sizes([run | dict.fromkeys(CHECKS, True)], "G")
        {256}
        >>> faster_sizes([run | dict.fromkeys(CHECKS, True) | {"racecheck": False}], "G")
        set()
    """
    of_gpu = [run for run in runs if run["gpu"] == gpu]
    if not of_gpu:
        return set()
    newest = max(of_gpu, key=lambda run: run["measured_at"])
    if not all(newest.get(check) is True for check in CHECKS):
        return set()
    rows = [row for row in newest["rows"] if row["arithmetic"] == arithmetic]
    faster = {row["hidden"]: True for row in rows}
    for row in rows:  # without a time of ours: not served
        ours = row["ours"]
        faster[row["hidden"]] &= ours is not None and ours < row["cudnn_packed"]
    return {hidden for hidden, always in faster.items() if always}


def describe(runs: Sequence[Mapping[str, Any]]) -> str:
    """What ``ehrseq-fast info`` says of the kernels.

    Example:
        >>> describe([]).partition(":")[0]
        "packed_lstm on a GPU is cuDNN's"
    """
    switch = os.environ.get(SWITCH, "")
    kernels = f"the package's CUDA kernels ({SERVES})"
    if switch == "0":
        return f"packed_lstm on a GPU is cuDNN's: {SWITCH} is 0"
    if switch:
        return f"packed_lstm on a GPU: {SWITCH} asks for {kernels}; everything else is cuDNN's"
    found = {
        (run["gpu"], row["arithmetic"]): faster_sizes(runs, run["gpu"], row["arithmetic"])
        for run in runs
        for row in run["rows"]
    }
    said = [
        f"{gpu}, {arithmetic}: hidden sizes {', '.join(map(str, sorted(sizes)))}"
        for (gpu, arithmetic), sizes in found.items()
        if sizes
    ]
    if said:
        return (
            f"packed_lstm on a GPU: {kernels} where committed results show them right and faster "
            f"than cuDNN ({'; '.join(said)}); everything else is cuDNN's"
        )
    return (
        f"packed_lstm on a GPU is cuDNN's: {kernels} are off, as no committed results show them "
        f"right and faster than cuDNN. {SWITCH}=1, or the backend cuda, takes them"
    )
