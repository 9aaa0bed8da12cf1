"""The gradient of the embedding table: what is launched, with room for what.

triton_gradient.py and triton_index.py hold the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..triton_support import interpreted, launch
from . import triton_gradient as gradient
from . import triton_index as index
from .reference import accumulator
from .triton_tiles import (
    MAX,
    MEAN,
    MOST_PROGRAMS,
    grid,
    kernel_mask,
    registers,
    rows_in_flight,
    tile_of,
)

# Slots of a padded batch: positions among them are 32-bit numbers, with room for a block beyond.
_MOST_SLOTS = 2**31 - 2**16


@dataclass(frozen=True)
class Index:
    """A code index in one of its forms (triton_gradient.py), and what its entries weigh."""

    codes: Tensor
    offsets: Tensor | None
    entries: Tensor
    n_slots: int | None = None  # where entries are slots
    count: Tensor | None = None  # of entries, where only the device knows it
    code_offsets: Tensor | None = None
    scales: Tensor | None = None
    mask: Tensor | None = None

    @property
    def most_entries(self) -> int:
        return self.entries.shape[0]


@dataclass(frozen=True)
class Rows:
    """Which rows of the gradient are written: all of the table, or those of the index's codes."""

    vocabulary: int
    padding_idx: int
    sparse: bool = False
    padding_segment: int = -1


def find_runs(at: Index, rows: Rows, n_rows: int) -> tuple[Tensor, int, int]:
    """The runs (triton_gradient.py), how long a piece of one is, and how many windows there are."""
    most = at.most_entries
    chunk = 32 if most < 2**22 else 128  # partials of a huge padded batch would need much room
    windows = most // chunk
    runs = at.entries.new_empty((4, windows + n_rows))
    block = 256
    window_programs = min(triton.cdiv(windows, block), MOST_PROGRAMS)
    launch(
        gradient.find_runs,
        (window_programs + triton.cdiv(n_rows, block),),
        at.codes,
        at.offsets,
        at.count,
        runs,
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
    return runs, chunk, windows


def sum_pieces(
    at: Index,
    runs: Tensor,
    chunk: int,
    windows: int,
    rows: Rows,
    out: Tensor,
    partials: Tensor,
    score_out: Tensor | None = None,
    score_partials: Tensor | None = None,
) -> None:
    """The last launch of a gradient, where the index is long enough for a long run."""
    if windows < 2:
        return
    n_rows, row_size = out.shape
    columns = min(triton.next_power_of_2(max(row_size, 1)), 32)
    launch(
        gradient.sum_pieces,
        # with attention a table without columns still has scores
        (min(windows, MOST_PROGRAMS), max(triton.cdiv(row_size, columns), 1)),
        runs,
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
    runs, chunk, windows = find_runs(at, rows, n_rows)
    most = at.most_entries
    partials = grad.new_empty((windows, row_size), dtype=accumulator(grad.dtype))
    tile = tile_of(grad, row_size, row_bytes=2048)
    window_tiles, column_programs = grid(windows, row_size, tile)
    launch(
        gradient.sum_runs,
        (min(window_tiles, MOST_PROGRAMS) + triton.cdiv(n_rows, tile.rows), column_programs),
        grad,
        arg_max if mode == MAX else None,
        runs,
        at.entries,
        at.count,
        at.code_offsets if mode == MEAN else None,
        at.scales if mode == MEAN else None,
        at.mask if mode != MAX else None,
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
        UNROLL=rows_in_flight(grad, row_size, mode, at.mask),
        num_warps=4,
        maxnreg=registers(grad, row_size, mode),
    )
    sum_pieces(at, runs, chunk, windows, rows, out, partials)
    return out


def index_padded_codes(
    codes: Tensor,
    mask: Tensor | None,
    vocabulary: int,
    dtype: torch.dtype,
    mode: int,
    padding_idx: int,
) -> Index:
    """The code index of a padded batch that has slots, built without waiting for the device."""
    *leading, n_slots = codes.shape
    n_visits, n = math.prod(leading), codes.numel()
    if n > _MOST_SLOTS:
        raise ValueError(
            f"the gradient of visit pooling takes at most {_MOST_SLOTS} slots, got {n}: pass a "
            "PackedVisits, which has none that are empty"
        )
    codes = codes.contiguous()
    mask, weighted = kernel_mask(mask)
    scales = None
    if mode == MEAN and mask is not None:
        scales = codes.new_empty((n_visits,), dtype=accumulator(dtype))

    block, visits = 2048, 8
    blocks = triton.cdiv(n, block)
    starts = codes.new_empty((blocks,), dtype=torch.int32)
    count = codes.new_empty((1,), dtype=torch.int32)
    launch(
        index.count_codes,
        (blocks + (0 if scales is None else triton.cdiv(n_visits, visits)),),
        codes,
        mask,
        starts,
        scales,
        n,
        n_slots,
        n_visits,
        vocabulary,
        padding_idx,
        blocks,
        WEIGHTED=weighted,
        BLOCK=block,
        VISITS=visits,
        WIDTH=64,
        num_warps=4,
    )
    launch(index.scan_counts, (1,), starts, count, blocks, BLOCK=4096, num_warps=8)
    keys = codes.new_empty((n,), dtype=torch.int32)
    slots = torch.empty_like(keys)
    launch(
        index.gather_codes,
        (blocks,),
        codes,
        mask,
        starts,
        keys,
        slots,
        n,
        vocabulary,
        padding_idx,
        BLOCK=block,
        num_warps=4,
    )
    keys, slots = sorted_by_code(keys, slots, count, vocabulary)
    return Index(
        keys,
        None,
        slots,
        n_slots,
        count,
        scales=scales,
        mask=mask if weighted else None,
    )


def sorted_by_code(
    keys: Tensor, slots: Tensor, count: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """The first ``count`` keys, ascending, and their slots; slots of one key keep their order."""
    bits = max(vocabulary - 1, 0).bit_length()
    passes = triton.cdiv(bits, 8)
    if not passes:
        return keys, slots
    digit_bits = triton.cdiv(bits, passes)
    radix, tile = 2**digit_bits, 128
    tiles = triton.cdiv(keys.shape[0], tile)
    programs = (min(tiles, MOST_PROGRAMS),)
    table = keys.new_empty((radix, tiles))
    totals = keys.new_empty((radix,))
    to_keys, to_slots = torch.empty_like(keys), torch.empty_like(slots)
    digits = min(radix, 32 if interpreted() else 4)
    for shift in range(0, bits, digit_bits):
        launch(
            index.count_digits,
            programs,
            keys,
            count,
            table,
            shift,
            tiles,
            RADIX=radix,
            TILE=tile,
            num_warps=4,
        )
        launch(
            index.scan_digits,
            (triton.cdiv(radix, digits),),
            count,
            table,
            totals,
            tiles,
            TILE=tile,
            DIGITS=digits,
            BLOCK=256,
            num_warps=4,
        )
        launch(
            index.scatter_digits,
            programs,
            keys,
            slots,
            to_keys,
            to_slots,
            count,
            table,
            totals,
            shift,
            tiles,
            RADIX=radix,
            TILE=tile,
            PART=min(radix, 32),
            num_warps=4,
        )
        keys, to_keys = to_keys, keys
        slots, to_slots = to_slots, slots
    return keys, slots
