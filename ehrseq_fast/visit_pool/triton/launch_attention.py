"""The operators of attention pooling in Triton; ``kernels_attention.py`` holds the kernels.

Launches (tests/test_triton_visit_pool.py counts them): one for pooling, at most three for its
gradient.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...checks import accumulator
from ...operations import implemented_in_triton
from ...triton_support import launch
from . import kernels_attention as kernels
from .arguments import (
    expect_attention_gradient,
    expect_index,
    expect_packed_codes,
    expect_padding,
    expect_scores,
    expect_table,
    expect_together,
)
from .launch_index import Index
from .launch_sums import Rows, find_segments, sum_pieces
from .tiles import tile_of


@implemented_in_triton("packed_attention_pool")
def packed_attention_pool(
    codes: Tensor, code_offsets: Tensor, weight: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``packed_attention_pool``."""
    expect_together(codes, code_offsets, weight, scores)
    expect_table(weight)
    expect_scores(scores, weight)
    expect_packed_codes(codes, code_offsets)
    table, codes, code_offsets = weight.contiguous(), codes.contiguous(), code_offsets.contiguous()
    vocabulary, row_size = table.shape
    n_visits = code_offsets.shape[0] - 1
    pooled = table.new_empty((n_visits, row_size))
    highest = table.new_empty((n_visits,), dtype=torch.float64)
    inverse = torch.empty_like(highest)
    if n_visits:
        tile = tile_of(table, row_size, row_bytes=2048)
        launch(
            kernels.pool_attention,
            (triton.cdiv(n_visits, tile.rows), max(triton.cdiv(row_size, tile.columns), 1)),
            table,
            codes,
            code_offsets,
            scores.contiguous(),
            pooled,
            highest,
            inverse,
            n_visits,
            codes.shape[0],
            vocabulary,
            ROW_SIZE=row_size,
            VISITS=tile.rows,
            COLUMNS=tile.columns,
            UNROLL=2,
            num_warps=2,
        )
    return pooled, highest, inverse


@implemented_in_triton("packed_attention_pool_backward")
def packed_attention_pool_backward(
    grad: Tensor,
    pooled: Tensor,
    highest: Tensor,
    inverse: Tensor,
    index_codes: Tensor,
    index_offsets: Tensor,
    index_visits: Tensor,
    weight: Tensor,
    scores: Tensor,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``packed_attention_pool_backward``."""
    expect_attention_gradient(grad, pooled, highest, inverse, weight, scores)
    expect_together(grad, index_codes, index_offsets, index_visits)
    expect_index(index_codes, index_offsets, index_visits)
    expect_padding(padding_idx, weight.shape[0])
    grad, table = grad.contiguous(), weight.contiguous()
    out, score_out = grad.new_empty(weight.shape), grad.new_empty(scores.shape)
    n_rows, row_size = out.shape
    if not n_rows:
        return out, score_out
    at = Index(index_codes.contiguous(), index_offsets.contiguous(), index_visits.contiguous())
    # the row of padding_idx gets no gradient, and its score does
    bounds, chunk, windows = find_segments(at, Rows(n_rows, -1), n_rows)
    partials = grad.new_empty((windows, row_size), dtype=accumulator(grad.dtype))
    score_partials = grad.new_empty((windows,), dtype=accumulator(grad.dtype))
    tile = tile_of(grad, row_size, row_bytes=2048)
    launch(
        kernels.sum_attention,
        (triton.cdiv(windows, tile.rows) + triton.cdiv(n_rows, tile.rows),),
        grad,
        pooled.contiguous(),
        highest.contiguous(),
        inverse.contiguous(),
        table,
        scores.contiguous(),
        bounds,
        at.entries,
        out,
        score_out,
        partials,
        score_partials,
        at.most_entries,
        grad.shape[0],
        windows,
        n_rows,
        padding_idx,
        ROW_SIZE=row_size,
        CHUNK=chunk,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        UNROLL=2,
        num_warps=4,
    )
    rows = Rows(n_rows, padding_idx)
    sum_pieces(at, bounds, chunk, windows, rows, out, partials, score_out, score_partials)
    return out, score_out
