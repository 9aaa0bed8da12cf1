"""Visit pooling in Triton: every operator of the room, as launches of the kernels beside this file.

triton_forward.py pools, triton_gradient.py sums the gradient of the table from a code index,
triton_index.py builds that index for a padded batch (triton_backward.py launches both), and
triton_attention.py has both directions of attention. Nothing here reads a value from the device,
except where the size of a sparse gradient depends on one.

Launches (tests/test_triton_visit_pool.py counts them): one for pooling; at most three for its
gradient when the index is given; for a padded batch three more, and three for every eight bits of
a code.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
from torch import Tensor

from ..backend import implemented_in_triton
from ..triton_support import launch
from . import triton_attention as attention
from . import triton_forward as forward
from . import triton_index as index
from .reference import accumulator
from .triton_arguments import (
    expect,
    expect_attention_gradient,
    expect_floating,
    expect_gradient,
    expect_index,
    expect_mask,
    expect_mode,
    expect_packed_codes,
    expect_packed_gradient,
    expect_padded_codes,
    expect_padded_gradient,
    expect_padding,
    expect_row,
    expect_scores,
    expect_table,
    expect_together,
)
from .triton_backward import Index, Rows, find_runs, index_padded_codes, sum_codes, sum_pieces
from .triton_tiles import MAX, grid, is_wide, kernel_mask, registers, tile_of

# ---------------------------------------------------------------------------------------------
# Forward


def _outputs(table: Tensor, shape: tuple[int, ...], mode: int) -> tuple[Tensor, Tensor]:
    winners = shape if mode == MAX else (0,)
    return table.new_empty(shape), table.new_empty(winners, dtype=torch.int32)


def _pool_runs(
    table: Tensor,
    codes: Tensor | None,
    code_offsets: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    n_visits: int,
    n_slots: int,
    n_entries: int,
    vocabulary: int,
    mode: int,
) -> tuple[Tensor, Tensor]:
    pooled, arg_max = outputs
    if pooled.numel():
        row_size = table.shape[-1]
        tile = tile_of(table, row_size, row_bytes=2048)
        launch(
            forward.pool_runs,
            grid(n_visits, row_size, tile),
            table,
            codes,
            code_offsets,
            pooled,
            arg_max if mode == MAX else None,
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
            forward.pool_masked,
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
        return _pool_runs(
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
    return _pool_runs(table, codes, code_offsets, outputs, n_visits, 0, n_entries, vocabulary, mode)


@implemented_in_triton("masked_pool")
def masked_pool(embeddings: Tensor, mask: Tensor | None, mode: int) -> tuple[Tensor, Tensor]:
    """The operator ``masked_pool``: the table is the slots themselves."""
    expect_together(embeddings, mask)
    expect(embeddings.dim() >= 2, "embeddings must be [..., C, E]", list(embeddings.shape))
    expect_floating("embeddings", embeddings)
    expect_mask(mask, embeddings.shape[:-1])
    expect_mode(mode)
    table = embeddings.contiguous()
    *leading, n_slots, row_size = table.shape
    n_visits = math.prod(leading)
    outputs = _outputs(table, (*leading, row_size), mode)
    if mask is None:
        return _pool_runs(
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
    expect(n_slots >= 0, "n_slots must not be negative", n_slots)
    expect_mask(mask, (*grad.shape[:-1], n_slots))
    grad = grad.contiguous()
    *leading, row_size = grad.shape
    out = grad.new_empty((*leading, n_slots, row_size))
    if out.numel():
        tile = tile_of(grad, row_size, row_bytes=4096)
        mask, weighted = kernel_mask(mask)
        launch(
            forward.spread,
            (math.prod(leading), triton.cdiv(row_size, tile.columns)),
            grad,
            mask,
            _winners(arg_max, mode),
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


# ---------------------------------------------------------------------------------------------
# Backward


@implemented_in_triton("packed_visit_pool_backward")
def packed_visit_pool_backward(
    grad: Tensor,
    code_offsets: Tensor,
    index_codes: Tensor,
    index_offsets: Tensor,
    index_visits: Tensor,
    vocabulary: int,
    arg_max: Tensor | None,
    mode: int,
    padding_idx: int,
) -> Tensor:
    """The operator ``packed_visit_pool_backward``."""
    expect_packed_gradient(grad, vocabulary, arg_max, mode, padding_idx)
    at = _packed_index(grad, code_offsets, index_codes, index_offsets, index_visits)
    rows = Rows(vocabulary, padding_idx)
    out = grad.new_empty((vocabulary, grad.shape[1]))
    return sum_codes(grad.contiguous(), _winners(arg_max, mode), at, rows, out, mode)


@implemented_in_triton("packed_visit_pool_backward_sparse")
def packed_visit_pool_backward_sparse(
    grad: Tensor,
    code_offsets: Tensor,
    index_codes: Tensor,
    index_offsets: Tensor,
    index_visits: Tensor,
    vocabulary: int,
    arg_max: Tensor | None,
    mode: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``packed_visit_pool_backward_sparse``.

    With ``padding_idx``, whether the batch holds that code decides the size of the result: then the
    host waits for the device, once.
    """
    expect_packed_gradient(grad, vocabulary, arg_max, mode, padding_idx)
    at = _packed_index(grad, code_offsets, index_codes, index_offsets, index_visits)
    winners = _winners(arg_max, mode)
    return _sparse_rows(grad.contiguous(), winners, at, vocabulary, mode, padding_idx)


