"""The definition of the packed GRU, visit by visit, in plain PyTorch.

The equations are those of :class:`torch.nn.GRU`'s documentation:

    r = σ(W_ir x + b_ir + W_hr h + b_hr)
    z = σ(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))
    h' = (1 - z) ⊙ n + z ⊙ h

The reset gate r scales the product with the hidden state, and not the state before it is
multiplied, as the GRU was first published. This is the tests' oracle, run in float64. Where no
kernel serves, the package runs PyTorch's own ``gru`` on the packed rows instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def packed_gru_layer(
    input: Tensor,
    batch_sizes: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    h0: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One direction of one layer: outputs ``[visits, H]`` and final states ``[patients, H]``.

    Rows are in the order of ``PackedSequence``: those of time t are the first ``batch_sizes[t]``
    patients, whose states change; the others' stay (they have ended, or, in reverse, not begun).
    """
    sizes = batch_sizes.tolist()
    h = input.new_zeros(sizes[0], weight_hh.shape[1]) if h0 is None else h0
    rows = input.split(sizes)
    outputs = [h] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        before, after = h[: sizes[t]], h[sizes[t] :]
        reset, update, candidate = linear(rows[t], weight_ih, bias_ih).chunk(3, dim=1)
        of_reset, of_update, of_candidate = linear(before, weight_hh, bias_hh).chunk(3, dim=1)
        z = (update + of_update).sigmoid()
        n = (candidate + (reset + of_reset).sigmoid() * of_candidate).tanh()
        outputs[t] = n + z * (before - n)
        h = torch.cat([outputs[t], after])
    return torch.cat(outputs), h
