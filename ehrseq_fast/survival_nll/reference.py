"""The survival losses as formulas: the definition that every kernel is held to.

Plain PyTorch, differentiable by autograd, on any device and in any floating dtype (16 bits are
computed in float32). Inputs are taken as they are: ``op.py`` checks them.

Slots that are not at risk (after the event time, before the entry time, padding) are replaced
*before* any logarithm, so that a NaN there reaches neither the loss nor a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..checks import accumulator
from .options import DEFAULTS, Options


def discrete_time_survival_nll(
    hazards: Tensor,
    event_times: Tensor,
    event_indicators: Tensor,
    sequence_mask: Tensor | None = None,
    options: Options = DEFAULTS,
    *,
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    visit_weight: Tensor | None = None,
) -> Tensor:
    """-Σ_{entry ≤ t < T} log(1-h_t) - δ log h_T - (1-δ) c log(1-h_T), c = 1 for "included"."""
    survived, at_time = visits_at_risk(hazards, event_times, entry_times, sequence_mask)
    event = at_time & (event_indicators != 0)[:, None]
    if options.censored_visit == "included":
        survived = survived | (at_time & ~event)
    terms = _bernoulli_nll(hazards, event, survived, options)
    nll = summed(terms, event | survived, visit_weight)
    return reduced(nll, sample_weight, options.reduction)


def competing_risks_nll(
    hazards: Tensor,
    event_times: Tensor,
    event_types: Tensor,
    sequence_mask: Tensor | None = None,
    options: Options = DEFAULTS,
    *,
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    visit_weight: Tensor | None = None,
) -> Tensor:
    """Sigmoid: the sum over causes of the loss above, every other cause's event being censoring.

    Softmax: -Σ_{entry ≤ t < T} log p_t0 - [type > 0] log p_T,type - [type = 0] c log p_T0.
    """
    survived, at_time = visits_at_risk(hazards, event_times, entry_times, sequence_mask)
    survived, at_time = survived[..., None], at_time[..., None]
    types = event_types[:, None, None]
    classes = torch.arange(hazards.shape[2], device=hazards.device)
    if options.link == "softmax":
        event = at_time & (types > 0) & (classes == types)
        if options.censored_visit == "included":
            survived = survived | (at_time & (types == 0))
        nothing = survived & (classes == 0)
        at_risk = (survived | event).any(2, keepdim=True)
        wide = hazards.to(accumulator(hazards.dtype))
        log_p = torch.where(at_risk, wide, 0.0).log_softmax(2)
        read = event | nothing
        terms = -torch.where(read, log_p, 0.0)
    else:
        event = at_time & (classes + 1 == types)
        survived = survived.expand_as(event)
        if options.censored_visit == "included":
            survived = survived | (at_time & ~event)
        terms = _bernoulli_nll(hazards, event, survived, options)
        read = event | survived
    nll = summed(terms, read, visit_weight)
    return reduced(nll, sample_weight, options.reduction)


def visits_at_risk(
    hazards: Tensor, event_times: Tensor, entry_times: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The visits [B, V] that were at risk before the event time, and the one at that time."""
    visit = torch.arange(hazards.shape[1], device=hazards.device)
    survived, at_time = visit < event_times[:, None], visit == event_times[:, None]
    if entry_times is not None:
        survived = survived & (visit >= entry_times[:, None])
    if mask is not None:
        survived, at_time = survived & (mask != 0), at_time & (mask != 0)
    return survived, at_time


def _bernoulli_nll(hazards: Tensor, event: Tensor, survived: Tensor, options: Options) -> Tensor:
    """-log h where the event was, -log(1-h) where it was survived, 0 elsewhere."""
    from_logits, eps = options.link != "probabilities", options.eps
    wide = hazards.to(accumulator(hazards.dtype))
    h = torch.where(event | survived, wide, 0.0 if from_logits else 0.5)
    if options.link == "cloglog":
        lasting = torch.where(survived & ~event, h, 0.0).exp()
        nll = torch.where(survived & ~event, lasting, 0.0)
        return torch.where(event, _cloglog_event(torch.where(event, h, 0.0)), nll)
    if from_logits:
        return torch.where(event | survived, -logsigmoid(torch.where(event, h, -h)), 0.0)
    clamped = h.clamp(eps, 1 - eps)
    # Where 1 - eps is rounded to 1 (and eps to 0), clamp lets these pass.
    passed = ((h <= 0) | (h >= 1)) if eps > 0 and rounds_to_one(1 - eps, h.dtype) else None
    if passed is not None:
        clamped = torch.where(passed, 0.5, clamped)
    # Each logarithm sees its own values alone: elsewhere its derivative may be infinite, and
    # infinity times 0 is NaN.
    nll = torch.where(
        event,
        -torch.where(event, clamped, 1.0).log(),
        -torch.log1p(-torch.where(survived & ~event, clamped, 0.0)),
    )
    if passed is not None:
        impossible = torch.where(event, h <= 0, h >= 1)
        nll = torch.where(impossible, -math.log(eps), torch.where(passed, eps, nll))
    return nll


def _cloglog_event(x: Tensor) -> Tensor:
    """-log(1 - exp(-m)) with m = e^x; each form sees its own values alone, as above."""
    positive = x > 0
    m = torch.where(positive, x.clamp(max=7), 1.0).exp()  # e^-e^7 is 0
    of_positive = -torch.log1p(-(-m).exp())
    low = torch.where(positive, -1.0, x)
    m = low.exp()
    tiny = m < 0.01  # where 1 - e^-m loses digits: a series of the logarithm of (1 - e^-m) / m
    large = torch.where(tiny, 1.0, m)
    ratio = (-torch.expm1(-large) / large).log()
    ratio = torch.where(tiny, m * (-0.5 + m * (1 / 24 - m * m / 2880)), ratio)
    return torch.where(positive, of_positive, -low - ratio)


def rounds_to_one(value: float, dtype: torch.dtype) -> bool:
    """Whether a probability below 1 is 1 in this dtype."""
    return value >= 1 - torch.finfo(dtype).eps / 4


def summed(terms: Tensor, read: Tensor, visit_weight: Tensor | None) -> Tensor:
    """The sum of each patient's terms ``[B, V]`` or ``[B, V, K]``, weighted by visits where they
    are ``read``, of the same shape: an infinity times a term that is none would be NaN."""
    dims = tuple(range(1, terms.dim()))
    if visit_weight is None:
        return terms.sum(dims)
    of_values = visit_weight.view(*visit_weight.shape, *(1,) * (terms.dim() - 2))
    return (terms * torch.where(read, of_values.to(terms.dtype), 0.0)).sum(dims)


def reduced(nll: Tensor, sample_weight: Tensor | None, reduction: str) -> Tensor:
    if sample_weight is not None:
        nll = nll * sample_weight.to(nll.dtype)
    if reduction == "none":
        return nll
    return nll.mean() if reduction == "mean" else nll.sum()
