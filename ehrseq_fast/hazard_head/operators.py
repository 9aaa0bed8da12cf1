"""The operators of the hazard head: Linear, ReLU, Dropout, Linear to one unit, Sigmoid.

``kept`` says which hidden units dropout keeps, and ``scale`` what it multiplies them by; ``hidden``
are those before dropout, which the backward pass needs: no rows of them without training.
"""

from __future__ import annotations

import torch

from ..operations import operator, register

register("hazard_head", "cpu", package=__package__)


@operator(
    "hazard_head(Tensor input, Tensor weight, Tensor bias, Tensor last_weight, Tensor last_bias,"
    " Tensor? kept, float scale, bool training) -> (Tensor hazards, Tensor hidden)"
)
def _(input, weight, bias, last_weight, last_bias, kept, scale, training):
    rows, units = input.shape[0], weight.shape[0]
    return input.new_empty(rows), input.new_empty(rows if training else 0, units)


@operator(
    "hazard_head_backward(Tensor grad, Tensor hazards, Tensor hidden, Tensor input, Tensor weight,"
    " Tensor bias, Tensor last_weight, Tensor last_bias, Tensor? kept, float scale,"
    " bool need_input, bool need_weights) -> (Tensor input, Tensor weight, Tensor bias,"
    " Tensor last_weight, Tensor last_bias)"
)
def _(
    grad,
    hazards,
    hidden,
    input,
    weight,
    bias,
    last_weight,
    last_bias,
    kept,
    scale,
    need_input,
    need_weights,
):
    weights = (weight, bias, last_weight, last_bias)
    return (
        torch.empty_like(input) if need_input else input.new_empty(0),
        *(torch.empty_like(w) if need_weights else input.new_empty(0) for w in weights),
    )
