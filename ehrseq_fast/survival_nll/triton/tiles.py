"""How the Triton kernels of the survival losses are laid out."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...triton_support import interpreted

# In a tile: four for each of a GPU's threads. In the interpreter an operation on a tile is one call
# of NumPy, so tiles are large and few there.
WARPS = 4
VALUES = 8192 if interpreted() else 4 * 32 * WARPS


def tile_of(slots: int, classes: int) -> dict[str, int]:
    """Few patients and many visits, unless rows are short."""
    block_classes = triton.next_power_of_2(classes)
    visits = max(1, min(16 if slots <= 16 else 128, VALUES // block_classes))
    patients = max(1, VALUES // (visits * block_classes))
    return {"PATIENTS": patients, "VISITS": visits, "BLOCK_CLASSES": block_classes}


def accumulator_of(dtype: torch.dtype) -> Any:
    """The dtype of sums, as the kernels name it."""
    return tl.float64 if dtype == torch.float64 else tl.float32
