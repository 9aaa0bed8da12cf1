"""GRU over packed visit vectors."""

from .module import PackedGRU
from .op import packed_gru

__all__ = ["PackedGRU", "packed_gru"]
