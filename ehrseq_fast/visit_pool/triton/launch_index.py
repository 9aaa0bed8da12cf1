"""The code index of a padded batch: what is launched, with what memory. ``kernels_index.py`` holds
the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...checks import accumulator
from ...triton_support import interpreted, launch
from . import kernels_index as kernels
from .tiles import MEAN, MOST_PROGRAMS, kernel_mask

# Slots of a padded batch: positions among them, up to a block past the last, are 32-bit numbers.
_MOST_SLOTS = 2**31 - 2**16


@dataclass(frozen=True)
class Index:
    """A code index in one of its forms (kernels_gradient.py), and what its entries weigh."""

    codes: Tensor
    offsets: Tensor | None
    entries: Tensor
    n_slots: int | None = None  # where entries are slots
    count: Tensor | None = None  # of entries, where only the device knows it
    code_offsets: Tensor | None = None
    scales: Tensor | None = None
    mask: Tensor | None = None
    # weights of codes, which of them is each entry's, and in mode mean the visits' sums of them
    code_weights: Tensor | None = None
    positions: Tensor | None = None
    totals: Tensor | None = None

    @property
    def most_entries(self) -> int:
        return self.entries.shape[0]


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
            f"codes: expected at most {_MOST_SLOTS} slots for the gradient, got {n}: pass a "
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
        kernels.count_codes,
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
    launch(kernels.scan_counts, (1,), starts, count, blocks, BLOCK=4096, num_warps=8)
    keys = codes.new_empty((n,), dtype=torch.int32)
    slots = torch.empty_like(keys)
    launch(
        kernels.gather_codes,
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
            kernels.count_digits,
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
            kernels.scan_digits,
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
            kernels.scatter_digits,
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
