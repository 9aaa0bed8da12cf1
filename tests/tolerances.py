"""How much a backend may differ from the reference in float64, for each dtype.

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


def assert_matches(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    scale: torch.Tensor | float = 1.0,
    terms: int = 1,
    accumulated_in: torch.dtype | None = None,
) -> None:
    """As :func:`assert_close`, for values of any size: NaN and infinities in the same places, and
    elsewhere within the tolerance times ``scale``, the size of what was summed (``Σ |term|``).

    ``accumulated_in`` is for results that are wider than what they were computed from.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    got, wanted = actual.double(), expected.to(actual.dtype).double()
    both = torch.stack([got.isnan(), wanted.isnan()])
    assert torch.equal(both[0], both[1]), f"NaN differ: {actual}, expected {expected}"
    finite = wanted.isfinite()
    infinite = ~finite & ~wanted.isnan()
    assert torch.equal(got[infinite], wanted[infinite]), f"{actual}, expected {expected}"
    bound = tolerance(accumulated_in or actual.dtype, terms)["rtol"]
    size = torch.as_tensor(scale, dtype=torch.float64).expand(wanted.shape)
    size = torch.where(size.isfinite(), size, 0.0)
    # what is too small for the dtype is rounded by an absolute step
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    allowed = bound * torch.maximum(size, wanted.abs()) + smallest
    apart = (got - wanted).abs()
    wrong = finite & ~(apart <= allowed)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} differ: {got[wrong][:5]}, expected "
        f"{wanted[wrong][:5]}, allowed {allowed[wrong][:5]}"
    )
