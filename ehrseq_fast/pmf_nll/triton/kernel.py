"""The kernel of the losses of a probability mass over time in Triton: loss and gradient in one
launch.

A program takes tiles of patients x visits x classes (a class is a cause), padded or packed: a visit
is row ``patient * slots + visit`` or ``row_starts[visit] + rank``. It goes over the visits once for
the sums of two log-sum-exps with running maxima, those of the outcome and of the other classes at
risk, and once more where a gradient is needed. The formula is in ``csrc/pmf_nll/kernels.cuh``.

Sums are taken in a fixed order, without float atomics.
"""

import triton
import triton.language as tl

from ...survival_nll.triton.columns import present, real, whole
from ...survival_nll.triton.rows import rows_of
from ...survival_nll.triton.sums import add_up_when_last
from ...survival_nll.triton.terms import exp_nonpositive, log1p, signed_zero


@triton.jit
def _tile_of(
    logits, mask, mask_patient, mask_visit, patient, visit, row, inside, entry, time, kind, later,
    class_of, ACCUMULATOR: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Logits [P, V, C], -inf where none is at risk; which are at risk; which are the outcome: the
    value of the event, or all visits from ``later`` on."""
    at_risk = inside & (visit[None, :] >= entry[:, None])
    if mask is not None:
        of_mask = patient[:, None] * mask_patient + visit.to(tl.int64)[None, :] * mask_visit
        at_risk = present(mask, of_mask, at_risk)
    counts = at_risk[:, :, None] & (class_of < CLASSES)
    x = tl.load(logits + (row[:, :, None] * CLASSES + class_of), mask=counts, other=0.0)
    x = tl.where(counts, x.to(ACCUMULATOR), -float("inf"))
    at_time = (visit[None, :] == time[:, None])[:, :, None]
    is_event = at_time & (class_of == (kind - 1)[:, None, None])
    is_later = (visit[None, :] >= later[:, None])[:, :, None] & (class_of >= 0)
    return x, counts, tl.where(kind[:, None, None] != 0, is_event, is_later)


@triton.jit
def _largest(largest, x):
    """The running maximum of each patient, and it as what to subtract, 0 for -inf."""
    largest = tl.maximum(largest, tl.max(tl.max(x, axis=2), axis=1))
    return largest, tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def _loss(others_largest, others, outcome_largest, outcome):
    """log(1 + e^d), and what e^(logit - largest) is multiplied by for the derivative, of the other
    classes and of the outcome; from two log-sum-exps."""
    if others.dtype == tl.float64:
        large = tl.full(others.shape, 600.0, others.dtype)  # e to which is far from infinity
    else:
        large = tl.full(others.shape, 40.0, others.dtype)
    apart = others_largest - outcome_largest
    is_large = apart > large
    held = tl.where(is_large, large, apart)
    power = exp_nonpositive(tl.where(held > 0.0, -held, held))
    ratio = others / outcome
    odds = tl.where(held > 0.0, 1.0 / power, power) * ratio
    nll = tl.where(is_large, apart + tl.log(ratio), log1p(odds))
    chance = tl.where(is_large, ratio / ratio, odds / (1.0 + odds))
    chance = tl.where(outcome == 0.0, 1.0, chance)  # the event cannot be
    certain = others == 0.0
    none = outcome - outcome  # 0; a NaN stays one
    nll = tl.where(outcome == 0.0, float("inf") + others, nll)
    return (
        tl.where(certain, none, nll),
        tl.where(certain, none, chance / others),
        tl.where(certain, none, -chance / outcome),
    )


# As for the losses of hazards (survival_nll/triton/kernel_nll.py).
_RUN_TIME = ["mask_patient", "patients", "slots", "n_rows"]
_POINTERS = ["logits", "row_starts", "ranks", "last_rows", "times", "types", "mask", "entries",
             "weights", "nll", "grad", "partials", "ticket"]  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def pmf_nll_kernel(
    logits,
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
    CENSORED_INCLUDED: tl.constexpr,
    REDUCES: tl.constexpr,
    PATIENTS: tl.constexpr,
    VISITS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """Loss and, unless ``grad`` is None, its gradient before it is scaled.

    Grid: programs that walk over the patients. A tile is ``[PATIENTS, VISITS, BLOCK_CLASSES]``
    values of the logits, which are contiguous. Reads the logits at risk, the outcomes and the mask;
    writes ``grad`` (every value of these patients) and, of each patient, ``nll``; or, if
    ``REDUCES``, one of ``partials``, which the last program adds up into ``nll``.
    """
    class_of = tl.arange(0, BLOCK_CLASSES)[None, None, :]
    loss = tl.zeros([PATIENTS], tl.float64)
    for group in range(tl.program_id(0), tl.cdiv(patients, PATIENTS), tl.num_programs(0)):
        patient = tl.cast(group, tl.int64) * PATIENTS + tl.arange(0, PATIENTS)
        exists = patient < patients
        time = whole(times, patient, times_stride, exists, -1, slots)
        entry = tl.zeros([PATIENTS], tl.int32)
        if entries is not None:
            entry = whole(entries, patient, entries_stride, exists, -1, slots)
        if COMPETING:
            kind = whole(types, patient, types_stride, exists, -1, CLASSES + 1)
        else:
            kind = (real(types, patient, types_stride, exists) != 0.0).to(tl.int32)
        weight = tl.full([PATIENTS], 1.0, tl.float64)
        if weights is not None:
            weight = real(weights, patient, weights_stride, exists)
        later = time
        if CENSORED_INCLUDED:
            later = time + 1

        # "beyond", whose logit is 0, is the outcome of a censoring and among the others of an event
        seen = kind != 0
        others = seen.to(ACCUMULATOR)
        outcome = 1.0 - others
        others_largest = tl.where(seen, 0.0, -float("inf")).to(ACCUMULATOR)
        outcome_largest = tl.where(seen, -float("inf"), 0.0).to(ACCUMULATOR)
        found = tl.zeros([PATIENTS], tl.int32)
        for start in range(0, slots, VISITS):
            visit = start + tl.arange(0, VISITS)
            row, inside = rows_of(
                patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows
            )
            x, counts, is_outcome = _tile_of(
                logits, mask, mask_patient, mask_visit, patient, visit, row, inside, entry, time,
                kind, later, class_of, ACCUMULATOR, CLASSES,
            )  # fmt: skip
            before, outcome_before = others_largest, outcome_largest
            others_largest, base = _largest(before, tl.where(is_outcome, -float("inf"), x))
            outcome_largest, outcome_base = _largest(
                outcome_before, tl.where(is_outcome, x, -float("inf"))
            )
            bases = tl.where(is_outcome, outcome_base[:, None, None], base[:, None, None])
            terms = exp_nonpositive(x - bases)
            others *= exp_nonpositive(before - base)
            others += tl.sum(tl.sum(tl.where(counts & ~is_outcome, terms, 0.0), axis=2), axis=1)
            outcome *= exp_nonpositive(outcome_before - outcome_base)
            outcome += tl.sum(tl.sum(tl.where(counts & is_outcome, terms, 0.0), axis=2), axis=1)
            found += tl.sum(tl.sum((counts & is_outcome).to(tl.int32), axis=2), axis=1)

        # an event outside the patient's visits counts as "beyond", as in the formula
        lost = seen & (found == 0)
        outcome_largest = tl.where(lost, 0.0, outcome_largest)
        outcome = tl.where(lost, 1.0, outcome)
        of_patient, of_others, of_outcome = _loss(others_largest, others, outcome_largest, outcome)

        if grad is not None:
            scale = (weight * share).to(ACCUMULATOR)
            of_others = (of_others * scale)[:, None, None]
            of_outcome = (of_outcome * scale)[:, None, None]
            for start in range(0, slots, VISITS):
                visit = start + tl.arange(0, VISITS)
                row, inside = rows_of(
                    patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows
                )
                x, counts, is_outcome = _tile_of(
                    logits, mask, mask_patient, mask_visit, patient, visit, row, inside, entry,
                    time, kind, later, class_of, ACCUMULATOR, CLASSES,
                )  # fmt: skip
                bases = tl.where(
                    is_outcome, outcome_largest[:, None, None], others_largest[:, None, None]
                )
                bases = tl.where(bases == -float("inf"), 0.0, bases)
                slopes = tl.where(is_outcome, of_outcome, of_others) * exp_nonpositive(x - bases)
                # where no other class can be, none has a derivative
                counts = counts & (is_outcome | (others != 0.0)[:, None, None])
                tl.store(
                    grad + (row[:, :, None] * CLASSES + class_of),
                    tl.where(counts, signed_zero(slopes), 0.0).to(grad.dtype.element_ty),
                    mask=inside[:, :, None] & (class_of < CLASSES),
                )

        weighted = of_patient.to(tl.float64) * weight
        if REDUCES:
            loss += tl.where(exists, weighted, 0.0)
        else:
            tl.store(nll + patient, weighted.to(nll.dtype.element_ty), mask=exists)

    if REDUCES:
        add_up_when_last(tl.sum(loss, axis=0), partials, ticket, nll, share)
