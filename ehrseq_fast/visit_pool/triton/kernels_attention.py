"""Attention over the codes of a packed visit, in Triton: a softmax of the codes' scores within each
visit, and the gradients of the table and of the scores.

Attention is ``exp(score - highest) * inverse``, with a visit's highest score and
``1 / (sum of exp(score - highest))``, in float64. The two are kept as two numbers, since the
logarithm of the sum would be rounded away beside a large score; and the difference is taken in
float64, since float32 near 1,000 is rounded to 6e-5.
"""

import triton
import triton.language as tl

from .kernels_gradient import load_bounds, visits_of
from .kernels_pool import ANY_ALIGNMENT, load_rows, row_of, tile_columns


@triton.jit
def _scores_of(codes, scores, entries, first, taken, vocabulary):
    """Table rows and scores (in float64) of one entry per visit, and which the table has."""
    rows, _, known = row_of(codes, entries, first, taken, vocabulary)
    return rows, tl.load(scores + rows, mask=known, other=0.0).to(tl.float64), known


@triton.jit(
    do_not_specialize=["n_visits", "n_entries", "vocabulary"],
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
)
def pool_attention(
    table, codes, code_offsets, scores, pooled, highest_out, inverse_out, n_visits, n_entries,
    vocabulary,
    ROW_SIZE: tl.constexpr, VISITS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Attention pooling. A code outside the vocabulary makes its visit NaN.

    Grid: tiles of visits, by tiles of columns. A tile is ``[VISITS, COLUMNS]``, and its codes are
    read three times: for the highest score, the sum of exponentials, and the rows. Reads
    ``code_offsets``, ``codes``, ``scores`` and rows of ``table``; writes ``pooled``, and the first
    tile of columns ``highest_out`` and ``inverse_out``.
    """
    ACC: tl.constexpr = tl.float64 if table.dtype.element_ty == tl.float64 else tl.float32
    visits = tl.program_id(0).to(tl.int64) * VISITS + tl.arange(0, VISITS)
    present = visits < n_visits
    columns, inside = tile_columns(ROW_SIZE, COLUMNS)
    first = tl.load(code_offsets + visits, mask=present, other=0).to(tl.int64)
    last = tl.load(code_offsets + visits + 1, mask=present, other=0).to(tl.int64)
    first = tl.maximum(first, 0)
    last = tl.minimum(last, n_entries)
    longest = tl.max(last - first, axis=0).to(tl.int32)

    highest = tl.full([VISITS], float("-inf"), tl.float64)
    invalid = visits < 0
    for step in range(0, longest):
        taken = first + step < last
        _, score, known = _scores_of(codes, scores, first + step, first, taken, vocabulary)
        highest = tl.where(known & (score > highest), score, highest)
        invalid = invalid | (taken & (known == 0))
    total = tl.zeros([VISITS], tl.float64)
    for step in range(0, longest):
        taken = first + step < last
        _, score, known = _scores_of(codes, scores, first + step, first, taken, vocabulary)
        total += tl.where(known, tl.exp(score - highest), 0.0)
    inverse = 1.0 / tl.where(total == 0, 1.0, total)  # 0 in an empty visit alone

    value = tl.zeros([VISITS, COLUMNS], ACC)
    for step in range(0, longest, UNROLL):
        for i in tl.static_range(UNROLL):
            entries = first + (step + i)
            rows, score, known = _scores_of(
                codes, scores, entries, first, entries < last, vocabulary
            )
            attention = tl.exp((score - highest).to(ACC)) * inverse.to(ACC)
            row = load_rows(table, rows, columns, known, inside, ROW_SIZE, ACC)
            value += tl.where(known[:, None], attention[:, None] * row, 0.0)
    value = tl.where(invalid[:, None], float("nan"), value)
    written = present[:, None] & inside[None, :]
    at = visits[:, None] * ROW_SIZE + columns[None, :]
    tl.store(pooled + at, value.to(pooled.dtype.element_ty), mask=written)
    kept = present & (tl.program_id(1) == 0)
    tl.store(highest_out + visits, highest, mask=kept)
    tl.store(inverse_out + visits, inverse, mask=kept)


@triton.jit(
    do_not_specialize=["n_entries", "n_visits", "windows", "n_rows", "padding_idx"],
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
)
def sum_attention(
    grad, pooled, highest_scores, inverses, table, scores, bounds, entries,
    out, score_out, partials, score_partials,
    n_entries, n_visits, windows, n_rows, padding_idx,
    ROW_SIZE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """As ``sum_segments``; and the gradient of a code's score, the sum over its visits of
    ``attention * (grad . (row - pooled))``. The difference is taken before the sum: two sums would
    be large and cancel. ``padding_idx`` keeps the gradient of its score.

    Grid: one program per tile of windows or of rows. A tile is ``[ROWS, COLUMNS]`` sums, and the
    program loops over the columns. Reads ``bounds``, ``entries``, ``scores``, ``highest_scores``,
    ``inverses``, and rows of ``grad``, ``pooled`` and ``table``; writes ``partials``,
    ``score_partials``, and rows of ``out`` and ``score_out``, each once.
    """
    ACC: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    tile = tl.program_id(0)
    window, is_window, there, code, row, _segment_begin, begin, end = load_bounds(
        bounds, tile, n_entries, windows, n_rows, CHUNK, ROWS
    )
    known = there & (code >= 0) & (code < n_rows)
    score = tl.load(scores + code, mask=known, other=0.0).to(tl.float64)
    longest = tl.max(end - begin, axis=0)
    to_partial = is_window & (begin < end)
    to_row = there & (is_window == 0) & (row >= 0)
    score_sums = tl.zeros([ROWS], ACC)
    for start in range(0, ROW_SIZE, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < ROW_SIZE
        own = load_rows(table, code, columns, known, inside, ROW_SIZE, ACC)
        sums = tl.zeros([ROWS, COLUMNS], ACC)
        products = tl.zeros([ROWS, COLUMNS], ACC)
        for step in range(0, longest, UNROLL):
            for i in tl.static_range(UNROLL):
                entry = begin + (step + i)
                _, visits, taken = visits_of(entries, entry, entry < end, None, n_visits)
                highest = tl.load(highest_scores + visits, mask=taken, other=0.0)
                inverse = tl.load(inverses + visits, mask=taken, other=0.0)
                attention = tl.exp((score - highest).to(ACC)) * inverse.to(ACC)
                grads = load_rows(grad, visits, columns, taken, inside, ROW_SIZE, ACC)
                shared = load_rows(pooled, visits, columns, taken, inside, ROW_SIZE, ACC)
                weighted = tl.where(taken[:, None], attention[:, None] * grads, 0.0)
                sums += weighted
                products += tl.where(taken[:, None], weighted * (own - shared), 0.0)
        score_sums += tl.sum(products, axis=1)
        tl.store(
            partials + window.to(tl.int64)[:, None] * ROW_SIZE + columns[None, :],
            sums,
            mask=to_partial[:, None] & inside[None, :],
        )
        sums = tl.where((row == padding_idx)[:, None], 0.0, sums)
        tl.store(
            out + row.to(tl.int64)[:, None] * ROW_SIZE + columns[None, :],
            sums.to(out.dtype.element_ty),
            mask=to_row[:, None] & inside[None, :],
        )
    tl.store(score_partials + window, score_sums, mask=to_partial)
    tl.store(score_out + row, score_sums.to(score_out.dtype.element_ty), mask=to_row)
