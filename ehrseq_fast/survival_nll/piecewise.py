"""The loss of rates that are constant within intervals, computed with the kernels of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..autograd import values_are_hidden
from ..backend import must_check_values
from ..batch import PackedVisits
from ..checks import FLOATING, REAL, expect_option
from ..rows import PackedRows
from ..rows.beside import with_batch
from .checks import check_column, refuse_mask, require_outcomes
from .op import discrete_time_survival_nll
from .operators import REDUCTIONS
from .reference import log_softplus

# the link whose loss of a survived visit is Λ
_LINKS = {"softplus": "sigmoid", "exp": "cloglog"}


def piecewise_hazard_nll(
    logits: Tensor | PackedRows,
    event_times: Tensor | PackedVisits | None = None,
    event_indicators: Tensor | None = None,
    fraction: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    *,
    link: str = "softplus",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    r"""Negative log-likelihood of a hazard rate that is constant within each interval of time.

    With :math:`\Lambda_t` the integral of the rate over interval t, an outcome in interval T of
    which the fraction f was seen, and :math:`\delta = 1` for an event, 0 for censoring:

    .. math:: \sum_{entry \le t < T} \Lambda_t + f \Lambda_T - \delta \log \Lambda_T

    (the density up to a constant, the width of the interval).
    Source: Friedman, Annals of Statistics 10 (1982); Kvamme and Borgan, Lifetime Data Analysis 27
    (2021), "PC-Hazard" (pycox's ``nll_pc_hazard_loss``, with ``link="softplus"``); MOTOR, Steinberg
    et al. (2024), with ``link="exp"``.

    Args:
        logits: ``[B, V]`` float32, float64, bfloat16 or float16, one for each interval; or
            :class:`~ehrseq_fast.PackedRows` ``[n_visits]``, whose batch has the outcomes where none
            are given.
        event_times: ``[B]`` integer: the interval of event or censoring, counted from 0.
        event_indicators: ``[B]`` bool or number: 1 event seen, 0 censored.
        fraction: ``[B]`` floating: how much of interval T was seen, in [0, 1]; 1 without it.
        sequence_mask: ``[B, V]`` as for :func:`discrete_time_survival_nll`.
        link: ``"softplus"``: :math:`\Lambda = \log(1 + e^x)`; ``"exp"``: :math:`\Lambda = e^x`,
            which overflows where x is above 88 (709 in float64).
        entry_times: ``[B]`` integer: the first interval at risk (left truncation), from its start.
        sample_weight: ``[B]``: multiplies each patient's loss.
        reduction: ``"mean"`` over the patients, ``"sum"``, or ``"none"`` for ``[B]``.
        validate: check values on a GPU too, at the price of a synchronisation.

    Returns:
        The loss, float64 for float64 and float32 otherwise. The logit of interval T is read where
        the event was in it or some of it was seen, those after it never. All derivatives are right.

    Raises:
        ValueError: as for :func:`discrete_time_survival_nll`, and for fractions outside [0, 1],
            with the first patient.
        TypeError: for dtypes, and missing outcomes.

    Example:
        >>> import torch
        >>> from ehrseq_fast import piecewise_hazard_nll
        >>> logits, times, seen = torch.zeros(2, 3), torch.tensor([1, 1]), torch.tensor([1, 0])
        >>> piecewise_hazard_nll(logits, times, seen, torch.tensor([0.5, 0.25]), reduction="none")
        tensor([1.4062, 0.8664])
    """
    expect_option("link", link, _LINKS)
    expect_option("reduction", reduction, REDUCTIONS)
    given: Any
    logits, given = with_batch(logits, event_times, "logits")
    if isinstance(logits, PackedRows):
        refuse_mask(sequence_mask)
        batch = logits.batch
        given = batch.event_times if given is None else given
        event_indicators = batch.event_indicators if event_indicators is None else event_indicators
    times, indicators = require_outcomes(event_times=given, event_indicators=event_indicators)
    # the sum over the intervals before T: a censoring there, of which interval T says nothing
    nll = discrete_time_survival_nll(
        logits,
        times,
        torch.zeros_like(times, dtype=torch.bool),
        sequence_mask,
        from_logits=True,
        link=_LINKS[link],
        entry_times=entry_times,
        reduction="none",
        validate=validate,
    )
    values = logits.values if isinstance(logits, PackedRows) else logits
    check_column(values, "event_indicators", indicators, REAL, "a bool or numeric", len(nll))
    if fraction is not None:
        check_column(values, "fraction", fraction, FLOATING, "a floating-point", len(nll))
    if sample_weight is not None:
        check_column(values, "sample_weight", sample_weight, REAL, "a real", len(nll))
    # no kernel reads these
    checks = must_check_values("reference", values.device.type, validate)
    if checks and not values_are_hidden(indicators, fraction):
        _check(indicators, fraction)

    event = indicators != 0
    seen = torch.ones_like(nll) if fraction is None else fraction.to(nll.dtype)
    partly = seen > 0
    last = torch.where(event | partly, _at(logits, times), 0.0).to(nll.dtype)
    integral = -logsigmoid(-last) if link == "softplus" else torch.where(partly, last, 0.0).exp()
    nll = nll + torch.where(partly, seen * integral, 0.0)
    nll = nll - torch.where(event, log_softplus(last) if link == "softplus" else last, 0.0)
    if sample_weight is not None:
        nll = nll * sample_weight.to(nll.dtype)
    if reduction == "none":
        return nll
    return nll.mean() if reduction == "mean" else nll.sum()


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


def _check(indicators: Tensor, fraction: Tensor | None) -> None:
    wrong = (indicators != 0) & (indicators != 1)
    if bool(wrong.any()):
        at = int(wrong.int().argmax())
        raise ValueError(
            f"event_indicators must be 0 (censored) or 1 (event): patient {at} has "
            f"{indicators[at].item():g} (patients at fault: {int(wrong.sum())})"
        )
    if fraction is None:
        return
    wrong = ~((fraction >= 0) & (fraction <= 1))
    if bool(wrong.any()):
        at = int(wrong.int().argmax())
        raise ValueError(
            f"fraction: expected numbers in [0, 1], got {fraction[at].item():g} (patient {at}; "
            f"patients at fault: {int(wrong.sum())})"
        )


class PiecewiseHazardLoss(nn.Module):
    """:func:`~ehrseq_fast.piecewise_hazard_nll` with its options held.

    Args:
        link, reduction, validate: as for the function.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PiecewiseHazardLoss
        >>> loss = PiecewiseHazardLoss(link="exp")
        >>> loss(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([1]), torch.tensor([0.5]))
        tensor(1.5000)
    """

    def __init__(
        self, *, link: str = "softplus", reduction: str = "mean", validate: bool = False
    ) -> None:
        super().__init__()
        self.link = link
        self.reduction = reduction
        self.validate = validate

    def forward(
        self,
        logits: Tensor | PackedRows,
        event_times: Tensor | PackedVisits | None = None,
        event_indicators: Tensor | None = None,
        fraction: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        *,
        entry_times: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[B, V]``, times, indicators and fractions ``[B]``, mask ``[B, V]`` to the loss.
        Or of :class:`~ehrseq_fast.PackedRows`, whose batch has the outcomes."""
        return piecewise_hazard_nll(
            logits,
            event_times,
            event_indicators,
            fraction,
            sequence_mask,
            link=self.link,
            entry_times=entry_times,
            sample_weight=sample_weight,
            reduction=self.reduction,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return f"link={self.link!r}, reduction={self.reduction!r}"
