"""EHR sequence models that cost what their real codes cost."""

from .backend import use_backend
from .batch import PackedVisits
from .visit_pool import masked_pool, packed_visit_pool, visit_mean_pool

__all__ = [
    "PackedVisits",
    "masked_pool",
    "packed_visit_pool",
    "use_backend",
    "visit_mean_pool",
]
