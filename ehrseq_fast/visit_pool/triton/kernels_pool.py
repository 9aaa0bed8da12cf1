"""Pooling in Triton: the rows of several visits gathered, masked and pooled in one launch.

A program holds a tile of ``VISITS`` visits by ``COLUMNS`` columns and takes one code of each visit
at a time, ``UNROLL`` of them without waiting for one another. Masked slots are skipped: the real
slots of 64 become the bits of a number, and the loop goes from bit to bit.

``ROW_SIZE`` is the width of the table, which a model has one of; lengths are run-time values.
``codes`` is None where the table holds the slots themselves (``masked_pool``).
"""

import triton
import triton.language as tl

MEAN, SUM, MAX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WORD = tl.constexpr(64)  # slots whose mask fits the bits of one number

# A packed batch's tensors are parts of one buffer, and where each begins depends on the lengths.
# Nothing is gained from those that begin at 16 bytes, and specialising on that would have Triton
# compile again in the middle of training.
ANY_ALIGNMENT = [
    "codes", "code_offsets", "mask", "offsets", "entries", "code_weights", "positions",
]  # fmt: skip


@triton.jit
def tile_columns(ROW_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's columns, and which of them the table has."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return columns, columns < ROW_SIZE


@triton.jit
def load_rows(table, rows, columns, wanted, inside, ROW_SIZE: tl.constexpr, ACC: tl.constexpr):
    """``table[rows][:, columns]`` in the accumulator's dtype; 0 where a row is not wanted."""
    at = rows.to(tl.int64)[:, None] * ROW_SIZE + columns[None, :]
    return tl.load(table + at, mask=wanted[:, None] & inside[None, :], other=0.0).to(ACC)


@triton.jit
def row_of(codes, entries, first, taken, vocabulary):
    """The table row of one entry per visit, its number in ``arg_max``, and whether the
    table has it."""
    if codes is None:
        rows = entries
        ids = entries - first
        known = taken
    else:
        ids = tl.load(codes + entries, mask=taken, other=0).to(tl.int64)
        known = taken & (ids >= 0) & (ids < vocabulary)
        rows = ids
    return rows, ids.to(tl.int32), known


@triton.jit
def _pool_one_each(
    value, winner, table, rows, ids, known, weights, columns, inside,
    ROW_SIZE: tl.constexpr, MODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Take one more row of every visit into the sums or maxima. NaN wins; of equals the first."""
    row = load_rows(table, rows, columns, known, inside, ROW_SIZE, ACC)
    if MODE == MAX:
        nan = (row != row) & (value == value)  # noqa: PLR0124
        better = known[:, None] & ((winner < 0) | (row > value) | nan)
        value = tl.where(better, row, value)
        winner = tl.where(better, ids[:, None], winner)
    elif weights is None:
        value += row
    else:
        value += weights[:, None] * row
    return value, winner


@triton.jit
def _write(
    pooled, arg_max, visits, present, columns, inside, value, winner, total, invalid,
    ROW_SIZE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Scaled and written; a visit with a code outside the vocabulary is NaN and has no winner."""
    if MODE == MEAN:
        value = value * (1.0 / tl.where(total < 1, 1.0, total))[:, None]
    value = tl.where(invalid[:, None], float("nan"), value)
    at = visits[:, None] * ROW_SIZE + columns[None, :]
    written = present[:, None] & inside[None, :]
    tl.store(pooled + at, value.to(pooled.dtype.element_ty), mask=written)
    if MODE == MAX:
        tl.store(arg_max + at, tl.where(invalid[:, None], -1, winner), mask=written)


@triton.jit(
    do_not_specialize=["n_visits", "n_slots", "n_entries", "vocabulary"],
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
)
def pool_contiguous(
    table, codes, code_offsets, code_weights, pooled, arg_max, totals,
    n_visits, n_slots, n_entries, vocabulary,
    ROW_SIZE: tl.constexpr, MODE: tl.constexpr,
    VISITS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Pool visits whose codes are contiguous: at ``code_offsets``, or ``n_slots`` each. A code of
    weight 0 is left out.

    Grid: tiles of visits, by tiles of columns. A tile is ``[VISITS, COLUMNS]``. Reads
    ``code_offsets``, ``codes``, ``code_weights`` and rows of ``table``; writes ``pooled``, in mode
    max ``arg_max``, of a weighted mean ``totals``.
    """
    ACC: tl.constexpr = tl.float64 if table.dtype.element_ty == tl.float64 else tl.float32
    visits = tl.program_id(0).to(tl.int64) * VISITS + tl.arange(0, VISITS)
    present = visits < n_visits
    columns, inside = tile_columns(ROW_SIZE, COLUMNS)
    if code_offsets is None:
        first = visits * n_slots
        last = tl.where(present, first + n_slots, first)
    else:
        first = tl.load(code_offsets + visits, mask=present, other=0).to(tl.int64)
        last = tl.load(code_offsets + visits + 1, mask=present, other=0).to(tl.int64)
        first = tl.maximum(first, 0)
        last = tl.minimum(last, n_entries)

    value = tl.zeros([VISITS, COLUMNS], ACC)
    winner = tl.full([VISITS, COLUMNS], -1, tl.int32)
    invalid = visits < 0
    total = (last - first).to(ACC) if code_weights is None else tl.zeros([VISITS], ACC)
    longest = tl.max(last - first, axis=0).to(tl.int32)
    for step in range(0, longest, UNROLL):
        for i in tl.static_range(UNROLL):
            entries = first + (step + i)
            taken = entries < last
            rows, ids, known = row_of(codes, entries, first, taken, vocabulary)
            invalid = invalid | (taken & (known == 0))
            if code_weights is None:
                weights = None
            else:
                weights = tl.load(code_weights + entries, mask=taken, other=0.0)
                total += weights
                known = known & (weights != 0)
            value, winner = _pool_one_each(
                value, winner, table, rows, ids, known, weights, columns, inside,
                ROW_SIZE, MODE, ACC,
            )  # fmt: skip
    if totals is not None:
        tl.store(totals + visits, total, mask=present & (tl.program_id(1) == 0))
    _write(
        pooled, arg_max, visits, present, columns, inside, value, winner, total, invalid,
        ROW_SIZE, MODE,
    )  # fmt: skip


@triton.jit
def _real_slots(mask, first, slot, n_slots, present, WIDTH: tl.constexpr):
    """``[VISITS, WIDTH]``: which of the ``WIDTH`` slots from ``slot`` on a visit's mask keeps."""
    slots = slot + tl.arange(0, WIDTH)
    wanted = present[:, None] & (slots < n_slots)[None, :]
    return tl.load(mask + first[:, None] + slots[None, :], mask=wanted, other=0) != 0


@triton.jit
def highest_bit(number):
    """The position of a number's highest bit, or one more; for 0 it is negative. From the exponent
    of the number as a float, whose sign, the 64th bit's, is left out."""
    return ((number.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit(
    do_not_specialize=["n_visits", "n_slots", "vocabulary"],
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
)
def pool_masked(
    table, codes, mask, pooled, arg_max, n_visits, n_slots, vocabulary,
    ROW_SIZE: tl.constexpr, MODE: tl.constexpr, WEIGHTED: tl.constexpr,
    VISITS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Pool padded visits, ``n_slots`` each. ``WORDS`` words of the mask are read together first,
    since most of them are empty.

    Grid: tiles of visits, by tiles of columns. A tile is ``[VISITS, COLUMNS]``, of the mask
    ``[VISITS, 64]``. Reads ``mask``, and ``codes`` and rows of ``table`` where it is not 0; writes
    ``pooled``, in mode max ``arg_max``.
    """
    ACC: tl.constexpr = tl.float64 if table.dtype.element_ty == tl.float64 else tl.float32
    visits = tl.program_id(0).to(tl.int64) * VISITS + tl.arange(0, VISITS)
    present = visits < n_visits
    columns, inside = tile_columns(ROW_SIZE, COLUMNS)
    first = visits * n_slots

    value = tl.zeros([VISITS, COLUMNS], ACC)
    winner = tl.full([VISITS, COLUMNS], -1, tl.int32)
    total = tl.zeros([VISITS], ACC)
    invalid = visits < 0
    words = tl.cdiv(n_slots, WORD)
    for ahead in range(0, words, WORDS):
        last_word = tl.minimum(ahead + WORDS, words)
        if WORDS > 1:
            seen = _real_slots(mask, first, ahead * WORD, n_slots, present, WORD * WORDS)
            any_real = tl.max(tl.max(seen.to(tl.int32), axis=1), axis=0)
            last_word = tl.where(any_real > 0, last_word, ahead)
        for word in range(ahead, last_word):
            real = _real_slots(mask, first, word * WORD, n_slots, present, WORD)
            bits = tl.sum(real.to(tl.int64) << tl.arange(0, WORD)[None, :].to(tl.int64), axis=1)
            most = tl.max(tl.sum(real.to(tl.int32), axis=1), axis=0)
            for _step in range(0, most, UNROLL):
                for _i in tl.static_range(UNROLL):
                    taken = bits != 0
                    lowest = bits & -bits
                    bits = bits ^ lowest
                    entries = first + tl.where(taken, word * WORD + highest_bit(lowest), 0)
                    rows, ids, known = row_of(codes, entries, first, taken, vocabulary)
                    invalid = invalid | (taken & (known == 0))
                    if WEIGHTED:
                        weights = tl.load(mask + entries, mask=taken, other=0).to(ACC)
                        total += weights
                    else:
                        weights = None
                        total += taken.to(ACC)
                    value, winner = _pool_one_each(
                        value, winner, table, rows, ids, known, weights, columns, inside,
                        ROW_SIZE, MODE, ACC,
                    )  # fmt: skip
    _write(
        pooled, arg_max, visits, present, columns, inside, value, winner, total, invalid,
        ROW_SIZE, MODE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_slots"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def spread(
    grad, mask, arg_max, out, n_slots,
    ROW_SIZE: tl.constexpr, MODE: tl.constexpr, WEIGHTED: tl.constexpr,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of ``masked_pool``: a visit's gradient times its weight in every real slot, or
    in mode max that of each column in the slot of its maximum; zeros in every other.

    Grid: visits, by tiles of columns. A tile is ``[SLOTS, COLUMNS]``. Reads ``grad``, ``mask`` and,
    in mode max, ``arg_max``; writes ``out``.
    """
    ACC: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    visit = tl.program_id(0).to(tl.int64)
    columns, inside = tile_columns(ROW_SIZE, COLUMNS)
    row = tl.load(grad + visit * ROW_SIZE + columns, mask=inside, other=0.0).to(ACC)
    if MODE == MAX:
        winner = tl.load(arg_max + visit * ROW_SIZE + columns, mask=inside, other=-1)
    if MODE == MEAN:
        if mask is None:
            total = tl.full([1], 0, ACC) + n_slots
        else:
            total = tl.zeros([1], ACC)
            for slot in range(0, n_slots, WORD):
                slots = slot + tl.arange(0, WORD)
                kept = tl.load(mask + visit * n_slots + slots, mask=slots < n_slots, other=0)
                total += tl.sum(kept.to(ACC) if WEIGHTED else (kept != 0).to(ACC), axis=0)
        row = row * (1.0 / tl.where(total < 1, 1.0, total))

    for slot in range(0, n_slots, SLOTS):
        slots = slot + tl.arange(0, SLOTS)
        there = slots < n_slots
        if MODE == MAX:
            values = tl.where(winner[None, :] == slots[:, None], row[None, :], 0.0)
        elif mask is None:
            values = tl.broadcast_to(row[None, :], [SLOTS, COLUMNS])
        else:
            kept = tl.load(mask + visit * n_slots + slots, mask=there, other=0)
            contribution = kept.to(ACC)[:, None] * row[None, :] if WEIGHTED else row[None, :]
            values = tl.where((kept != 0)[:, None], contribution, 0.0)
        at = (visit * n_slots + slots)[:, None] * ROW_SIZE + columns[None, :]
        written = there[:, None] & inside[None, :]
        tl.store(out + at, values.to(out.dtype.element_ty), mask=written)
