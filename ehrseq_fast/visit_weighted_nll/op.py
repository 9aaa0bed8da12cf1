"""The survival losses with a weight for each visit: their checks, and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..autograd import transformed
from ..backend import must_check_values
from ..checks import accumulator
from ..survival_nll.checks import (
    check_outcomes,
    check_probabilities,
    refuse_visit_weight,
    visits_read,
)
from ..survival_nll.fused import Rows, SurvivalNll, as_padded, nll, nll_on_host
from ..survival_nll.visit_weight import check_weight, is_accumulated
from . import operators as _operators  # noqa: F401  registers


class VisitWeightedNll(SurvivalNll):
    """The survival losses whose inputs end with the weights of visits, ``[B, V]`` or
    ``[n_visits]``."""

    __slots__ = ()
    of_visits = (6,)

    def compute(self, ops: Any, rows: Rows, inputs: Any, needs_grad: bool) -> Any:
        competing = inputs[0].dim() == (3 if rows[0] is None else 2)
        numbered = (competing, *self.numbered(), needs_grad)
        return ops.visit_weighted_nll.default(*inputs[:4], *rows, *inputs[4:], *numbered)


def survival_on_host(
    operation: str,
    dims: int,
    options: SurvivalNll,
    rows: Rows,
    inputs: Any,
    visit_weight: Any,
) -> Tensor | None:
    """:func:`~..survival_nll.fused.nll_on_host` of the survival losses, with weights of visits
    where there are any."""
    hazards, sample_weight = inputs[0], inputs[5]
    if visit_weight is None:
        return nll_on_host(operation, dims, options, rows, inputs, (sample_weight,))
    if not is_accumulated(visit_weight, hazards):
        return None
    weights = (sample_weight, visit_weight)
    loss = VisitWeightedNll(*options)
    inputs = (*inputs, visit_weight)
    return nll_on_host("visit_weighted_nll", dims, loss, rows, inputs, weights)


def weighted_nll(
    rows: Rows, inputs: Any, options: SurvivalNll, visit_weight: Any, validate: bool
) -> Tensor:
    """The loss of arguments that have been checked, but for values and the weights."""
    hazards, sample_weight = inputs[0], inputs[5]
    device = hazards.device.type
    check_weight(rows, hazards, visit_weight, "hazards")
    chosen = backend.choose("visit_weighted_nll", device, hazards.dtype)
    if transformed(hazards, sample_weight, visit_weight):
        chosen = "reference"
    elif visit_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "visit_weight: expected no requires_grad, as the loss has a gradient for hazards "
            "alone; detach it, or differentiate with torch.func"
        )
    loss = VisitWeightedNll(*options)
    inputs = (*inputs, visit_weight.to(accumulator(hazards.dtype)))
    if must_check_values(chosen, device, validate):
        *padded, weight = as_padded(rows, inputs, loss)
        check_outcomes(tuple(padded), options.link)
        check_probabilities(tuple(padded), options)
        read = visits_read(tuple(padded), options.censored_visit == "included")
        refuse_visit_weight(weight, read)
    return nll(chosen, rows, inputs, loss)
