"""Which backend computes an operation: what loaded here, what was asked for, and why not the rest.

Four backends give the same numbers: ``cuda`` and ``cpu`` (compiled), ``triton``, and ``reference``
(plain PyTorch, any device). The first of these that serves the tensors' device and dtype is taken,
unless one is asked for with the environment variable ``EHRSEQ_FAST_BACKEND`` or, in one thread or
task, with :func:`use_backend`; asking for one that cannot run is an error, never a silent
downgrade. An operation that has no kernels of the asked-for backend on any device (the packed LSTM
has none in Triton) is computed as if nothing were asked for; ``python -m ehrseq_fast info`` lists
which.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from . import operations
from .checks import FLOATING

BACKENDS = ("cuda", "cpu", "triton", "reference")

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Loaded:
    """A compiled library: loaded (``reason is None``), or why it is not."""

    reason: str | None
    path: str | None = None


@dataclass(frozen=True)
class Kernels:
    """One backend's kernels in this process: what they serve, and where they are called.

    ``emulated`` kernels were written for a GPU and run on the host, for tests: slow, and never
    taken unless asked for.
    """

    device: str
    namespace: str
    reason: str | None
    dtypes: frozenset[torch.dtype] = FLOATING
    emulated: bool = False


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
        record = build_record()
        skipped = record.get("cuda_skipped") if stem == "_C_cuda" else None
        return Loaded(skipped or record.get("skipped") or f"{stem} was not built, or was deleted")
    try:
        torch.ops.load_library(str(found[0]))
        operations.name_arguments_in(ctypes.CDLL(str(found[0])))
    except (OSError, RuntimeError, AttributeError) as error:
        return Loaded(f"{found[0].name} did not load: {error}", str(found[0]))
    return Loaded(None, str(found[0]))


def _import_batching() -> tuple[ModuleType | None, Loaded]:
    if os.environ.get("EHRSEQ_FAST_NO_COMPILED", "0") not in ("", "0"):
        return None, Loaded("EHRSEQ_FAST_NO_COMPILED is set")
    try:
        module = importlib.import_module("._batching", __package__)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == f"{__package__}._batching":
            reason = build_record().get("skipped", "_batching was not built, or was deleted")
            return None, Loaded(reason)
        return None, Loaded(f"_batching did not load: {error}")
    return module, Loaded(None, module.__file__)


def _cuda_kernels() -> Kernels:
    if torch.version.cuda is None:
        reason: str | None = "this torch is built without CUDA"
    else:
        reason = _load_library("_C_cuda").reason
    return Kernels("cuda", operations.COMPILED, reason)


def _triton_kernels() -> Kernels:
    """Triton's are imported later (:func:`load_triton_kernels`); whether they can run is known
    before."""
    absent = Kernels("cuda", operations.TRITON, None)
    if importlib.util.find_spec("triton") is None:
        return replace(absent, reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        # its interpreter computes with NumPy, which has no bfloat16
        served = FLOATING - {torch.bfloat16}
        return Kernels("cpu", operations.TRITON, None, served, emulated=True)
    if torch.version.cuda is None:
        return replace(
            absent,
            reason="this torch is built without CUDA (TRITON_INTERPRET=1, set before the import, "
            "runs them in Triton's interpreter)",
        )
    return replace(absent, reason=_why_triton_cannot_launch())


def _why_triton_cannot_launch() -> str | None:
    """Triton compiles its launcher, in C, at the first launch. Where it cannot, that call would
    fail; known now, another backend is taken."""
    # CC may be set to anything where Triton's cache holds the launcher
    if os.environ.get("CC") or sys.platform != "linux":
        return None
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        return "triton needs a C compiler to launch kernels: install gcc or clang, or set CC"
    scheme = sysconfig.get_default_scheme()  # Debian's own names a folder that holds no headers
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    headers = Path(sysconfig.get_path("include", scheme))
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not elsewhere and not (headers / "Python.h").exists():
        return f"triton needs Python's headers to launch kernels: no Python.h in {headers}"
    return None


compiled_cpu = _load_library("_C")
batching, compiled_batching = _import_batching()


def cpu_capability() -> str | None:
    """The instruction set that the ``cpu`` kernels use: ``baseline``, ``avx2``, ``avx512``,
    ``avx512_bf16`` or ``amx``, the best that this processor has and ``EHRSEQ_FAST_CPU_CAPABILITY``
    allows, or ``amx_emulated`` where that variable asks for it; the reason why they refuse where it
    holds something else; None where they are not loaded."""
    if compiled_cpu.reason is not None or compiled_cpu.path is None:
        return None
    function = ctypes.CDLL(compiled_cpu.path).ehrseq_fast_cpu_capability
    function.restype = ctypes.c_char_p
    return function().decode()


def bfloat16_products() -> str | None:
    """How the ``cpu`` kernels of recurrent layers multiply bfloat16: in ``tiles`` (AMX), in
    ``pairs`` (AVX512-BF16), or widened to ``float32``; None where they are not loaded."""
    if compiled_cpu.reason is not None or compiled_cpu.path is None:
        return None
    function = ctypes.CDLL(compiled_cpu.path).ehrseq_fast_bfloat16_products
    function.restype = ctypes.c_char_p
    return function().decode()


def why_no_amx() -> str | None:
    """Why the ``cpu`` kernels cannot use the tiles of AMX here; None where they can. What
    ``EHRSEQ_FAST_CPU_CAPABILITY`` holds plays no part."""
    if compiled_cpu.reason is not None or compiled_cpu.path is None:
        return "no kernels are loaded"
    function = ctypes.CDLL(compiled_cpu.path).ehrseq_fast_why_no_amx
    function.restype = ctypes.c_char_p
    reason = function()
    return None if reason is None else reason.decode()


_kernels = {
    "cuda": _cuda_kernels(),
    "cpu": Kernels("cpu", operations.COMPILED, compiled_cpu.reason),
    "triton": _triton_kernels(),
}
_by_environment: str | None = None


@dataclass(eq=False)
class _Block:
    """One ``use_backend`` block."""

    backend: str | None
    is_open: bool = True


# The use_backend blocks that the current context is in, outermost first. A context variable, as
# neither threads nor the tasks of an event loop may see each other's; and a block takes away its
# own entry alone, since generators that hold blocks open may be closed in any order. One that is
# closed in another context, whose variable is not this one's, is marked, and no longer counts here.
_Blocks = tuple[_Block, ...]
_blocks: ContextVar[_Blocks] = ContextVar("ehrseq_fast_backend", default=())


class _Traced:
    """The blocks for ``torch.compile``, which does not trace the reading of a context variable, but
    takes a property that is written in C for what it is: it reads this one, and guards on what it
    found. Called with this object as the default, it gives that where no block was ever entered."""

    blocks = property(_blocks.get)  # type: ignore[arg-type]


_traced = _Traced()


def kernels(backend: str) -> Kernels:
    """What is known of a backend other than ``reference``."""
    return _kernels[backend]


@contextlib.contextmanager
def emulating(backend: str, emulated: Kernels) -> Iterator[None]:
    """Use ``emulated`` as a backend's kernels inside the ``with`` block. For tests."""
    before = _kernels[backend]
    _set_kernels(backend, replace(emulated, emulated=True))
    try:
        yield
    finally:
        _set_kernels(backend, before)


