"""EHR sequence models that cost what their real codes cost."""

from .backend import use_backend
from .packed_lstm import PackedLSTM, packed_lstm

__all__ = ["PackedLSTM", "packed_lstm", "use_backend"]
