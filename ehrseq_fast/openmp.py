"""Where PyTorch's own kernels are wrong: with fewer OpenMP threads than it asks for."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor


def refuse_restricted_openmp(input: Tensor, what: str, *, is_lstm: bool = False) -> None:
    """Raise where oneDNN, which PyTorch calls on the CPU, may be granted too few threads.

    Without an error, products of bfloat16 are then wrong, up to NaN, and those of float32 where
    ``torch.set_float32_matmul_precision("medium")`` gives them to oneDNN; so are, in training, the
    states and gradients of an LSTM in any dtype but float64, by 0.5 and more. oneDNN's LSTM serves
    tensors and packed sequences of one length; others could be let through, but a batch's lengths
    should not decide whether a program runs.

    Args:
        input: of what would run.
        what: what runs it, for the message.
        is_lstm: whether it is PyTorch's LSTM.

    Raises:
        RuntimeError: on the CPU, with more than one thread, where ``OMP_THREAD_LIMIT`` is below
            PyTorch's number of threads, ``OMP_DYNAMIC`` is true or ``OMP_MAX_ACTIVE_LEVELS`` is 0
            (or the program told OpenMP so), unless oneDNN is switched off.
    """
    if input.device.type != "cpu" or torch.compiler.is_compiling():
        return
    dtype = input.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    if dtype == torch.float64 or not (is_lstm or _multiplied_by_onednn(dtype)):
        return
    threads = torch.get_num_threads()
    if threads == 1:
        return
    variable, granted = _restriction()
    if granted >= threads or not torch.backends.mkldnn.enabled:
        return
    name = str(dtype).removeprefix("torch.")
    kind = "LSTM gives" if is_lstm else f"products of {name} give"
    raise RuntimeError(
        f"{what}: PyTorch's own {kind} wrong numbers where {variable} lets OpenMP grant fewer "
        f"threads than the {threads} that PyTorch asks for. Call torch.set_num_threads("
        f"{granted}), set torch.backends.mkldnn.enabled = False, or use the "
        'compiled kernels (path="fused", backend "cpu"; modules without hooks), which are right'
    )


def products_are_safe(dtype: torch.dtype) -> bool:
    """Whether PyTorch's own products of this dtype on the CPU are right here, for what may be left
    to them or not."""
    if not _multiplied_by_onednn(dtype) or torch.get_num_threads() == 1:
        return True
    return _restriction()[1] >= torch.get_num_threads() or not torch.backends.mkldnn.enabled


def _multiplied_by_onednn(dtype: torch.dtype) -> bool:
    if dtype != torch.float32:
        return dtype == torch.bfloat16
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(settings, "fp32_precision", "ieee")
    if precision == "tf32":
        return bool(getattr(torch.cpu, "_is_amx_fp16_supported", lambda: True)())
    return precision == "bf16"


def _restriction() -> tuple[str, int]:
    """What keeps OpenMP from granting threads, and how many it grants for certain."""
    runtime = _runtime()
    if runtime is None:
        dynamic = os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true"
        limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
        most, levels = int(limit) if limit.isdigit() else 0, 1
    else:
        dynamic, most = bool(runtime.omp_get_dynamic()), runtime.omp_get_thread_limit()
        levels = runtime.omp_get_max_active_levels()
    if dynamic:
        return "OMP_DYNAMIC=true", 1
    if levels == 0:
        return "OMP_MAX_ACTIVE_LEVELS=0", 1
    return f"OMP_THREAD_LIMIT={most}", most if most > 0 else 2**31


@functools.cache
def _runtime() -> Any:
    """The OpenMP that PyTorch is linked with, which knows what the environment meant and what was
    changed since; None where it cannot be asked."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        for name in ("omp_get_dynamic", "omp_get_thread_limit", "omp_get_max_active_levels"):
            getattr(library, name).restype = ctypes.c_int
    except (AttributeError, OSError):
        return None
    return library
