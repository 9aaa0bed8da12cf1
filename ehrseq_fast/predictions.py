"""From hazards to what is asked of them: survival, cumulative hazards and incidences, restricted
mean, median, risk within a horizon; as tensors and as a data frame.

Hazards are ``[B, V]`` padded, or :class:`~ehrseq_fast.PackedRows` ``[n_visits]``: ``h_t`` is the
probability of the event at time t of those who are without it so far. After a patient's last visit
nothing is known: survival stays where it is. Sums of logarithms (``log1p``) keep the digits of
small hazards; a hazard of 1 ends it, and nothing is clamped.

Everything is differentiable where it is smooth, and computed in float32 for 16 bits. ``times`` are
the times of the visits' indices 0, 1, ...: by default these themselves; the ends of intervals where
hazards are of intervals. Before the first time everybody is without the event.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arrays import expect_tensor, integer
from .autograd import values_are_hidden
from .backend import validate_on_device
from .checks import accumulator, expect_floating
from .rows import PackedRows

# How far above 1 rounding may take a sum of hazards.
_SLACK = 1e-5


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
        return _packed(survival, hazards, sequence_mask, 1)
    return _survival(_read(hazards, sequence_mask, 2))


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
        return _packed(cumulative_hazard, hazards, sequence_mask, 1)
    return -torch.log1p(-_read(hazards, sequence_mask, 2)).cumsum(1)


def hazards_from_pmf(logits: Tensor | PackedRows, sequence_mask: Tensor | None = None) -> Any:
    """The hazards of a probability mass over time, ``h_t = p_t / Σ_{u≥t} p_u`` with
    ``p = softmax(x_0, ..., x_{V-1}, 0)``, the last class being "beyond": what models trained with
    :func:`~ehrseq_fast.pmf_nll` predict, as the other functions of this module take it.

    Args:
        logits: ``[B, V]``, or with K causes ``[B, V, K]``; or packed rows of either.
        sequence_mask: ``[B, V]``, non-zero at real visits; padding is never read.

    Returns:
        The shape of ``logits``; 0 on padding. Those of K causes are cause-specific and sum to at
        most 1 at a visit. A logit above all later ones by more than the dtype can tell has the
        hazard 1.

    Raises:
        ValueError: for shapes that do not fit.
        TypeError: for anything but floating-point tensors and packed rows.

    Example:
        >>> import torch
        >>> from ehrseq_fast.predictions import hazards_from_pmf, survival
        >>> hazards_from_pmf(torch.zeros(1, 3))  # 1/4 at each of three visits, and beyond
        tensor([[0.2500, 0.3333, 0.5000]])
        >>> survival(hazards_from_pmf(torch.zeros(1, 3)))
        tensor([[0.7500, 0.5000, 0.2500]])
    """
    if isinstance(logits, PackedRows):
        _refuse_mask(sequence_mask)
        batch = logits.batch
        real = torch.ones(batch.n_visits, dtype=torch.bool, device=logits.values.device)
        padded = hazards_from_pmf(logits.to_padded(), batch.pad(real))
        return PackedRows(batch.pack(padded), batch)
    expect_floating("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits: expected [B, V] or [B, V, K], got shape {list(logits.shape)}")
    x = logits.to(accumulator(logits.dtype))
    if sequence_mask is not None:
        padding = _padding(sequence_mask, x)
        x = x.masked_fill(padding.unsqueeze(2) if x.dim() == 3 else padding, -torch.inf)
    each = x.logsumexp(2) if x.dim() == 3 else x
    beyond = each.new_zeros(len(each), 1)
    later = torch.cat([each, beyond], 1).flip(1).logcumsumexp(1).flip(1)[:, :-1]
    return (x - (later.unsqueeze(2) if x.dim() == 3 else later)).exp()


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
    padded = _padded(hazards, sequence_mask)
    start = integer("start", start, 0, max(padded.shape[1] - 1, 0))
    ends = [integer("horizons", horizon, 1, 2**31) for horizon in horizons]
    later = padded[:, start:]
    columns = [min(end, later.shape[1]) - 1 for end in ends]
    over = later >= 1
    logs = torch.log1p(-torch.where(over, 0.0, later)).cumsum(1)
    risks = torch.where(over.cumsum(1) > 0, 1.0, -torch.expm1(logs))  # small ones keep their digits
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
    padded = _padded(hazards, sequence_mask)
    grid, curve = _curve(padded, times)
    last = float(grid[-1])
    end = last if horizon is None else float(horizon)
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
    reached.

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
    grid, curve = _curve(_padded(hazards, sequence_mask), times)
    below = curve <= 0.5
    reached = below.any(1)
    at = below.to(torch.int8).argmax(1).clamp(min=1)  # the curve begins at 1
    found = grid[at]
    if interpolate:
        high = curve.gather(1, at[:, None] - 1).squeeze(1)
        low = curve.gather(1, at[:, None]).squeeze(1)
        drop = torch.where(reached, high - low, 1.0)
        found = grid[at - 1] + (grid[at] - grid[at - 1]) * (high - 0.5) / drop
    return torch.where(reached, found, torch.inf)


def survival_frame(
    hazards: Tensor | PackedRows,
    sequence_mask: Tensor | None = None,
    *,
    times: Tensor | None = None,
    interpolate: int = 1,
) -> Any:
    """Survival as a pandas data frame: a row for each time, a column for each patient, as pycox's
    ``predict_surv_df`` gives it.

    Args:
        times: ``[V]``, as in :func:`restricted_mean`; the index.
        interpolate: rows for each interval between times; above 1 survival is linear within.

    Raises:
        ImportError: where pandas is not installed.

    Example:
        >>> import torch
        >>> from ehrseq_fast.predictions import survival_frame
        >>> survival_frame(torch.tensor([[0.5, 0.5], [0.25, 0.0]]), interpolate=2)
                 0     1
        0.0  0.500  0.75
        0.5  0.375  0.75
        1.0  0.250  0.75
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "survival_frame makes a pandas.DataFrame, and pandas is not installed: "
            "pip install ehrseq_fast[metrics]"
        ) from error
    parts = integer("interpolate", interpolate, 1, 10**6)
    padded = _padded(hazards, sequence_mask).detach().cpu()
    curve, grid = _survival(padded), _times(padded, times).cpu()
    if parts > 1:
        share = torch.arange(parts, device="cpu") / parts
        grid, curve = (_between(values, share) for values in (grid, curve))
    return pandas.DataFrame(curve.T.numpy(), index=grid.numpy())


