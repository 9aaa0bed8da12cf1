"""How far a backend may stand from the reference in float64, for each dtype.

A result is rounded once to its own dtype after a sum in a wider one (float32 for 16 bits). The
bound is the unit roundoff of the dtype times a few, plus the growth of the accumulator's error with
the number of terms: sums of n terms lose about sqrt(n) roundoffs, n at worst.
"""

from __future__ import annotations

import torch

ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def tolerance(dtype: torch.dtype, terms: int = 1) -> dict[str, float]:
    """``rtol`` and ``atol`` for a result that sums ``terms`` values of size about 1."""
    accumulator = ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    bound = 2 * ROUNDOFF[dtype] + 2 * terms * accumulator
    return {"rtol": bound, "atol": bound}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, terms: int = 1) -> None:
    """``actual`` (any dtype) against ``expected`` (float64), within what its dtype allows."""
    bound = tolerance(actual.dtype, terms)
    torch.testing.assert_close(actual.double(), expected.double(), **bound)
