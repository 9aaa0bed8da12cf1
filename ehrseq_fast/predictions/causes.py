"""Competing events: cumulative incidences, and hazards of what models predict in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import accumulator, expect_floating
from ..rows import PackedRows
from .curves import survival_of
from .reading import SLACK, of_rows, padding_of, read, readable, refuse_mask


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
        return of_rows(cumulative_incidence, hazards, sequence_mask, 2)
    hazards = read(hazards, sequence_mask, 3)
    curve = survival_of(hazards.sum(2))
    before = torch.cat([torch.ones_like(curve[:, :1]), curve[:, :-1]], 1)[:, : curve.shape[1]]
    return (before.unsqueeze(2) * hazards).cumsum(1)


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
        refuse_mask(sequence_mask)
        batch = logits.batch
        real = torch.ones(batch.n_visits, dtype=torch.bool, device=logits.values.device)
        padded = hazards_from_pmf(logits.to_padded(), batch.pad(real))
        return PackedRows(batch.pack(padded), batch)
    expect_floating("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits: expected [B, V] or [B, V, K], got shape {list(logits.shape)}")
    x = logits.to(accumulator(logits.dtype))
    padding = None
    if sequence_mask is not None:
        padding = padding_of(sequence_mask, x)
        padding = padding.unsqueeze(2) if x.dim() == 3 else padding
        x = x.masked_fill(padding, -torch.inf)
    each = x.logsumexp(2) if x.dim() == 3 else x
    beyond = each.new_zeros(len(each), 1)
    later = torch.cat([each, beyond], 1).flip(1).logcumsumexp(1).flip(1)[:, :-1]
    hazards = (x - (later.unsqueeze(2) if x.dim() == 3 else later)).exp()
    # 0 already; its second derivatives are NaN without
    return hazards if padding is None else hazards.masked_fill(padding, 0)


def hazards_from_incidence(incidences: Tensor) -> Tensor:
    """Cause-specific hazards of cumulative incidences, ``h_k(t) = (F_k(t) − F_k(t−1)) / S(t−1)``
    with ``S(t) = 1 − Σ_k F_k(t)``: the inverse of :func:`cumulative_incidence`, for models that
    predict whole curves. 0 where survival is 0.

    Args:
        incidences: ``[B, V, K]``, not falling over V, with a sum over K of at most 1.

    Returns:
        ``[B, V, K]``, in float32 for 16 bits. Small hazards have the digits that differences of the
        incidences have.

    Raises:
        ValueError: for another shape, incidences that fall, are outside [0, 1] or sum above 1, with
            the first patient.
        TypeError: for anything but floating-point tensors.

    Example:
        >>> import torch
        >>> from ehrseq_fast.predictions import hazards_from_incidence
        >>> hazards_from_incidence(torch.tensor([[[0.1, 0.2], [0.45, 0.2]]]))
        tensor([[[0.1000, 0.2000],
                 [0.5000, 0.0000]]])
    """
    values = read(incidences, None, 3, "incidences")
    steps = torch.cat([values[:, :1], values.diff(dim=1)], 1)[:, : values.shape[1]]
    if readable(values) and bool((steps < -SLACK).any()):
        patient, visit, cause = (steps < -SLACK).nonzero()[0].tolist()
        raise ValueError(
            "incidences: expected those that do not fall, got "
            f"{values[patient, visit - 1, cause]:g} and then {values[patient, visit, cause]:g} "
            f"(patient {patient}, visit {visit}, cause {cause + 1})"
        )
    left = 1 - torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], 1).sum(2, keepdim=True)
    alive = ~(left <= 0)  # a NaN shows
    return torch.where(alive, steps.clamp(min=0) / torch.where(alive, left, 1.0), 0.0).clamp(max=1)
