"""EHR sequence models that cost what their real codes cost."""

from .backend import use_backend
from .batch import PackedVisits
from .packed_lstm import PackedLSTM, packed_lstm
from .visit_pool import masked_pool, packed_visit_pool, visit_mean_pool

__all__ = [
    "PackedLSTM",
    "PackedVisits",
    "masked_pool",
    "packed_lstm",
    "packed_visit_pool",
    "use_backend",
    "visit_mean_pool",
]
