"""DeepHit's ranking loss of pairs of patients, and with the likelihood DeepHit's loss."""

from .module import DeepHitLoss, DeepHitRankingLoss
from .op import deephit_competing_ranking_loss, deephit_ranking_loss

__all__ = [
    "DeepHitLoss",
    "DeepHitRankingLoss",
    "deephit_competing_ranking_loss",
    "deephit_ranking_loss",
]
