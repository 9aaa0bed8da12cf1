"""The packed LSTM; see :mod:`.recurrent`."""

from __future__ import annotations

from ehrseq_fast import PackedLSTM, packed_lstm
from ehrseq_fast.packed_lstm import reference

from .recurrent import Layer, benchmark

LAYER = Layer("LSTM", 4, PackedLSTM, packed_lstm, reference.packed_lstm_layer)
BENCHMARK = benchmark(LAYER)
