"""The operator of the losses of a probability mass over time in Triton: one launch."""

from __future__ import annotations

import triton
from torch import Tensor

from ...operations import implemented_in_triton
from ...survival_nll.operators import empty_nll_and_grad
from ...survival_nll.triton import arguments
from ...survival_nll.triton.sums import MOST_PROGRAMS, share_of_patient
from ...survival_nll.triton.tiles import WARPS, accumulator_of, tile_of
from ...survival_nll.triton.workspace import workspace
from ...triton_support import launch
from .kernel import pmf_nll_kernel


@implemented_in_triton("pmf_nll")
def pmf_nll(
    logits: Tensor,
    event_times: Tensor,
    event_types: Tensor,
    sequence_mask: Tensor | None,
    row_starts: Tensor | None,
    unsorted_indices: Tensor | None,
    last_rows: Tensor | None,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    competing: bool,
    censored_included: bool,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    given = (row_starts, unsorted_indices, last_rows)
    outcomes = (event_times, event_types, entry_times, sample_weight)
    patients, slots, classes = arguments.check_logits(
        "pmf_nll", logits, competing, sequence_mask, given, outcomes
    )
    arguments.check_reduction("pmf_nll", reduction)
    logits = logits.contiguous()
    rows = tuple(None if tensor is None else tensor.contiguous() for tensor in given)
    nll, grad = empty_nll_and_grad(logits, (patients,), reduction, needs_grad)
    if patients == 0 and not reduction:
        return nll, grad

    tile = tile_of(slots, classes)
    programs = min(MOST_PROGRAMS.value, max(1, triton.cdiv(patients, tile["PATIENTS"])))
    partials, ticket = workspace(logits.device) if reduction else (None, None)
    launch(
        pmf_nll_kernel,
        (programs,),
        logits,
        *rows,
        *arguments.columns_of_patients(
            event_times, event_types, sequence_mask, entry_times, sample_weight
        ),
        nll,
        grad if needs_grad else None,
        partials,
        ticket,
        patients,
        slots,
        patients * slots if row_starts is None else logits.shape[0],
        share_of_patient(reduction, patients),
        ACCUMULATOR=accumulator_of(logits.dtype),
        COMPETING=competing,
        CLASSES=classes,
        CENSORED_INCLUDED=censored_included,
        REDUCES=bool(reduction),
        **tile,
        num_warps=WARPS,
    )
    return nll, grad
