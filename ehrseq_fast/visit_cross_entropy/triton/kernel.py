"""The kernel of the cross-entropy of one class per visit in Triton: loss and gradient in one
launch, for a mean after one of the same kernel that sums the weights.

A program takes tiles of patients x visits x classes, padded or packed: a visit is row
``patient * slots + visit`` or ``row_starts[visit] + rank``. It goes over the classes for the
largest logit, for the sum of the others' e^(x - largest), and once more where a gradient is needed.
The formula is in ``csrc/visit_cross_entropy/kernels.cuh``.

Sums are taken in a fixed order, without float atomics.
"""

import triton
import triton.language as tl

from ...survival_nll.triton.columns import present, real, weights_at
from ...survival_nll.triton.rows import rows_of
from ...survival_nll.triton.sums import add_up_when_last
from ...survival_nll.triton.terms import exp_nonpositive, log1p, signed_zero


@triton.jit
def _logits_at(logits, row, counts, class_of, ACCUMULATOR: tl.constexpr, CLASSES: tl.constexpr):
    """[P, V, C]: -inf past the last class, 0 at visits that do not count, which are not read."""
    exists = class_of < CLASSES
    x = tl.load(
        logits + (row[:, :, None] * CLASSES + class_of), mask=counts[:, :, None] & exists, other=0.0
    )
    return tl.where(exists, x.to(ACCUMULATOR), -float("inf"))


@triton.jit
def _weights_of(class_weights, class_of, exists):
    """Those of classes; 0 for one that does not exist."""
    weight = tl.where(exists, 1.0, 0.0).to(tl.float64)
    if class_weights is not None:
        weight = real(class_weights, class_of, 1, exists)
    return weight


