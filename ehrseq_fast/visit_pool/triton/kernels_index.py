"""The code index of a padded batch, built on the device without waiting for it.

Nearly all slots are empty, so the real ones are gathered first, in the order of the batch, and only
they are sorted by code: a stable radix sort, over the bits that the vocabulary needs. Their number
stays on the device. Buffers are as large as the number of slots; what is read and written of them,
and the programs that do more than return, are those of the real codes.

A code outside the vocabulary, and ``padding_idx``, are left out: they get no gradient.
"""

import triton
import triton.language as tl

from .kernels_gradient import lower_bound


@triton.jit
def _real_codes(codes, mask, slots, there, vocabulary, padding_idx):
    """The codes of the slots that the index takes, and which slots those are."""
    if mask is not None:
        there = there & (tl.load(mask + slots, mask=there, other=0) != 0)
    code = tl.load(codes + slots, mask=there, other=-1).to(tl.int64)
    return code.to(tl.int32), there & (code >= 0) & (code < vocabulary) & (code != padding_idx)


@triton.jit(do_not_specialize=["n", "n_slots", "n_visits", "vocabulary", "padding_idx", "blocks"])
def count_codes(
    codes, mask, counts, scales, n, n_slots, n_visits, vocabulary, padding_idx, blocks,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, VISITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """How many codes each block of slots gives the index, and for the mean what each visit's
    gradient is multiplied by.

    Grid: ``blocks`` programs with a tile of ``[BLOCK]`` slots each, then one per ``VISITS`` visits
    with tiles of ``[VISITS, WIDTH]`` slots. Reads ``codes`` and ``mask``, writes ``counts`` and
    ``scales``.
    """
    program = tl.program_id(0)
    if program < blocks:
        slots = program * BLOCK + tl.arange(0, BLOCK)
        _, real = _real_codes(codes, mask, slots, slots < n, vocabulary, padding_idx)
        tl.store(counts + program, tl.sum(real.to(tl.int32), axis=0))
    elif scales is not None:
        ACC: tl.constexpr = scales.dtype.element_ty
        visits = (program - blocks) * VISITS + tl.arange(0, VISITS)
        total = tl.zeros([VISITS], ACC)
        for first in range(0, n_slots, WIDTH):
            slots = first + tl.arange(0, WIDTH)
            there = (visits < n_visits)[:, None] & (slots < n_slots)[None, :]
            kept = tl.load(mask + visits[:, None] * n_slots + slots[None, :], mask=there, other=0)
            total += tl.sum(kept.to(ACC) if WEIGHTED else (kept != 0).to(ACC), axis=1)
        tl.store(scales + visits, 1.0 / tl.where(total < 1, 1.0, total), mask=visits < n_visits)


@triton.jit(do_not_specialize=["n"])
def scan_counts(counts, total, n, BLOCK: tl.constexpr):
    """Where each block's codes begin, and the number of all.

    Grid: one program, tiles of ``[BLOCK]`` counts. Reads ``counts`` and overwrites them with their
    exclusive sums; writes ``total``.
    """
    before = tl.full((), 0, tl.int32)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        values = tl.load(counts + at, mask=at < n, other=0)
        tl.store(counts + at, before + tl.cumsum(values, axis=0) - values, mask=at < n)
        before += tl.sum(values, axis=0)
    tl.store(total, before)


@triton.jit(do_not_specialize=["n", "vocabulary", "padding_idx"])
def gather_codes(
    codes, mask, starts, keys, slots_out, n, vocabulary, padding_idx, BLOCK: tl.constexpr
):
    """The real codes and their slots, in the order of the batch.

    Grid: one program per ``[BLOCK]`` slots. Reads ``codes``, ``mask`` and ``starts``, writes
    ``keys`` and ``slots_out``.
    """
    program = tl.program_id(0)
    slots = program * BLOCK + tl.arange(0, BLOCK)
    code, real = _real_codes(codes, mask, slots, slots < n, vocabulary, padding_idx)
    at = tl.load(starts + program) + tl.cumsum(real.to(tl.int32), axis=0) - 1
    tl.store(keys + at, code, mask=real)
    tl.store(slots_out + at, slots, mask=real)


@triton.jit
def _digits(keys, at, n, shift, RADIX: tl.constexpr):
    """The digit that this pass sorts by; ``RADIX``, which no digit is, past the end."""
    key = tl.load(keys + at, mask=at < n, other=0)
    return tl.where(at < n, (key >> shift) & (RADIX - 1), RADIX)


@triton.jit(do_not_specialize=["shift", "capacity"])
def count_digits(keys, count, table, shift, capacity, RADIX: tl.constexpr, TILE: tl.constexpr):
    """How often each digit occurs in each tile of keys; ``table`` is ``[RADIX, capacity]``.

    Grid: programs that walk over tiles of ``[TILE]`` keys. Reads ``keys`` and ``count``, writes
    ``table``.
    """
    n = tl.load(count)
    every = tl.arange(0, RADIX)
    for tile in range(tl.program_id(0), tl.cdiv(n, TILE), tl.num_programs(0)):
        digit = _digits(keys, tile * TILE + tl.arange(0, TILE), n, shift, RADIX)
        found = tl.sum((digit[:, None] == every[None, :]).to(tl.int32), axis=0)
        tl.store(table + every.to(tl.int64) * capacity + tile, found)


@triton.jit(do_not_specialize=["capacity"])
def scan_digits(
    count, table, totals, capacity, TILE: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):
    """How often each digit occurs in the tiles before each, and in all.

    Grid: one program per ``DIGITS`` digits, tiles of ``[DIGITS, BLOCK]`` of ``table``, which it
    overwrites with exclusive sums. Reads ``count`` too, writes ``totals``.
    """
    digits = tl.program_id(0) * DIGITS + tl.arange(0, DIGITS)
    rows = table + digits.to(tl.int64)[:, None] * capacity
    tiles = tl.cdiv(tl.load(count), TILE)
    before = tl.zeros([DIGITS], tl.int32)
    for first in range(0, tiles, BLOCK):
        at = first + tl.arange(0, BLOCK)[None, :]
        there = (digits >= 0)[:, None] & (at < tiles)
        values = tl.load(rows + at, mask=there, other=0)
        tl.store(rows + at, before[:, None] + tl.cumsum(values, axis=1) - values, mask=there)
        before += tl.sum(values, axis=1)
    tl.store(totals + digits, before)


@triton.jit(do_not_specialize=["shift", "capacity"])
def scatter_digits(
    keys, slots, keys_out, slots_out, count, table, totals, shift, capacity,
    RADIX: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Keys and slots in the order of the digit; those of the same digit keep theirs.

    Grid: programs that walk over tiles of ``[TILE]`` keys. Reads ``keys``, ``slots``, ``table`` and
    ``totals``, writes ``keys_out`` and ``slots_out``.
    """
    n = tl.load(count)
    lanes = tl.arange(0, TILE)
    some = tl.arange(0, PART)
    for tile in range(tl.program_id(0), tl.cdiv(n, TILE), tl.num_programs(0)):
        at = tile * TILE + lanes
        there = at < n
        digit = _digits(keys, at, n, shift, RADIX)
        to = tl.load(table + digit.to(tl.int64) * capacity + tile, mask=there, other=0)
        for first in range(0, RADIX, PART):
            total = tl.load(totals + first + some)
            smaller = (first + some)[None, :] < digit[:, None]
            to += tl.sum(tl.where(smaller, total[None, :], 0), axis=1)
        for first in range(0, TILE, PART):
            other = _digits(keys, tile * TILE + first + some, n, shift, RADIX)
            earlier = (first + some)[None, :] < lanes[:, None]
            to += tl.sum(((other[None, :] == digit[:, None]) & earlier).to(tl.int32), axis=1)
        tl.store(keys_out + to, tl.load(keys + at, mask=there, other=0), mask=there)
        tl.store(slots_out + to, tl.load(slots + at, mask=there, other=0), mask=there)


@triton.jit(do_not_specialize=["n_rows"])
def find_rows(keys, count, row_offsets, n_rows, ROWS: tl.constexpr):
    """Where the entries of each row of the table begin among the sorted ``keys``.

    Grid: one program per ``[ROWS]`` rows. Reads ``keys`` and ``count``, writes ``row_offsets``.
    """
    n = tl.load(count)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(row_offsets + rows, lower_bound(keys, n, rows), mask=rows < n_rows)
