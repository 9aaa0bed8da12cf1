"""The survival losses in Triton: one launch for loss and gradient, one to scale the gradient.

A program takes tiles of patients x visits x classes (a class is a cause, and with the softmax link
"no event" as well), so that one kernel serves single and competing risks, and padded and packed
batches, whose visits stand ``patient * slots + visit`` or ``row_starts[visit] + rank`` rows in.
Tiles depend on the kind of model and on whether rows are long; lengths and batch sizes are
run-time values.

Sums are taken in a fixed order, without float atomics: every program leaves the sum of its
patients, and the last to finish adds those up.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import implemented_in_triton
from ..triton_support import current, interpreted, launch
from . import raw_checks
from .fused import empty_nll_and_grad
from .reference import rounds_to_one
from .triton_terms import nll_of_logits, nll_of_probabilities, nll_of_softmax, scaled_by

# As the operators number them (schemas.py).
PROBABILITIES: tl.constexpr = tl.constexpr(0)
SOFTMAX: tl.constexpr = tl.constexpr(2)
MEAN = 1

# So that the last program adds all the others' sums in one load.
MOST_PROGRAMS: tl.constexpr = tl.constexpr(1024)


@triton.jit
def _rows(patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows):
    """Where the visits of patients stand, [P, V], and which there are."""
    inside = exists[:, None] & (visit < slots)[None, :]
    if row_starts is None:
        row = patient[:, None] * slots + visit[None, :]
    else:
        start = tl.load(row_starts + visit, mask=visit < slots, other=0)
        rank = tl.load(ranks + patient, mask=exists, other=0)
        last = tl.load(last_rows + patient, mask=exists, other=-1)
        row = start[None, :] + rank[:, None]
        # the last two hold for every batch; they keep a tampered one inside its memory
        inside = inside & (row <= last[:, None]) & (row >= 0) & (row < n_rows)
    return row, inside


@triton.jit
def _whole(column, patient, stride, exists, lowest, highest):
    """One integer per patient, of any dtype, held within bounds that tell apart what matters."""
    wide = tl.load(column + patient * stride, mask=exists, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(wide, lowest), highest).to(tl.int32)


@triton.jit
def _real(column, patient, stride, exists):
    """One number per patient, of any dtype."""
    values = tl.load(column + patient * stride, mask=exists, other=0)
    if values.dtype == tl.bfloat16:
        values = values.to(tl.float32)
    return values.to(tl.float64)


@triton.jit
def _present(mask, where, wanted):
    return wanted & (tl.load(mask + where, mask=wanted, other=0) != 0)


@triton.jit
def _trials(before, at_time, kind, class_of, CENSORED_INCLUDED: tl.constexpr):
    """Which values, [P, V, C], are an event, and which are events or survived."""
    event = at_time & (class_of == kind - 1)
    if CENSORED_INCLUDED:
        survived = before | (at_time & (class_of != kind - 1))
    else:
        survived = before & (class_of >= 0)
    return event, event | survived


@triton.jit
def _softmax_trials(
    before, at_time, kind, class_of, CLASSES: tl.constexpr, CENSORED_INCLUDED: tl.constexpr
):
    """Which visits, [P, V, C], count, and the class that each had."""
    counts = (kind > 0) & (kind < CLASSES)
    if CENSORED_INCLUDED:
        counts = counts | (kind == 0)
    return tl.where(at_time, kind, 0), (before | (at_time & counts)) & (class_of >= 0)


@triton.jit
def _add_up_when_last(loss, partials, ticket, nll, share):
    """Leave this program's sum; the last program adds them all, in their order.

    The ticket is an integer: who is last depends on the schedule, what is added does not. It
    releases the sum that this program wrote and acquires those of the programs before; the
    barriers extend both from the one thread that draws it to the others. The sums are read past
    the first-level cache, which is not coherent. The last program leaves the ticket as it was
    found, at zero, for the next launch on this stream.
    """
    programs = tl.num_programs(0)
    tl.store(partials + tl.program_id(0), loss)
    tl.debug_barrier()
    finished_before = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    if finished_before == programs - 1:
        tl.debug_barrier()
        program = tl.arange(0, MOST_PROGRAMS)
        sums = tl.load(partials + program, mask=program < programs, other=0.0, cache_modifier=".cg")
        tl.store(nll, (tl.sum(sums, axis=0) * share).to(nll.dtype.element_ty))
        tl.store(ticket, 0)


# Alignment and divisibility buy nothing here, since a patient's row starts anywhere; without them
# no batch size, length or view makes Triton compile again. A stride of 1 still does: it coalesces.
_RUN_TIME = ["hazards_patient", "mask_patient", "patients", "slots", "n_rows"]
_POINTERS = ["hazards", "row_starts", "ranks", "last_rows", "times", "types", "mask", "entries",
             "weights", "nll", "grad", "partials", "ticket"]  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def survival_nll_kernel(
    hazards,
    hazards_patient,
    hazards_visit,
    hazards_class,
    row_starts,
    ranks,
    last_rows,
    times,
    times_stride,
    types,
    types_stride,
    mask,
    mask_patient,
    mask_visit,
    entries,
    entries_stride,
    weights,
    weights_stride,
    nll,
    grad,
    partials,
    ticket,
    patients,
    slots,
    n_rows,
    share: tl.float64,  # of one patient in the loss; a quotient here would cost a subroutine
    ACCUMULATOR: tl.constexpr,
    COMPETING: tl.constexpr,
    CLASSES: tl.constexpr,
    LINK: tl.constexpr,
    CENSORED_INCLUDED: tl.constexpr,
    EPS: tl.constexpr,
    NLL_OF_EPS: tl.constexpr,
    REDUCES: tl.constexpr,
    PATIENTS: tl.constexpr,
    VISITS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    class_of = tl.arange(0, BLOCK_CLASSES)[None, None, :]
    loss = tl.zeros([PATIENTS], tl.float64)
    for group in range(tl.program_id(0), tl.cdiv(patients, PATIENTS), tl.num_programs(0)):
        patient = tl.cast(group, tl.int64) * PATIENTS + tl.arange(0, PATIENTS)
        exists = patient < patients
        time = tl.where(exists, _whole(times, patient, times_stride, exists, -1, slots), -1)
        entry = tl.zeros([PATIENTS], tl.int32)
        if entries is not None:
            entry = _whole(entries, patient, entries_stride, exists, -1, slots)
        if COMPETING:
            kind = _whole(types, patient, types_stride, exists, -1, CLASSES + 1)
        else:
            kind = (_real(types, patient, types_stride, exists) != 0.0).to(tl.int32)
        weight = tl.full([PATIENTS], 1.0, tl.float64)
        if weights is not None:
            weight = _real(weights, patient, weights_stride, exists)
        scale = (weight * share).to(ACCUMULATOR)[:, None, None]

        terms_of_visits = tl.zeros([PATIENTS, VISITS], ACCUMULATOR)
        end = tl.minimum(tl.max(time, axis=0) + 1, slots)
        for start in range(0, end, VISITS):
            visit = start + tl.arange(0, VISITS)
            row, inside = _rows(patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows)
            before = inside & (visit[None, :] >= entry[:, None]) & (visit[None, :] < time[:, None])
            at_time = inside & (visit[None, :] == time[:, None])
            if mask is not None:
                of_mask = patient[:, None] * mask_patient + visit.to(tl.int64)[None, :] * mask_visit
                before = _present(mask, of_mask, before)
                at_time = _present(mask, of_mask, at_time)
            if row_starts is None:
                of_hazard = (
                    patient[:, None] * hazards_patient + visit.to(tl.int64)[None, :] * hazards_visit
                )
            else:
                of_hazard = row * hazards_visit
            of_hazards = of_hazard[:, :, None] + class_of.to(tl.int64) * hazards_class

            if LINK == SOFTMAX:
                target, trial = _softmax_trials(
                    before[:, :, None],
                    at_time[:, :, None],
                    kind[:, None, None],
                    class_of,
                    CLASSES,
                    CENSORED_INCLUDED,
                )
                logit = tl.load(
                    hazards + of_hazards, mask=trial & (class_of < CLASSES), other=0.0
                ).to(ACCUMULATOR)
                terms, slopes = nll_of_softmax(logit, class_of, target, scale, CLASSES)
            else:
                event, trial = _trials(
                    before[:, :, None],
                    at_time[:, :, None],
                    kind[:, None, None],
                    class_of,
                    CENSORED_INCLUDED,
                )
                trial = trial & (class_of < CLASSES)
                hazard = tl.load(hazards + of_hazards, mask=trial, other=0.0).to(ACCUMULATOR)
                if LINK == PROBABILITIES:
                    hazard = tl.where(trial, hazard, 0.5)
                    terms, slopes = nll_of_probabilities(hazard, event, scale, EPS, NLL_OF_EPS)
                else:
                    terms, slopes = nll_of_logits(hazard, event, scale)
            terms_of_visits += tl.sum(tl.where(trial, terms, 0.0), axis=2)

            if grad is not None:
                tl.store(
                    grad + (row[:, :, None] * CLASSES + class_of),
                    tl.where(trial, slopes, 0.0).to(grad.dtype.element_ty),
                    mask=inside[:, :, None] & (class_of < CLASSES),
                )

        if grad is not None:
            for start in range(tl.cdiv(end, VISITS) * VISITS, slots, VISITS):
                visit = start + tl.arange(0, VISITS)
                row, inside = _rows(
                    patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows
                )
                tl.store(
                    grad + (row[:, :, None] * CLASSES + class_of),
                    tl.zeros([PATIENTS, VISITS, BLOCK_CLASSES], grad.dtype.element_ty),
                    mask=inside[:, :, None] & (class_of < CLASSES),
                )

        weighted = tl.sum(terms_of_visits, axis=1).to(tl.float64) * weight
        if REDUCES:
            loss += tl.where(exists, weighted, 0.0)
        else:
            tl.store(nll + patient, weighted.to(nll.dtype.element_ty), mask=exists)

    if REDUCES:
        _add_up_when_last(tl.sum(loss, axis=0), partials, ticket, nll, share)


@triton.jit(do_not_specialize=["values"], do_not_specialize_on_alignment=["grad_nll"])
def scale_by_one_kernel(grad, grad_nll, scaled, values, ACCUMULATOR: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    factor = tl.load(grad_nll).to(ACCUMULATOR)
    if start + BLOCK <= values:  # without a mask, which would keep loads narrow
        product = scaled_by(tl.load(grad + at).to(ACCUMULATOR), factor)
        tl.store(scaled + at, product.to(scaled.dtype.element_ty))
    else:
        product = scaled_by(tl.load(grad + at, mask=at < values, other=0.0).to(ACCUMULATOR), factor)
        tl.store(scaled + at, product.to(scaled.dtype.element_ty), mask=at < values)


@triton.jit(
    do_not_specialize=["patients", "slots", "n_rows"],
    do_not_specialize_on_alignment=["row_starts", "ranks", "last_rows", "grad_nll"],
)
def scale_by_patient_kernel(
    grad,
    grad_nll,
    grad_nll_stride,
    scaled,
    row_starts,
    ranks,
    last_rows,
    patients,
    slots,
    n_rows,
    ACCUMULATOR: tl.constexpr,
    CLASSES: tl.constexpr,
    PATIENTS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    patient = tl.program_id(0).to(tl.int64) * PATIENTS + tl.arange(0, PATIENTS)
    exists = patient < patients
    factor = tl.load(grad_nll + patient * grad_nll_stride, mask=exists, other=0.0)[:, None]
    for start in range(0, slots * CLASSES, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        row, inside = _rows(
            patient, exists, position // CLASSES, slots, n_rows, row_starts, ranks, last_rows
        )
        at = row * CLASSES + (position % CLASSES)[None, :]
        product = scaled_by(tl.load(grad + at, mask=inside, other=0.0).to(ACCUMULATOR), factor)
        tl.store(scaled + at, product.to(scaled.dtype.element_ty), mask=inside)


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _nll_of_eps(eps: float, dtype: torch.dtype) -> float:
    """-log(eps) where 1 - eps is rounded to 1, else 0."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return -math.log(eps) if eps > 0 and rounds_to_one(1 - eps, wide) else 0.0


