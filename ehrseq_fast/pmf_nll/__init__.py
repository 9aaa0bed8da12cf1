"""Losses of a probability mass over time, of one event and of competing ones."""

from .module import PMFCompetingRisksLoss, PMFLoss
from .op import pmf_competing_risks_nll, pmf_nll

__all__ = ["PMFCompetingRisksLoss", "PMFLoss", "pmf_competing_risks_nll", "pmf_nll"]
