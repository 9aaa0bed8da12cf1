"""The packed GRU; see :mod:`.recurrent`."""

from __future__ import annotations

from ehrseq_fast import PackedGRU, packed_gru
from ehrseq_fast.packed_gru import reference

from .recurrent import Layer, benchmark

LAYER = Layer("GRU", 3, PackedGRU, packed_gru, reference.packed_gru_layer, share=0.7)
BENCHMARK = benchmark(LAYER)