def cumulative_incidence(hazards: Tensor | PackedRows, sequence_mask: Tensor | None = None) -> Any:
    """The probability of each of K competing events by each visit:
    ``F_k(t) = Σ_{u≤t} S(u−1) h_k(u)`` with ``S(u) = Π_{v≤u} (1 − Σ_k h_k(v))``.

    The K incidences and survival sum to 1 at every visit. Over padding they stay at the value of
    the last real visit. Source: Tutz and Schmid, Modeling Discrete Time-to-Event Data (2016),
    chapter 8.

    Args:
        hazards: ``[B, V, K]`` cause-specific hazards in [0, 1] that sum to at most 1 at a visit, as
            those of ``competing_risks_nll(link="softmax")``; independent sigmoids may not. Or
            :class:`~ehrseq_fast.PackedRows` ``[n_visits, K]``.
        sequence_mask: ``[B, V]``, non-zero at real visits. Without it padding must hold zeros.

    Returns:
        ``[B, V, K]``, in float32 for 16 bits; :class:`~ehrseq_fast.PackedRows` for packed rows.
        Differentiable.

    Raises:
        ValueError: for shapes that do not fit, and hazards outside [0, 1] or with a sum above 1,
            with the first patient (on a GPU with ``EHRSEQ_FAST_VALIDATE=1``).
        TypeError: for anything but floating-point tensors and packed rows.

    Example:
        >>> import torch
        >>> from ehrseq_fast.metrics import cumulative_incidence
        >>> cumulative_incidence(torch.tensor([[[0.1, 0.2], [0.5, 0.0]]]))
        tensor([[[0.1000, 0.2000],
                 [0.4500, 0.2000]]])
    """
    if isinstance(hazards, PackedRows):
        return _packed(cumulative_incidence, hazards, sequence_mask, 2)
    hazards = _read(hazards, sequence_mask, 3)
    curve = _survival(hazards.sum(2))
    before = torch.cat([torch.ones_like(curve[:, :1]), curve[:, :-1]], 1)[:, : curve.shape[1]]
    return (before.unsqueeze(2) * hazards).cumsum(1)


def _between(values: Tensor, share: Tensor) -> Tensor:
    """Values ``[..., V]`` and what lies between them, linearly."""
    inner = values[..., :-1, None] + values.diff()[..., None] * share
    return torch.cat([inner.flatten(-2), values[..., -1:]], -1)


