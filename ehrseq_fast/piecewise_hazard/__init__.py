"""The loss of rates that are constant within intervals of time."""

from .module import PiecewiseHazardLoss
from .op import piecewise_hazard_nll

__all__ = ["PiecewiseHazardLoss", "piecewise_hazard_nll"]
