"""The recurrent layers of the package, so that one test serves both, and what such tests need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence

from ehrseq_fast import PackedGRU, PackedLSTM, packed_gru, packed_lstm
from ehrseq_fast.packed_gru.reference import packed_gru_layer
from ehrseq_fast.packed_lstm.reference import packed_lstm_layer

LENGTHS = {
    "any order": [3, 1, 7, 7, 2, 5],
    "length 1": [1, 1, 1],
    "all equal": [4] * 6,
    "one patient": [5],
    "one visit": [1],
    "long tail": [40, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
}


@dataclass(frozen=True)
class Cell:
    """A kind of layer: PyTorch's and the package's module, function, definition and operators."""

    operation: str
    gates: int
    states: int
    plain: type[nn.RNNBase]
    fast: type[nn.RNNBase]
    function: Callable[..., Any]
    definition: Callable[..., Any]

    @property
    def forward(self) -> Any:
        return getattr(torch.ops.ehrseq_fast, f"{self.operation}_layer")

    @property
    def backward(self) -> Any:
        return getattr(torch.ops.ehrseq_fast, f"{self.operation}_layer_backward")

    def given(self, states):
        """States as its function and modules take them."""
        return tuple(states) if self.states > 1 else states[0]

    def weights(self, inputs, hidden, *, dtype=torch.float64, scale=1.0):
        """Of one direction of one layer, at random."""
        rows = self.gates * hidden
        shapes = [(rows, inputs), (rows, hidden), (rows,), (rows,)]
        return [(torch.randn(shape) * scale).to(dtype) for shape in shapes]

    def layers(self, *args, dtype=torch.float64, **kwargs):
        """The same layer twice: PyTorch's and ours, from one state_dict."""
        plain = self.plain(*args, **kwargs).to(dtype)
        fast = self.fast(*args, **kwargs).to(dtype)
        fast.load_state_dict(plain.state_dict())
        return plain, fast

    def states_for(self, layer, patients, dtype=torch.float64):
        """Initial states at random, with gradients."""
        directions = 2 if layer.bidirectional else 1
        shape = layer.num_layers * directions, patients, layer.hidden_size
        return self.given(
            [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(self.states)]
        )

    def realistic(self, patients, inputs, hidden, dtype=torch.float32, cap=200):
        """Both layers, and records of log-normal lengths."""
        lengths = torch.exp(2.08 + 1.1 * torch.randn(patients)).round().clamp(1, cap).int().tolist()
        return self.layers(inputs, hidden, dtype=dtype), records(lengths, inputs, dtype)


LSTM = Cell("packed_lstm", 4, 2, nn.LSTM, PackedLSTM, packed_lstm, packed_lstm_layer)
GRU = Cell("packed_gru", 3, 1, nn.GRU, PackedGRU, packed_gru, packed_gru_layer)
CELLS = {"lstm": LSTM, "gru": GRU}

every_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)


def pack_sequence(visits, enforce_sorted=True):
    """PyTorch's, which makes lengths where new tensors go and wants them on the CPU."""
    with torch.device("cpu"):
        return rnn.pack_sequence(visits, enforce_sorted)


def packed_rows(data, *sizes):
    """Rows with their batch sizes, on the CPU wherever new tensors go."""
    return PackedSequence(data, torch.tensor(sizes, dtype=torch.int64, device="cpu"))


def flat(states):
    """The tensors of initial or final states, or of none."""
    if states is None:
        return ()
    return states if isinstance(states, tuple) else (states,)


def sizes_of(lengths):
    sizes = [sum(n > t for n in lengths) for t in range(max(lengths))]
    return torch.tensor(sizes, device="cpu")


def records(lengths, inputs, dtype=torch.float64, requires_grad=True):
    return [torch.randn(n, inputs, dtype=dtype, requires_grad=requires_grad) for n in lengths]


def weighted(tensor, seed=5):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tensor.shape, generator=generator, device="cpu")
    return (tensor * drawn.bfloat16().to(tensor)).sum()  # exact in every dtype


def results_of(layer, visits, hx):
    """Outputs and final states."""
    output, final = layer(pack_sequence(visits, enforce_sorted=False), hx)
    return [output.data, *flat(final)]


def everything(layer, visits, hx):
    """Outputs, final states and the gradients of all that has one."""
    results = results_of(layer, visits, hx)
    loss = sum(weighted(result, 5 + at) for at, result in enumerate(results))
    leaves = [*visits, *layer.parameters(), *flat(hx)]
    return [*results, *torch.autograd.grad(loss, leaves)]


def close(actual, expected, bound):
    """Within `bound` of the largest value of each tensor."""
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=bound * scale)


def one_thread():
    """For a fixture: batches of tests are small, and threads that wait for each other only slow a
    busy machine. The tests that are about threads set their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
