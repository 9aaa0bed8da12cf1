"""The kernels of DeepHit's ranking loss in Triton; the formula is in
``csrc/deephit_ranking/kernels.cuh``.

The first makes the sums over the later ones of all pairs, of groups of patients, each with a
largest exponent of its own; the second joins them in the groups' order, and adds up the events; the
third writes the gradient. A program of the first and third takes tiles of patients x visits x
classes (a class is a cause), padded or packed: a visit is row ``patient * slots + visit`` or
``row_starts[visit] + rank``.

Sums are taken in a fixed order, without float atomics.
"""

import triton
import triton.language as tl

from ...survival_nll.triton.columns import real
from ...survival_nll.triton.rows import rows_of
from ...survival_nll.triton.sums import add_up_when_last
from ...survival_nll.triton.terms import exp_nonpositive, signed_zero
from .tiles import logits_of, outcomes_of, roles_of, weighted

# As for the losses of hazards (survival_nll/triton/kernel_nll.py).
_RUN_TIME = ["mask_patient", "patients", "slots", "n_rows", "tiles", "groups", "values"]
_ROWS = ["logits", "row_starts", "ranks", "last_rows", "times", "types", "mask", "entries",
         "weights"]  # fmt: skip


@triton.jit(
    do_not_specialize=_RUN_TIME[:5],
    do_not_specialize_on_alignment=_ROWS,
)
def sum_later_kernel(
    logits, row_starts, ranks, last_rows, times, times_stride, types, types_stride, mask,
    mask_patient, mask_visit, entries, entries_stride, weights, weights_stride,
    later_largest, later_sum, event, own, softmax_largest, softmax_share, incidence,
    patients, slots, n_rows, tiles,
    of_incidence: tl.float64,
    ACCUMULATOR: tl.constexpr, COMPETING: tl.constexpr, CLASSES: tl.constexpr,
    CENSORED_INCLUDED: tl.constexpr, PATIENTS: tl.constexpr, VISITS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """The sums of groups of patients.

    Grid: one program per group, of ``tiles`` times ``PATIENTS`` patients. Reads the logits at risk,
    the outcomes and the mask; writes ``later_*`` ``[groups, slots, CLASSES]``, and of each patient
    the position of the event (-1 for none), the exponent there, and, unless they are None, what the
    softmax subtracts and multiplies by, and the incidence ``[patients, CLASSES]`` up to the
    outcome.
    """
    class_of = tl.arange(0, BLOCK_CLASSES)[None, None, :]
    cause = tl.arange(0, BLOCK_CLASSES)[None, :]
    group = tl.program_id(0).to(tl.int64)
    of_group = group * slots * CLASSES
    for start in range(0, slots, VISITS):
        visit = start + tl.arange(0, VISITS)
        at = of_group + visit[:, None].to(tl.int64) * CLASSES + cause
        inside = (visit < slots)[:, None] & (cause < CLASSES)
        # no exponent is below 0
        tl.store(later_largest + at, tl.zeros([VISITS, BLOCK_CLASSES], ACCUMULATOR), mask=inside)
        tl.store(later_sum + at, tl.zeros([VISITS, BLOCK_CLASSES], tl.float64), mask=inside)
    tl.debug_barrier()

    for tile in range(0, tiles):
        patient = (group * tiles + tile) * PATIENTS + tl.arange(0, PATIENTS)
        exists = patient < patients
        time, kind, entry = outcomes_of(
            patient, exists, times, times_stride, types, types_stride, entries, entries_stride,
            slots, COMPETING, CLASSES, PATIENTS,
        )  # fmt: skip
        weight = tl.full([PATIENTS], 1.0, ACCUMULATOR)
        if weights is not None:
            weight = real(weights, patient, weights_stride, exists).to(ACCUMULATOR)
        weight = weight[:, None, None]

        # "beyond", whose logit is 0, is the first term
        largest = tl.zeros([PATIENTS], ACCUMULATOR)
        terms = tl.full([PATIENTS], 1.0, tl.float64)
        for start in range(0, slots, VISITS):
            visit = start + tl.arange(0, VISITS)
            row, inside = rows_of(
                patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows
            )
            x, _ = logits_of(
                logits, mask, mask_patient, mask_visit, patient, visit, row, inside, entry,
                class_of, ACCUMULATOR, CLASSES,
            )  # fmt: skip
            # a NaN is left to the sum
            ordered = tl.where(x > -float("inf"), x, -float("inf"))
            most = tl.max(tl.max(ordered, axis=2), axis=1)
            before = largest
            largest = tl.maximum(before, most)
            terms *= exp_nonpositive(before - largest).to(tl.float64)
            power = exp_nonpositive(x - largest[:, None, None]).to(tl.float64)
            terms += tl.sum(tl.sum(power, axis=2), axis=1)
        share = (1.0 / terms).to(ACCUMULATOR)

        of_event = tl.zeros([PATIENTS], ACCUMULATOR)
        until = tl.zeros([PATIENTS, BLOCK_CLASSES], tl.float64)
        end = tl.minimum(tl.max(time, axis=0) + 1, slots)
        for start in range(0, end, VISITS):
            visit = start + tl.arange(0, VISITS)
            row, inside = rows_of(
                patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows
            )
            x, at_risk = logits_of(
                logits, mask, mask_patient, mask_visit, patient, visit, row, inside, entry,
                class_of, ACCUMULATOR, CLASSES,
            )  # fmt: skip
            is_event, is_later = roles_of(
                visit, time, kind, at_risk, class_of, slots, CLASSES, CENSORED_INCLUDED
            )
            mass = exp_nonpositive(x - largest[:, None, None]) * share[:, None, None]
            mass = tl.where((visit[None, :] <= time[:, None])[:, :, None], mass, 0.0)
            mass = mass.to(tl.float64)
            exponent = (until[:, None, :] + tl.cumsum(mass, axis=1)) * of_incidence
            until += tl.sum(mass, axis=1)
            exponent = exponent.to(ACCUMULATOR)
            of_event += tl.sum(tl.sum(tl.where(is_event, exponent, 0.0), axis=2), axis=1)

            at = of_group + visit[:, None].to(tl.int64) * CLASSES + cause
            kept = (visit < slots)[:, None] & (cause < CLASSES)
            before_sum = tl.load(later_sum + at, mask=kept, other=0.0)
            before_largest = tl.load(later_largest + at, mask=kept, other=0.0)
            # A weight of 0 leaves the patient out: beside its exponent all others might vanish. A
            # NaN is left to the sum.
            can_be = is_later & (weight != 0.0) & (exponent >= 0.0)
            most = tl.maximum(before_largest, tl.max(tl.where(can_be, exponent, 0.0), axis=0))
            added = tl.where(is_later, weighted(exponent, most[None, :, :], weight), 0.0)
            sums = before_sum * exp_nonpositive(before_largest - most).to(tl.float64)
            sums += tl.sum(added.to(tl.float64), axis=0)
            tl.debug_barrier()  # where several threads hold one value, all have loaded it by now
            tl.store(later_largest + at, most, mask=kept)
            tl.store(later_sum + at, sums, mask=kept)

        has_event = (kind > 0) & (kind <= CLASSES) & (time >= 0) & (time < slots)
        tl.store(event + patient, tl.where(has_event, time * CLASSES + kind - 1, -1), mask=exists)
        tl.store(own + patient, of_event.to(tl.float64), mask=exists)
        if softmax_largest is not None:
            tl.store(softmax_largest + patient, largest, mask=exists)
            tl.store(softmax_share + patient, share, mask=exists)
            tl.store(
                incidence + (patient[:, None] * CLASSES + cause),
                until,
                mask=exists[:, None] & (cause < CLASSES),
            )
        tl.debug_barrier()  # the next tile reads what other threads of this program have stored


@triton.jit(
    do_not_specialize=["patients", "groups", "values"], do_not_specialize_on_alignment=["weights"]
)
def join_later_kernel(
    later_largest, later_sum, event, own, weights, weights_stride, largest, of_events, by_event,
    loss, partials, ticket, patients, groups, values,
    share: tl.float64,  # of a pair in the loss
    share_of_slope: tl.float64,
    ACCUMULATOR: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sums of all patients, and the loss.

    Grid: programs that walk over the visits and causes, ``POSITIONS`` at a time, of ``ROWS`` groups
    or patients. Reads ``later_*`` ``[groups, values]``, ``event``, ``own`` and the weights; writes
    ``largest`` and ``of_events`` ``[values]``, ``by_event`` (of each event minus the derivative by
    the exponent there) and one of ``partials``, which the last program adds up into ``loss``.
    """
    total = tl.zeros([POSITIONS], tl.float64)
    for part in range(tl.program_id(0), tl.cdiv(values, POSITIONS), tl.num_programs(0)):
        position = tl.cast(part, tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
        inside = (position < values)[None, :]
        most = tl.zeros([POSITIONS], ACCUMULATOR)
        for start in range(0, groups, ROWS):
            group = start + tl.arange(0, ROWS)[:, None]
            at = group.to(tl.int64) * values + position[None, :]
            x = tl.load(later_largest + at, mask=inside & (group < groups), other=0.0)
            most = tl.maximum(most, tl.max(x, axis=0))
        of_later = tl.zeros([POSITIONS], tl.float64)
        for start in range(0, groups, ROWS):
            group = start + tl.arange(0, ROWS)[:, None]
            at = group.to(tl.int64) * values + position[None, :]
            x = tl.load(later_largest + at, mask=inside & (group < groups), other=0.0)
            sums = tl.load(later_sum + at, mask=inside & (group < groups), other=0.0)
            of_later += tl.sum(sums * exp_nonpositive(x - most[None, :]).to(tl.float64), axis=0)

        of_event = tl.zeros([POSITIONS], tl.float64)
        for start in range(0, patients, ROWS):
            patient = start + tl.arange(0, ROWS).to(tl.int64)
            exists = patient < patients
            is_here = tl.load(event + patient, mask=exists, other=-1)[:, None] == position[None, :]
            here = exists & (tl.max(is_here.to(tl.int32), axis=1) != 0)
            base = tl.sum(tl.where(is_here, most.to(tl.float64)[None, :], 0.0), axis=1)
            later = tl.sum(tl.where(is_here, of_later[None, :], 0.0), axis=1)
            exponent = base - tl.load(own + patient, mask=here, other=0.0)
            weight = tl.full([ROWS], 1.0, tl.float64)
            if weights is not None:
                weight = real(weights, patient, weights_stride, here).to(ACCUMULATOR)
                weight = weight.to(tl.float64)
            # a weight of 0 leaves the event out, but for a NaN
            none = weight == 0.0
            power = tl.exp(tl.where(none, 0.0, exponent))
            factor = tl.where(none, exponent * 0.0, weight * power)
            tl.store(by_event + patient, factor * later * share_of_slope, mask=here)
            of_event += tl.sum(tl.where(is_here, factor[:, None], 0.0), axis=0)
        total += of_later * of_event
        tl.store(largest + position, most, mask=position < values)
        slope = (of_event * share_of_slope).to(ACCUMULATOR)
        tl.store(of_events + position, slope, mask=position < values)
    add_up_when_last(tl.sum(total, axis=0), partials, ticket, loss, share)


@triton.jit(
    do_not_specialize=_RUN_TIME[:4],
    do_not_specialize_on_alignment=_ROWS,
)
def ranking_gradient_kernel(
    logits, row_starts, ranks, last_rows, times, times_stride, types, types_stride, mask,
    mask_patient, mask_visit, entries, entries_stride, weights, weights_stride,
    largest, of_events, by_event, softmax_largest, softmax_share, incidence, grad,
    patients, slots, n_rows,
    of_incidence: tl.float64,
    ACCUMULATOR: tl.constexpr, COMPETING: tl.constexpr, CLASSES: tl.constexpr,
    CENSORED_INCLUDED: tl.constexpr, PATIENTS: tl.constexpr, VISITS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """The gradient of the loss by the logits.

    Grid: one program per ``PATIENTS`` patients, which goes over their visits twice, from the last.
    Reads the logits at risk, the outcomes, the mask and what the other kernels left; writes
    ``grad``, every value of these patients.
    """
    class_of = tl.arange(0, BLOCK_CLASSES)[None, None, :]
    cause = tl.arange(0, BLOCK_CLASSES)[None, :]
    patient = tl.program_id(0).to(tl.int64) * PATIENTS + tl.arange(0, PATIENTS)
    exists = patient < patients
    time, kind, entry = outcomes_of(
        patient, exists, times, times_stride, types, types_stride, entries, entries_stride,
        slots, COMPETING, CLASSES, PATIENTS,
    )  # fmt: skip
    weight = tl.full([PATIENTS], 1.0, ACCUMULATOR)
    if weights is not None:
        weight = real(weights, patient, weights_stride, exists).to(ACCUMULATOR)
    weight = weight[:, None, None]
    base = tl.load(softmax_largest + patient, mask=exists, other=0.0)[:, None, None]
    share = tl.load(softmax_share + patient, mask=exists, other=0.0)[:, None, None]
    of_event = -tl.load(by_event + patient, mask=exists, other=0.0).to(ACCUMULATOR)[:, None, None]
    at_end = tl.load(
        incidence + (patient[:, None] * CLASSES + cause),
        mask=exists[:, None] & (cause < CLASSES),
        other=0.0,
    )
    has_event = (kind > 0) & (kind <= CLASSES) & (time >= 0) & (time < slots)
    counts = has_event | (entry < time)
    if CENSORED_INCLUDED:
        counts = counts | ((kind == 0) & (entry <= time))

    mean = tl.zeros([PATIENTS], tl.float64)
    read = tl.cdiv(tl.minimum(tl.max(time, axis=0) + 1, slots), VISITS)
    all_parts = tl.cdiv(slots, VISITS)
    for writes in tl.static_range(0, 2):
        until = at_end
        of_later_visits = tl.zeros([PATIENTS, BLOCK_CLASSES], tl.float64)
        parts = all_parts if writes == 1 else read
        for step in range(0, parts):
            visit = (parts - 1 - step) * VISITS + tl.arange(0, VISITS)
            row, inside = rows_of(
                patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows
            )
            x, at_risk = logits_of(
                logits, mask, mask_patient, mask_visit, patient, visit, row, inside, entry,
                class_of, ACCUMULATOR, CLASSES,
            )  # fmt: skip
            is_event, is_later = roles_of(
                visit, time, kind, at_risk, class_of, slots, CLASSES, CENSORED_INCLUDED
            )
            mass = exp_nonpositive(x - base) * share
            before = (visit[None, :] <= time[:, None])[:, :, None]
            own_mass = tl.where(before, mass, 0.0).to(tl.float64)
            until -= tl.sum(own_mass, axis=1)
            exponent = (until[:, None, :] + tl.cumsum(own_mass, axis=1)) * of_incidence
            exponent = exponent.to(ACCUMULATOR)
            at = visit[:, None].to(tl.int64) * CLASSES + cause
            kept = (visit < slots)[:, None] & (cause < CLASSES)
            most = tl.load(largest + at, mask=kept, other=0.0)[None, :, :]
            events = tl.load(of_events + at, mask=kept, other=0.0)[None, :, :]
            by_exponent = tl.where(is_later, weighted(exponent, most, weight) * events, 0.0)
            by_exponent = tl.where(is_event, of_event, by_exponent).to(tl.float64)
            # by the mass, which is part of all later exponents
            slope = tl.cumsum(by_exponent, axis=1, reverse=True) + of_later_visits[:, None, :]
            of_later_visits += tl.sum(by_exponent, axis=1)
            if writes == 0:
                # Visits that are not at risk have a mass of 0, but make an infinite slope NaN, as
                # in the formula.
                mean += tl.sum(tl.sum(mass.to(tl.float64) * slope, axis=2), axis=1)
            else:
                value = (mass.to(tl.float64) * (slope - mean[:, None, None])).to(ACCUMULATOR)
                signed = tl.where(
                    counts[:, None, None], signed_zero(value), tl.where(value == 0.0, 0.0, value)
                )
                tl.store(
                    grad + (row[:, :, None] * CLASSES + class_of),
                    tl.where(at_risk[:, :, None], signed, 0.0).to(grad.dtype.element_ty),
                    mask=inside[:, :, None] & (class_of < CLASSES),
                )
