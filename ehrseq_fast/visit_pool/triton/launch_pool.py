"""The operators of pooling in Triton, and of the gradient of ``masked_pool``: one launch each, of a
kernel in ``kernels_pool.py``."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ...operations import implemented_in_triton
from ...triton_support import launch
from . import kernels_pool as kernels
from .arguments import (
    expect,
    expect_code_weights,
    expect_floating,
    expect_gradient,
    expect_mask,
    expect_mode,
    expect_packed_codes,
    expect_padded_codes,
    expect_table,
    expect_together,
    expect_weighted_mode,
)
from .tiles import MAX, MEAN, grid, is_wide, kernel_mask, registers, tile_of, winners_of


def _outputs(table: Tensor, shape: tuple[int, ...], mode: int) -> tuple[Tensor, Tensor]:
    winners = shape if mode == MAX else (0,)
    return table.new_empty(shape), table.new_empty(winners, dtype=torch.int32)


def _pool_contiguous(
    table: Tensor,
    codes: Tensor | None,
    code_offsets: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    n_visits: int,
    n_slots: int,
    n_entries: int,
    vocabulary: int,
    mode: int,
    code_weights: Tensor | None = None,
    totals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    pooled, arg_max = outputs
    if pooled.numel():
        row_size = table.shape[-1]
        tile = tile_of(table, row_size, row_bytes=2048)
        launch(
            kernels.pool_contiguous,
            grid(n_visits, row_size, tile),
            table,
            codes,
            code_offsets,
            code_weights,
            pooled,
            arg_max if mode == MAX else None,
            totals,
            n_visits,
            n_slots,
            n_entries,
            vocabulary,
            ROW_SIZE=row_size,
            MODE=mode,
            VISITS=tile.rows,
            COLUMNS=tile.columns,
            UNROLL=2 if n_entries < 3 * n_visits else 4,
            num_warps=2,
            maxnreg=registers(table, row_size, mode),
        )
    return outputs


def _pool_masked(
    table: Tensor,
    codes: Tensor | None,
    mask: Tensor,
    outputs: tuple[Tensor, Tensor],
    n_visits: int,
    n_slots: int,
    vocabulary: int,
    mode: int,
) -> tuple[Tensor, Tensor]:
    pooled, arg_max = outputs
    if pooled.numel():
        row_size = table.shape[-1]
        tile = tile_of(table, row_size, 2048, most_rows=4 if is_wide(table, row_size) else 2)
        kept, weighted = kernel_mask(mask)
        launch(
            kernels.pool_masked,
            grid(n_visits, row_size, tile),
            table,
            codes,
            kept,
            pooled,
            arg_max if mode == MAX else None,
            n_visits,
            n_slots,
            vocabulary,
            ROW_SIZE=row_size,
            MODE=mode,
            WEIGHTED=weighted,
            VISITS=tile.rows,
            COLUMNS=tile.columns,
            UNROLL=2,
            WORDS=1 if n_slots <= 64 else 4,
            num_warps=1,
            maxnreg=160,
        )
    return outputs


@implemented_in_triton("visit_pool")
def visit_pool(
    codes: Tensor, weight: Tensor, visit_mask: Tensor | None, mode: int
) -> tuple[Tensor, Tensor]:
    """The operator ``visit_pool``."""
    expect_together(codes, weight, visit_mask)
    expect_table(weight)
    expect_mode(mode)
    expect_padded_codes(codes, visit_mask)
    table, codes = weight.contiguous(), codes.contiguous()
    vocabulary, row_size = table.shape
    *leading, n_slots = codes.shape
    n_visits = math.prod(leading)
    outputs = _outputs(table, (*leading, row_size), mode)
    if visit_mask is None:
        n_entries = n_visits * n_slots
        return _pool_contiguous(
            table, codes, None, outputs, n_visits, n_slots, n_entries, vocabulary, mode
        )
    return _pool_masked(table, codes, visit_mask, outputs, n_visits, n_slots, vocabulary, mode)


@implemented_in_triton("packed_visit_pool")
def packed_visit_pool(
    codes: Tensor, code_offsets: Tensor, weight: Tensor, mode: int
) -> tuple[Tensor, Tensor]:
    """The operator ``packed_visit_pool``."""
    expect_together(codes, code_offsets, weight)
    expect_table(weight)
    expect_mode(mode)
    expect_packed_codes(codes, code_offsets)
    table, codes, code_offsets = weight.contiguous(), codes.contiguous(), code_offsets.contiguous()
    vocabulary, row_size = table.shape
    n_visits = code_offsets.shape[0] - 1
    outputs = _outputs(table, (n_visits, row_size), mode)
    n_entries = codes.shape[0]
    return _pool_contiguous(
        table, codes, code_offsets, outputs, n_visits, 0, n_entries, vocabulary, mode
    )


@implemented_in_triton("packed_weighted_pool")
def packed_weighted_pool(
    codes: Tensor, code_offsets: Tensor, weight: Tensor, code_weights: Tensor, mode: int
) -> tuple[Tensor, Tensor]:
    """The operator ``packed_weighted_pool``."""
    expect_together(codes, code_offsets, weight, code_weights)
    expect_table(weight)
    expect_weighted_mode(mode)
    expect_packed_codes(codes, code_offsets)
    expect_code_weights(code_weights, codes, weight)
    table, codes, code_offsets = weight.contiguous(), codes.contiguous(), code_offsets.contiguous()
    vocabulary, row_size = table.shape
    n_visits = code_offsets.shape[0] - 1
    outputs = _outputs(table, (n_visits, row_size), mode)
    totals = code_weights.new_empty((n_visits if mode == MEAN else 0,))
    if not row_size:
        # there is no column for a program, and the gradient of the weights is zero whatever these
        totals.zero_()
    pooled, _ = _pool_contiguous(
        table,
        codes,
        code_offsets,
        outputs,
        n_visits,
        0,
        codes.shape[0],
        vocabulary,
        mode,
        code_weights.contiguous(),
        totals if mode == MEAN else None,
    )
    return pooled, totals


@implemented_in_triton("masked_pool")
def masked_pool(embeddings: Tensor, mask: Tensor | None, mode: int) -> tuple[Tensor, Tensor]:
    """The operator ``masked_pool``: the table is the slots themselves."""
    expect_together(embeddings, mask)
    expect(embeddings.dim() >= 2, "embeddings", "shape [..., C, E]", list(embeddings.shape))
    expect_floating("embeddings", embeddings)
    expect_mask(mask, embeddings.shape[:-1])
    expect_mode(mode)
    table = embeddings.contiguous()
    *leading, n_slots, row_size = table.shape
    n_visits = math.prod(leading)
    outputs = _outputs(table, (*leading, row_size), mode)
    if mask is None:
        return _pool_contiguous(
            table, None, None, outputs, n_visits, n_slots, n_visits * n_slots, 0, mode
        )
    return _pool_masked(table, None, mask, outputs, n_visits, n_slots, 0, mode)


@implemented_in_triton("masked_pool_backward")
def masked_pool_backward(
    grad: Tensor, mask: Tensor | None, arg_max: Tensor | None, n_slots: int, mode: int
) -> Tensor:
    """The operator ``masked_pool_backward``."""
    expect_together(grad, mask, arg_max)
    expect_gradient(grad, grad.shape[:-1], arg_max, mode)
    expect(n_slots >= 0, "n_slots", "0 or more", n_slots)
    expect_mask(mask, (*grad.shape[:-1], n_slots))
    grad = grad.contiguous()
    *leading, row_size = grad.shape
    out = grad.new_empty((*leading, n_slots, row_size))
    if out.numel():
        tile = tile_of(grad, row_size, row_bytes=4096)
        mask, weighted = kernel_mask(mask)
        launch(
            kernels.spread,
            (math.prod(leading), triton.cdiv(row_size, tile.columns)),
            grad,
            mask,
            winners_of(arg_max, mode),
            out,
            n_slots,
            ROW_SIZE=row_size,
            MODE=mode,
            WEIGHTED=weighted,
            SLOTS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=4,
        )
    return out
