"""The operator of DeepHit's ranking loss in Triton: two launches, and one more for the gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ...checks import accumulator
from ...operations import implemented_in_triton
from ...survival_nll.operators import REDUCTIONS, empty_nll_and_grad
from ...survival_nll.triton import arguments
from ...survival_nll.triton.sums import MOST_PROGRAMS
from ...survival_nll.triton.tiles import WARPS, accumulator_of, tile_of
from ...survival_nll.triton.workspace import workspace
from ...triton_support import interpreted, launch
from .kernels import join_later_kernel, ranking_gradient_kernel, sum_later_kernel

FEWEST_OF_GROUP = 8
MOST_GROUPS = 1024
POSITIONS, ROWS = 32, 1024 if interpreted() else 64  # of a tile of the second kernel


@implemented_in_triton("deephit_ranking")
def deephit_ranking(
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
    sigma: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    given = (row_starts, unsorted_indices, last_rows)
    outcomes = (event_times, event_types, entry_times, sample_weight)
    name = "deephit_ranking"
    patients, slots, classes = arguments.check_logits(
        name, logits, competing, sequence_mask, given, outcomes
    )
    arguments.check_sigma(name, sigma)
    logits = logits.contiguous()
    loss, grad = empty_nll_and_grad(logits, (patients,), REDUCTIONS["mean"], needs_grad)
    wide = accumulator(logits.dtype)
    values = slots * classes
    tile = tile_of(slots, classes)
    tiles = _tiles_of_group(patients, tile["PATIENTS"])
    groups = triton.cdiv(patients, tiles * tile["PATIENTS"])
    share = 1 / patients**2 if patients else math.inf  # of none: the loss is 0 * inf, nan

    def empty(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    later_largest, later_sum = empty(groups, values), empty(groups, values, dtype=torch.float64)
    event, own = empty(patients, dtype=torch.int32), empty(patients, dtype=torch.float64)
    largest, of_events = empty(values), empty(values)
    by_event = torch.empty_like(own)
    softmax: tuple[Tensor | None, ...] = (None, None, None)
    if needs_grad:
        softmax = empty(patients), empty(patients), empty(patients, classes, dtype=torch.float64)
    of_patients: tuple[Any, ...] = (
        logits,
        *(None if tensor is None else tensor.contiguous() for tensor in given),
        *arguments.columns_of_patients(
            event_times, event_types, sequence_mask, entry_times, sample_weight
        ),
    )
    sizes = (patients, slots, patients * slots if row_starts is None else logits.shape[0])
    options = {
        "ACCUMULATOR": accumulator_of(logits.dtype),
        "COMPETING": competing,
        "CLASSES": classes,
        "CENSORED_INCLUDED": censored_included,
        **tile,
        "num_warps": WARPS,
    }
    if patients:
        launch(
            sum_later_kernel,
            (groups,),
            *of_patients,
            later_largest,
            later_sum,
            event,
            own,
            *softmax,
            *sizes,
            tiles,
            1 / sigma,
            **options,
        )
    launch(
        join_later_kernel,
        (min(MOST_PROGRAMS.value, max(1, triton.cdiv(values, POSITIONS))),),
        later_largest,
        later_sum,
        event,
        own,
        sample_weight,
        0 if sample_weight is None else sample_weight.stride(0),
        largest,
        of_events,
        by_event,
        loss,
        *workspace(logits.device),
        patients,
        groups,
        values,
        share,
        share / sigma,
        ACCUMULATOR=accumulator_of(logits.dtype),
        POSITIONS=POSITIONS,
        ROWS=ROWS,
        num_warps=WARPS,
    )
    if needs_grad and patients:
        launch(
            ranking_gradient_kernel,
            (triton.cdiv(patients, tile["PATIENTS"]),),
            *of_patients,
            largest,
            of_events,
            by_event,
            *softmax,
            grad,
            *sizes,
            1 / sigma,
            **options,
        )
    return loss, grad


def _tiles_of_group(patients: int, of_tile: int) -> int:
    """So many that the groups' sums take little memory beside the logits."""
    fewest = triton.cdiv(FEWEST_OF_GROUP, of_tile)
    return max(fewest, triton.cdiv(triton.cdiv(patients, of_tile), MOST_GROUPS))
