"""Losses of a probability mass over time (DeepHit's likelihood)."""

from .module import PMFCompetingRisksLoss, PMFLoss
from .op import pmf_competing_risks_nll, pmf_nll

__all__ = ["PMFCompetingRisksLoss", "PMFLoss", "pmf_competing_risks_nll", "pmf_nll"]
