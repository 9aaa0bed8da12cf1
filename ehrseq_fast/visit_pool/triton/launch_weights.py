"""The operators of the gradients of pooling with weights per code, in Triton.

Launches (tests/test_triton_visit_pool.py counts them): at most three for the table, one for the
weights.
"""

from __future__ import annotations

import triton
from torch import Tensor

from ...checks import accumulator
from ...operations import implemented_in_triton
from ...triton_support import launch
from . import kernels_weights as kernels
from .arguments import (
    expect,
    expect_code_weights,
    expect_dtype,
    expect_index,
    expect_packed_codes,
    expect_packed_gradient,
    expect_row,
    expect_shape,
    expect_table,
    expect_together,
    expect_totals,
    expect_weighted_mode,
)
from .launch_gradient import sparse_rows_of
from .launch_index import Index
from .launch_sums import Rows, sum_codes
from .tiles import MEAN, tile_of


@implemented_in_triton("packed_weighted_pool_backward")
def packed_weighted_pool_backward(
    grad: Tensor,
    codes: Tensor,
    code_offsets: Tensor,
    code_weights: Tensor,
    totals: Tensor | None,
    index_codes: Tensor,
    index_offsets: Tensor,
    index_visits: Tensor,
    index_positions: Tensor | None,
    vocabulary: int,
    mode: int,
    padding_idx: int,
) -> Tensor:
    """The operator ``packed_weighted_pool_backward``."""
    batch = (codes, code_offsets, code_weights, totals)
    index = (index_codes, index_offsets, index_visits, index_positions)
    at = _index(grad, *batch, *index, vocabulary, mode, padding_idx)
    out = grad.new_empty((vocabulary, grad.shape[1]))
    return sum_codes(grad.contiguous(), None, at, Rows(vocabulary, padding_idx), out, mode)


@implemented_in_triton("packed_weighted_pool_backward_sparse")
def packed_weighted_pool_backward_sparse(
    grad: Tensor,
    codes: Tensor,
    code_offsets: Tensor,
    code_weights: Tensor,
    totals: Tensor | None,
    index_codes: Tensor,
    index_offsets: Tensor,
    index_visits: Tensor,
    index_positions: Tensor | None,
    vocabulary: int,
    mode: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``packed_weighted_pool_backward_sparse``, which waits for the device where
    ``packed_visit_pool_backward_sparse`` does."""
    batch = (codes, code_offsets, code_weights, totals)
    index = (index_codes, index_offsets, index_visits, index_positions)
    at = _index(grad, *batch, *index, vocabulary, mode, padding_idx)
    return sparse_rows_of(grad.contiguous(), None, at, vocabulary, mode, padding_idx)


def _index(
    grad: Tensor,
    codes: Tensor,
    code_offsets: Tensor,
    code_weights: Tensor,
    totals: Tensor | None,
    index_codes: Tensor,
    index_offsets: Tensor,
    index_visits: Tensor,
    index_positions: Tensor | None,
    vocabulary: int,
    mode: int,
    padding_idx: int,
) -> Index:
    if index_positions is None:
        raise ValueError("index_positions: expected a tensor on a GPU, got None")
    expect_weighted_mode(mode)
    expect_packed_gradient(grad, vocabulary, None, mode, padding_idx)
    expect_together(grad, codes, code_offsets, code_weights, totals)
    expect_together(grad, index_codes, index_offsets, index_visits, index_positions)
    expect_packed_codes(codes, code_offsets)
    expect_row("code_offsets", code_offsets, grad.shape[0] + 1)
    expect_index(index_codes, index_offsets, index_visits)
    expect_row("index_visits", index_visits, codes.shape[0])
    expect_row("index_positions", index_positions, codes.shape[0])
    expect_code_weights(code_weights, codes, grad)
    expect_totals(totals, grad.shape[0], grad, mode)
    return Index(
        index_codes.contiguous(),
        index_offsets.contiguous(),
        index_visits.contiguous(),
        code_weights=code_weights.contiguous(),
        positions=index_positions.contiguous(),
        totals=None if totals is None else totals.contiguous(),
    )


@implemented_in_triton("packed_weighted_pool_backward_weights")
def packed_weighted_pool_backward_weights(
    grad: Tensor,
    pooled: Tensor | None,
    totals: Tensor | None,
    codes: Tensor,
    code_offsets: Tensor,
    weight: Tensor,
    mode: int,
) -> Tensor:
    """The operator ``packed_weighted_pool_backward_weights``."""
    expect_weighted_mode(mode)
    expect_together(grad, pooled, totals, codes, code_offsets, weight)
    expect_table(weight)
    expect_packed_codes(codes, code_offsets)
    n_visits = code_offsets.shape[0] - 1
    vocabulary, row_size = weight.shape
    expect_shape("grad", grad, (n_visits, row_size))
    expect_dtype("grad", grad, weight.dtype)
    expect_totals(totals, n_visits, weight, mode)
    if mode == MEAN:
        expect(pooled is not None, "pooled", "a tensor in mode mean", None)
        assert pooled is not None
        expect_shape("pooled", pooled, grad.shape)
        expect_dtype("pooled", pooled, weight.dtype)
        pooled = pooled.contiguous()
    out = weight.new_empty(codes.shape, dtype=accumulator(weight.dtype))
    if not codes.shape[0]:
        return out
    table = weight.contiguous()
    tile = tile_of(table, row_size, row_bytes=2048)
    launch(
        kernels.weight_gradients,
        (triton.cdiv(n_visits, tile.rows),),
        grad.contiguous(),
        table,
        pooled if mode == MEAN else None,
        totals.contiguous() if mode == MEAN and totals is not None else None,
        codes.contiguous(),
        code_offsets.contiguous(),
        out,
        n_visits,
        codes.shape[0],
        vocabulary,
        ROW_SIZE=row_size,
        MODE=mode,
        VISITS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=2,
    )
    return out
