"""The operators of the packed LSTM: one direction of one layer, rows and states in the order of
``PackedSequence``.

``gates`` and ``cells`` are what the backward pass needs, in the kernel's own layout; empty without
training. Gates are those of the first ``kept`` visits: the backward pass computes the others again.
``tf32`` lets the CUDA kernels multiply float32 hidden states as TF32.
"""

from __future__ import annotations

import torch

from ..checks import accumulator
from ..operations import operator, register
from ..recurrent import padded_units

register("packed_lstm", "cpu", package=__package__, on_request=("cuda",))


@operator(
    "packed_lstm_layer(Tensor input, Tensor batch_sizes, Tensor weight_ih, Tensor weight_hh,"
    " Tensor? bias_ih, Tensor? bias_hh, Tensor? h0, Tensor? c0, bool reverse, bool training,"
    " SymInt kept, bool tf32=False) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates,"
    " Tensor cells)"
)
def _(
    input,
    batch_sizes,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    h0,
    c0,
    reverse,
    training,
    kept,
    tf32=False,
):
    visits, hidden = input.shape[0], weight_hh.shape[1]
    # The number of patients is a value, batch_sizes[0]; the shape of given states is the same.
    state = next((s for s in (h0, c0) if s is not None), None)
    patients = torch.library.get_ctx().new_dynamic_size() if state is None else state.shape[0]
    padded = padded_units(hidden)
    wide = accumulator(input.dtype)
    return (
        input.new_empty(visits, hidden),
        input.new_empty(patients, hidden),
        input.new_empty(patients, hidden),
        input.new_empty((kept, 4 * padded), dtype=wide),
        input.new_empty((visits, padded) if training else (0,), dtype=wide),
    )


@operator(
    "packed_lstm_layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n,"
    " Tensor input, Tensor batch_sizes, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih,"
    " Tensor? bias_hh, Tensor? h0, Tensor? c0, Tensor output, Tensor gates, Tensor cells,"
    " bool reverse, bool need_input, bool need_weights, bool need_states, bool tf32=False)"
    " -> (Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor bias, Tensor h0, Tensor c0)"
)
def _(
    grad_output,
    grad_h_n,
    grad_c_n,
    input,
    batch_sizes,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    h0,
    c0,
    output,
    gates,
    cells,
    reverse,
    need_input,
    need_weights,
    need_states,
    tf32=False,
):
    state = next((s for s in (h0, c0, grad_h_n, grad_c_n) if s is not None), None)

    def wanted(need, like):
        return torch.empty_like(like) if need else input.new_empty(0)

    return (
        wanted(need_input, input),
        wanted(need_weights, weight_ih),
        wanted(need_weights, weight_hh),
        wanted(need_weights, weight_hh[:, 0]),
        wanted(need_states, state),
        wanted(need_states, state),
    )
