"""The definition of the hazard head, in plain PyTorch: ``σ(w · drop(relu(W x + b)) + c)``."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def hazard_head(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    kept: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Rows ``[rows, inputs]`` → hazards ``[rows]``. ``kept`` ``[rows, units]`` says which hidden
    units dropout keeps, which it multiplies by ``scale``; the others it multiplies by 0."""
    hidden = linear(input, weight, bias).relu()
    if kept is not None:
        hidden = hidden * (kept.to(hidden.dtype) * scale)
    return linear(hidden, last_weight, last_bias).sigmoid().squeeze(1)
