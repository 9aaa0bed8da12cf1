"""DeepHit's ranking loss of all pairs of patients, in time and memory of one pass over the logits.

Plain PyTorch on every backend: a softmax, a cumulative sum and sums over patients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..autograd import values_are_hidden
from ..backend import must_check_values
from ..checks import INTEGER, REAL, accumulator, expect_option
from ..rows import PackedRows
from ..survival_nll.checks import (
    check_column,
    check_outcomes,
    check_tensors,
    refuse_mask,
    require_outcomes,
)
from ..survival_nll.fused import as_padded
from ..survival_nll.options import CENSORED_VISITS
from .op import pmf_competing_risks_nll, pmf_nll

_ROWS = 64  # summed at once


def deephit_ranking_loss(
    logits: Tensor | PackedRows,
    event_times: Tensor | None = None,
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
        sample_weight: ``[B]``: the weights w; 1 without it.
        validate: check values on a GPU too, at the price of a synchronisation.

    Returns:
        The mean over all B² pairs, those that are not comparable counting 0; nan for B = 0.
        float64 for float64 and float32 otherwise.

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
    return _ranking(logits, event_times, types, more, sigma, censored_visit, validate)


def deephit_competing_ranking_loss(
    logits: Tensor | PackedRows,
    event_times: Tensor | None = None,
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
    return _ranking(logits, event_times, types, more, sigma, censored_visit, validate)


def _ranking(
    logits: Tensor | PackedRows,
    event_times: Tensor | None,
    event_types: tuple[str, Tensor | None],
    more: tuple[Tensor | None, Tensor | None, Tensor | None],
    sigma: float,
    censored_visit: str,
    validate: bool,
) -> Tensor:
    expect_option("censored_visit", censored_visit, CENSORED_VISITS)
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma: expected a finite number above 0, got {sigma}")
    mask, entry_times, sample_weight = more
    name, types = event_types
    if isinstance(logits, PackedRows):
        refuse_mask(mask)
        batch = logits.batch
        event_times = batch.event_times if event_times is None else event_times
        types = getattr(batch, name) if types is None else types
        rows = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
        times, types = require_outcomes(event_times=event_times, **{name: types})
        inputs = as_padded(rows, (logits.values, times, types, None, entry_times, None))
        logits, mask = inputs[0], inputs[3]
    else:
        times, types = require_outcomes(event_times=event_times, **{name: types})
    competing = name == "event_types"
    layout = ("B", "V", "K") if competing else ("B", "V")
    kinds = (name, types, INTEGER | {torch.bool} if competing else REAL)
    check_tensors(logits, layout, times, kinds, mask, entry_times, None, "logits")
    if sample_weight is not None:
        check_column(logits, "sample_weight", sample_weight, REAL, "a real", len(times))
    checks = must_check_values("reference", logits.device.type, validate)
    if checks and not values_are_hidden(logits, times, types, mask):
        check_outcomes((logits, times, types, mask, entry_times, None), "sigmoid")
    return _mean_of_pairs(
        logits, times.long(), types, mask, entry_times, sample_weight, sigma, censored_visit
    )


def _mean_of_pairs(
    logits: Tensor,
    times: Tensor,
    types: Tensor,
    mask: Tensor | None,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    sigma: float,
    censored_visit: str,
) -> Tensor:
    x = logits.to(accumulator(logits.dtype))
    x = x if x.dim() == 3 else x.unsqueeze(2)
    patients, slots, causes = x.shape
    visit = torch.arange(slots, device=x.device)
    at_risk = visit >= 0 if entry_times is None else visit >= entry_times[:, None]
    at_risk = at_risk if mask is None else at_risk & (mask != 0)
    x = torch.where(at_risk.expand(patients, slots)[:, :, None], x, -torch.inf)
    every = torch.cat([x.flatten(1), x.new_zeros(patients, 1)], 1)
    # not softmax(), the bits of whose gradient depend on the number of threads
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
    largest = exponents.detach().amax(0)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    of_later = (exponents - largest).exp()

    # the events at each time; masks in place of indices, whose gradients are sums in any order
    kind = torch.arange(1, causes + 1, device=x.device)
    is_own = event[:, None] if causes == 1 else types[:, None] == kind
    is_own = (visit == times[:, None])[:, :, None] & is_own[:, None, :]
    of_events = torch.where(is_own, largest - incidence, -torch.inf).exp()
    if sample_weight is not None:
        weights = sample_weight.to(x.dtype)[:, None, None]
        of_later, of_events = of_later * weights, of_events * weights
    return (_sum(of_later) * _sum(of_events)).sum() / patients**2


def _sum(values: Tensor) -> Tensor:
    """The sum over patients in an order that does not depend on the number of threads."""
    while len(values) > 1:
        width = min(len(values), _ROWS)
        missing = values.new_zeros(-len(values) % width, *values.shape[1:])
        values = torch.cat([values, missing]).unflatten(0, (-1, width)).sum(1)
    return values.sum(0)


class DeepHitRankingLoss(nn.Module):
    """:func:`~ehrseq_fast.deephit_ranking_loss` with its options held; of logits ``[B, V, K]``
    :func:`~ehrseq_fast.deephit_competing_ranking_loss`.

    Args:
        sigma, censored_visit, validate: as for the functions.

    Example:
        >>> import torch
        >>> from ehrseq_fast import DeepHitRankingLoss
        >>> DeepHitRankingLoss(sigma=0.2)(torch.zeros(2, 2), torch.tensor([0, 1]), torch.ones(2))
        tensor(0.2500)
    """

    def __init__(
        self, sigma: float = 0.1, *, censored_visit: str = "included", validate: bool = False
    ) -> None:
        super().__init__()
        self.sigma = sigma
        self.censored_visit = censored_visit
        self.validate = validate

    def forward(
        self,
        logits: Tensor | PackedRows,
        event_times: Tensor | None = None,
        event_types: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        *,
        entry_times: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[B, V]`` or ``[B, V, K]``, times and indicators (or types) ``[B]``, mask
        ``[B, V]`` to the loss; or of :class:`~ehrseq_fast.PackedRows`."""
        rank = deephit_competing_ranking_loss if _competes(logits) else deephit_ranking_loss
        return rank(
            logits,
            event_times,
            event_types,
            sequence_mask,
            sigma=self.sigma,
            censored_visit=self.censored_visit,
            entry_times=entry_times,
            sample_weight=sample_weight,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, censored_visit={self.censored_visit!r}"


class DeepHitLoss(nn.Module):
    """DeepHit's loss, ``alpha · pmf_nll + (1 − alpha) · ranking``, as pycox's ``DeepHitSingleLoss``
    and, of logits ``[B, V, K]``, its ``DeepHitLoss``.

    Args:
        alpha: the weight of the likelihood, in [0, 1].
        sigma, censored_visit, validate: as for :func:`~ehrseq_fast.deephit_ranking_loss`.

    Raises:
        ValueError: for an alpha outside [0, 1].

    Example:
        >>> import torch
        >>> from ehrseq_fast import DeepHitLoss
        >>> DeepHitLoss(0.5)(torch.zeros(2, 2), torch.tensor([0, 1]), torch.ones(2))
        tensor(0.6743)
    """

    def __init__(
        self,
        alpha: float = 0.2,
        sigma: float = 0.1,
        *,
        censored_visit: str = "included",
        validate: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
        self.alpha = alpha
        self.ranking = DeepHitRankingLoss(sigma, censored_visit=censored_visit, validate=validate)

    def forward(
        self,
        logits: Tensor | PackedRows,
        event_times: Tensor | None = None,
        event_types: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        *,
        entry_times: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """As :class:`DeepHitRankingLoss`."""
        given = (logits, event_times, event_types, sequence_mask)
        nll = pmf_competing_risks_nll if _competes(logits) else pmf_nll
        likelihood = nll(
            *given,
            censored_visit=self.ranking.censored_visit,
            entry_times=entry_times,
            sample_weight=sample_weight,
            validate=self.ranking.validate,
        )
        ranking = self.ranking(*given, entry_times=entry_times, sample_weight=sample_weight)
        return self.alpha * likelihood + (1 - self.alpha) * ranking

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


def _competes(logits: Tensor | PackedRows) -> bool:
    return logits.values.dim() == 2 if isinstance(logits, PackedRows) else logits.dim() == 3
