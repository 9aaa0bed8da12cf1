"""The survival losses of packed batches: hazards as rows of visits, nothing padded or unpadded."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..arrays import kind_of
from ..autograd import transformed
from ..backend import must_check_values
from ..batch import PackedVisits
from ..checks import INTEGER, REAL
from ..rows import PackedRows
from ..rows.beside import ROWS, fields_of
from ..visit_weighted_nll.op import survival_on_host, weighted_nll
from .checks import (
    check_companions,
    check_entries_and_weights,
    check_hazards,
    check_link,
    check_outcomes,
    check_probabilities,
    check_single_link,
    fits_link,
)
from .fused import Inputs, Rows, SurvivalNll, as_padded, nll
from .visit_weight import weight_of_rows

_KINDS = INTEGER | {torch.bool}
_Types = tuple[str, Tensor | None, frozenset[torch.dtype]]


def packed_survival_nll(
    hazards: Tensor | PackedRows,
    batch: PackedVisits | None = None,
    *,
    event_times: Tensor | None = None,
    event_indicators: Tensor | None = None,
    from_logits: bool = False,
    link: str = "sigmoid",
    censored_visit: str = "excluded",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    visit_weight: Tensor | PackedRows | None = None,
    eps: float = 1e-7,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """:func:`discrete_time_survival_nll` of one hazard per row of a packed batch.

    Args:
        hazards: ``[n_visits]``, rows in the order of ``batch``: probabilities, or logits with
            ``from_logits=True``. Or :class:`~ehrseq_fast.PackedRows`, which hold their batch.
        batch: whose visits they are; its ``event_times`` and ``event_indicators`` are the outcomes.
        event_times, event_indicators: ``[B]`` in the caller's order, in place of the batch's.
        entry_times, sample_weight: ``[B]`` in the caller's order.
        visit_weight: ``[n_visits]``, or :class:`~ehrseq_fast.PackedRows` of the same batch.

    All else as for :func:`discrete_time_survival_nll`; ``reduction="none"`` gives ``[B]`` in the
    caller's order of patients.

    Raises:
        ValueError: if neither the batch nor the call has outcomes; else as there.
        TypeError: as there.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PackedVisits, packed_survival_nll
        >>> batch = PackedVisits.from_lists(
        ...     [[[1]], [[2], [3]]], event_times=[0, 1], event_indicators=[1, 0]
        ... )
        >>> packed_survival_nll(torch.tensor([0.2, 0.1, 0.3]), batch, reduction="none")
        tensor([2.3026, 0.2231])
    """
    hazards, batch = _rows_and_batch(hazards, batch)
    options = SurvivalNll(link if from_logits else "probabilities", censored_visit, eps, reduction)
    given = ("event_indicators", event_indicators, REAL)
    rows, inputs = _inputs(hazards, batch, event_times, given, entry_times, sample_weight)
    if fits_link(link, from_logits) and isinstance(batch, PackedVisits):
        value = survival_on_host("packed_survival_nll", 1, options, rows, inputs, visit_weight)
        if value is not None:
            return value
    is_own = event_times is None and event_indicators is None
    _check_inputs(batch, (), rows, inputs, given, is_own)
    check_single_link(link, from_logits)
    return _packed_nll(batch, rows, inputs, options, visit_weight, validate)


def packed_competing_risks_nll(
    hazards: Tensor | PackedRows,
    batch: PackedVisits | None = None,
    *,
    event_times: Tensor | None = None,
    event_types: Tensor | None = None,
    from_logits: bool = False,
    link: str = "sigmoid",
    censored_visit: str = "excluded",
    entry_times: Tensor | None = None,
    sample_weight: Tensor | None = None,
    visit_weight: Tensor | PackedRows | None = None,
    eps: float = 1e-7,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """:func:`competing_risks_nll` of K hazards (or logits) per row of a packed batch.

    Args:
        hazards: ``[n_visits, K]``, or ``[n_visits, K + 1]`` logits for ``link="softmax"``.
        batch: whose visits they are; its ``event_times`` and ``event_types`` are the outcomes.
        event_times, event_types: ``[B]`` in the caller's order, in place of the batch's.

    All else as for :func:`competing_risks_nll`.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PackedVisits, packed_competing_risks_nll
        >>> batch = PackedVisits.from_lists([[[1], [2]]], event_times=[1], event_types=[1])
        >>> packed_competing_risks_nll(torch.tensor([[0.1, 0.2], [0.5, 0.3]]), batch)
        tensor(1.0217)
    """
    hazards, batch = _rows_and_batch(hazards, batch)
    options = SurvivalNll(link if from_logits else "probabilities", censored_visit, eps, reduction)
    given = ("event_types", event_types, _KINDS)
    rows, inputs = _inputs(hazards, batch, event_times, given, entry_times, sample_weight)
    if fits_link(link, from_logits, "softmax") and isinstance(batch, PackedVisits):
        value = survival_on_host("packed_survival_nll", 2, options, rows, inputs, visit_weight)
        if value is not None:
            return value
    is_own = event_times is None and event_types is None
    trailing = ("K + 1",) if link == "softmax" else ("K",)
    _check_inputs(batch, trailing, rows, inputs, given, is_own)
    check_link(hazards, link, from_logits)
    return _packed_nll(batch, rows, inputs, options, visit_weight, validate)


def _rows_and_batch(
    hazards: Tensor | PackedRows, batch: PackedVisits | None
) -> tuple[Tensor, PackedVisits]:
    if not isinstance(hazards, PackedRows):
        if batch is None:
            raise TypeError("batch: expected a PackedVisits, got None (only PackedRows hold one)")
        if not (hasattr(type(batch), "row_starts") or hasattr(batch, "row_starts")):
            raise TypeError(f"batch: expected a PackedVisits, got {kind_of(batch)}")
        return hazards, batch
    if batch is None or batch is hazards.batch:
        return hazards.values, hazards.batch
    if not batch.same_visits(hazards.batch):
        raise ValueError(
            "batch: expected that of the PackedRows in hazards, got another; pass hazards.values "
            "for rows of another batch with the same layout"
        )
    return hazards.values, batch


def _inputs(
    hazards: Tensor,
    batch: PackedVisits,
    event_times: Tensor | None,
    event_types: _Types,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
) -> tuple[Rows, Inputs]:
    """What the loss is computed of, with the batch's outcomes where none are given."""
    name, types, _ = event_types
    names = (*ROWS, "event_times", name)
    row_starts, ranks, last_rows, own_times, own_types = fields_of(batch, *names)
    times = own_times if event_times is None else event_times
    kinds = own_types if types is None else types
    if times is None or kinds is None:
        raise ValueError(f"event_times and {name}: expected with the batch or the call, got None")
    rows = (row_starts, ranks, last_rows)
    return rows, (hazards, times, kinds, None, entry_times, sample_weight)


