"""DeepHit's ranking loss as a formula: the definition of the kernels.

Plain PyTorch, differentiable by autograd, in time and memory of a few passes over the logits; 16
bits are computed in float32. Inputs are taken as they are: ``op.py`` checks them. The same bits for
any number of threads, which torch's own softmax gradient and indexing do not give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import varies
from ..checks import accumulator

_ROWS = 64  # summed at once


def deephit_ranking(
    logits: Tensor,
    event_times: Tensor,
    event_types: Tensor,
    sequence_mask: Tensor | None = None,
    *,
    sigma: float = 0.1,
    censored_visit: str = "included",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """All pairs by one sum over the patients at risk and one over the events of each time, since
    the exponential of a difference is a product. ``logits`` are ``[B, V]`` or ``[B, V, K]``."""
    x = logits.to(accumulator(logits.dtype))
    x = x if x.dim() == 3 else x.unsqueeze(2)
    patients, slots, causes = x.shape
    times, types = event_times.long(), event_types
    visit = torch.arange(slots, device=x.device)
    at_risk = visit >= 0 if entry_times is None else visit >= entry_times[:, None]
    at_risk = at_risk if sequence_mask is None else at_risk & (sequence_mask != 0)
    x = torch.where(at_risk.expand(patients, slots)[:, :, None], x, -torch.inf)
    every = torch.cat([x.flatten(1), x.new_zeros(patients, 1)], 1)
    every = (every - every.detach().amax(1, keepdim=True)).exp()
    every = every[:, :-1] / every.sum(1, keepdim=True)
    incidence = every.unflatten(1, (slots, causes)).cumsum(1) / sigma

    # who was still without the event after each time
    event = types != 0
    later = visit < times[:, None]
    if censored_visit == "included":
        later = later | ((visit == times[:, None]) & ~event[:, None])
    later = (later & at_risk)[:, :, None]
    exponents = torch.where(later, incidence, -torch.inf)
    if not patients:
        return exponents.sum() / 0
    weights = None if sample_weight is None else sample_weight.to(x.dtype)[:, None, None]
    # A patient of weight 0 must not be the largest, beside whom all others vanish; nor one of NaN,
    # which would be every pair's.
    counts = None if weights is None or varies(weights) else weights != 0
    given = exponents.detach()
    given = torch.where(given.isnan() if counts is None else given.isnan() | ~counts, 0.0, given)
    largest = given.amax(0).clamp(min=0)  # no exponent is below 0

    # the events at each time; masks in place of indices, whose gradients are sums in any order
    kind = torch.arange(1, causes + 1, device=x.device)
    is_own = event[:, None] if logits.dim() == 2 else types[:, None] == kind
    is_own = (visit == times[:, None])[:, :, None] & is_own[:, None, :]
    of_later = exponents - largest
    of_events = torch.where(is_own, largest - incidence, -torch.inf)
    if counts is not None:
        nothing = incidence * 0  # or NaN
        of_later = torch.where(counts, of_later, nothing)
        of_events = torch.where(counts, of_events, nothing)
    of_later, of_events = of_later.exp(), of_events.exp()
    if weights is not None:
        of_later = torch.where(later, of_later * weights, 0.0)
        of_events = torch.where(is_own, of_events * weights, 0.0)
    return (_sum(of_later) * _sum(of_events)).sum() / patients**2


def _sum(values: Tensor) -> Tensor:
    """The sum over patients in an order that does not depend on the number of threads."""
    while len(values) > 1:
        width = min(len(values), _ROWS)
        missing = values.new_zeros(-len(values) % width, *values.shape[1:])
        values = torch.cat([values, missing]).unflatten(0, (-1, width)).sum(1)
    return values.sum(0)
