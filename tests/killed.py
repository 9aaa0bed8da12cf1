"""Training in a process of its own that is killed at a chosen moment.

The moments are counted: each step of the optimizer, each wait for the disk, and each renaming and
half-written file of weights. At the chosen one the process kills itself as ``kill -9`` would.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ehrseq_fast.training", "safetensors.torch", "yaml"])


def moments_of(config: Any) -> int:
    """How many moments a run has, which it is run for, to its end."""
    counted = _CONTEXT.Value("l", 0)
    assert run(config, counted=counted) == 0
    return counted.value


def run(
    config: Any, *, moment: int | None = None, resume: bool = False, counted: Any = None
) -> int:
    """Run ``fit``; the process's exit code, which is -9 where it was killed."""
    process = _CONTEXT.Process(target=_fit, args=(config, resume, moment, counted))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def _fit(config: Any, resume: bool, moment: int | None, counted: Any) -> None:
    import safetensors.torch
    import torch

    from ehrseq_fast.training import fit, loop

    torch.set_num_threads(1)
    seen = 0

    def pass_moment() -> None:
        nonlocal seen
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        if counted is not None:
            counted.value = seen

    def before(function: Any) -> Any:
        def replacement(*args: Any, **options: Any) -> Any:
            pass_moment()
            return function(*args, **options)

        return replacement

    whole = safetensors.torch.save_file

    def in_two_parts(tensors: Any, path: Any, metadata: Any) -> None:
        whole(tensors, path, metadata)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        pass_moment()
        Path(path).write_bytes(content)

    safetensors.torch.save_file = in_two_parts
    os.replace = before(os.replace)
    os.fsync = before(os.fsync)
    loop.Trainer._step = before(loop.Trainer._step)  # type: ignore[method-assign]
    fit(config, resume=resume)
