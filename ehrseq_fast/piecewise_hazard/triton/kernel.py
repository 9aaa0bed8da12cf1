"""The kernel of the loss of rates that are constant within intervals in Triton: loss and gradient
in one launch.

A program takes tiles of patients x intervals, padded or packed: an interval is row
``patient * slots + visit`` or ``row_starts[visit] + rank``. With Λ the integral of the rate, an
interval that was survived adds Λ, and the one at the event time f Λ - δ log Λ.

Sums are taken in a fixed order, without float atomics.
"""

import triton
import triton.language as tl

from ...survival_nll.triton.columns import present, real, whole
from ...survival_nll.triton.rows import rows_of
from ...survival_nll.triton.sums import add_up_when_last
from ...survival_nll.triton.terms import exp_nonpositive, log1p, signed_zero

EXP: tl.constexpr = tl.constexpr(1)  # as the operator takes it (operators.py)


@triton.jit
def _softplus(x):
    """Λ = log(1 + e^x), its logarithm, and the slopes of both."""
    decay = exp_nonpositive(tl.where(x > 0.0, -x, x))
    integral = tl.where(x > 0.0, x, 0.0) + log1p(decay)
    slope = tl.where(x > 0.0, 1.0, decay) / (1.0 + decay)
    small = x < -20.0  # x - e^x / 2 to the last digit, where Λ itself may be 0
    whole_integral = tl.where(small, 1.0, integral)
    log = tl.where(small, x - decay * 0.5, tl.log(whole_integral))
    slope_of_log = tl.where(small, 1.0 - decay * 0.5, slope / whole_integral)
    return integral, slope, log, slope_of_log


@triton.jit
def _exp(x):
    """Λ = e^x, its logarithm, and the slopes of both."""
    if x.dtype == tl.float64:
        infinite = tl.full(x.shape, 720.0, x.dtype)
    else:
        infinite = tl.full(x.shape, 100.0, x.dtype)
    held = tl.where(x > infinite, infinite, x)
    # by its root, so that it becomes infinite, or 0, as it should
    root = exp_nonpositive(tl.where(held > 0.0, -held, held) * 0.5)
    raised = tl.where(held > 0.0, 1.0 / root, root)
    integral = raised * raised
    return integral, integral, x, tl.full(x.shape, 1.0, x.dtype)


# As for the losses of hazards (survival_nll/triton/kernel_nll.py).
_RUN_TIME = ["mask_patient", "patients", "slots", "n_rows"]
_POINTERS = ["logits", "row_starts", "ranks", "last_rows", "times", "indicators", "mask", "entries",
             "weights", "fractions", "visit_weights", "nll", "grad", "partials",
             "ticket"]  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def piecewise_hazard_kernel(
    logits,
    row_starts,
    ranks,
    last_rows,
    times,
    times_stride,
    indicators,
    indicators_stride,
    mask,
    mask_patient,
    mask_visit,
    entries,
    entries_stride,
    weights,
    weights_stride,
    fractions,
    fractions_stride,
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
    LINK: tl.constexpr,
    REDUCES: tl.constexpr,
    PATIENTS: tl.constexpr,
    VISITS: tl.constexpr,
):
    """Loss and, unless ``grad`` is None, its gradient before it is scaled.

    Grid: programs that walk over the patients. A tile is ``[PATIENTS, VISITS]`` values of the
    logits, which are contiguous, as are the weights of visits. Reads both up to the event time, the
    outcomes and the mask; writes ``grad`` (every value of these patients) and, of each patient,
    ``nll``; or, if ``REDUCES``, one of ``partials``, which the last program adds up into ``nll``.
    """
    loss = tl.zeros([PATIENTS], tl.float64)
    for group in range(tl.program_id(0), tl.cdiv(patients, PATIENTS), tl.num_programs(0)):
        patient = tl.cast(group, tl.int64) * PATIENTS + tl.arange(0, PATIENTS)
        exists = patient < patients
        time = tl.where(exists, whole(times, patient, times_stride, exists, -1, slots), -1)
        entry = tl.zeros([PATIENTS], tl.int32)
        if entries is not None:
            entry = whole(entries, patient, entries_stride, exists, -1, slots)
        seen = real(indicators, patient, indicators_stride, exists) != 0.0
        weight = tl.full([PATIENTS], 1.0, tl.float64)
        if weights is not None:
            weight = real(weights, patient, weights_stride, exists)
        scale = (weight * share).to(ACCUMULATOR)[:, None]
        part = tl.full([PATIENTS], 1.0, ACCUMULATOR)
        if fractions is not None:
            part = real(fractions, patient, fractions_stride, exists).to(ACCUMULATOR)
        partly = part != 0.0  # a NaN is to reach the loss

        terms_of_visits = tl.zeros([PATIENTS, VISITS], ACCUMULATOR)
        end = slots
        if grad is None:
            end = tl.minimum(tl.max(time, axis=0) + 1, slots)
        for start in range(0, end, VISITS):
            visit = start + tl.arange(0, VISITS)
            row, inside = rows_of(
                patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows
            )
            before = inside & (visit[None, :] >= entry[:, None]) & (visit[None, :] < time[:, None])
            at_time = inside & (visit[None, :] == time[:, None]) & (seen | partly)[:, None]
            counts = before | at_time
            if mask is not None:
                of_mask = patient[:, None] * mask_patient + visit.to(tl.int64)[None, :] * mask_visit
                counts = present(mask, of_mask, counts)
            x = tl.load(logits + row, mask=counts, other=0.0).to(ACCUMULATOR)
            if LINK == EXP:
                integral, slope, log, slope_of_log = _exp(x)
            else:
                integral, slope, log, slope_of_log = _softplus(x)
            # what is not seen is left out: 0 times an infinite Λ would be NaN
            whole_or_part = tl.where(at_time, part[:, None], 1.0)
            adds = before | (at_time & partly[:, None])
            event = at_time & seen[:, None]
            if visit_weights is not None:
                # Both are weighed, as an infinite weight may make them infinities that cancel; and
                # scaled with the weight, whose product with a slope may be too large.
                of_visit = tl.load(visit_weights + row, mask=counts, other=0.0)
                of_slope = of_visit * scale
                terms = tl.where(adds, of_visit * (whole_or_part * integral), 0.0)
                terms -= tl.where(event, of_visit * log, 0.0)
                slopes = tl.where(adds, of_slope * (whole_or_part * slope), 0.0)
                slopes -= tl.where(event, of_slope * slope_of_log, 0.0)
            else:
                terms = tl.where(adds, whole_or_part * integral, 0.0) - tl.where(event, log, 0.0)
                slopes = tl.where(adds, whole_or_part * slope, 0.0)
                slopes = (slopes - tl.where(event, slope_of_log, 0.0)) * scale
            terms_of_visits += tl.where(counts, terms, 0.0)
            if grad is not None:
                tl.store(
                    grad + row,
                    tl.where(counts, signed_zero(slopes), 0.0).to(grad.dtype.element_ty),
                    mask=inside,
                )

        weighted = tl.sum(terms_of_visits, axis=1).to(tl.float64) * weight
        if REDUCES:
            loss += tl.where(exists, weighted, 0.0)
        else:
            tl.store(nll + patient, weighted.to(nll.dtype.element_ty), mask=exists)

    if REDUCES:
        add_up_when_last(tl.sum(loss, axis=0), partials, ticket, nll, share)
