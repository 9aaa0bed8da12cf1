"""How visit pooling's Triton kernels are laid out for a table: heuristics by shape and dtype, no
autotuning. Lengths decide the grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...triton_support import interpreted

MEAN, SUM, MAX = 0, 1, 2

# Programs of a kernel that walks over tiles whose number only the device knows: enough to fill a
# large GPU, and not many that find nothing to do.
MOST_PROGRAMS = 2048
# The interpreter is quickest with few programs.
_INTERPRETED_ROWS = 128


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int


def tile_of(like: Tensor, row_size: int, row_bytes: int, most_rows: int = 32) -> Tile:
    """Rows by columns of about ``row_bytes``, as many columns as the table has and fit."""
    columns = min(triton.next_power_of_2(max(row_size, 1)), row_bytes // like.element_size())
    rows = row_bytes // (columns * like.element_size())
    return Tile(_INTERPRETED_ROWS if interpreted() else min(rows, most_rows), columns)


def is_wide(table: Tensor, row_size: int) -> bool:
    """Whether rows can be read 16 bytes at a time."""
    return row_size * table.element_size() % 16 == 0


def rows_in_flight(grad: Tensor, row_size: int, mode: int, mask: Tensor | None) -> int:
    """As many as registers allow: a maximum reads its winners, too, and a narrow row takes a load
    for every column."""
    if not is_wide(grad, row_size):
        return 2
    return 4 if mode == MAX or mask is not None else 8


def registers(table: Tensor, row_size: int, mode: int) -> int:
    """A bound on those of a thread, above which nothing is spilled: with 64, an SM holds 32 warps.
    A thread holds twice as many sums of a 16-bit table; a narrow row takes an address a column."""
    if not is_wide(table, row_size):
        return 168
    if mode == MAX or table.dtype == torch.float64:
        return 128
    return 64 if table.dtype == torch.float32 else 72


def grid(rows: int, row_size: int, tile: Tile) -> tuple[int, int]:
    return triton.cdiv(rows, tile.rows), triton.cdiv(row_size, tile.columns)


def kernel_mask(mask: Tensor | None) -> tuple[Tensor | None, bool]:
    """A mask as the kernels read it, and whether its values are weights."""
    if mask is None:
        return None, False
    whole = mask.contiguous()
    return (whole.view(torch.uint8), False) if whole.dtype == torch.bool else (whole, True)


def winners_of(arg_max: Tensor | None, mode: int) -> Tensor | None:
    """``arg_max`` as the kernels read it; None in the modes that have none."""
    return arg_max.contiguous() if mode == MAX and arg_max is not None else None
