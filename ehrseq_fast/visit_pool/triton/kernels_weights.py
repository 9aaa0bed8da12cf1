"""The gradient of weights per code, in Triton."""

import triton
import triton.language as tl

from .kernels_pool import ANY_ALIGNMENT, MEAN, load_rows, row_of


@triton.jit(
    do_not_specialize=["n_visits", "n_entries", "vocabulary"],
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
)
def weight_gradients(
    grad, table, pooled, totals, codes, code_offsets, out, n_visits, n_entries, vocabulary,
    ROW_SIZE: tl.constexpr, MODE: tl.constexpr, VISITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of each code's weight: ``grad . row`` and, of a mean over a total of 1 or more,
    ``grad . (row - pooled) / total``. The difference is taken before the sum: two sums would be
    large and cancel. A code outside the vocabulary gets NaN.

    Grid: tiles of visits. A tile is ``[VISITS, COLUMNS]``, one code of each visit at a time, and
    the program loops over the columns. Reads ``code_offsets``, ``codes``, ``totals``, and rows of
    ``grad``, ``table`` and ``pooled``; writes ``out``, once for each code.
    """
    ACC: tl.constexpr = tl.float64 if table.dtype.element_ty == tl.float64 else tl.float32
    visits = tl.program_id(0).to(tl.int64) * VISITS + tl.arange(0, VISITS)
    present = visits < n_visits
    first = tl.load(code_offsets + visits, mask=present, other=0).to(tl.int64)
    last = tl.load(code_offsets + visits + 1, mask=present, other=0).to(tl.int64)
    first = tl.maximum(first, 0)
    last = tl.minimum(last, n_entries)
    if MODE == MEAN:
        total = tl.load(totals + visits, mask=present, other=1.0)
        divided = (total < 1) == 0
        scale = 1.0 / tl.where(divided, total, 1.0)
    longest = tl.max(last - first, axis=0).to(tl.int32)
    for step in range(0, longest):
        entries = first + step
        taken = entries < last
        rows, _, known = row_of(codes, entries, first, taken, vocabulary)
        products = tl.zeros([VISITS, COLUMNS], ACC)
        for start in range(0, ROW_SIZE, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < ROW_SIZE
            grads = load_rows(grad, visits, columns, taken, inside, ROW_SIZE, ACC)
            row = load_rows(table, rows, columns, known, inside, ROW_SIZE, ACC)
            if MODE == MEAN:
                row -= load_rows(pooled, visits, columns, taken & divided, inside, ROW_SIZE, ACC)
            products += tl.where(taken[:, None], grads * row, 0.0)
        gradient = tl.sum(products, axis=1)
        if MODE == MEAN:
            gradient = scale * gradient
        tl.store(out + entries, tl.where(known, gradient, float("nan")), mask=taken)