def _share(reduction: int, patients: int) -> float:
    if reduction != MEAN:
        return 1.0
    return 1.0 / patients if patients else math.inf  # the mean of none is 0 * inf: nan


# In a tile: four for each of a GPU's threads. In the interpreter an operation on a tile is one call
# of NumPy, so tiles are large and few there.
_WARPS = 4
_VALUES = 8192 if interpreted() else 4 * 32 * _WARPS


def _tile(slots: int, classes: int) -> dict[str, int]:
    """Few patients and many visits, unless rows are short."""
    block_classes = triton.next_power_of_2(classes)
    visits = max(1, min(16 if slots <= 16 else 128, _VALUES // block_classes))
    patients = max(1, _VALUES // (visits * block_classes))
    return {"PATIENTS": patients, "VISITS": visits, "BLOCK_CLASSES": block_classes}


# row_starts, unsorted_indices, last_rows of a packed batch
Rows = tuple[Tensor | None, Tensor | None, Tensor | None]

_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _fresh_workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    partials = torch.empty(MOST_PROGRAMS.value, dtype=torch.float64, device=device)
    return partials, torch.zeros(1, dtype=torch.int32, device=device)


def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the programs' sums, and a ticket at zero.

    Launches of one stream follow one another, so they can share both: each finds the ticket at
    zero because the one before left it so, and no launch is spent on zeroing it. Launches of
    different streams can overlap and must not.

    A captured CUDA graph is another matter. It may be replayed on any stream, beside launches that
    use that stream's workspace, so its launches get one of their own, zeroed inside the graph.
    It is allocated in the graph's memory, which other graphs of that pool use again, so it must
    not be kept.
    """
    if device.type != "cuda":
        return _fresh_workspace(device)
    with current(device):
        if torch.cuda.is_current_stream_capturing():
            return _fresh_workspace(device)
        stream = torch.cuda.current_stream(device)
        key = (device.index, stream.cuda_stream)
        workspace = _workspaces.get(key)
        if workspace is None:
            # torch.compile's warm-up before a capture sends this thread's allocations to the
            # graph's pool and refuses those that stay. Another thread's go where they always do.
            with ThreadPoolExecutor(1) as elsewhere:
                workspace = elsewhere.submit(_unset_workspace, device, stream).result()
            workspace[1].zero_()
            _workspaces[key] = workspace
    return workspace


def _unset_workspace(device: torch.device, stream: Any) -> tuple[Tensor, Tensor]:
    # on the stream that will use it: what another stream freed, it may still be writing to
    with torch.cuda.stream(stream):
        partials = torch.empty(MOST_PROGRAMS.value, dtype=torch.float64, device=device)
        return partials, torch.empty(1, dtype=torch.int32, device=device)


def _launch_nll(
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
) -> tuple[Tensor, Tensor]:
    patients, slots, n_rows, classes = sizes
    operation = "competing_risks_nll" if competing else "survival_nll"
    raw_checks.check_options(operation, competing, classes, link, eps, reduction)
    raw_checks.check_patients(
        hazards, patients, competing, event_times, event_types, entry_times, sample_weight
    )
    if slots * classes >= 2**31:  # positions within a row are int32
        raise ValueError("hazards: a patient's row has more than 2^31 - 1 values")
    device = hazards.device
    nll, grad = empty_nll_and_grad(hazards, (patients,), reduction, needs_grad)
    if patients == 0 and not reduction:
        return nll, grad

    tile = _tile(slots, classes)
    programs = min(MOST_PROGRAMS.value, max(1, triton.cdiv(patients, tile["PATIENTS"])))
    partials, ticket = _workspace(device) if reduction else (None, None)
    launch(
        survival_nll_kernel,
        (programs,),
        hazards,
        *strides,
        *rows,
        event_times,
        event_times.stride(0),
        event_types,
        event_types.stride(0),
        sequence_mask,
        *(sequence_mask.stride() if sequence_mask is not None else (0, 0)),
        entry_times,
        0 if entry_times is None else entry_times.stride(0),
        sample_weight,
        0 if sample_weight is None else sample_weight.stride(0),
        nll,
        grad if needs_grad else None,
        partials,
        ticket,
        patients,
        slots,
        n_rows,
        _share(reduction, patients),
        ACCUMULATOR=_accumulator(hazards.dtype),
        COMPETING=competing,
        CLASSES=classes,
        LINK=link,
        CENSORED_INCLUDED=censored_included,
        EPS=eps if link == PROBABILITIES.value else 0.0,
        NLL_OF_EPS=_nll_of_eps(eps, hazards.dtype) if link == PROBABILITIES.value else 0.0,
        REDUCES=bool(reduction),
        **tile,
        num_warps=_WARPS,
        # what float32 needs, so that five blocks are at work at a time
        maxnreg=255 if hazards.dtype == torch.float64 else 96,
    )
    return nll, grad


@implemented_in_triton("survival_nll")
def survival_nll(
    hazards: Tensor, event_times: Tensor, event_types: Tensor, mask: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    raw_checks.check_hazards("survival_nll", hazards, (2,), "[B, V]")
    raw_checks.check_mask(hazards, mask)
    patients, slots = hazards.shape
    strides = (*hazards.stride(), 0)
    sizes = (patients, slots, patients * slots, 1)
    outcomes = (event_times, event_types, mask)
    return _launch_nll(hazards, strides, (None,) * 3, sizes, False, *outcomes, *others)


@implemented_in_triton("competing_risks_nll")
def competing_risks_nll(
    hazards: Tensor, event_times: Tensor, event_types: Tensor, mask: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    raw_checks.check_hazards("competing_risks_nll", hazards, (3,), "[B, V, K]")
    raw_checks.check_mask(hazards, mask)
    patients, slots, classes = hazards.shape
    sizes = (patients, slots, patients * slots, classes)
    strides, outcomes = hazards.stride(), (event_times, event_types, mask)
    return _launch_nll(hazards, strides, (None,) * 3, sizes, True, *outcomes, *others)


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
    shape = "[n_visits] or [n_visits, K]"
    raw_checks.check_hazards("packed_survival_nll", hazards, (1, 2), shape)
    raw_checks.check_rows(hazards, row_starts, unsorted_indices, last_rows)
    competing = hazards.dim() == 2
    strides = (0, hazards.stride(0), hazards.stride(1) if competing else 0)
    classes = hazards.shape[1] if competing else 1
    rows = (row_starts.contiguous(), unsorted_indices.contiguous(), last_rows.contiguous())
    sizes = (len(unsorted_indices), len(row_starts) - 1, hazards.shape[0], classes)
    return _launch_nll(
        hazards, strides, rows, sizes, competing, event_times, event_types, None, *others
    )


@implemented_in_triton("survival_nll_scale")
def survival_nll_scale(
    grad: Tensor,
    grad_nll: Tensor,
    row_starts: Tensor | None,
    unsorted_indices: Tensor | None,
    last_rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    raw_checks.check_scale(grad, grad_nll, (row_starts, unsorted_indices, last_rows), dtype)
    grad = grad.contiguous()
    scaled = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    if grad.numel() == 0:
        return scaled
    accumulator = _accumulator(dtype)
    if grad_nll.dim() == 0:
        block = 16 * _VALUES if interpreted() else 1024
        launch(
            scale_by_one_kernel,
            (triton.cdiv(grad.numel(), block),),
            grad,
            grad_nll,
            scaled,
            grad.numel(),
            ACCUMULATOR=accumulator,
            BLOCK=block,
        )
        return scaled
    patients = grad_nll.shape[0]
    rows: Rows = (None, None, None)
    if row_starts is None or unsorted_indices is None or last_rows is None:
        classes, slots = 1, grad.numel() // patients
    else:
        rows = (row_starts.contiguous(), unsorted_indices.contiguous(), last_rows.contiguous())
        classes, slots = grad[0].numel(), len(row_starts) - 1
    positions = 16 if slots * classes <= 16 else 128
    tile = {"PATIENTS": _VALUES // positions, "POSITIONS": positions}
    launch(
        scale_by_patient_kernel,
        (triton.cdiv(patients, tile["PATIENTS"]),),
        grad,
        grad_nll,
        grad_nll.stride(0),
        scaled,
        *rows,
        patients,
        slots,
        grad.shape[0],
        ACCUMULATOR=accumulator,
        CLASSES=classes,
        **tile,
        num_warps=_WARPS,
    )
    return scaled
