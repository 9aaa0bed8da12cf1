"""PyTorch's activation checkpoints, for tests that ask for a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as plain_checkpoint

from ehrseq_fast import backend, use_backend


def checkpoint(run: Callable[..., Any], *args: Any, use_reentrant: bool) -> Any:
    """On a GPU a thread of autograd's own computes ``run`` again. What the caller's ``with`` blocks
    ask for does not hold there, so it is asked for here."""
    asked, device = backend.requested(), torch.get_default_device()

    def within(*given: Any) -> Any:
        with use_backend(asked), torch.device(device):
            return run(*given)

    return plain_checkpoint(within, *args, use_reentrant=use_reentrant)
