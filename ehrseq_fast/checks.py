"""What several operations check and compute alike: dtypes."""

from __future__ import annotations

import torch

FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float64 for float64, and in float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
