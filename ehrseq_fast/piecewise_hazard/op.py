"""The loss of rates that are constant within intervals: what it takes; the choice of backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..autograd import transformed
from ..backend import must_check_values
from ..batch import PackedVisits
from ..checks import FLOATING, REAL, accumulator, expect_option
from ..rows import PackedRows
from ..rows.beside import with_batch
from ..survival_nll.checks import (
    check_column,
    check_companions,
    check_fraction,
    check_hazards,
    check_outcomes,
    check_tensors,
    refuse_mask,
    refuse_visit_weight,
    require_outcomes,
    visits_read,
)
from ..survival_nll.fused import PADDED, Rows, as_padded, nll, nll_on_host
from ..survival_nll.operators import REDUCTIONS
from ..survival_nll.visit_weight import check_weight, is_accumulated, weight_of_rows
from . import reference
from .operators import LINKS


class _Options(NamedTuple):
    link: str
    reduction: str


class PiecewiseHazard(_Options):
    """The options of the loss, and what computes it (:class:`~..survival_nll.fused.Loss`). Its
    inputs are those of the survival losses, ``fraction`` and ``visit_weight``."""

    __slots__ = ()
    of_visits = (7,)

    def check(self) -> None:
        """``ValueError`` for unknown options."""
        expect_option("link", self.link, LINKS)
        expect_option("reduction", self.reduction, REDUCTIONS)

    def define(self, inputs: Any) -> Tensor:
        logits, times, indicators, mask, entry_times, sample_weight, fraction, weight = inputs
        return reference.piecewise_hazard_nll(
            logits,
            times,
            indicators,
            fraction,
            mask,
            link=self.link,
            reduction=self.reduction,
            entry_times=entry_times,
            sample_weight=sample_weight,
            visit_weight=weight,
        )

    def compute(self, ops: Any, rows: Rows, inputs: Any, needs_grad: bool) -> Any:
        numbered = (LINKS[self.link], REDUCTIONS[self.reduction], needs_grad)
        return ops.piecewise_hazard_nll.default(*inputs[:4], *rows, *inputs[4:], *numbered)


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
    visit_weight: Tensor | PackedRows | None = None,
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
        sample_weight: ``[B]``, not negative: multiplies each patient's loss.
        visit_weight: ``[B, V]`` (of packed rows ``[n_visits]`` or PackedRows) floating: multiplies
            each visit's term. Not negative where a visit is read; what it has elsewhere changes
            nothing, even a NaN. It may require a gradient, as may ``fraction`` and
            ``sample_weight``: the loss is then computed by the plain PyTorch definition.
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
    loss = PiecewiseHazard(link, reduction)
    rows: Rows = PADDED
    batch = None
    given: Any
    logits, given = with_batch(logits, event_times, "logits")
    if isinstance(logits, PackedRows):
        refuse_mask(sequence_mask)
        batch = logits.batch
        given = batch.event_times if given is None else given
        event_indicators = batch.event_indicators if event_indicators is None else event_indicators
        rows = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
        logits = logits.values
    weights: Any = (sample_weight, fraction, visit_weight)
    dims = 2 if batch is None else 1
    if visit_weight is None or is_accumulated(visit_weight, logits):
        inputs: Any = (logits, given, event_indicators, sequence_mask, entry_times, *weights)
        value = nll_on_host("piecewise_hazard", dims, loss, rows, inputs, weights)
        if value is not None:
            return value
    loss.check()
    if batch is not None:
        check_hazards(logits, ("n_visits",), "logits")
    times, indicators = require_outcomes(event_times=given, event_indicators=event_indicators)
    # weights and fractions may have a gradient here: check_column does not refuse it
    kinds = ("event_indicators", indicators, REAL)
    if batch is None:
        layout = ("B", "V")
        check_tensors(logits, layout, times, kinds, sequence_mask, entry_times, None, "logits")
        patients = len(logits)
    else:
        patients = len(batch)
        check_companions(logits, patients, times, kinds, entry_times, None, "logits")
    if sample_weight is not None:
        check_column(logits, "sample_weight", sample_weight, REAL, "a real", patients)
    if fraction is not None:
        check_column(logits, "fraction", fraction, FLOATING, "a floating-point", patients)
    of_visits: Any = visit_weight
    if of_visits is not None:
        if batch is not None:
            of_visits = weight_of_rows(logits, batch, of_visits)
        check_weight(rows, logits, of_visits, "logits")
        of_visits = of_visits.to(accumulator(logits.dtype))
    weights = (sample_weight, fraction, of_visits)
    inputs = (logits, times, indicators, sequence_mask, entry_times, *weights)
    chosen = backend.choose("piecewise_hazard", logits.device.type, logits.dtype)
    if transformed(logits, *weights) or _learns(*weights):
        chosen = "reference"
    if must_check_values(chosen, logits.device.type, validate):
        *padded, _, weight = as_padded(rows, inputs, loss)
        outcomes: Any = tuple(padded)
        check_outcomes(outcomes, "sigmoid")
        check_fraction(fraction)
        if weight is not None:
            read = visits_read(outcomes, False)
            at_time = visits_read(outcomes, True) & ~read
            partly = True if fraction is None else (fraction != 0)[:, None]
            refuse_visit_weight(weight, read | (at_time & partly))
    return nll(chosen, rows, inputs, loss)


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
