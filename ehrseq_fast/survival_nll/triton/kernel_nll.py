"""The kernel of the survival losses in Triton, which computes loss and gradient in one launch.

A program takes tiles of patients x visits x classes (a class is a cause, and with the softmax link
"no event" as well), so that one kernel serves single and competing risks, and padded and packed
batches: a visit is row ``patient * slots + visit`` or ``row_starts[visit] + rank``.
Tiles depend on the kind of model and on whether rows are long; lengths and batch sizes are
run-time values.

Sums are taken in a fixed order, without float atomics: every program leaves the sum of its
patients, and the last to finish adds those up.
"""

import triton
import triton.language as tl

from .columns import present, real, whole
from .rows import rows_of
from .sums import add_up_when_last
from .terms import nll_of_cloglog, nll_of_logits, nll_of_probabilities, nll_of_softmax

# as the operators take them (operators.py)
PROBABILITIES: tl.constexpr = tl.constexpr(0)
SOFTMAX: tl.constexpr = tl.constexpr(2)
CLOGLOG: tl.constexpr = tl.constexpr(3)


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


# Alignment and divisibility buy nothing here, since a patient's row starts anywhere; without them
# no batch size, length or view makes Triton compile again. A stride of 1 still does: it coalesces.
_RUN_TIME = ["hazards_patient", "mask_patient", "patients", "slots", "n_rows"]
_POINTERS = ["hazards", "row_starts", "ranks", "last_rows", "times", "types", "mask", "entries",
             "weights", "visit_weights", "nll", "grad", "partials", "ticket"]  # fmt: skip


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
    visit_weights,
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
    """Loss and, unless ``grad`` is None, its gradient before it is scaled.

    Grid: programs that walk over the patients. A tile is ``[PATIENTS, VISITS, BLOCK_CLASSES]``
    values of the hazards. Reads the hazards at risk, the weights of their visits (one for each row,
    contiguous) where there are any, the outcomes and the mask; writes ``grad`` (every value of
    these patients) and, of each patient, ``nll``; or, if ``REDUCES``, one of ``partials``, which
    the last program adds up into ``nll``.
    """
    class_of = tl.arange(0, BLOCK_CLASSES)[None, None, :]
    loss = tl.zeros([PATIENTS], tl.float64)
    for group in range(tl.program_id(0), tl.cdiv(patients, PATIENTS), tl.num_programs(0)):
        patient = tl.cast(group, tl.int64) * PATIENTS + tl.arange(0, PATIENTS)
        exists = patient < patients
        time = tl.where(exists, whole(times, patient, times_stride, exists, -1, slots), -1)
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
        scale = (weight * share).to(ACCUMULATOR)[:, None, None]

        terms_of_visits = tl.zeros([PATIENTS, VISITS], ACCUMULATOR)
        end = tl.minimum(tl.max(time, axis=0) + 1, slots)
        for start in range(0, end, VISITS):
            visit = start + tl.arange(0, VISITS)
            row, inside = rows_of(
                patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows
            )
            before = inside & (visit[None, :] >= entry[:, None]) & (visit[None, :] < time[:, None])
            at_time = inside & (visit[None, :] == time[:, None])
            if mask is not None:
                of_mask = patient[:, None] * mask_patient + visit.to(tl.int64)[None, :] * mask_visit
                before = present(mask, of_mask, before)
                at_time = present(mask, of_mask, at_time)
            if row_starts is None:
                of_hazard = (
                    patient[:, None] * hazards_patient + visit.to(tl.int64)[None, :] * hazards_visit
                )
            else:
                of_hazard = row * hazards_visit
            of_hazards = of_hazard[:, :, None] + class_of.to(tl.int64) * hazards_class
            if visit_weights is None:
                scales = scale
            else:
                at_risk = before | at_time
                of_visit = tl.load(visit_weights + row, mask=at_risk, other=0.0)[:, :, None]
                scales = scale * of_visit

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
                terms, slopes = nll_of_softmax(logit, class_of, target, scales, CLASSES)
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
                    terms, slopes = nll_of_probabilities(hazard, event, scales, EPS, NLL_OF_EPS)
                elif LINK == CLOGLOG:
                    terms, slopes = nll_of_cloglog(hazard, event, scales)
                else:
                    terms, slopes = nll_of_logits(hazard, event, scales)
            counts = trial
            if visit_weights is not None:
                terms = terms * of_visit
                if LINK == SOFTMAX:  # whose one term is at class 0: elsewhere 0 times infinity
                    counts = trial & (class_of == 0)
            terms_of_visits += tl.sum(tl.where(counts, terms, 0.0), axis=2)

            if grad is not None:
                tl.store(
                    grad + (row[:, :, None] * CLASSES + class_of),
                    tl.where(trial, slopes, 0.0).to(grad.dtype.element_ty),
                    mask=inside[:, :, None] & (class_of < CLASSES),
                )

        if grad is not None:
            for start in range(tl.cdiv(end, VISITS) * VISITS, slots, VISITS):
                visit = start + tl.arange(0, VISITS)
                row, inside = rows_of(
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
        add_up_when_last(tl.sum(loss, axis=0), partials, ticket, nll, share)
