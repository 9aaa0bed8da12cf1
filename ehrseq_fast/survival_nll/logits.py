"""The losses of logits over time, padded or packed: what they take, and the choice of backend."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .. import backend
from ..autograd import transformed
from ..backend import must_check_values
from ..checks import INTEGER, REAL
from ..rows import PackedRows
from ..rows.beside import ROWS, fields_of, with_batch
from .checks import (
    check_column,
    check_companions,
    check_hazards,
    check_outcomes,
    check_tensors,
    refuse_mask,
    require_outcomes,
)
from .fused import PADDED, Inputs, Loss, Rows, as_padded, nll, nll_on_host


class LossOfLogits(Loss, Protocol):
    """A loss (:class:`~.fused.Loss`) of one event, or of competing ones."""

    @property
    def competing(self) -> bool:
        """Whether there is a last dimension of causes."""

    def check(self) -> None:
        """``ValueError`` for unknown options."""


def loss_of_logits(
    operation: str,
    loss: LossOfLogits,
    logits: Tensor | PackedRows,
    event_times: Any,
    event_types: Tensor | None,
    more: tuple[Tensor | None, Tensor | None, Tensor | None],
    validate: bool,
    weight_has_gradient: bool = False,
) -> Tensor:
    """The loss of what a caller gave; ``more`` is the mask, entry times and weights.

    Weights that require a gradient get it, by the definition, where ``weight_has_gradient``, and
    are refused elsewhere.
    """
    mask, entry_times, sample_weight = more
    name = "event_types" if loss.competing else "event_indicators"
    rows: Rows = PADDED
    batch = None
    logits, times = with_batch(logits, event_times, "logits")
    types: Any = event_types
    if isinstance(logits, PackedRows):
        refuse_mask(mask)
        batch, logits = logits.batch, logits.values
        *fields, own_times, own_types = fields_of(batch, *ROWS, "event_times", name)
        times = own_times if times is None else times
        types = own_types if types is None else types
        if times is None or types is None:
            raise ValueError(
                f"event_times and {name}: expected with the batch or the call, got None"
            )
        rows = (fields[0], fields[1], fields[2])
    given: Any = (logits, times, types, mask, entry_times, sample_weight)
    dims = (2 if batch is None else 1) + loss.competing
    value = nll_on_host(operation, dims, loss, rows, given, (sample_weight,))
    if value is not None:
        return value
    loss.check()
    allowed = INTEGER | {torch.bool} if loss.competing else REAL
    checked_weight = None if weight_has_gradient else sample_weight
    if batch is not None:
        patients = len(batch)
        check_hazards(logits, ("n_visits", "K") if loss.competing else ("n_visits",), "logits")
        kinds = (name, types, allowed)
        check_companions(logits, patients, times, kinds, entry_times, checked_weight, "logits")
    else:
        times, types = require_outcomes(event_times=times, **{name: types})
        layout = ("B", "V", "K") if loss.competing else ("B", "V")
        kinds = (name, types, allowed)
        check_tensors(logits, layout, times, kinds, mask, entry_times, checked_weight, "logits")
        patients = len(logits)
    if loss.competing and logits.shape[-1] < 1:
        raise ValueError(f"logits: expected at least one cause, got shape {list(logits.shape)}")
    learns = False
    if weight_has_gradient and sample_weight is not None:
        check_column(logits, "sample_weight", sample_weight, REAL, "a real", patients)
        learns = sample_weight.requires_grad and torch.is_grad_enabled()
    inputs: Inputs = (logits, times, types, mask, entry_times, sample_weight)
    device = logits.device.type
    chosen = backend.choose(operation, device, logits.dtype)
    if learns or transformed(logits, sample_weight):
        chosen = "reference"
    if must_check_values(chosen, device, validate):
        check_outcomes(as_padded(rows, inputs), "sigmoid")
    return nll(chosen, rows, inputs, loss)