def _survival(hazards: Tensor) -> Tensor:
    """A hazard of 1 apart from the logarithms, where it would be infinite."""
    over = hazards >= 1
    curve = torch.log1p(-torch.where(over, 0.0, hazards)).cumsum(1).exp()
    return torch.where(over.cumsum(1) > 0, 0.0, curve)


def _curve(hazards: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor]:
    """The times and survival at them, with 1 at 0 before."""
    grid = torch.cat([hazards.new_zeros(1), _times(hazards, times)])
    curve = _survival(hazards)
    return grid, torch.cat([torch.ones_like(curve[:, :1]), curve], 1)


def _times(hazards: Tensor, times: Tensor | None) -> Tensor:
    slots = hazards.shape[1]
    if not slots:
        raise ValueError("hazards: expected at least one time, got none")
    if times is None:
        return torch.arange(slots, dtype=hazards.dtype, device=hazards.device)
    times = torch.as_tensor(times, dtype=hazards.dtype, device=hazards.device)
    if times.shape != (slots,):
        raise ValueError(f"times: expected [V] = [{slots}], got {list(times.shape)}")
    if not bool((times[0] >= 0) & (times.diff() > 0).all()):
        raise ValueError(f"times: expected ascending from 0 or above, got {times.tolist()[:8]}")
    return times


def _padded(hazards: Tensor | PackedRows, sequence_mask: Tensor | None) -> Tensor:
    if isinstance(hazards, PackedRows):
        _refuse_mask(sequence_mask)
        if hazards.values.dim() != 1:
            raise ValueError(
                f"hazards: expected PackedRows [n_visits], got {list(hazards.values.shape)}"
            )
        hazards = hazards.to_padded()
    return _read(hazards, sequence_mask, 2)


def _packed(function: Any, rows: PackedRows, mask: Tensor | None, dims: int) -> PackedRows:
    _refuse_mask(mask)
    if rows.values.dim() != dims:
        expected = "[n_visits]" if dims == 1 else "[n_visits, K]"
        raise ValueError(f"hazards: expected PackedRows {expected}, got {list(rows.values.shape)}")
    return PackedRows(rows.batch.pack(function(rows.to_padded())), rows.batch)


def _refuse_mask(sequence_mask: Tensor | None) -> None:
    if sequence_mask is not None:
        raise ValueError("sequence_mask: expected None, as hazards are PackedRows, got a mask")


def _read(hazards: Tensor, sequence_mask: Tensor | None, dims: int) -> Tensor:
    """Checked, widened, and 0 on padding."""
    expect_floating("hazards", hazards)
    if hazards.dim() != dims:
        expected = "[B, V]" if dims == 2 else "[B, V, K]"
        raise ValueError(f"hazards: expected {expected}, got shape {list(hazards.shape)}")
    hazards = hazards.to(accumulator(hazards.dtype))
    if sequence_mask is not None:
        padding = _padding(sequence_mask, hazards)
        hazards = hazards.masked_fill(padding.unsqueeze(2) if dims == 3 else padding, 0.0)
    _check(hazards)
    return hazards


def _padding(sequence_mask: Tensor, values: Tensor) -> Tensor:
    expect_tensor("sequence_mask", sequence_mask)
    if sequence_mask.shape != values.shape[:2]:
        raise ValueError(
            f"sequence_mask: expected [B, V] = {list(values.shape[:2])}, got "
            f"{list(sequence_mask.shape)}"
        )
    return sequence_mask == 0


def _check(hazards: Tensor) -> None:
    if torch.compiler.is_compiling() or values_are_hidden(hazards):
        return
    if hazards.device.type != "cpu" and not validate_on_device():
        return
    wrong = (hazards < 0) | (hazards > 1)
    expected = "hazards in [0, 1]"
    if hazards.dim() == 3:
        wrong = wrong.any(2) | (hazards.sum(2) > 1 + _SLACK)
        expected = "K hazards in [0, 1] with a sum of at most 1 at each visit"
    if bool(wrong.any()):
        patient, visit = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"hazards: expected {expected}, got {hazards[patient, visit].tolist()} (patient "
            f"{patient}, visit {visit}; {int(wrong.sum())} visits in all)"
        )


__all__ = [
    "cumulative_hazard",
    "cumulative_incidence",
    "hazards_from_pmf",
    "median_time",
    "restricted_mean",
    "risk_within",
    "survival",
    "survival_frame",
]
