"""Numbers of patients and of visits, and the mask of visits, of any dtype, in Triton."""

import triton
import triton.language as tl


@triton.jit
def whole(column, patient, stride, exists, lowest, highest):
    """One integer per patient, of any dtype, clamped to bounds that keep what matters distinct."""
    wide = tl.load(column + patient * stride, mask=exists, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(wide, lowest), highest).to(tl.int32)


@triton.jit
def real(column, patient, stride, exists):
    """One number per patient, of any dtype."""
    values = tl.load(column + patient * stride, mask=exists, other=0)
    if values.dtype == tl.bfloat16:
        values = values.to(tl.float32)
    return values.to(tl.float64)


@triton.jit
def present(mask, where, wanted):
    return wanted & (tl.load(mask + where, mask=wanted, other=0) != 0)


@triton.jit
def weights_at(row, patient, exists, counts, visit_weights, sample_weights, sample_weights_stride):
    """The weights of visits, [P, V]; 0 where a visit does not count: nothing is read there."""
    weight = tl.where(counts, 1.0, 0.0).to(tl.float64)
    if visit_weights is not None:
        weight = real(visit_weights, row, 1, counts)
    if sample_weights is not None:
        of_patient = real(sample_weights, patient, sample_weights_stride, exists)
        weight = tl.where(counts, weight * of_patient[:, None], 0.0)
    return weight
