"""``ehrseq-fast info``: what is installed, what loaded, and what would compute what."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

import ehrseq_fast

from .. import backend, operations
from ..packed_lstm import cuda

# Written by `python -m benchmarks readme` from the results that are committed.
GPU_RUNS = Path(__file__).parent.parent / "gpu_runs.json"
_PACKAGES = ("torch", "triton", "numpy", "lifelines", "duckdb")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed" if util.find_spec(package) is None else "of unknown version"


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _simd() -> str:
    return getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown")()


def _amx(products: str | None) -> str:
    """Whether recurrent layers use the tiles of AMX, and why not."""
    if backend.cpu_capability() == "amx_emulated":
        return "emulated, slowly, because EHRSEQ_FAST_CPU_CAPABILITY asks for it"
    if products == "tiles":
        return "used"
    reason = backend.why_no_amx()
    return reason or "not used, because EHRSEQ_FAST_CPU_CAPABILITY forbids it"


def _bfloat16() -> str:
    """How recurrent layers multiply bfloat16 on the CPU, and whether AMX is in it."""
    products = backend.bfloat16_products()
    how = {
        "tiles": "in tiles (AMX)",
        "pairs": "in pairs (AVX512-BF16)",
        "float32": "widened to float32",
        None: "by PyTorch",
    }[products]
    return f"bfloat16 in recurrent layers on the CPU: {how}; AMX: {_amx(products)}"


def _usable(name: str) -> str:
    """Whether a backend can run here, where and on what condition, or why it cannot."""
    reason = backend.why_not_loaded(name)
    if reason is not None:
        return f"not used: {reason}"
    if name == "reference":
        return "available"
    kernels = backend.kernels(name)
    if kernels.emulated:
        return (
            f"emulated on {kernels.device} tensors, slowly and when asked for: "
            "TRITON_INTERPRET is set"
        )
    if kernels.device == "cuda" and not torch.cuda.is_available():
        return "loaded, but there is no CUDA device here for it to serve"
    return "available"


def describe() -> str:
    """The report that ``info`` prints.

    Example:
        >>> from ehrseq_fast.cli import describe
        >>> describe().splitlines()[0].split()[0]
        'ehrseq_fast'
    """
    record = backend.build_record()
    lines = [
        f"ehrseq_fast {_version('ehrseq_fast')}  ({ehrseq_fast.__path__[0]})",
        f"Python {platform.python_version()}, {platform.platform()}",
        ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        f"CPU: {torch.get_num_threads()} threads, {_simd()}; kernels for: "
        f"{backend.cpu_capability() or 'none loaded'}; CUDA: "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"),
        _bfloat16(),
        "Built with: " + (", ".join(f"{k} {v}" for k, v in record.items()) or "no record"),
        "",
        "Backends",
    ]
    lines += [f"  {name:<10} {_usable(name)}" for name in backend.BACKENDS]
    asked = backend.requested()
    if asked is not None:
        lines.append(f"  EHRSEQ_FAST_BACKEND or use_backend asks for {asked!r}")
    lines += ["", "Each operation would use"]
    for operation in operations.registered():
        for device in _devices():
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                try:
                    chosen = backend.choose(operation.name, device, dtype)
                except RuntimeError as error:
                    chosen = f"nothing: {error}"
                name = str(dtype).removeprefix("torch.")
                lines.append(f"  {operation.name:<22} {device:<5} {name:<9} {chosen}")
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith("EHRSEQ_FAST_")}
    lines += ["", "Environment: " + (", ".join(f"{k}={v}" for k, v in settings.items()) or "-")]
    lines += [
        "",
        cuda.describe(cuda.committed_runs()) + ".",
        describe_gpu_runs(json.loads(GPU_RUNS.read_text())),
        "Triton's are tested in its interpreter, CUDA's compiled for the host; "
        "both are compiled ahead for sm_80, sm_90 and sm_100.",
    ]
    return "\n".join(lines)


def describe_gpu_runs(runs: Sequence[Mapping[str, Any]]) -> str:
    """What the committed results show to have run on GPUs, in a sentence for each run.

    Example:
        >>> from ehrseq_fast.cli import describe_gpu_runs
        >>> describe_gpu_runs([])
        'Run on a GPU so far: nothing. No kernel of this version has been verified on one.'
    """
    if not runs:
        return "Run on a GPU so far: nothing. No kernel of this version has been verified on one."
    said = [
        f"{run['gpu']} (commit {run['commit']}, {run['measured_at'][:10]}): "
        + "; ".join(f"{name}: {', '.join(of)}" for name, of in run["operations"].items())
        for run in runs
    ]
    return f"Run on a GPU so far, with results equal to PyTorch's: {'. '.join(said)}."


def add(commands: Any) -> None:
    """Add the command to ``argparse``'s sub-parsers."""
    parser = commands.add_parser("info", help="versions, what loaded, what did not and why")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    print(describe())
    return 0
