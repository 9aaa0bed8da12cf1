"""Batches of patients with nothing padded."""

from .packed_visits import PackedVisits

__all__ = ["PackedVisits"]