def _check_inputs(
    batch: PackedVisits,
    trailing: tuple[str, ...],
    rows: Rows,
    inputs: Inputs,
    event_types: _Types,
    is_own: bool,
) -> None:
    """Refuse inputs whose kind, dtype, shape or device does not fit the batch; ``is_own`` says that
    the outcomes are its own."""
    hazards, times, kinds, _, entry_times, sample_weight = inputs
    row_starts = rows[0]
    assert row_starts is not None
    check_hazards(hazards, ("n_visits", *trailing))
    if hazards.shape[0] != batch.n_visits:
        raise ValueError(
            f"hazards: expected one row per visit, n_visits = {batch.n_visits}, "
            f"got {list(hazards.shape)}"
        )
    if row_starts.device != hazards.device:
        raise ValueError(
            f"batch: expected on {hazards.device}, where hazards is, got "
            f"{row_starts.device}: move it with batch.to(device)"
        )
    if is_own and isinstance(batch, PackedVisits):  # whose outcomes were checked when it was made
        check_entries_and_weights(hazards, len(batch), entry_times, sample_weight)
    else:
        name, _, allowed = event_types
        given = (name, kinds, allowed)
        check_companions(hazards, len(batch), times, given, entry_times, sample_weight)


def _packed_nll(
    batch: PackedVisits,
    rows: Rows,
    inputs: Inputs,
    options: SurvivalNll,
    visit_weight: Tensor | PackedRows | None,
    validate: bool,
) -> Tensor:
    hazards = inputs[0]
    device = hazards.device.type
    options.check()
    if visit_weight is not None:
        weight = weight_of_rows(hazards, batch, visit_weight)
        return weighted_nll(rows, inputs, options, weight, validate)
    chosen = backend.choose("packed_survival_nll", device, hazards.dtype)
    if transformed(hazards, inputs[5]):
        chosen = "reference"
    if chosen != "cpu" and must_check_values(chosen, device, validate):
        padded = as_padded(rows, inputs)
        check_outcomes(padded, options.link)
        check_probabilities(padded, options)
    return nll(chosen, rows, inputs, options)
