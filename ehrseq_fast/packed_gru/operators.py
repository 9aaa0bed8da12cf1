"""The operators of the packed GRU: one direction of one layer, rows and states in the order of
``PackedSequence``.

``gates`` are what the backward pass needs, in the kernel's own layout; empty without training. They
are those of the first ``kept`` visits: the backward pass computes the others again.
"""

from __future__ import annotations

import torch

from ..checks import accumulator
from ..operations import operator, register
from ..recurrent import padded_units

register("packed_gru", "cpu", package=__package__)


@operator(
    "packed_gru_layer(Tensor input, Tensor batch_sizes, Tensor weight_ih, Tensor weight_hh,"
    " Tensor? bias_ih, Tensor? bias_hh, Tensor? h0, bool reverse, bool training, SymInt kept)"
    " -> (Tensor output, Tensor h_n, Tensor gates)"
)
def _(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, reverse, training, kept):
    visits, hidden = input.shape[0], weight_hh.shape[1]
    # The number of patients is a value, batch_sizes[0]; the shape of given states is the same.
    patients = torch.library.get_ctx().new_dynamic_size() if h0 is None else h0.shape[0]
    return (
        input.new_empty(visits, hidden),
        input.new_empty(patients, hidden),
        input.new_empty((kept, 4 * padded_units(hidden)), dtype=accumulator(input.dtype)),
    )


@operator(
    "packed_gru_layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input,"
    " Tensor batch_sizes, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? h0, Tensor output, Tensor gates, bool reverse, bool need_input, bool need_weights,"
    " bool need_states) -> (Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih,"
    " Tensor bias_hh, Tensor h0)"
)
def _(
    grad_output,
    grad_h_n,
    input,
    batch_sizes,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    h0,
    output,
    gates,
    reverse,
    need_input,
    need_weights,
    need_states,
):
    def wanted(need, like):
        return torch.empty_like(like) if need else input.new_empty(0)

    return (
        wanted(need_input, input),
        wanted(need_weights, weight_ih),
        wanted(need_weights, weight_hh),
        wanted(need_weights, weight_hh[:, 0]),
        wanted(need_weights, weight_hh[:, 0]),
        wanted(need_states, grad_h_n if h0 is None else h0),
    )
