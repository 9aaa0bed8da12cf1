"""Which backend computes an operation: what loaded here, what was asked for, and why not the rest.

Four backends give the same numbers: ``cuda`` and ``cpu`` (compiled), ``triton``, and ``reference``
(plain PyTorch, any device). The first of these that serves the tensors' device and dtype is taken,
unless one is asked for with the environment variable ``EHRSEQ_FAST_BACKEND`` or with
:func:`use_backend`; asking for one that cannot run is an error, never a silent downgrade.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from . import (
    _batching_reference,
    schemas,  # noqa: F401  (the operators must be defined before a library implements them)
)

BACKENDS = ("cuda", "cpu", "triton", "reference")
FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Support:
    """What one backend serves of one operation."""

    device: str
    dtypes: frozenset[torch.dtype] = FLOATING


@dataclass(frozen=True)
class Loaded:
    """A compiled library: loaded (``reason is None``), or why it is not."""

    reason: str | None
    path: str | None = None


def build_record() -> dict[str, str]:
    """What the build left behind: compiler and torch, or why compiled parts were skipped."""
    try:
        return json.loads((_PACKAGE / "_build_record.json").read_text())
    except (OSError, ValueError):
        return {}


def _load_library(stem: str) -> Loaded:
    if os.environ.get("EHRSEQ_FAST_NO_COMPILED", "0") not in ("", "0"):
        return Loaded("EHRSEQ_FAST_NO_COMPILED is set")
    found = sorted(_PACKAGE.glob(f"{stem}.*so"))
    if not found:
        skipped = build_record().get("skipped", f"{stem} was not built, or was deleted")
        return Loaded(skipped)
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return Loaded(f"{found[0].name} did not load: {error}", str(found[0]))
    return Loaded(None, str(found[0]))


def _import_batching() -> tuple[ModuleType | None, Loaded]:
    if os.environ.get("EHRSEQ_FAST_NO_COMPILED", "0") not in ("", "0"):
        return None, Loaded("EHRSEQ_FAST_NO_COMPILED is set")
    try:
        module = importlib.import_module("._batching", __package__)
    except ModuleNotFoundError:
        return None, Loaded(
            build_record().get("skipped", "_batching was not built, or was deleted")
        )
    except ImportError as error:
        return None, Loaded(f"_batching did not load: {error}")
    return module, Loaded(None, module.__file__)


compiled_cpu = _load_library("_C")
_batching, compiled_batching = _import_batching()

_supports: dict[str, dict[str, Support]] = {}
_requested: str | None = None


def register(operation: str, **supports: Support) -> None:
    """Say what each backend serves of ``operation``; every room calls this once."""
    _supports[operation] = supports


def operations() -> tuple[str, ...]:
    """The names of all operations."""
    return tuple(_supports)


def why_not_loaded(backend: str) -> str | None:
    """Why ``backend`` cannot run in this process at all; None where it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return compiled_cpu.reason
    if backend in BACKENDS:
        return "this version of the package has no such kernels"
    return f"there is no such backend; there are {', '.join(BACKENDS)}"


def why_not(operation: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``operation`` on tensors of that device and dtype."""
    if backend == "reference":
        return None
    reason = why_not_loaded(backend)
    if reason is not None:
        return reason
    support = _supports[operation].get(backend)
    if support is None:
        return f"it has no kernel for {operation}"
    if support.device != device:
        return f"it serves {support.device} tensors, and these are on {device}"
    if dtype not in support.dtypes:
        return f"its {operation} has no kernel for {dtype}"
    return None


def choose(operation: str, device: str, dtype: torch.dtype) -> str:
    """The backend for one call.

    Raises:
        RuntimeError: if a backend was asked for and cannot run this call, with the reason.
    """
    if _requested is not None:
        reason = why_not(operation, _requested, device, dtype)
        if reason is not None:
            raise RuntimeError(
                f"backend {_requested!r} was asked for, but cannot run {operation}: {reason}"
            )
        return _requested
    for backend in BACKENDS:
        if why_not(operation, backend, device, dtype) is None:
            return backend
    raise AssertionError("unreachable: reference serves everything")


def batch_builder() -> ModuleType:
    """What builds :class:`~ehrseq_fast.PackedVisits` on the host: the compiled ``_batching``, or
    its NumPy twin ``_batching_reference`` where nothing is compiled or ``reference`` is asked for.

    Raises:
        RuntimeError: if ``cpu`` was asked for and ``_batching`` did not load, with the reason.
    """
    if _requested == "cpu" and _batching is None:
        raise RuntimeError(
            f"backend 'cpu' was asked for, but cannot build batches: {compiled_batching.reason}"
        )
    if _batching is None or _requested == "reference":
        return _batching_reference
    return _batching


def requested() -> str | None:
    """The backend that was asked for; None where the package chooses."""
    return _requested


def _request(backend: str | None) -> None:
    global _requested  # noqa: PLW0603  (one process-wide choice, as torch.backends has)
    if backend is not None:
        reason = why_not_loaded(backend)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} was asked for, but cannot run: {reason}")
    _requested = backend


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Ask for one backend inside the ``with`` block (process-wide); None lets the package choose.

    Raises:
        RuntimeError: if that backend cannot run here, with the reason.

    Example:
        >>> import torch, ehrseq_fast
        >>> codes, weight = torch.tensor([[1, 2], [2, 0]]), torch.eye(3)
        >>> with ehrseq_fast.use_backend("reference"):
        ...     ehrseq_fast.visit_mean_pool(codes, weight, codes != 0)
        tensor([[0.0000, 0.5000, 0.5000],
                [0.0000, 0.0000, 1.0000]])
    """
    before = _requested
    _request(backend)
    try:
        yield
    finally:
        _request(before)


def validate_on_device() -> bool:
    """Whether values are checked on a GPU too, at the price of a synchronisation per call."""
    return os.environ.get("EHRSEQ_FAST_VALIDATE", "0") not in ("", "0")


def request_from_environment() -> None:
    """Take up ``EHRSEQ_FAST_BACKEND``. Importing never fails, so a backend that cannot run is kept
    as asked for and refused at the first call."""
    global _requested  # noqa: PLW0603
    _requested = os.environ.get("EHRSEQ_FAST_BACKEND") or None


request_from_environment()
