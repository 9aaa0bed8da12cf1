"""What tests of the packed LSTM's CUDA kernels need: the emulator, layers in two precisions, and
the operators' arguments."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from ehrseq_fast import PackedLSTM
from ehrseq_fast import backend as backends

from . import cuda_on_cpu
from .recurrent_layers import LSTM, records, sizes_of
from .tolerances import tolerance

on_host = pytest.mark.skipif(cuda_on_cpu.why_not() is not None, reason=str(cuda_on_cpu.why_not()))
NOTHING = float("nan")

# an operand, which of its numbers, and what that is
not_finite = pytest.mark.parametrize(
    ("argument", "at", "value"),
    [
        (0, (4, 1), NOTHING),  # a visit of the second patient
        (3, (7, 2), NOTHING),
        (3, (7, 2), float("inf")),
        (4, (40,), float("inf")),
        (6, (1, 5), NOTHING),
        (7, (2, 9), float("inf")),
    ],
    ids=["row", "weight", "infinite weight", "infinite bias", "h0", "infinite c0"],
)


@contextlib.contextmanager
def emulated():
    loaded = cuda_on_cpu.load()
    with backends.emulating("cuda", cuda_on_cpu.KERNELS), backends.use_backend("cuda"):
        yield loaded


def ops():
    return getattr(torch.ops, cuda_on_cpu.NAMESPACE)


def launches(shim, call):
    shim.reset_counts()
    result = call()
    return result, shim.counts().kernels


def assert_agree(mine, exact, bound):
    """Within ``bound`` of the largest value of each tensor."""
    for got, expected in zip(mine, exact, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound * scale)


def bound_of(dtype, layers=1):
    """On tensor cores, float32 as TF32, of which significands are as long as float16's: hidden
    states are rounded once at each visit, gradients of sums too."""
    return layers * tolerance(torch.float16 if dtype == torch.float32 else dtype)["atol"]


def twice(lengths, inputs=5, hidden=32, given=False, device="cpu", dtype=torch.float32, **options):
    """The same layer, records and states in ``dtype`` and, the same numbers, in float64,
    PyTorch's: whole gradients of both."""
    fast = PackedLSTM(inputs, hidden, **options).to(dtype)
    exact = nn.LSTM(inputs, hidden, **options).double()
    exact.load_state_dict(fast.state_dict())
    visits = records(lengths, inputs, torch.float32)
    shape = len(fast.all_weights), len(lengths), hidden
    states = [torch.randn(shape) for _ in range(2)] if given else None

    def of(wanted, device):
        def leaf(x):
            return x.detach().to(dtype).to(device, wanted).requires_grad_()

        return [leaf(x) for x in visits], None if states is None else tuple(map(leaf, states))

    return fast.to(device), exact, of(dtype, device), of(torch.float64, "cpu")


def raw(lengths=(3, 2, 1), inputs=3, hidden=32, dtype=torch.float32):
    """What an operator is called with: rows, weights, biases and states."""
    weights = LSTM.weights(inputs, hidden, dtype=dtype, scale=0.25)
    states = [torch.randn(len(lengths), hidden).to(dtype) for _ in range(2)]
    rows = torch.randn(sum(lengths), inputs).to(dtype)
    return [rows, sizes_of(lengths), *weights, *states]


def forward(operands, reverse=False, tf32=False):
    return ops().packed_lstm_layer(*operands, reverse, True, operands[0].shape[0], tf32)


def backward(operands, results, incoming, reverse=False, tf32=False, need=(True, True, True)):
    saved = results[0], *results[3:]
    return ops().packed_lstm_layer_backward(*incoming, *operands, *saved, reverse, *need, tf32)


def ragged(patients, longest):
    return [1 + (i * 7919) % longest for i in range(patients)]
