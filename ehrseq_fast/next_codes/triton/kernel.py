"""The kernel of the loss of a visit's codes in Triton: losses of rows of logits, and the
derivatives in place of the logits."""

import triton
import triton.language as tl

# A class with this logit adds nothing.
NOTHING: tl.constexpr = tl.constexpr(-3.0e38)


@triton.jit
def _terms(z, TERMS: tl.constexpr):
    """softplus(z) and sigmoid(z).

    With e = exp(-|z|), log(1 + e) = 2 artanh(s), s = e / (2 + e): a series that keeps the digits of
    small e. 0 * z is NaN where z is -inf, as in PyTorch.
    """
    e = tl.exp(-tl.abs(z))
    s = e / (e + 2)
    square = s * s
    series = square * 0 + 1.0 / (2 * TERMS - 1)
    for i in tl.static_range(TERMS - 1):
        series = series * square + 1.0 / (2 * (TERMS - 2 - i) + 1)
    positive = z > 0
    inverse = 1 / (e + 1)
    return tl.where(positive, z, z * 0) + 2 * s * series, tl.where(positive, inverse, e * inverse)


@triton.jit(
    do_not_specialize=["first_row", "classes"],
    do_not_specialize_on_alignment=["code_offsets", "pos_weight", "class_weight", "row_scale"],
)
def next_codes_rows(
    logits,
    losses,
    codes,
    code_offsets,
    of_codes,
    pos_weight,
    class_weight,
    row_scale,
    first_row,
    classes,
    SAMPLED: tl.constexpr,
    SLOPES: tl.constexpr,
    TERMS: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of each row of ``logits`` and, with ``SLOPES``, its derivatives in their place.

    Grid: one program per row, which goes over ``[BLOCK]`` classes at a time, and before and after
    that over ``[CODES]`` of the row's codes. A code is -1 where it is none of the classes or was
    there before, and ``classes`` where it is outside the vocabulary: then all of the row is NaN.
    Reads ``codes``, weights and scale; writes ``losses``, ``logits``, and in ``of_codes`` what the
    same program reads again.
    """
    local = tl.program_id(0)
    row = first_row + local
    base = logits + local.to(tl.int64) * classes
    begin = tl.load(code_offsets + row)
    end = tl.load(code_offsets + row + 1)
    accumulator = logits.dtype.element_ty
    scale = tl.full((), 1, accumulator)
    if row_scale is not None:
        scale = tl.load(row_scale + row)
    total = tl.zeros((), accumulator)
    for at in range(begin, end, CODES):
        i = at + tl.arange(0, CODES)
        code = tl.load(codes + i, mask=i < end, other=-1)
        there = (code >= 0) & (code < classes)
        outside = code >= classes
        if not SAMPLED:
            z = tl.load(base + code, mask=there, other=0)
            tl.debug_barrier()  # several threads hold one value: all have loaded it by now
            loss, absent = _terms(-z, TERMS)
            loss += z * 0
            factor = tl.full((CODES,), 1, accumulator)
            if pos_weight is not None:
                factor *= tl.load(pos_weight + code, mask=there, other=0)
            if class_weight is not None:
                factor *= tl.load(class_weight + code, mask=there, other=0)
            total += tl.sum(tl.where(there, loss * factor, 0))
            if SLOPES:
                tl.store(of_codes + i, -absent * factor, mask=there)
        wrong = tl.sum(tl.where(outside, float("nan"), 0.0)).to(accumulator)
        total += wrong
        scale += wrong
        tl.store(base + code, tl.full((CODES,), NOTHING, accumulator), mask=there)
    tl.debug_barrier()  # other threads' marks are read
    sums = tl.zeros((BLOCK,), accumulator)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = tl.load(base + k, mask=k < classes, other=NOTHING)
        tl.debug_barrier()  # as above, where BLOCK is less than there are threads
        loss, chance = _terms(z, TERMS)
        if class_weight is not None:
            factor = tl.load(class_weight + k, mask=k < classes, other=0)
            loss *= factor
            chance *= factor
        sums += loss
        if SLOPES:
            tl.store(base + k, chance * scale, mask=k < classes)
    total += tl.sum(sums)
    tl.store(losses + row, total)
    if SLOPES and not SAMPLED:
        tl.debug_barrier()
        for at in range(begin, end, CODES):
            i = at + tl.arange(0, CODES)
            code = tl.load(codes + i, mask=i < end, other=-1)
            there = (code >= 0) & (code < classes)
            tl.store(base + code, tl.load(of_codes + i, mask=there, other=0) * scale, mask=there)
