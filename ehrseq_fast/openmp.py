"""Where PyTorch's own kernels are wrong: with fewer OpenMP threads than it asks for."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def refuse_restricted_openmp(input: Tensor, what: str, *, is_lstm: bool = False) -> None:
    """Raise where oneDNN, which PyTorch calls on the CPU, may be granted too few threads.

    Without an error, products of bfloat16 are then wrong, up to NaN; so are, in training, the
    states and gradients of an LSTM in any dtype but float64, by 0.5 and more. oneDNN's LSTM serves
    tensors and packed sequences of one length; others could be let through, but a batch's lengths
    should not decide whether a program runs.

    Args:
        input: of what would run.
        what: what runs it, for the message.
        is_lstm: whether it is PyTorch's LSTM.

    Raises:
        RuntimeError: on the CPU, with more than one thread, where ``OMP_THREAD_LIMIT`` is below
            PyTorch's number of threads or ``OMP_DYNAMIC`` is true, unless oneDNN is switched off.
    """
    if input.device.type != "cpu" or torch.compiler.is_compiling():
        return
    dtype = input.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    if dtype == torch.float64 or (not is_lstm and dtype != torch.bfloat16):
        return
    dynamic = os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true"
    limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    threads = torch.get_num_threads()
    too_few = threads > 1 if dynamic else limit.isdigit() and 0 < int(limit) < threads
    if not too_few or not torch.backends.mkldnn.enabled:
        return
    variable = "OMP_DYNAMIC=true" if dynamic else f"OMP_THREAD_LIMIT={limit}"
    kind = "LSTM gives" if is_lstm else "products of bfloat16 give"
    raise RuntimeError(
        f"{what}: PyTorch's own {kind} wrong numbers where {variable} lets OpenMP grant fewer "
        f"threads than the {threads} that PyTorch asks for. Call torch.set_num_threads("
        f"{1 if dynamic else int(limit)}), set torch.backends.mkldnn.enabled = False, or use the "
        'compiled kernels (path="fused", backend "cpu"; modules without hooks), which are right'
    )
