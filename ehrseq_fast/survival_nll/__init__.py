"""Discrete-time survival losses: clamp, masks, logarithms and sums in one pass over the visits."""

from .module import CompetingRisksSurvivalLoss, DiscreteTimeSurvivalLoss
from .op import competing_risks_nll, discrete_time_survival_nll
from .packed import packed_competing_risks_nll, packed_survival_nll

__all__ = [
    "CompetingRisksSurvivalLoss",
    "DiscreteTimeSurvivalLoss",
    "competing_risks_nll",
    "discrete_time_survival_nll",
    "packed_competing_risks_nll",
    "packed_survival_nll",
]
