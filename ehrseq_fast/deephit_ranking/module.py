"""DeepHit's ranking loss as a module, and with the likelihood."""

from __future__ import annotations

from torch import Tensor, nn

from ..batch import PackedVisits
from ..pmf_nll import pmf_competing_risks_nll, pmf_nll
from ..rows import PackedRows
from .op import deephit_competing_ranking_loss, deephit_ranking_loss


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
        event_times: Tensor | PackedVisits | None = None,
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
        event_times: Tensor | PackedVisits | None = None,
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
