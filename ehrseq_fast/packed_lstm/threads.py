"""Where PyTorch's own LSTM is wrong: with fewer OpenMP threads than it asks for."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def refuse_restricted_openmp(input: Tensor, what: str) -> None:
    """Raise where oneDNN's LSTM, which PyTorch runs on the CPU, may be granted too few threads.

    Its states and gradients are then wrong by 0.5 and more, without an error. It serves tensors
    and packed sequences of one length, but for float64; others could be let through, but a batch's
    lengths should not decide whether a program runs.

    Args:
        input: of the LSTM.
        what: what runs it, for the message.

    Raises:
        RuntimeError: on the CPU, with more than one thread, where ``OMP_THREAD_LIMIT`` is below
            PyTorch's number of threads or ``OMP_DYNAMIC`` is true, unless oneDNN is switched off.
    """
    if input.device.type != "cpu" or input.dtype == torch.float64 or torch.compiler.is_compiling():
        return
    dynamic = os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true"
    limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    threads = torch.get_num_threads()
    too_few = threads > 1 if dynamic else limit.isdigit() and 0 < int(limit) < threads
    if not too_few or not torch.backends.mkldnn.enabled:
        return
    variable = "OMP_DYNAMIC=true" if dynamic else f"OMP_THREAD_LIMIT={limit}"
    raise RuntimeError(
        f"{what}: PyTorch's own LSTM gives wrong numbers where {variable} lets OpenMP grant fewer "
        f"threads than the {threads} that PyTorch asks for. Call torch.set_num_threads("
        f"{1 if dynamic else int(limit)}), set torch.backends.mkldnn.enabled = False, or use the "
        'compiled kernels (path="fused", backend "cpu"), which are right'
    )
