"""Whether the event comes within a horizon of each visit: labels from event times, and the loss."""

from .labels import fixed_horizon_labels
from .op import fixed_horizon_bce

__all__ = ["fixed_horizon_bce", "fixed_horizon_labels"]
