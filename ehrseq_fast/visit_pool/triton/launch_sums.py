"""Sums over the segments of a code index: what is launched, with what memory.
``kernels_gradient.py`` holds the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
from torch import Tensor

from ...checks import accumulator
from ...triton_support import launch
from . import kernels_gradient as kernels
from .launch_index import Index
from .tiles import MAX, MEAN, MOST_PROGRAMS, grid, registers, rows_in_flight, tile_of


@dataclass(frozen=True)
class Rows:
    """Which rows of the gradient are written: all of the table, or those of the index's codes."""

    vocabulary: int
    padding_idx: int
    sparse: bool = False
    padding_segment: int = -1


def find_segments(at: Index, rows: Rows, n_rows: int) -> tuple[Tensor, int, int]:
    """The bounds of the segments (kernels_gradient.py), the length of a piece, and the number of
    windows."""
    most = at.most_entries
    chunk = 32 if most < 2**22 else 128  # partials of a huge padded batch would take much memory
    windows = most // chunk
    bounds = at.entries.new_empty((4, windows + n_rows))
    block = 256
    window_programs = min(triton.cdiv(windows, block), MOST_PROGRAMS)
    launch(
        kernels.find_segments,
        (window_programs + triton.cdiv(n_rows, block),),
        at.codes,
        at.offsets,
        at.count,
        bounds,
        at.codes.shape[0],
        most,
        windows,
        n_rows,
        rows.vocabulary,
        rows.padding_idx,
        rows.padding_segment,
        window_programs,
        SPARSE=rows.sparse,
        CHUNK=chunk,
        BLOCK=block,
        num_warps=4,
    )
    return bounds, chunk, windows


def sum_pieces(
    at: Index,
    bounds: Tensor,
    chunk: int,
    windows: int,
    rows: Rows,
    out: Tensor,
    partials: Tensor,
    score_out: Tensor | None = None,
    score_partials: Tensor | None = None,
) -> None:
    """The last launch of a gradient, where the index is long enough for a long segment."""
    if windows < 2:
        return
    n_rows, row_size = out.shape
    columns = min(triton.next_power_of_2(max(row_size, 1)), 32)
    launch(
        kernels.sum_pieces,
        # with attention a table without columns still has scores
        (min(windows, MOST_PROGRAMS), max(triton.cdiv(row_size, columns), 1)),
        bounds,
        at.count,
        out,
        score_out,
        partials,
        score_partials,
        at.most_entries,
        windows,
        n_rows,
        -1 if rows.sparse else rows.padding_idx,
        ROW_SIZE=row_size,
        CHUNK=chunk,
        ROWS=64,
        COLUMNS=columns,
        UNROLL=4,
        num_warps=8,
    )


def sum_codes(
    grad: Tensor, arg_max: Tensor | None, at: Index, rows: Rows, out: Tensor, mode: int
) -> Tensor:
    """``out``, every row written: the sum over its code's entries."""
    n_rows, row_size = out.shape
    if not out.numel():
        return out
    bounds, chunk, windows = find_segments(at, rows, n_rows)
    most = at.most_entries
    partials = grad.new_empty((windows, row_size), dtype=accumulator(grad.dtype))
    tile = tile_of(grad, row_size, row_bytes=2048)
    window_tiles, column_programs = grid(windows, row_size, tile)
    launch(
        kernels.sum_segments,
        (min(window_tiles, MOST_PROGRAMS) + triton.cdiv(n_rows, tile.rows), column_programs),
        grad,
        arg_max if mode == MAX else None,
        bounds,
        at.entries,
        at.count,
        at.code_offsets if mode == MEAN else None,
        at.scales if mode == MEAN else None,
        at.mask if mode != MAX else None,
        at.code_weights,
        at.positions,
        at.totals if mode == MEAN else None,
        out,
        partials,
        most,
        at.n_slots,
        math.prod(grad.shape[:-1]),
        windows,
        n_rows,
        ROW_SIZE=row_size,
        MODE=mode,
        CHUNK=chunk,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        UNROLL=rows_in_flight(
            grad, row_size, mode, at.mask if at.code_weights is None else at.code_weights
        ),
        num_warps=4,
        maxnreg=registers(grad, row_size, mode),
    )
    sum_pieces(at, bounds, chunk, windows, rows, out, partials)
    return out
