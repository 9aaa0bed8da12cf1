"""The definition of a linear layer with an activation, in plain PyTorch: ``act(x Wᵀ + b)``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

# in the order of the operators' numbers
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def linear_layer(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``[rows, inputs]``, ``[units, inputs]``, ``[units]`` → ``[rows, units]``."""
    return ACTIVATIONS[activation](linear(input, weight, bias))
