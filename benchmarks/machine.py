"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ehrseq_fast import backend, operations

ROOT = Path(__file__).parent.parent


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """CPU, versions, commit, and the backend that each operation takes on ``device`` in float32."""
    return {
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": cpu_model(),
        # hypervisors leave the name out that would tell one generation from the next
        "cpu_family": cpu_facts().get("cpu family"),
        "cpu_model": cpu_facts().get("model"),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": has_amx(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
        "commit": commit(),
        "backends": {
            operation.name: backend.choose(operation.name, device, torch.float32)
            for operation in operations.registered()
        },
    }


def cpu_model() -> str:
    """The CPU's name as the kernel gives it."""
    return cpu_facts().get("model name", platform.processor() or platform.machine())


def cpu_facts() -> dict[str, str]:
    """What the kernel says of the first CPU; empty where it says nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def cpu_flags() -> set[str]:
    """The instruction sets that the kernel lists; empty where it lists none."""
    return set(cpu_facts().get("flags", "").split())


def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware."""
    return "amx_bf16" in cpu_flags()


def commit() -> str | None:
    """The commit of this checkout, with ``+`` where tracked files differ from it; of a copy without
    its ``.git`` what ``GIT_COMMIT`` says, or None."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
