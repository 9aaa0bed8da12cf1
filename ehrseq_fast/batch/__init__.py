"""Batches of patients with nothing padded."""

from typing import Any

import torch

from .packed_visits import PackedVisits
from .visits import NextVisitCodes

__all__ = ["NextVisitCodes", "PackedVisits"]

torch.serialization.add_safe_globals([PackedVisits])  # torch.load reads it with weights_only


def _collate(batches: list[PackedVisits], *, collate_fn_map: Any = None) -> PackedVisits:
    return PackedVisits.cat(batches)


try:  # torch's registry: a DataLoader without a collate_fn joins the batches that a data set gives
    from torch.utils.data._utils.collate import default_collate_fn_map
except ImportError:  # then default_collate refuses batches by itself
    pass
else:
    default_collate_fn_map[PackedVisits] = _collate
