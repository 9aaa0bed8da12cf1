"""The operators of a linear layer, float32 or float64."""

from __future__ import annotations

import torch

from ..operations import operator, register
from . import reference

register("linear", "cpu", package=__package__)

# as the operators take them
ACTIVATIONS = {name: number for number, name in enumerate(reference.ACTIVATIONS)}


@operator("linear_layer(Tensor input, Tensor weight, Tensor? bias, int activation) -> Tensor")
def _(input, weight, bias, activation):
    return input.new_empty(input.shape[0], weight.shape[0])


@operator(
    "linear_layer_backward(Tensor grad, Tensor input, Tensor weight, Tensor out, int activation,"
    " bool need_input, bool need_weights) -> (Tensor input, Tensor weight, Tensor bias)"
)
def _(grad, input, weight, out, activation, need_input, need_weights):
    return (
        torch.empty_like(input) if need_input else input.new_empty(0),
        torch.empty_like(weight) if need_weights else input.new_empty(0),
        weight.new_empty(weight.shape[0] if need_weights else 0),
    )
