"""LSTM over packed visit vectors."""

from .module import PackedLSTM
from .op import packed_lstm

__all__ = ["PackedLSTM", "packed_lstm"]
