"""Batches of patients with nothing padded."""

import torch

from .packed_visits import PackedVisits

__all__ = ["PackedVisits"]

torch.serialization.add_safe_globals([PackedVisits])  # torch.load reads it with weights_only
