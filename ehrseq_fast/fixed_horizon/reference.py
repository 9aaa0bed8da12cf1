"""The definition of the losses of a horizon, in plain PyTorch.

Differentiable by autograd; 16 bits are computed in float32. Inputs are taken as they are: ``op.py``
checks them. Logits of visits that are left out are replaced before anything is computed of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import varies
from ..checks import accumulator
from ..visitwise import Visits


def labels(
    like: Tensor,
    event_times: Tensor,
    event_indicators: Tensor,
    visits: Visits,
    visit_times: Tensor | None,
    horizon: float,
) -> tuple[Tensor, Tensor]:
    """Of visits at times s, of patients with the event or censoring at T: whether s < T ≤ s + w
    with the event, and whether that is known: s < T, and the event or T ≥ s + w. Both of the shape
    of ``like``."""
    now = (visits.times(like) if visit_times is None else visit_times).double()
    end = now + horizon
    event = visits.of_patients(event_times.double(), like)
    seen = visits.of_patients(event_indicators != 0, like)
    known = visits.real(like) & (now < event) & (seen | (event >= end))
    return known & seen & (event <= end), known


def fixed_horizon_bce(
    logits: Tensor,
    event_times: Tensor,
    event_indicators: Tensor,
    visits: Visits,
    visit_times: Tensor | None,
    horizon: float,
    *,
    pos_weight: float = 1.0,
    visit_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ w_n BCE(x_n, y_n) over visits whose label is known, divided by Σ w_n for the mean; 0 where
    that is 0."""
    dtype = accumulator(logits.dtype)
    within, known = labels(logits, event_times, event_indicators, visits, visit_times, horizon)
    weight = known.to(dtype)
    if visit_weight is not None:
        weight = torch.where(known, visit_weight.to(dtype), 0)
    if sample_weight is not None:
        of_patients = visits.of_patients(sample_weight.to(dtype), logits)
        weight = torch.where(known, weight * of_patients, 0)
    x = torch.where(known, logits.to(dtype), 0)
    terms = weight * F.binary_cross_entropy_with_logits(x, within.to(dtype), reduction="none")
    if pos_weight != 1:
        terms = terms * torch.where(within, pos_weight, 1.0)
    terms = torch.where(known, terms, 0)
    if reduction == "none":
        return terms
    if reduction == "sum":
        return terms.sum()
    total = weight.sum()
    return terms.sum() * torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1, total))


def masked_bce(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Σ w BCE(x, y) / max(Σ w, 1); what has the weight 0 is left out. All of one shape."""
    dtype = accumulator(logits.dtype)
    counts = weights != 0
    if varies(weights):  # of which one that is 0 has a derivative, where there is a term
        counts = counts | (logits.isfinite() & (targets >= 0) & (targets <= 1))
    terms = F.binary_cross_entropy_with_logits(
        logits.to(dtype).masked_fill(~counts, 0.0),
        targets.to(dtype).masked_fill(~counts, 0.0),
        reduction="none",
    )
    terms = torch.where(counts, terms, 0)
    weight = weights.to(dtype)
    return (terms * weight).sum() / weight.sum().clamp(min=1)
