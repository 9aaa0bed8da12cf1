"""The losses under the names and at the place that they have in ``ehrsequencing.models.losses``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..arrays import expect_tensor
from ..batch import PackedVisits
from ..losses import FixedHorizonProgressionLoss, MultiTaskSurvivalLoss
from ..metrics.harrell import concordance_index
from ..rows import PackedRows
from ..rows.beside import with_batch
from ..survival_nll import DiscreteTimeSurvivalLoss
from ..survival_nll.checks import require_outcomes

__all__ = [
    "DiscreteTimeSurvivalLoss",
    "FixedHorizonProgressionLoss",
    "HybridSurvivalLoss",
    "MultiTaskSurvivalLoss",
    "PairwiseRankingLoss",
    "concordance_index",
]


class PairwiseRankingLoss(nn.Module):
    """Hinge loss over pairs of patients of whom one has the event first.

    The mean of ``max(0, margin − (r_i − r_j))`` over the pairs i ≠ j where i has the event and
    ``T_i ≤ T_j``; 0 where there is no such pair. It holds ``[B, B]``, as the reference does.

    Args:
        margin: by how much the risk of the earlier is to be larger.

    Example:
        >>> import torch
        >>> from ehrseq_fast.models.losses import PairwiseRankingLoss
        >>> loss = PairwiseRankingLoss(margin=0.5)
        >>> loss(torch.tensor([2.0, 1.75]), torch.tensor([1, 3]), torch.tensor([1, 0]))
        tensor(0.2500)
    """

    def __init__(self, margin: float = 0.1) -> None:
        super().__init__()
        self.margin = margin

    def extra_repr(self) -> str:
        return f"margin={self.margin}"

    def forward(self, risk_scores: Tensor, event_times: Tensor, event_indicators: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            risk_scores: ``[B]`` floating.
            event_times: ``[B]`` numeric.
            event_indicators: ``[B]`` bool or numeric, non-zero = event seen.

        Raises:
            ValueError: for shapes other than ``[B]``.
            TypeError: for anything but tensors.
        """
        given = {"event_times": event_times, "event_indicators": event_indicators}
        for name, tensor in {"risk_scores": risk_scores, **given}.items():
            expect_tensor(name, tensor)
            if tensor.dim() != 1 or len(tensor) != len(risk_scores):
                raise ValueError(
                    f"{name}: expected [B], B patients as risk_scores "
                    f"{list(risk_scores.shape)}, got {list(tensor.shape)}"
                )
        comparable = (event_indicators != 0).unsqueeze(1) & (
            event_times.unsqueeze(1) <= event_times.unsqueeze(0)
        )
        itself = torch.eye(len(risk_scores), dtype=torch.bool, device=risk_scores.device)
        comparable = comparable & ~itself
        lead = risk_scores.unsqueeze(1) - risk_scores.unsqueeze(0)
        hinge = torch.where(comparable, torch.relu(self.margin - lead), 0.0)
        return hinge.sum() / comparable.sum().clamp(min=1)


class HybridSurvivalLoss(nn.Module):
    """``lambda_nll · DiscreteTimeSurvivalLoss + lambda_rank · PairwiseRankingLoss``.

    Args:
        lambda_nll, lambda_rank: the weights of both.
        margin: of :class:`PairwiseRankingLoss`.
        eps: of :class:`~ehrseq_fast.DiscreteTimeSurvivalLoss`.

    Example:
        >>> import torch
        >>> from ehrseq_fast.models.losses import HybridSurvivalLoss
        >>> hazards = torch.tensor([[0.5, 0.5], [0.5, 0.0]])
        >>> outcomes = torch.tensor([1, 0]), torch.tensor([1, 0])
        >>> loss, parts = HybridSurvivalLoss()(hazards, hazards.sum(1), *outcomes, hazards > 0)
        >>> sorted(parts)
        ['nll', 'rank', 'total']
    """

    def __init__(
        self,
        lambda_nll: float = 1.0,
        lambda_rank: float = 0.1,
        margin: float = 0.1,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        self.lambda_nll = lambda_nll
        self.lambda_rank = lambda_rank
        self.nll_loss = DiscreteTimeSurvivalLoss(eps=eps)
        self.rank_loss = PairwiseRankingLoss(margin=margin)

    def forward(
        self,
        hazards: Tensor | PackedRows,
        risk_scores: Tensor,
        event_times: Tensor | PackedVisits | None = None,
        event_indicators: Tensor | None = None,
        sequence_mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and ``total``, ``nll`` and ``rank`` without a gradient, for logging.

        The three are tensors, where the reference gives floats: reading them would make the host
        wait for a GPU at every step. ``float(parts["nll"])`` reads one.

        Args:
            hazards: ``[B, V]`` in (0, 1); or :class:`~ehrseq_fast.PackedRows`, without a mask,
                whose batch's outcomes are taken where none are given.
            risk_scores: ``[B]``, such as ``hazards.sum(1)``, or of packed rows ``hazards.sum()``.
            event_times, event_indicators: ``[B]``.
            sequence_mask: ``[B, V]``, non-zero for real visits.

        Raises:
            ValueError, TypeError: as the two losses.
        """
        times: Any
        hazards, times = with_batch(hazards, event_times, "hazards")
        if isinstance(hazards, PackedRows):
            batch = hazards.batch
            times = batch.event_times if times is None else times
            if event_indicators is None:
                event_indicators = batch.event_indicators
        times, seen = require_outcomes(event_times=times, event_indicators=event_indicators)
        nll = self.nll_loss(hazards, times, seen, sequence_mask)
        rank = self.rank_loss(risk_scores, times, seen)
        total = self.lambda_nll * nll + self.lambda_rank * rank
        return total, {"total": total.detach(), "nll": nll.detach(), "rank": rank.detach()}
