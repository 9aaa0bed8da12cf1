"""The kernels that scale a saved gradient of the survival losses, in Triton."""

import triton
import triton.language as tl

from .rows import rows_of
from .terms import scaled_by


@triton.jit(do_not_specialize=["values"], do_not_specialize_on_alignment=["grad_nll"])
def scale_by_one_kernel(grad, grad_nll, scaled, values, ACCUMULATOR: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """``grad`` times one number.

    Grid: one program per ``[BLOCK]`` values. Reads ``grad`` and ``grad_nll``, writes ``scaled``.
    """
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
    """``grad`` times one number per patient.

    Grid: one program per ``PATIENTS`` patients. A tile is ``[PATIENTS, POSITIONS]`` values of their
    rows. Reads ``grad``, ``grad_nll`` and where rows are, writes ``scaled``.
    """
    patient = tl.program_id(0).to(tl.int64) * PATIENTS + tl.arange(0, PATIENTS)
    exists = patient < patients
    factor = tl.load(grad_nll + patient * grad_nll_stride, mask=exists, other=0.0)[:, None]
    for start in range(0, slots * CLASSES, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        row, inside = rows_of(
            patient, exists, position // CLASSES, slots, n_rows, row_starts, ranks, last_rows
        )
        at = row * CLASSES + (position % CLASSES)[None, :]
        product = scaled_by(tl.load(grad + at, mask=inside, other=0.0).to(ACCUMULATOR), factor)
        tl.store(scaled + at, product.to(scaled.dtype.element_ty), mask=inside)
