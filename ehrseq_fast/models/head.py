"""The small networks of the models, run by the package's own kernels where that is the same.

PyTorch's products on the CPU give other bits for other numbers of threads, and its private oneDNN
operators lose NaN and break where OpenMP grants fewer threads than torch asks for. A network that
was changed or has hooks, and one that the kernels do not serve, is called as it is.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hazard_head.op import hazard_head as fused_hazards
from ..linear.op import dtypes_for, linear_layer
from ..openmp import refuse_restricted_openmp
from .reading import are_plain, is_plain

_HEAD = (nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.Sigmoid)
_LOGITS_HEAD = (nn.Linear, nn.ReLU, nn.Dropout, nn.Linear)
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}


def hazard_head(width: int, hidden_dim: int, dropout: float) -> nn.Sequential:
    """Hidden state ``[..., width]`` → hazard in (0, 1), ``[..., 1]``."""
    return nn.Sequential(
        nn.Linear(width, hidden_dim),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_dim, 1),
        nn.Sigmoid(),
    )


def called(network: nn.Module, rows: Tensor) -> Tensor:
    """``network(rows)``.

    Raises:
        RuntimeError: where PyTorch's products would be wrong
            (:func:`~ehrseq_fast.openmp.refuse_restricted_openmp`).
    """
    refuse_restricted_openmp(rows, type(network).__name__)
    return network(rows)


def hazards_of(head: nn.Module, states: Tensor) -> Tensor:
    """``head`` (Linear, ReLU, Dropout, Linear, Sigmoid) of states: ``[..., D]`` → ``[..., 1]``.

    As one function for rows ``[N, D]`` on the CPU, where the modules are what they were built as
    and have no hooks. Elsewhere, on the backend ``reference``, under ``torch.compile`` and the
    transforms of ``torch.func``, by calling the modules.
    """
    layers = _layers_of(head)
    if layers is None:
        return called(head, states)
    hidden, dropout, last = layers
    weights = (hidden.weight, hidden.bias, last.weight, last.bias)
    dtypes = dtypes_for(states, *weights)
    if dtypes is None:
        return called(head, states)
    computed, result = dtypes
    kept, scale = None, 1.0
    if dropout.training and dropout.p > 0:
        kept = states.new_empty(len(states), hidden.out_features, dtype=torch.bool)
        kept.bernoulli_(1 - dropout.p)
        scale = 1 / (1 - dropout.p) if dropout.p < 1 else 0.0
    rows, weight, bias, last_weight, last_bias = (
        x if x.dtype == computed else x.to(computed) for x in (states, *weights)
    )
    hazards = fused_hazards(rows, weight, bias, last_weight, last_bias, kept, scale)
    return (hazards if result == computed else hazards.to(result)).unsqueeze(1)


def _layers_of(head: nn.Module) -> tuple[nn.Linear, nn.Dropout, nn.Linear] | None:
    """The layers of a hazard head that hold something; None where it is not a plain one."""
    if not are_plain(head, _HEAD):
        return None
    hidden, _, dropout, last, _ = cast(Any, head)
    is_head = hidden.bias is not None and last.bias is not None and last.out_features == 1
    return (hidden, dropout, last) if is_head else None


def logits_of(head: nn.Module, states: Tensor) -> Tensor:
    """``head`` (Linear, ReLU, Dropout, Linear) of states: ``[..., D]`` → ``[..., outputs]``."""
    dtypes = dtypes_for(states, *head.parameters()) if are_plain(head, _LOGITS_HEAD) else None
    if dtypes is None:
        return called(head, states)
    computed, result = dtypes
    rows = states.to(computed)
    modules = cast(nn.Sequential, head)
    hidden, last = (cast(nn.Linear, modules[i]) for i in (0, 3))
    dropout = cast(nn.Dropout, modules[2])
    for layer, activation in ((hidden, "relu"), (last, "none")):
        bias = None if layer.bias is None else layer.bias.to(computed)
        rows = linear_layer(rows, layer.weight.to(computed), bias, activation)
        if layer is hidden:
            rows = F.dropout(rows, dropout.p, dropout.training)
    return rows.to(result)


def run_network(network: nn.Module, rows: Tensor) -> Tensor:
    """``network(rows)`` for a Linear, or a Sequential of Linears with ReLU or Tanh between them."""
    layers = [network] if isinstance(network, nn.Linear) else network
    if not _is_plain_network(layers):
        return called(network, rows)
    dtypes = dtypes_for(rows, *network.parameters())
    if dtypes is None:
        return called(network, rows)
    computed, result = dtypes
    rows = rows.to(computed)
    modules = list(cast(nn.Sequential, layers))
    for i, module in enumerate(modules):
        if isinstance(module, nn.Linear):
            after = type(modules[i + 1]) if i + 1 < len(modules) else nn.Identity
            activation = _ACTIVATIONS.get(after, "none")
            bias = None if module.bias is None else module.bias.to(computed)
            rows = linear_layer(rows, module.weight.to(computed), bias, activation)
    return rows.to(result)


def _is_plain_network(layers: object) -> bool:
    """One Linear, or Linears each but the last followed by one activation, all plain."""
    if isinstance(layers, list):
        return is_plain(layers[0], nn.Linear)
    if not isinstance(layers, nn.Sequential) or len(layers) % 2 == 0:
        return False
    kinds = [type(layer) for layer in layers]
    return (
        all(kind is nn.Linear for kind in kinds[::2])
        and all(kind in _ACTIVATIONS for kind in kinds[1::2])
        and are_plain(layers, kinds)
    )
