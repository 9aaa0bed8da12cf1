"""Survival and what follows from it, of one event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arrays import integer
from ..rows import PackedRows
from .reading import of_rows, padded_hazards, read, times_of


def survival(hazards: Tensor | PackedRows, sequence_mask: Tensor | None = None) -> Any:
    """``S_t = Π_{u≤t} (1 − h_u)``, the probability of being without the event after time t.

    Args:
        hazards: ``[B, V]``, or packed rows ``[n_visits]``.
        sequence_mask: ``[B, V]``, non-zero at real visits. Without it padding must hold zeros.

    Returns:
        ``[B, V]``, or packed rows.

    Raises:
        ValueError: for shapes that do not fit, and hazards outside [0, 1], with the first patient
            (on a GPU with ``EHRSEQ_FAST_VALIDATE=1``).
        TypeError: for anything but floating-point tensors and packed rows.

    Example:
        >>> import torch
        >>> from ehrseq_fast.predictions import survival
        >>> survival(torch.tensor([[0.5, 0.5, 0.0]]))
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    if isinstance(hazards, PackedRows):
        return of_rows(survival, hazards, sequence_mask, 1)
    return survival_of(read(hazards, sequence_mask, 2))


def cumulative_hazard(hazards: Tensor | PackedRows, sequence_mask: Tensor | None = None) -> Any:
    """``H_t = −Σ_{u≤t} log(1 − h_u)``, so that survival is ``exp(−H)``; infinite from a hazard of 1
    on. (The sum of the hazards themselves is in ``models.survival_curve``.)

    Arguments and errors as in :func:`survival`.

    Example:
        >>> import torch
        >>> from ehrseq_fast.predictions import cumulative_hazard
        >>> cumulative_hazard(torch.tensor([[0.5, 0.5, 0.0]]))
        tensor([[0.6931, 1.3863, 1.3863]])
    """
    if isinstance(hazards, PackedRows):
        return of_rows(cumulative_hazard, hazards, sequence_mask, 1)
    return -torch.log1p(-read(hazards, sequence_mask, 2)).cumsum(1)


def risk_within(
    hazards: Tensor | PackedRows,
    horizons: Sequence[int],
    sequence_mask: Tensor | None = None,
    *,
    start: int = 0,
) -> Tensor:
    """The probability of the event at one of the next w times, ``1 − Π_{s≤u<s+w} (1 − h_u)``, of
    those without it before time s.

    Args:
        horizons: J whole numbers above 0, counts of times.
        start: s.

    Returns:
        ``[B, J]``, in the caller's order of patients.

    Raises:
        ValueError: also for horizons below 1 and a start outside [0, V).

    Example:
        >>> import torch
        >>> from ehrseq_fast.predictions import risk_within
        >>> risk_within(torch.tensor([[0.5, 0.5, 0.1]]), [1, 2], start=1)
        tensor([[0.5000, 0.5500]])
    """
    padded = padded_hazards(hazards, sequence_mask)
    start = integer("start", start, 0, max(padded.shape[1] - 1, 0))
    ends = [integer("horizons", horizon, 1, 2**31) for horizon in horizons]
    later = padded[:, start:]
    columns = [min(end, later.shape[1]) - 1 for end in ends]
    over = later >= 1
    logs = torch.log1p(-torch.where(over, 0.0, later)).cumsum(1)
    risks = -torch.expm1(logs)  # small ones keep their digits
    risks = torch.where((over.cumsum(1) > 0) & ~logs.isnan(), 1.0, risks)
    return risks[:, columns]


def restricted_mean(
    hazards: Tensor | PackedRows,
    sequence_mask: Tensor | None = None,
    *,
    horizon: float | None = None,
    times: Tensor | None = None,
    interpolate: bool = False,
) -> Tensor:
    """The mean time without the event up to a horizon, ``E[min(T, τ)]``: the area under the
    survival curve from 0 to τ.

    The curve is 1 until the first time and falls at each; with ``interpolate`` it falls linearly
    between times (and from 1 at 0 to the first).

    Args:
        horizon: τ; by default the last of ``times``.
        times: ``[V]`` ascending from 0 or above; by default 0, 1, ..., where the restricted mean is
            ``Σ_{t<τ} S_t``.

    Returns:
        ``[B]``.

    Raises:
        ValueError: also for times that do not ascend, and a horizon outside [0, last time].

    Example:
        >>> import torch
        >>> from ehrseq_fast.predictions import restricted_mean
        >>> restricted_mean(torch.tensor([[0.5, 0.5, 0.0]]))  # 0.5 + 0.25 up to time 2
        tensor([0.7500])
    """
    padded = padded_hazards(hazards, sequence_mask)
    grid, curve = with_start(padded, times)
    last = float(grid[-1])
    end = last
    if horizon is not None:  # in the dtype of the times: the last one is not below itself
        end = float(torch.tensor(float(horizon), dtype=grid.dtype, device="cpu"))
    if not 0 <= end <= last:
        raise ValueError(f"horizon: expected 0 to {last:g}, the last time, got {end:g}")
    widths = grid.clamp(max=end).diff()
    if not interpolate:
        return (curve[:, :-1] * widths).sum(1)
    # the curve at the ends of each piece, the last one cut off at the horizon
    share = torch.where(grid.diff() > 0, widths / grid.diff(), 0.0)
    ends = curve[:, :-1] + (curve[:, 1:] - curve[:, :-1]) * share
    return ((curve[:, :-1] + ends) / 2 * widths).sum(1)


def median_time(
    hazards: Tensor | PackedRows,
    sequence_mask: Tensor | None = None,
    *,
    times: Tensor | None = None,
    interpolate: bool = False,
) -> Tensor:
    """The first time at which half have had the event, ``S ≤ 1/2``; infinite where that is not
    reached, NaN where a hazard before it is NaN.

    Args:
        times: ``[V]``, as in :func:`restricted_mean`.
        interpolate: where the curve that falls linearly between times crosses 1/2.

    Returns:
        ``[B]``.

    Example:
        >>> import torch
        >>> from ehrseq_fast.predictions import median_time
        >>> median_time(torch.tensor([[0.2, 0.5, 0.0], [0.1, 0.0, 0.0]]))
        tensor([1., inf])
    """
    grid, curve = with_start(padded_hazards(hazards, sequence_mask), times)
    below = ~(curve > 0.5)  # or NaN
    reached = below.any(1)
    at = below.to(torch.int8).argmax(1).clamp(min=1)  # the curve begins at 1
    found = grid[at]
    low = curve.gather(1, at[:, None]).squeeze(1)
    if interpolate:
        high = curve.gather(1, at[:, None] - 1).squeeze(1)
        drop = torch.where(reached, high - low, 1.0)
        found = grid[at - 1] + (grid[at] - grid[at - 1]) * (high - 0.5) / drop
    return torch.where(low.isnan(), torch.nan, torch.where(reached, found, torch.inf))


def survival_of(hazards: Tensor) -> Tensor:
    """A hazard of 1 apart from the logarithms, where it would be infinite. A NaN stays: a certain
    event at another visit does not hide it."""
    over = hazards >= 1
    curve = torch.log1p(-torch.where(over, 0.0, hazards)).cumsum(1).exp()
    return torch.where((over.cumsum(1) > 0) & ~curve.isnan(), 0.0, curve)


def with_start(hazards: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor]:
    """The times and survival at them, with 1 at 0 before."""
    grid = times_of(hazards, times)
    grid = torch.cat([grid.new_zeros(1), grid])
    curve = survival_of(hazards)
    return grid, torch.cat([torch.ones_like(curve[:, :1]), curve], 1)
