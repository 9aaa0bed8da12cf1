"""What the rooms' Triton kernels share: how they are launched, and compiling them ahead of use.

Every kernel of the package is launched through :func:`launch`. That is one place to make the right
device current, and one place to watch: :func:`watching_launches` lists what an operation launches,
in the interpreter as on a GPU, and can hold the launches back, so that their arguments tell what a
compiler ahead of time has to compile.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
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


def warmup(
    *,
    patients: int,
    visits: int,
    codes: int,
    embedding_dim: int,
    vocab_size: int = 1024,
    dtype: torch.dtype = torch.float32,
    modes: Sequence[str] = ("mean",),
    causes: int | None = None,
    from_logits: bool = False,
    device: torch.device | str | None = None,
) -> list[str]:
    """Compile what training on such batches will launch, so that no training step waits for it.

    Triton compiles a kernel when it is first launched with arguments of new types, and keeps it on
    disk (``TRITON_CACHE_DIR``). This runs pooling and survival losses once, forward and backward,
    padded and packed, on made-up records of the given size. Lengths and batch sizes do not select
    the kernel to the last number: a batch of the usual size stands for those like it.

    Args:
        patients, visits, codes: a typical batch ``[B, V, C]``.
        embedding_dim: the width of a visit vector.
        vocab_size: rows of the embedding table.
        dtype: of the embedding table and of the hazards (give autocast's, to train under autocast).
        modes: of visit pooling: ``"mean"``, ``"sum"``, ``"max"``, ``"attention"`` (packed alone).
        causes: competing risks to compile the loss for as well; None compiles the single-risk loss
            alone.
        from_logits: whether the losses are to take logits.
        device: a GPU; by default the current one, or the host where there is none.

    Returns:
        The names of the Triton kernels that ran. None ran where another backend serves these
        tensors (``python -m ehrseq_fast info`` says which and why): then there is nothing to do.

    Example:
        >>> import ehrseq_fast
        >>> with ehrseq_fast.use_backend("reference"):  # in training: what you train with
        ...     ehrseq_fast.warmup(patients=4, visits=3, codes=2, embedding_dim=8)
        []
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with watching_launches() as launches:
        for mode in modes:
            _pool_once(patients, visits, codes, embedding_dim, vocab_size, dtype, mode, device)
        for count in (None, causes) if causes else (None,):
            _lose_once(patients, visits, count, from_logits, dtype, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return sorted({launch.name for launch in launches})


def _records(patients: int, visits: int, codes: int, vocab_size: int) -> Tensor:
    return torch.arange(patients * visits * codes).reshape(patients, visits, codes) % vocab_size


def _pool_once(
    patients: int,
    visits: int,
    codes: int,
    embedding_dim: int,
    vocab_size: int,
    dtype: torch.dtype,
    mode: str,
    device: torch.device,
) -> None:
    from . import PackedVisits, packed_visit_pool, visit_mean_pool

    padded = _records(patients, visits, codes, vocab_size)
    weight = torch.zeros(vocab_size, embedding_dim, dtype=dtype, device=device, requires_grad=True)
    scores = None
    if mode == "attention":
        scores = torch.zeros(vocab_size, dtype=dtype, device=device, requires_grad=True)
    else:
        mask = torch.ones_like(padded, dtype=torch.bool).to(device)
        visit_mean_pool(padded.to(device), weight, mask, mode=mode).sum().backward()
    batch = PackedVisits.from_lists(padded.tolist()).to(device)
    packed_visit_pool(batch, weight, mode=mode, scores=scores).sum().backward()


def _lose_once(
    patients: int,
    visits: int,
    causes: int | None,
    from_logits: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    from . import (
        PackedVisits,
        competing_risks_nll,
        discrete_time_survival_nll,
        packed_competing_risks_nll,
        packed_survival_nll,
    )

    outcomes = torch.zeros(patients, dtype=torch.int64, device=device)
    mask = torch.ones(patients, visits, dtype=torch.bool, device=device)
    batch = PackedVisits.from_lists([[[1]] * visits] * patients).to(device)
    shape = [patients, visits] if causes is None else [patients, visits, causes]

    def hazards(*shape: int) -> Tensor:
        return torch.full(shape, 0.5, dtype=dtype, device=device, requires_grad=True)

    if causes is None:
        padded = discrete_time_survival_nll(
            hazards(*shape), outcomes, outcomes, mask, from_logits=from_logits
        )
        packed = packed_survival_nll(
            hazards(patients * visits),
            batch,
            event_times=outcomes,
            event_indicators=outcomes,
            from_logits=from_logits,
        )
    else:
        padded = competing_risks_nll(
            hazards(*shape), outcomes, outcomes, mask, from_logits=from_logits
        )
        packed = packed_competing_risks_nll(
            hazards(patients * visits, causes),
            batch,
            event_times=outcomes,
            event_types=outcomes,
            from_logits=from_logits,
        )
    (padded + packed).backward()
