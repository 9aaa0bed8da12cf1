"""What the kernels of DeepHit's ranking loss read of some patients at some visits, in Triton."""

import triton
import triton.language as tl

from ...survival_nll.triton.columns import present, real, whole
from ...survival_nll.triton.terms import exp_nonpositive


@triton.jit
def outcomes_of(
    patient, exists, times, times_stride, types, types_stride, entries, entries_stride, slots,
    COMPETING: tl.constexpr, CLASSES: tl.constexpr, PATIENTS: tl.constexpr,
):  # fmt: skip
    """Time and kind of the outcome, and the first visit at risk."""
    time = tl.where(exists, whole(times, patient, times_stride, exists, -1, slots), -1)
    if COMPETING:
        kind = whole(types, patient, types_stride, exists, -1, CLASSES + 1)
    else:
        kind = (real(types, patient, types_stride, exists) != 0.0).to(tl.int32)
    entry = tl.zeros([PATIENTS], tl.int32)
    if entries is not None:
        entry = whole(entries, patient, entries_stride, exists, -1, slots)
    return time, kind, entry


@triton.jit
def logits_of(
    logits, mask, mask_patient, mask_visit, patient, visit, row, inside, entry, class_of,
    ACCUMULATOR: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Logits [P, V, C], -inf where none is at risk, and which visits, [P, V], are."""
    at_risk = inside & (visit[None, :] >= entry[:, None])
    if mask is not None:
        of_mask = patient[:, None] * mask_patient + visit.to(tl.int64)[None, :] * mask_visit
        at_risk = present(mask, of_mask, at_risk)
    counts = at_risk[:, :, None] & (class_of < CLASSES)
    x = tl.load(logits + (row[:, :, None] * CLASSES + class_of), mask=counts, other=0.0)
    return tl.where(counts, x.to(ACCUMULATOR), -float("inf")), at_risk


@triton.jit
def roles_of(visit, time, kind, at_risk, class_of, slots, CLASSES: tl.constexpr,
             CENSORED_INCLUDED: tl.constexpr):  # fmt: skip
    """Which values, [P, V, C], are the event, and which the patient has as the later one of a
    pair."""
    at_time = (visit[None, :] == time[:, None]) & (time < slots)[:, None]
    event = at_time[:, :, None] & (class_of == (kind - 1)[:, None, None]) & (class_of < CLASSES)
    later = visit[None, :] < time[:, None]
    if CENSORED_INCLUDED:
        later = later | (at_time & (kind == 0)[:, None])
    return event, (later & at_risk)[:, :, None] & (class_of < CLASSES)


@triton.jit
def weighted(x, largest, weight):
    """w e^(x - largest). With a weight of 0 the exponents may be above the largest: then it is 0,
    or NaN."""
    none = weight == 0.0
    above = tl.where(none, 0.0, x - largest)
    return tl.where(none, x * 0.0, exp_nonpositive(above) * weight)