def _set_kernels(backend: str, kernels: Kernels) -> None:
    _kernels[backend] = kernels
    _choose.cache_clear()


def load_triton_kernels() -> None:
    """Import every operation's Triton kernels where they can run, and register them for the device
    they serve. A failure is kept as the reason why they cannot, since importing the package never
    fails."""
    if _kernels["triton"].reason is not None:
        return
    for folder in sorted({x.folder for x in operations.registered() if "triton" in x.backends}):
        name = f"{__package__}.{folder}.triton"
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever another version of Triton raises
            reason = f"{name} did not load: {type(error).__name__}: {error}"
            _set_kernels("triton", replace(_kernels["triton"], reason=reason))
            return
    operations.implement_in_triton(_kernels["triton"].device)


def operators(backend: str) -> Any:
    """The ``torch.ops`` namespace whose operators run ``backend``'s kernels."""
    return getattr(torch.ops, _kernels[backend].namespace)


class _Unwatched:
    """As a ``torch.ops`` namespace, of operators that are called where
    :func:`~ehrseq_fast.autograd.nothing_watches`, with plain tensors: straight from the dispatcher,
    without a look for ``__torch_function__``, which takes as long as a small operator."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:  # called once for each operator
        overload = getattr(getattr(torch.ops, self._namespace), name).default
        operator = SimpleNamespace(default=partial(torch._C._dispatch_call_boxed, overload._handle))
        setattr(self, name, operator)
        return operator


unwatched_operators = _Unwatched(operations.COMPILED)


def why_not_loaded(backend: str) -> str | None:
    """Why ``backend`` cannot run in this process at all; None where it can."""
    if backend == "reference":
        return None
    if backend in _kernels:
        return _kernels[backend].reason
    return f"expected one of {', '.join(map(repr, BACKENDS))}"


def why_not(operation: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``operation`` on tensors of that device and dtype."""
    if backend == "reference":
        return None
    reason = why_not_loaded(backend)
    if reason is not None:
        return reason
    if backend not in operations.named(operation).backends:
        return f"it has no kernel for {operation}"
    serves = _kernels[backend]
    if serves.device != device:
        return f"it serves {serves.device} tensors, and these are on {device}"
    if dtype not in serves.dtypes:
        emulator = " in its emulator" if serves.emulated else ""
        return f"its {operation} has no kernel for {dtype}{emulator}"
    return None