def _winners(arg_max: Tensor | None, mode: int) -> Tensor | None:
    return arg_max.contiguous() if mode == MAX and arg_max is not None else None


def _packed_index(
    grad: Tensor,
    code_offsets: Tensor,
    index_codes: Tensor,
    index_offsets: Tensor,
    index_visits: Tensor,
) -> Index:
    expect_together(grad, code_offsets, index_codes, index_offsets, index_visits)
    expect_row("code_offsets", code_offsets, grad.shape[0] + 1)
    expect_index(index_codes, index_offsets, index_visits)
    return Index(
        index_codes.contiguous(),
        index_offsets.contiguous(),
        index_visits.contiguous(),
        code_offsets=code_offsets.contiguous(),
    )


def _sparse_rows(
    grad: Tensor, arg_max: Tensor | None, at: Index, vocabulary: int, mode: int, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """The gradient's rows for the codes of a packed batch's index, and those codes."""
    # a code outside the vocabulary has a row of zeros, whose number must still be one of the table
    code_ids = at.codes.clamp(0, max(vocabulary - 1, 0)).long()
    padding_segment = at.codes.shape[0]
    if padding_idx >= 0:
        padding_segment = _position_of(at.codes, padding_idx)
        code_ids = torch.cat([code_ids[:padding_segment], code_ids[padding_segment + 1 :]])
    rows = Rows(vocabulary, padding_idx, sparse=True, padding_segment=padding_segment)
    out = grad.new_empty((code_ids.shape[0], grad.shape[1]))
    return code_ids, sum_codes(grad, arg_max, at, rows, out, mode)


def _position_of(ascending: Tensor, wanted: int) -> int:
    """Where ``wanted`` stands; the length where it does not. Waits for the device."""
    places = torch.arange(ascending.shape[0], device=ascending.device)
    places = torch.where(ascending == wanted, places, ascending.shape[0])
    return int(places.min()) if ascending.shape[0] else 0


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
            attention.pool_attention,
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
    runs, chunk, windows = find_runs(at, Rows(n_rows, -1), n_rows)
    partials = grad.new_empty((windows, row_size), dtype=accumulator(grad.dtype))
    score_partials = grad.new_empty((windows,), dtype=accumulator(grad.dtype))
    tile = tile_of(grad, row_size, row_bytes=2048)
    launch(
        attention.sum_attention,
        (triton.cdiv(windows, tile.rows) + triton.cdiv(n_rows, tile.rows),),
        grad,
        pooled.contiguous(),
        highest.contiguous(),
        inverse.contiguous(),
        table,
        scores.contiguous(),
        runs,
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
    sum_pieces(at, runs, chunk, windows, rows, out, partials, score_out, score_partials)
    return out, score_out


@implemented_in_triton("visit_pool_backward")
def visit_pool_backward(
    grad: Tensor,
    codes: Tensor,
    vocabulary: int,
    visit_mask: Tensor | None,
    arg_max: Tensor | None,
    mode: int,
    padding_idx: int,
) -> Tensor:
    """The operator ``visit_pool_backward``."""
    expect_padded_gradient(grad, codes, vocabulary, visit_mask, arg_max, mode, padding_idx)
    out = grad.new_empty((vocabulary, grad.shape[-1]))
    if not codes.numel():
        return out.zero_()
    at = index_padded_codes(codes, visit_mask, vocabulary, grad.dtype, mode, padding_idx)
    rows = Rows(vocabulary, padding_idx)
    return sum_codes(grad.contiguous(), _winners(arg_max, mode), at, rows, out, mode)


@implemented_in_triton("visit_pool_backward_sparse")
def visit_pool_backward_sparse(
    grad: Tensor,
    codes: Tensor,
    vocabulary: int,
    visit_mask: Tensor | None,
    arg_max: Tensor | None,
    mode: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``visit_pool_backward_sparse``.

    The number of different codes is the size of the result: the host waits for it, once.
    """
    expect_padded_gradient(grad, codes, vocabulary, visit_mask, arg_max, mode, padding_idx)
    row_size = grad.shape[-1]
    if not codes.numel() or not vocabulary:
        return grad.new_empty((0,), dtype=torch.int64), grad.new_empty((0, row_size))
    at = index_padded_codes(codes, visit_mask, vocabulary, grad.dtype, mode, padding_idx)
    row_offsets = at.entries.new_empty((vocabulary + 1,))
    launch(
        index.find_rows,
        (triton.cdiv(vocabulary + 1, 256),),
        at.codes,
        at.count,
        row_offsets,
        vocabulary + 1,
        ROWS=256,
        num_warps=4,
    )
    code_ids = row_offsets.diff().nonzero().squeeze(1)
    offsets = torch.cat([row_offsets[:-1][code_ids], row_offsets[-1:]])
    at = replace(at, codes=code_ids.int(), offsets=offsets)
    rows = Rows(vocabulary, padding_idx, sparse=True, padding_segment=code_ids.shape[0])
    rows_out = grad.new_empty((code_ids.shape[0], row_size))
    winners = _winners(arg_max, mode)
    return code_ids, sum_codes(grad.contiguous(), winners, at, rows, rows_out, mode)
