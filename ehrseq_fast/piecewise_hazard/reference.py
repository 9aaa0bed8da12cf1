"""The loss of rates that are constant within intervals as a formula, in plain PyTorch; as
``survival_nll/reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..autograd import varies
from ..checks import accumulator
from ..survival_nll.reference import reduced, summed, visits_at_risk


def piecewise_hazard_nll(
    logits: Tensor,
    event_times: Tensor,
    event_indicators: Tensor,
    fraction: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    *,
    link: str = "softplus",
    reduction: str = "mean",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    visit_weight: Tensor | None = None,
) -> Tensor:
    """Σ_{entry ≤ t < T} Λ_t + f Λ_T - δ log Λ_T with Λ = log(1 + e^x), or e^x for "exp"."""
    survived, at_time = visits_at_risk(logits, event_times, entry_times, sequence_mask)
    wide = logits.to(accumulator(logits.dtype))
    seen = torch.ones_like(wide[:, 0]) if fraction is None else fraction.to(wide.dtype)
    share = torch.where(survived, 1.0, torch.where(at_time, seen[:, None], 0.0))
    read = share != 0
    if fraction is not None and varies(fraction):
        # of which one that is 0 has a derivative; the loss is the same as without
        finite = _integral(wide.detach(), link).isfinite()
        if visit_weight is not None:
            finite = finite & visit_weight.detach().isfinite()
        read = read | (at_time & finite)
    integral = _integral(torch.where(read, wide, 0.0), link)
    nll = summed(torch.where(read, integral, 0.0) * share, read, visit_weight)
    event = at_time & (event_indicators != 0)[:, None]
    x = torch.where(event, wide, 0.0)
    log = log_softplus(x) if link == "softplus" else x
    nll = nll - summed(torch.where(event, log, 0.0), event, visit_weight)
    return reduced(nll, sample_weight, reduction)


def _integral(x: Tensor, link: str) -> Tensor:
    return -logsigmoid(-x) if link == "softplus" else x.exp()


def log_softplus(z: Tensor) -> Tensor:
    """log(softplus(z)), where softplus(z) itself would be 0: there log(e^z − e^2z/2) = z − e^z/2.
    Each form sees its own values alone, as the other's derivative may be infinite there."""
    small = z < -20
    low = torch.where(small, z, -20.0)
    rest = torch.where(small, 0.0, z)
    return torch.where(small, low - low.exp() / 2, (-logsigmoid(-rest)).log())
