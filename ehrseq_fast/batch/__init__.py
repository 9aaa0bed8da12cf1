"""Batches of patients with nothing padded."""

from typing import Any

import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from .packed_visits import PackedVisits
from .visits import NextVisitCodes

__all__ = ["NextVisitCodes", "PackedVisits"]


def _collate(batches: list[PackedVisits], *, collate_fn_map: Any = None) -> PackedVisits:
    return PackedVisits.cat(batches)


torch.serialization.add_safe_globals([PackedVisits])  # torch.load reads it with weights_only
# torch's own registry: a DataLoader without a collate_fn joins the batches that a data set gives
default_collate_fn_map[PackedVisits] = _collate
