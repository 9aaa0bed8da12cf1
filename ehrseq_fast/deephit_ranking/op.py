"""DeepHit's ranking loss: what it takes, and the choice of backend."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..batch import PackedVisits
from ..checks import expect_option
from ..rows import PackedRows
from ..survival_nll.fused import Inputs, Rows
from ..survival_nll.logits import loss_of_logits
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
        sample_weight: ``[B]``, not negative: the weights w; 1 without it. A patient of weight 0 is
            left out of all pairs, which are still B². One that requires a gradient gets it, by the
            plain PyTorch definition.
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
    more = (sequence_mask, entry_times, sample_weight)
    loss = _Ranking(False, sigma, censored_visit)
    return loss_of_logits(
        "deephit_ranking",
        loss,
        logits,
        event_times,
        event_indicators,
        more,
        validate,
        weight_has_gradient=True,
    )


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
    more = (sequence_mask, entry_times, sample_weight)
    loss = _Ranking(True, sigma, censored_visit)
    return loss_of_logits(
        "deephit_ranking",
        loss,
        logits,
        event_times,
        event_types,
        more,
        validate,
        weight_has_gradient=True,
    )
