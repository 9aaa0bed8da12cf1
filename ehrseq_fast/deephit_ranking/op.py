"""DeepHit's ranking loss: what it takes, and the choice of backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..autograd import transformed
from ..backend import must_check_values
from ..batch import PackedVisits
from ..checks import INTEGER, REAL, expect_option
from ..rows import PackedRows
from ..rows.beside import with_batch
from ..survival_nll.checks import (
    check_column,
    check_companions,
    check_hazards,
    check_outcomes,
    check_tensors,
    refuse_mask,
    require_outcomes,
)
from ..survival_nll.fused import PADDED, Inputs, Rows, as_padded, nll
from ..survival_nll.options import CENSORED_VISITS
from . import (
    operators,  # noqa: F401  (which defines what is called here)
    reference,
)


class _Ranking(NamedTuple):
    """The options of the loss, and what computes it (:class:`~..survival_nll.fused.Loss`)."""

    competing: bool
    sigma: float
    censored_visit: str

    def check(self) -> None:
        """``ValueError`` for unknown options."""
        expect_option("censored_visit", self.censored_visit, CENSORED_VISITS)
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma: expected a finite number above 0, got {self.sigma}")

    def define(self, inputs: Inputs) -> Tensor:
        logits, times, types, mask, entry_times, sample_weight = inputs
        return reference.deephit_ranking(
            logits,
            times,
            types,
            mask,
            sigma=self.sigma,
            censored_visit=self.censored_visit,
            entry_times=entry_times,
            sample_weight=sample_weight,
        )

    def compute(self, ops: Any, rows: Rows, inputs: Inputs, needs_grad: bool) -> Any:
        options = (self.competing, self.censored_visit == "included", self.sigma, needs_grad)
        return ops.deephit_ranking.default(*inputs[:4], *rows, *inputs[4:], *options)


def deephit_ranking_loss(
    logits: Tensor | PackedRows,
    event_times: Tensor | PackedVisits | None = None,
    event_indicators: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    *,
    sigma: float = 0.1,
    censored_visit: str = "included",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    r"""DeepHit's ranking loss: who has the event early is to have the higher incidence by then.

    With :math:`p = \mathrm{softmax}(x_0, ..., x_{V-1}, 0)` over a patient's visits and "beyond", as
    in :func:`~ehrseq_fast.pmf_nll`, and :math:`F(t) = \sum_{u \le t} p_u`:

    .. math:: \frac{1}{B^2} \sum_i \delta_i w_i \sum_{j\ \mathrm{comparable}} w_j
              \exp\frac{F_j(T_i) - F_i(T_i)}{\sigma}

    j is comparable to i where j was still without the event after :math:`T_i`: :math:`T_j > T_i`,
    or :math:`T_j = T_i` where j was censored there (``censored_visit="included"``), and j had
    entered.
    The exponential is a product of one factor per patient, and each time has one sum over the
    patients at risk, so that all B² pairs cost O(B·V). The largest exponent of each time is taken
    out first: the result is finite wherever it is.

    Source: Lee, Zame, Yoon and van der Schaar, DeepHit (AAAI 2018); pycox's
    ``rank_loss_deephit_single``.

    Args:
        logits: ``[B, V]`` float32, float64, bfloat16 or float16; or
            :class:`~ehrseq_fast.PackedRows` ``[n_visits]``, whose batch has the outcomes where none
            are given.
        event_times: ``[B]`` integer: the visit of event or censoring, counted from 0.
        event_indicators: ``[B]`` bool or number: 1 event seen, 0 censored.
        sequence_mask: ``[B, V]`` as for :func:`~ehrseq_fast.pmf_nll`.
        sigma: above 0; the smaller, the more the worst pair counts.
        entry_times: ``[B]`` integer: the first visit at risk (left truncation); 0 without it.
        sample_weight: ``[B]``: the weights w; 1 without it. A patient of weight 0 is left out of
            all pairs, which are still B². One that requires a gradient gets it, by the plain
            PyTorch definition.
        validate: check values on a GPU too, at the price of a synchronisation.

    Returns:
        The mean over all B² pairs, those that are not comparable counting 0; nan for B = 0.
        float64 for float64 and float32 otherwise. Second derivatives, forward mode and the
        transforms of ``torch.func`` are computed by the plain PyTorch definition.

    Raises:
        ValueError: as for :func:`~ehrseq_fast.pmf_nll`, and for a sigma that is not above 0.
        TypeError: for dtypes, and missing outcomes.

    Example:
        >>> import torch
        >>> from ehrseq_fast import deephit_ranking_loss
        >>> times, seen = torch.tensor([0, 1]), torch.tensor([1, 0])
        >>> deephit_ranking_loss(torch.zeros(2, 2), times, seen)  # of 4 pairs one is comparable
        tensor(0.2500)
    """
    types = ("event_indicators", event_indicators)
    more = (sequence_mask, entry_times, sample_weight)
    loss = _Ranking(False, sigma, censored_visit)
    return _ranking(logits, event_times, types, more, loss, validate)


def deephit_competing_ranking_loss(
    logits: Tensor | PackedRows,
    event_times: Tensor | PackedVisits | None = None,
    event_types: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    *,
    sigma: float = 0.1,
    censored_visit: str = "included",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    r""":func:`deephit_ranking_loss` with K competing events: i is compared by the incidence of the
    cause of its own event, :math:`F^k(t) = \sum_{u \le t} p_{u,k}`. As pycox's
    ``rank_loss_deephit_cr``, whose logits are ``[B, K, V]``.

    Args:
        logits: ``[B, V, K]``, or :class:`~ehrseq_fast.PackedRows` ``[n_visits, K]``.
        event_types: ``[B]`` integer: 0 censored, 1..K the cause of the event.

    All else as for :func:`deephit_ranking_loss`.

    Example:
        >>> import torch
        >>> from ehrseq_fast import deephit_competing_ranking_loss
        >>> times, types = torch.tensor([0, 1]), torch.tensor([2, 0])
        >>> deephit_competing_ranking_loss(torch.zeros(2, 2, 3), times, types)
        tensor(0.2500)
    """
    types = ("event_types", event_types)
    more = (sequence_mask, entry_times, sample_weight)
    loss = _Ranking(True, sigma, censored_visit)
    return _ranking(logits, event_times, types, more, loss, validate)


def _ranking(
    logits: Tensor | PackedRows,
    times: Any,
    event_types: tuple[str, Tensor | None],
    more: tuple[Tensor | None, Tensor | None, Tensor | None],
    loss: _Ranking,
    validate: bool,
) -> Tensor:
    loss.check()
    mask, entry_times, sample_weight = more
    name, types = event_types
    allowed = INTEGER | {torch.bool} if loss.competing else REAL
    rows: Rows = PADDED
    # a weight may have a gradient here, which check_tensors would refuse: check_column does not
    logits, times = with_batch(logits, times, "logits")
    if isinstance(logits, PackedRows):
        refuse_mask(mask)
        batch = logits.batch
        times = batch.event_times if times is None else times
        types = getattr(batch, name) if types is None else types
        times, types = require_outcomes(event_times=times, **{name: types})
        logits, rows = logits.values, (batch.row_starts, batch.unsorted_indices, batch.last_rows)
        check_hazards(logits, ("n_visits", "K") if loss.competing else ("n_visits",), "logits")
        kinds = (name, types, allowed)
        check_companions(logits, len(batch), times, kinds, entry_times, None, "logits")
        patients = len(batch)
    else:
        times, types = require_outcomes(event_times=times, **{name: types})
        layout = ("B", "V", "K") if loss.competing else ("B", "V")
        kinds = (name, types, allowed)
        check_tensors(logits, layout, times, kinds, mask, entry_times, None, "logits")
        patients = len(logits)
    if sample_weight is not None:
        check_column(logits, "sample_weight", sample_weight, REAL, "a real", patients)
    if loss.competing and logits.shape[-1] < 1:
        raise ValueError(f"logits: expected at least one cause, got shape {list(logits.shape)}")
    inputs: Inputs = (logits, times, types, mask, entry_times, sample_weight)
    device = logits.device.type
    chosen = backend.choose("deephit_ranking", device, logits.dtype)
    if transformed(logits, sample_weight) or _has_gradient(sample_weight):
        chosen = "reference"
    if must_check_values(chosen, device, validate):
        check_outcomes(as_padded(rows, inputs), "sigmoid")
    return nll(chosen, rows, inputs, loss)


def _has_gradient(sample_weight: Tensor | None) -> bool:
    return sample_weight is not None and sample_weight.requires_grad and torch.is_grad_enabled()
