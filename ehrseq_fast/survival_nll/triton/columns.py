"""One number per patient, and the mask of visits, of any dtype, in Triton."""

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
