"""Losses of a probability mass over time: DeepHit's likelihood and its ranking of pairs."""

from .module import PMFCompetingRisksLoss, PMFLoss
from .op import pmf_competing_risks_nll, pmf_nll
from .ranking import (
    DeepHitLoss,
    DeepHitRankingLoss,
    deephit_competing_ranking_loss,
    deephit_ranking_loss,
)

__all__ = [
    "DeepHitLoss",
    "DeepHitRankingLoss",
    "PMFCompetingRisksLoss",
    "PMFLoss",
    "deephit_competing_ranking_loss",
    "deephit_ranking_loss",
    "pmf_competing_risks_nll",
    "pmf_nll",
]
