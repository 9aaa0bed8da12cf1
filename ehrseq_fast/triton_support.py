"""What the operations' Triton kernels share: how they are launched.

Every kernel of the package is launched through :func:`launch`. That is one place to make the right
device current, and to observe launches: :func:`watching_launches` lists what an operation launches,
in the interpreter as on a GPU, and can hold the launches back, so that their arguments say what a
compiler ahead of time has to compile.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what was called, on how many programs, with what."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kernel's name in its source."""
        return self.kernel.fn.__name__


@dataclass(eq=False)
class _Watcher:
    launches: list[Launch]
    held_back_in: int | None  # the thread whose launches do not run


_watchers: list[_Watcher] = []


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter here: programs one after another, every operation
    a call of NumPy. Then few programs of large tiles take least time."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one inside the ``with`` block; costs next to nothing if it is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` on the device and current stream of the first tensor
    among ``arguments``, which all others must share.

    ``options`` holds the kernel's constexpr arguments by name and Triton's own (``num_warps``, …).
    Without a ``maxnreg`` among them a thread may have as many registers as a block of that many
    warps leaves it: with no bound given, ptxas spills a few bytes for one more block at a time, and
    which kernels it does that to changes with every line.
    """
    threads = 32 * options.get("num_warps", 4)
    options.setdefault("maxnreg", min(255, 65536 // threads))
    if _watchers:
        watched = Launch(kernel, grid, arguments, options)
        for watcher in _watchers:
            watcher.launches.append(watched)
        if any(watcher.held_back_in == threading.get_ident() for watcher in _watchers):
            return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with current(device):  # where Triton launches
        kernel[grid](*arguments, **options)


@contextlib.contextmanager
def watching_launches(held_back: bool = False) -> Iterator[list[Launch]]:
    """The kernels that are launched inside the ``with`` block, in their order, by any thread. For
    tests and for compiling ahead of time: ``held_back`` launches are listed and do not run, so what
    they would have written is left as it was; other threads' launches run.

    Example:
        >>> from ehrseq_fast.triton_support import watching_launches
        >>> with watching_launches() as launches:
        ...     pass  # call operations under use_backend("triton")
        >>> [launch.name for launch in launches]
        []
    """
    watcher = _Watcher([], threading.get_ident() if held_back else None)
    _watchers.append(watcher)
    try:
        yield watcher.launches
    finally:
        _watchers.remove(watcher)
