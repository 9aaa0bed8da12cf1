"""The operators of the survival losses in Triton: one launch for loss and gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ...checks import accumulator
from ...operations import implemented_in_triton
from ...triton_support import launch
from ..operators import empty_nll_and_grad
from ..reference import rounds_to_one
from . import arguments
from .kernel_nll import PROBABILITIES, survival_nll_kernel
from .sums import MOST_PROGRAMS, share_of_patient
from .tiles import WARPS, accumulator_of, tile_of
from .workspace import workspace


def _nll_of_eps(eps: float, dtype: torch.dtype) -> float:
    """-log(eps) where 1 - eps is rounded to 1, else 0."""
    to_one = rounds_to_one(1 - eps, accumulator(dtype))
    return -math.log(eps) if eps > 0 and to_one else 0.0


def _registers(dtype: torch.dtype, weighted: bool) -> int:
    """What float32 needs, so that five blocks fit a multiprocessor, or four with weights."""
    return 255 if dtype == torch.float64 else 128 if weighted else 96


# row_starts, unsorted_indices, last_rows of a packed batch
Rows = tuple[Tensor | None, Tensor | None, Tensor | None]


def nll_and_grad(
    operation: str,
    hazards: Tensor,
    strides: tuple[int, ...],  # of patient, visit and class
    rows: Rows,
    sizes: tuple[int, int, int, int],  # patients, slots, rows, classes
    competing: bool,
    event_times: Tensor,
    event_types: Tensor,
    sequence_mask: Tensor | None,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
    link: int,
    censored_included: bool,
    eps: float,
    reduction: int,
    needs_grad: bool,
    visit_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of contiguous hazards whose shape has been checked: what strides they have
    decides which threads a compiled kernel gives them to, and so the order of its sums. Weights of
    visits are contiguous, too, and have the loss's dtype."""
    patients, slots, n_rows, classes = sizes
    arguments.check_options(operation, competing, classes, link, eps, reduction)
    outcomes = (event_times, event_types, entry_times, sample_weight)
    arguments.check_patients(operation, hazards, patients, competing, *outcomes)
    arguments.check_row_length(operation, slots, classes)
    device = hazards.device
    nll, grad = empty_nll_and_grad(hazards, (patients,), reduction, needs_grad)
    if patients == 0 and not reduction:
        return nll, grad

    tile = tile_of(slots, classes)
    programs = min(MOST_PROGRAMS.value, max(1, triton.cdiv(patients, tile["PATIENTS"])))
    partials, ticket = workspace(device) if reduction else (None, None)
    launch(
        survival_nll_kernel,
        (programs,),
        hazards,
        *strides,
        *rows,
        *arguments.columns_of_patients(
            event_times, event_types, sequence_mask, entry_times, sample_weight
        ),
        visit_weight,
        nll,
        grad if needs_grad else None,
        partials,
        ticket,
        patients,
        slots,
        n_rows,
        share_of_patient(reduction, patients),
        ACCUMULATOR=accumulator_of(hazards.dtype),
        COMPETING=competing,
        CLASSES=classes,
        LINK=link,
        CENSORED_INCLUDED=censored_included,
        EPS=eps if link == PROBABILITIES.value else 0.0,
        NLL_OF_EPS=_nll_of_eps(eps, hazards.dtype) if link == PROBABILITIES.value else 0.0,
        REDUCES=bool(reduction),
        **tile,
        num_warps=WARPS,
        maxnreg=_registers(hazards.dtype, visit_weight is not None),
    )
    return nll, grad


@implemented_in_triton("survival_nll")
def survival_nll(
    hazards: Tensor, event_times: Tensor, event_types: Tensor, mask: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    name = "survival_nll"
    arguments.check_hazards(name, hazards, (2,), "[B, V]")
    arguments.check_mask(name, hazards, mask)
    hazards = hazards.contiguous()
    patients, slots = hazards.shape
    strides = (*hazards.stride(), 0)
    sizes = (patients, slots, patients * slots, 1)
    outcomes = (event_times, event_types, mask)
    return nll_and_grad(name, hazards, strides, (None,) * 3, sizes, False, *outcomes, *others)


@implemented_in_triton("competing_risks_nll")
def competing_risks_nll(
    hazards: Tensor, event_times: Tensor, event_types: Tensor, mask: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    name = "competing_risks_nll"
    arguments.check_hazards(name, hazards, (3,), "[B, V, K]")
    arguments.check_mask(name, hazards, mask)
    hazards = hazards.contiguous()
    patients, slots, classes = hazards.shape
    sizes = (patients, slots, patients * slots, classes)
    strides, outcomes = hazards.stride(), (event_times, event_types, mask)
    return nll_and_grad(name, hazards, strides, (None,) * 3, sizes, True, *outcomes, *others)


@implemented_in_triton("packed_survival_nll")
def packed_survival_nll(
    hazards: Tensor,
    row_starts: Tensor,
    unsorted_indices: Tensor,
    last_rows: Tensor,
    event_times: Tensor,
    event_types: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    name = "packed_survival_nll"
    arguments.check_hazards(name, hazards, (1, 2), "[n_visits] or [n_visits, K]")
    arguments.check_rows(name, hazards, row_starts, unsorted_indices, last_rows)
    hazards = hazards.contiguous()
    competing = hazards.dim() == 2
    strides = (0, hazards.stride(0), hazards.stride(1) if competing else 0)
    classes = hazards.shape[1] if competing else 1
    rows = (row_starts.contiguous(), unsorted_indices.contiguous(), last_rows.contiguous())
    sizes = (len(unsorted_indices), len(row_starts) - 1, hazards.shape[0], classes)
    outcomes = (event_times, event_types, None)
    return nll_and_grad(name, hazards, strides, rows, sizes, competing, *outcomes, *others)
