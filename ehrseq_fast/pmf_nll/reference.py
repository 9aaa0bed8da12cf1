"""The losses of a probability mass over time as a formula: the definition of the kernels.

Plain PyTorch, differentiable by autograd; 16 bits are computed in float32. Inputs are taken as they
are: ``op.py`` checks them. Classes that are not at risk are replaced before any exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..checks import accumulator


def pmf_nll(
    logits: Tensor,
    event_times: Tensor,
    event_types: Tensor,
    sequence_mask: Tensor | None = None,
    *,
    censored_visit: str = "included",
    reduction: str = "mean",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """-log(Σ_{outcome} e^x / Σ_{at risk} e^x) = softplus(lse(others) - lse(outcome)), the class
    "beyond" having x = 0. ``logits`` are ``[B, V]`` or ``[B, V, K]``."""
    x = logits.to(accumulator(logits.dtype))
    x = x if x.dim() == 3 else x.unsqueeze(2)
    visit = torch.arange(x.shape[1], device=x.device)[:, None]
    cause = torch.arange(1, x.shape[2] + 1, device=x.device)
    times, types = event_times[:, None, None], event_types[:, None, None]
    at_risk = torch.ones_like(x, dtype=torch.bool)
    if sequence_mask is not None:
        at_risk = at_risk & (sequence_mask != 0)[:, :, None]
    if entry_times is not None:
        at_risk = at_risk & (visit >= entry_times[:, None, None])
    later = visit > times if censored_visit == "included" else visit >= times
    is_event = types != 0
    kind = types if logits.dim() == 3 else is_event.long()  # any indicator but 0 is the event
    outcome = at_risk & torch.where(is_event, (visit == times) & (cause == kind), later)
    others = at_risk & ~outcome
    # nothing but the outcome can be: visits of -inf have no derivative then
    certain = ~((others & (x != -torch.inf)).flatten(1).any(1) | (event_types != 0))
    others = others & ~certain[:, None, None]

    # "beyond" is the outcome of a censoring, and among the others of an event
    beyond = (event_types == 0)[:, None]
    chosen, rest = _log_sum(x, outcome, beyond), _log_sum(x, others, ~beyond)
    apart = torch.where(certain, chosen - chosen, rest - chosen)
    nll = torch.where(certain, apart, -logsigmoid(-apart))
    if sample_weight is not None:
        nll = nll * sample_weight.to(nll.dtype)
    if reduction == "none":
        return nll
    return nll.mean() if reduction == "mean" else nll.sum()


def _log_sum(x: Tensor, which: Tensor, beyond: Tensor) -> Tensor:
    """The log-sum-exp of some classes of each patient, and of "beyond"; of none it is 0."""
    none = ~(which.flatten(1).any(1, keepdim=True) | beyond)
    values = torch.where(which, x, -torch.inf).flatten(1)
    last = torch.where(beyond | none, 0.0, -torch.inf).to(x.dtype)
    total = torch.cat([values, last], 1).logsumexp(1)
    # NaN, derivatives too, as a softmax of an infinite logit
    return total * torch.where(total == torch.inf, torch.nan, 1.0)
