"""The operator of the loss of rates that are constant within intervals in Triton: one launch."""

from __future__ import annotations

import triton
from torch import Tensor

from ...checks import FLOATING, accumulator
from ...operations import implemented_in_triton
from ...survival_nll.operators import empty_nll_and_grad
from ...survival_nll.triton import arguments
from ...survival_nll.triton.sums import MOST_PROGRAMS, share_of_patient
from ...survival_nll.triton.tiles import WARPS, accumulator_of, tile_of
from ...survival_nll.triton.workspace import workspace
from ...triton_support import launch
from .kernel import piecewise_hazard_kernel

_NAME = "piecewise_hazard_nll"


@implemented_in_triton(_NAME)
def piecewise_hazard_nll(
    logits: Tensor,
    event_times: Tensor,
    event_indicators: Tensor,
    sequence_mask: Tensor | None,
    row_starts: Tensor | None,
    unsorted_indices: Tensor | None,
    last_rows: Tensor | None,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    fraction: Tensor | None,
    visit_weight: Tensor | None,
    link: int,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    given = (row_starts, unsorted_indices, last_rows)
    outcomes = (event_times, event_indicators, entry_times, sample_weight)
    patients, slots, _ = arguments.check_logits(
        _NAME, logits, False, sequence_mask, given, outcomes
    )
    arguments.check_numbers(_NAME, logits, "fraction", fraction, (patients,), "[B]", FLOATING)
    dims = "[B, V]" if row_starts is None else "[n_visits]"
    of_visits = ("visit_weight", visit_weight, tuple(logits.shape), dims)
    wide = frozenset({accumulator(logits.dtype)})
    arguments.check_numbers(_NAME, logits, *of_visits, wide)
    arguments.check_rate_link(_NAME, link)
    arguments.check_reduction(_NAME, reduction)
    logits = logits.contiguous()
    weights = None if visit_weight is None else visit_weight.contiguous()
    rows = tuple(None if tensor is None else tensor.contiguous() for tensor in given)
    nll, grad = empty_nll_and_grad(logits, (patients,), reduction, needs_grad)
    if patients == 0 and not reduction:
        return nll, grad

    tile = tile_of(slots, 1)
    programs = min(MOST_PROGRAMS.value, max(1, triton.cdiv(patients, tile["PATIENTS"])))
    partials, ticket = workspace(logits.device) if reduction else (None, None)
    launch(
        piecewise_hazard_kernel,
        (programs,),
        logits,
        *rows,
        *arguments.columns_of_patients(
            event_times, event_indicators, sequence_mask, entry_times, sample_weight
        ),
        *arguments.column(fraction),
        weights,
        nll,
        grad if needs_grad else None,
        partials,
        ticket,
        patients,
        slots,
        patients * slots if row_starts is None else logits.shape[0],
        share_of_patient(reduction, patients),
        ACCUMULATOR=accumulator_of(logits.dtype),
        LINK=link,
        REDUCES=bool(reduction),
        PATIENTS=tile["PATIENTS"],
        VISITS=tile["VISITS"],
        num_warps=WARPS,
    )
    return nll, grad
