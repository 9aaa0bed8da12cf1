"""The definition of the survival losses with weights of visits: that of the losses without, each
visit's term times its weight."""

from ..survival_nll.reference import competing_risks_nll, discrete_time_survival_nll

__all__ = ["competing_risks_nll", "discrete_time_survival_nll"]
