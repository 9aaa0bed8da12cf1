"""The kernel of the losses of a horizon in Triton: loss and gradient in one launch, for a mean
after one of the same kernel that sums the weights. Labels are made of event times, or given.

A program takes tiles of patients x visits, padded or packed: a visit is row
``patient * slots + visit`` or ``row_starts[visit] + rank``. The formula is in
``csrc/fixed_horizon/kernels.cuh``.

Sums are taken in a fixed order, without float atomics.
"""

import triton
import triton.language as tl

from ...survival_nll.triton.columns import present, real, weights_at
from ...survival_nll.triton.rows import rows_of
from ...survival_nll.triton.sums import add_up_when_last
from ...survival_nll.triton.terms import exp_nonpositive, log1p, signed_zero


@triton.jit
def _term(x, y):
    """Of a logit and its label, and the derivative: exact where the logit is far on the label's
    side."""
    positive = x >= 0.0
    q = exp_nonpositive(tl.where(positive, -x, x))
    rest = q / (1.0 + q)
    slope = tl.where(positive, (1.0 - y) - rest, rest - y)
    return x * (1.0 - y) + tl.where(positive, 0.0, -x) + log1p(q), slope


# As for the losses of hazards (survival_nll/triton/kernel_nll.py).
_RUN_TIME = ["mask_patient", "patients", "slots", "n_rows"]
_POINTERS = ["logits", "row_starts", "ranks", "last_rows", "mask", "visit_weights",
             "sample_weights", "loss", "grad", "total", "partials", "ticket", "labels", "times",
             "seen", "visit_times"]  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def horizon_kernel(
    logits,
    row_starts,
    ranks,
    last_rows,
    mask,
    mask_patient,
    mask_visit,
    visit_weights,
    sample_weights,
    sample_weights_stride,
    loss,
    grad,
    total,
    partials,
    ticket,
    patients,
    slots,
    n_rows,
    labels,
    times,
    times_stride,
    seen,
    seen_stride,
    visit_times,
    horizon: tl.float64,
    pos_weight: tl.float64,
    ACCUMULATOR: tl.constexpr,
    WEIGHS: tl.constexpr,
    REDUCES: tl.constexpr,
    PATIENTS: tl.constexpr,
    VISITS: tl.constexpr,
):
    """Loss and, unless ``grad`` is None, its gradient before it is scaled; or, with ``WEIGHS``, the
    sum of the weights.

    Grid: programs that walk over the patients. A tile is ``[PATIENTS, VISITS]`` logits, which are
    contiguous as all numbers of visits are. Reads the mask, labels or what they are made of,
    weights and, of visits that count, the logits; of a mean ``total``, the sum of the weights.
    Writes ``grad`` (every value of these patients) and, of each visit, ``loss``; or, if
    ``REDUCES``, one of ``partials``, which the last program adds up into ``loss``.
    """
    share = tl.full((), 1.0, tl.float64)
    if total is not None:
        share = tl.load(total)
        if labels is None:
            share = tl.where(share == 0.0, 0.0, 1.0 / tl.where(share == 0.0, 1.0, share))
        else:
            share = 1.0 / tl.where(share < 1.0, 1.0, share)
    sums = tl.zeros([PATIENTS], tl.float64)
    for group in range(tl.program_id(0), tl.cdiv(patients, PATIENTS), tl.num_programs(0)):
        patient = tl.cast(group, tl.int64) * PATIENTS + tl.arange(0, PATIENTS)
        exists = patient < patients
        for start in range(0, slots, VISITS):
            visit = start + tl.arange(0, VISITS)
            row, inside = rows_of(
                patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows
            )
            counts = inside
            if mask is not None:
                of_mask = patient[:, None] * mask_patient + visit.to(tl.int64)[None, :] * mask_visit
                counts = present(mask, of_mask, inside)
            if labels is None:
                time = real(times, patient, times_stride, exists)[:, None]
                has_event = (real(seen, patient, seen_stride, exists) != 0.0)[:, None]
                now = visit.to(tl.float64)[None, :]
                if visit_times is not None:
                    now = real(visit_times, row, 1, counts)
                end = now + horizon
                counts = counts & (now < time) & (has_event | (time >= end))
                label = tl.where(has_event & (time <= end), 1.0, 0.0).to(tl.float64)
            else:
                counts = counts & (real(visit_weights, row, 1, counts) != 0.0)
                label = real(labels, row, 1, counts)
            weight = weights_at(
                row, patient, exists, counts, visit_weights, sample_weights, sample_weights_stride
            )
            if WEIGHS:
                sums += tl.sum(weight, axis=1)
            else:
                weight = tl.where(label == 1.0, weight * pos_weight, weight)
                x = tl.load(logits + row, mask=counts, other=0.0).to(ACCUMULATOR)
                term, slope = _term(x, label.to(ACCUMULATOR))
                value = tl.where(counts, term.to(tl.float64) * weight, 0.0)
                if REDUCES:
                    sums += tl.sum(value, axis=1)
                else:
                    tl.store(loss + row, value.to(loss.dtype.element_ty), mask=inside)
                if grad is not None:
                    slope = signed_zero(slope * (weight * share).to(ACCUMULATOR))
                    slope = tl.where(counts, slope, 0.0)
                    tl.store(grad + row, slope.to(grad.dtype.element_ty), mask=inside)

    if REDUCES:
        add_up_when_last(tl.sum(sums, axis=0), partials, ticket, loss, share)