# As for the losses of hazards (survival_nll/triton/kernel_nll.py).
_RUN_TIME = ["mask_patient", "patients", "slots", "n_rows", "ignore_index"]
_POINTERS = ["logits", "row_starts", "ranks", "last_rows", "mask", "visit_weights",
             "sample_weights", "loss", "grad", "total", "partials", "ticket", "labels",
             "class_weights"]  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def cross_entropy_kernel(
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
    class_weights,
    ignore_index,
    smoothing: tl.float64,
    ACCUMULATOR: tl.constexpr,
    CLASSES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WEIGHS: tl.constexpr,
    REDUCES: tl.constexpr,
    PATIENTS: tl.constexpr,
    VISITS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """Loss and, unless ``grad`` is None, its gradient before it is scaled; or, with ``WEIGHS``, the
    sum of the weights.

    Grid: programs that walk over the patients. A tile is ``[PATIENTS, VISITS, BLOCK_CLASSES]``
    values of the logits, which are contiguous as labels and weights of visits are. Reads the mask,
    labels, weights and, of visits that count, the logits; of a mean ``total``, the sum of the
    weights. Writes ``grad`` (every value of these patients) and, of each visit, ``loss``; or, if
    ``REDUCES``, one of ``partials``, which the last program adds up into ``loss``.
    """
    share = tl.full((), 1.0, tl.float64)
    if total is not None:
        share = 1.0 / tl.load(total)
    weights = tl.zeros([BLOCK_CLASSES], tl.float64)
    if SMOOTHED:
        for first in range(0, CLASSES, BLOCK_CLASSES):
            of_block = first + tl.arange(0, BLOCK_CLASSES)
            weights += _weights_of(class_weights, of_block, of_block < CLASSES)
    all_weights = tl.sum(weights, axis=0)

    block = tl.arange(0, BLOCK_CLASSES)[None, None, :]
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
            label = tl.load(labels + row, mask=counts, other=0).to(tl.int64)
            counts = counts & (label != ignore_index)
            weight = weights_at(
                row, patient, exists, counts, visit_weights, sample_weights, sample_weights_stride
            )
            is_class = counts & (label >= 0) & (label < CLASSES)
            of_label = weight * _weights_of(class_weights, label, is_class)
            of_label = tl.where(counts & ~is_class, float("nan"), of_label)
            if WEIGHS:
                sums += tl.sum(of_label, axis=1)
            else:
                largest = tl.full([PATIENTS, VISITS], -float("inf"), ACCUMULATOR)
                at_largest = tl.full([PATIENTS, VISITS], CLASSES, tl.int32)
                for first in range(0, CLASSES, BLOCK_CLASSES):
                    class_of = first + block
                    x = _logits_at(logits, row, counts, class_of, ACCUMULATOR, CLASSES)
                    of_block = tl.max(x, axis=2)
                    is_first = tl.where(x == of_block[:, :, None], class_of, CLASSES)
                    higher = of_block > largest  # a NaN is left to the sum
                    at_largest = tl.where(higher, tl.min(is_first, axis=2), at_largest)
                    largest = tl.where(higher, of_block, largest)

                # Without the 1 of the largest, beside which small terms would lose digits.
                others = tl.zeros([PATIENTS, VISITS], ACCUMULATOR)
                spread = tl.zeros([PATIENTS, VISITS], tl.float64)  # Σ w_c (largest - x_c)
                for first in range(0, CLASSES, BLOCK_CLASSES):
                    class_of = first + block
                    x = _logits_at(logits, row, counts, class_of, ACCUMULATOR, CLASSES)
                    below = largest[:, :, None] - x
                    terms = exp_nonpositive(-below)
                    is_largest = class_of == at_largest[:, :, None]
                    others += tl.sum(tl.where(is_largest, 0.0, terms), axis=2)
                    if SMOOTHED:
                        weight_of = _weights_of(class_weights, class_of, class_of < CLASSES)
                        product = below.to(tl.float64) * weight_of
                        spread += tl.sum(tl.where(class_of < CLASSES, product, 0.0), axis=2)
                others += largest - largest  # 0, or NaN where softmax is not defined

                of_classes = weight * (smoothing / CLASSES)
                if SMOOTHED:
                    of_label = of_label * (1.0 - smoothing)
                at_label = tl.load(logits + (row * CLASSES + label), mask=is_class, other=0.0)
                below = largest - at_label.to(ACCUMULATOR)
                log_sum = log1p(others).to(tl.float64)
                value = of_label * (log_sum + below.to(tl.float64))
                if SMOOTHED:
                    value += of_classes * (all_weights * log_sum + spread)
                value = tl.where(counts, value, 0.0)
                if REDUCES:
                    sums += tl.sum(value, axis=1)
                else:
                    tl.store(loss + row, value.to(loss.dtype.element_ty), mask=inside)

                if grad is not None:
                    total_of = 1.0 + others
                    inverse = share / total_of.to(tl.float64)
                    ratio = of_label * inverse
                    is_largest = label == at_largest
                    term = tl.where(is_largest, 1.0, exp_nonpositive(-below))
                    # without the digits that p - 1 would lose
                    rest = tl.where(is_largest, others, total_of - term)
                    own = -(of_label * inverse) * rest.to(tl.float64)
                    if SMOOTHED:
                        from_classes = of_classes * all_weights * inverse
                        ratio += from_classes
                        own += from_classes * term.to(tl.float64)
                    for first in range(0, CLASSES, BLOCK_CLASSES):
                        class_of = first + block
                        x = _logits_at(logits, row, counts, class_of, ACCUMULATOR, CLASSES)
                        terms = exp_nonpositive(x - largest[:, :, None])
                        terms = tl.where(class_of == at_largest[:, :, None], 1.0, terms)
                        slopes = ratio.to(ACCUMULATOR)[:, :, None] * terms
                        of_own = own.to(ACCUMULATOR)[:, :, None]
                        slopes = tl.where(class_of == label[:, :, None], of_own, slopes)
                        if SMOOTHED:
                            weight_of = _weights_of(class_weights, class_of, class_of < CLASSES)
                            given = (share * of_classes)[:, :, None] * weight_of
                            slopes -= given.to(ACCUMULATOR)
                        slopes = tl.where(counts[:, :, None], signed_zero(slopes), 0.0)
                        tl.store(
                            grad + (row[:, :, None] * CLASSES + class_of),
                            slopes.to(grad.dtype.element_ty),
                            mask=inside[:, :, None] & (class_of < CLASSES),
                        )

    if REDUCES:
        add_up_when_last(tl.sum(sums, axis=0), partials, ticket, loss, share)
