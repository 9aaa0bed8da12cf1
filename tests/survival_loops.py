"""The survival losses and their gradients written out as plain loops in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def loss_and_gradient(
    hazards: Tensor,
    times: list[int],
    types: list[int],
    lengths: list[int],
    entries: list[int],
    weights: list[float],
    way: str,
    grad_nll: Tensor,
    reduction: str,
    *,
    censored_visit: str = "excluded",
    eps: float = 1e-7,
) -> tuple[Tensor, Tensor]:
    """Of padded hazards ``[B, V]`` or ``[B, V, K]``, taken for the numbers that they are."""
    values = hazards.detach().double()
    values = values[..., None] if values.dim() == 2 else values
    share = 1 / len(times) if reduction == "mean" else 1.0
    nlls, grad = [], torch.zeros_like(values)
    for i, (time, kind, entry, weight) in enumerate(
        zip(times, types, entries, weights, strict=True)
    ):
        incoming = float(grad_nll[i] if grad_nll.dim() else grad_nll)
        total = 0.0
        for visit in range(entry, min(time + 1, lengths[i])):
            counts = visit < time or kind > 0 or censored_visit == "included"
            terms = _visit(
                values[i, visit].tolist(),
                kind if visit == time else 0,
                way,
                visit < time or censored_visit == "included",
                counts,
                eps,
                hazards.dtype,
            )
            for c, (nll, slope) in enumerate(terms):
                total += nll
                grad[i, visit, c] = slope * weight * share * incoming if slope is not None else 0.0
        nlls.append(total * weight)
    nll = torch.tensor(nlls, dtype=torch.float64)
    if reduction != "none":
        nll = nll.sum() * share
    return nll, grad.reshape(hazards.shape)


def _visit(
    x: list[float],
    kind: int,
    way: str,
    survived: bool,
    counts: bool,
    eps: float,
    dtype: torch.dtype,
) -> list[tuple[float, float | None]]:
    """The loss and slope of each value of a visit; a slope of None where it has none."""
    if way == "softmax":
        if not counts:
            return [(0.0, None)] * len(x)
        highest = max(x)
        total = sum(math.exp(v - highest) for v in x)
        nll = math.log(total) + highest - x[kind]
        return [
            (nll if c == kind else 0.0, math.exp(v - highest) / total - (c == kind))
            for c, v in enumerate(x)
        ]
    terms: list[tuple[float, float | None]] = []
    for c, v in enumerate(x):
        event = c + 1 == kind
        if not event and not survived:
            terms.append((0.0, None))
        elif way == "sigmoid":
            decay = math.exp(-abs(v))
            against = -v if event else v
            slope = (1.0 if against > 0 else decay) / (1 + decay)
            terms.append((max(against, 0.0) + math.log1p(decay), -slope if event else slope))
        else:
            terms.append(_of_probability(v, event, eps, dtype))
    return terms


def _of_probability(
    h: float, event: bool, eps: float, dtype: torch.dtype
) -> tuple[float, float | None]:
    """Hazards are clamped to bounds of their own dtype, and to eps where 1 - eps is 1 there."""
    lowest, highest = torch.tensor([eps, 1 - eps], dtype=dtype).tolist()
    rounds = eps > 0 and highest == 1
    if h < lowest or (rounds and h <= 0):
        return _minus_log(eps if rounds else lowest) if event else -math.log1p(-lowest), None
    if h > highest or (rounds and h >= 1):
        if event:
            return -math.log(highest), None
        return (-math.log(eps) if rounds else _minus_log(1 - highest)), None
    if event:
        return _minus_log(h), -1 / h if h else -math.inf
    return -math.log1p(-h) if h < 1 else math.inf, 1 / (1 - h) if h < 1 else math.inf


def _minus_log(p: float) -> float:
    return -math.log(p) if p > 0 else math.inf
