"""The definition of the packed LSTM, visit by visit, in plain PyTorch.

The equations are those of :class:`torch.nn.LSTM`'s documentation:

    i = σ(W_ii x + b_ii + W_hi h + b_hi)        c' = f ⊙ c + i ⊙ g
    f = σ(W_if x + b_if + W_hf h + b_hf)        h' = o ⊙ tanh(c')
    g = tanh(W_ig x + b_ig + W_hg h + b_hg)
    o = σ(W_io x + b_io + W_ho h + b_ho)

This is the tests' oracle, run in float64. Where no kernel serves, the package runs PyTorch's own
``lstm`` on the packed rows instead, which computes the same and is not held up by a Python loop.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def packed_lstm_layer(
    input: Tensor,
    batch_sizes: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer: outputs ``[visits, H]`` and final states ``[patients, H]``.

    Rows are in the order of ``PackedSequence``: those of time t are the first ``batch_sizes[t]``
    patients, whose states change; the others' stay (they have ended, or, in reverse, not begun).
    """
    sizes = batch_sizes.tolist()
    zeros = input.new_zeros(sizes[0], weight_hh.shape[1])
    h = zeros if h0 is None else h0
    c = zeros if c0 is None else c0
    rows = input.split(sizes)
    outputs = [zeros] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        gates = linear(rows[t], weight_ih, bias_ih) + linear(h[:n], weight_hh, bias_hh)
        i, f, g, o = gates.chunk(4, dim=1)
        cell = f.sigmoid() * c[:n] + i.sigmoid() * g.tanh()
        outputs[t] = o.sigmoid() * cell.tanh()
        h, c = torch.cat([outputs[t], h[n:]]), torch.cat([cell, c[n:]])
    return torch.cat(outputs), h, c
