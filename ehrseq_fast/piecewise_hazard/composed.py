"""The loss where its kernel does not run, on a GPU: the sum over the intervals before T by the
survival losses' kernels, and interval T by PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..rows import PackedRows
from ..survival_nll import discrete_time_survival_nll
from ..survival_nll.reference import reduced
from .reference import log_softplus

# the link whose loss of a survived visit is Λ
_LINKS = {"softplus": "sigmoid", "exp": "cloglog"}


def piecewise_hazard_nll(
    logits: Tensor | PackedRows,
    times: Tensor,
    indicators: Tensor,
    sequence_mask: Tensor | None,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    fraction: Tensor | None,
    *,
    link: str,
    reduction: str,
) -> Tensor:
    """Of inputs that have been checked."""
    # a censoring at T, of which interval T says nothing
    nll = discrete_time_survival_nll(
        logits,
        times,
        torch.zeros_like(times, dtype=torch.bool),
        sequence_mask,
        from_logits=True,
        link=_LINKS[link],
        entry_times=entry_times,
        reduction="none",
    )
    event = indicators != 0
    seen = torch.ones_like(nll) if fraction is None else fraction.to(nll.dtype)
    partly = seen != 0  # a NaN is to reach the loss
    last = torch.where(event | partly, _at(logits, times), 0.0).to(nll.dtype)
    integral = -logsigmoid(-last) if link == "softplus" else torch.where(partly, last, 0.0).exp()
    nll = nll + torch.where(partly, seen * integral, 0.0)
    nll = nll - torch.where(event, log_softplus(last) if link == "softplus" else last, 0.0)
    return reduced(nll, sample_weight, reduction)


def _at(logits: Tensor | PackedRows, times: Tensor) -> Tensor:
    """Each patient's logit of interval T; of the nearest where a GPU's times are not checked."""
    times = times.long()
    if not isinstance(logits, PackedRows):
        if not logits.shape[1]:  # then there are no patients either
            return logits.sum(1)
        return logits.gather(1, times.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    batch = logits.batch
    starts = batch.row_starts[times.clamp(0, max(len(batch.row_starts) - 2, 0))]
    return logits.values[torch.minimum(starts + batch.unsorted_indices, batch.last_rows)]