def choose(operation: str, device: str, dtype: torch.dtype) -> str:
    """The backend for one call.

    Raises:
        RuntimeError: if a backend was asked for and cannot run this call, with the reason.
    """
    if torch.compiler.is_compiling():  # which warns of cached functions, and traces what they wrap
        return _choose.__wrapped__(_requested_while_compiling(), operation, device, dtype)
    return _choose(_requested(), operation, device, dtype)


def is_cpu(operation: str, dtype: torch.dtype) -> bool:
    """Whether :func:`choose` gives the compiled ``cpu`` kernels for tensors on the host, where no
    graph is traced."""
    return _choose(_requested(), operation, "cpu", dtype) == "cpu"


@cache
def _choose(asked: str | None, operation: str, device: str, dtype: torch.dtype) -> str:
    """:func:`choose`; kept until :func:`_set_kernels` is called."""
    if asked is not None and _has_kernels(operation, asked):
        reason = why_not(operation, asked, device, dtype)
        if reason is not None:
            raise RuntimeError(
                f"backend {asked!r} was asked for, but cannot run {operation}: {reason}"
            )
        return asked
    for backend in BACKENDS:
        emulated = backend in _kernels and _kernels[backend].emulated
        if not emulated and why_not(operation, backend, device, dtype) is None:
            return backend
    raise AssertionError("unreachable: reference serves everything")


def _has_kernels(operation: str, backend: str) -> bool:
    """False where the package has none, whatever the machine; an unknown or absent backend is not
    passed over."""
    if why_not_loaded(backend) is not None or backend == "reference":
        return True
    return backend in operations.named(operation).backends


def requested() -> str | None:
    """The backend that was asked for; None where the package chooses."""
    return _requested_while_compiling() if torch.compiler.is_compiling() else _requested()


def _requested_while_compiling() -> str | None:
    traced: Any = _traced.blocks
    for block in reversed(traced) if isinstance(traced, tuple) else ():
        if block.is_open:
            return block.backend
    return _by_environment


def _requested() -> str | None:
    blocks = _blocks.get()
    if blocks and not blocks[-1].is_open:
        blocks = _enter(blocks)
    return blocks[-1].backend if blocks else _by_environment


def _enter(blocks: _Blocks) -> _Blocks:
    """Make those of ``blocks`` that are open the current context's."""
    blocks = tuple(block for block in blocks if block.is_open)
    _blocks.set(blocks)
    return blocks


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Ask for one backend inside the ``with`` block; None lets the package choose.

    It holds for this thread, and for the tasks that an event loop starts inside the block
    (:mod:`contextvars`). A thread started inside does not take it over, unless it runs in a
    ``contextvars.copy_context()``; a backward pass computes with the backend of its forward pass,
    wherever it runs. ``EHRSEQ_FAST_BACKEND`` asks for the whole process.

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
    reason = None if backend is None else why_not_loaded(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} was asked for, but cannot run: {reason}")
    block = _Block(backend)
    _enter((*_blocks.get(), block))
    try:
        yield
    finally:
        blocks = _blocks.get()
        if block in blocks:  # of this context alone: tasks that took it over keep it
            _enter(tuple(entry for entry in blocks if entry is not block))
        else:  # closed in another context than opened
            block.is_open = False


def validate_on_device() -> bool:
    """Whether values are checked on a GPU too, at the price of a synchronisation per call."""
    return os.environ.get("EHRSEQ_FAST_VALIDATE", "0") not in ("", "0")


def must_check_values(chosen: str, device: str, validate: bool) -> bool:
    """Whether an operation has to check values before its kernel runs: the ``cpu`` kernels check
    them as they read them, and a GPU would have to be waited for."""
    if (chosen == "cpu" and device == "cpu") or torch.compiler.is_compiling():
        return False
    return device == "cpu" or validate or validate_on_device()


def request_from_environment() -> None:
    """Take up ``EHRSEQ_FAST_BACKEND``. Importing never fails, so a backend that cannot run is kept
    as asked for and refused at the first call."""
    global _by_environment  # noqa: PLW0603
    _by_environment = os.environ.get("EHRSEQ_FAST_BACKEND") or None


request_from_environment()
