"""The gradient of the embedding table in Triton, from a code index: three launches, every row
written once, no atomics.

The entries of an index are sorted by code; the entries of one code are its *segment*, and each
entry names a visit. A segment shorter than ``2 * CHUNK`` is summed at once. A longer one is cut,
from its first entry on, into *pieces* of ``CHUNK`` entries, the last of which takes the rest (at
most ``2 * CHUNK - 1``). Every piece is at least a ``CHUNK`` long, so at most one begins in any
*window* of ``CHUNK`` entries, and it reaches over that window's last entry: window ``w`` finds its
piece with one search and keeps the sum as partial ``w``, and the partials of a segment are
consecutive.

1. ``find_segments`` looks up the segment of every row of the gradient and of every window;
2. ``sum_segments`` sums short segments into their rows, and pieces into partials: no more than
   ``2 * CHUNK - 1`` entries each, however the codes are distributed;
3. ``sum_pieces`` adds the partials of each long segment, in their order.

Which program computes what depends on the shapes alone, so that the bits are the same on every run.

The segments of an index are given in one of two ways: ``codes`` holds the distinct codes,
ascending, and ``offsets`` where the entries of each begin; or, with ``offsets`` None, ``codes``
holds the code of every entry. Its ``entries`` are visits or, with ``n_slots``, slots of a padded
batch (``visit * n_slots + slot``). Where only the device knows their number, it is in ``count``.
"""

import triton
import triton.language as tl

from .kernels_pool import ANY_ALIGNMENT, MAX, MEAN, highest_bit, load_rows, tile_columns

# What find_segments writes of every segment, [4, windows + rows]: its code, the row of the gradient
# (-1: not to be written), its first entry and the end of it.
CODE, ROW, BEGIN, END = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def lower_bound(ascending, n, wanted):
    """For each of ``wanted``, how many of ``ascending[:n]`` are less."""
    low = tl.zeros_like(wanted)
    high = low + n
    # a for loop, through which Triton's compiler carries the layout that its user needs
    for _halving in range(0, highest_bit(n) + 1):
        middle = low + ((high - low) >> 1)
        open_ = low < high
        less = tl.load(ascending + middle, mask=open_, other=0) < wanted
        low = tl.where(open_ & less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
    return low


@triton.jit
def _bounds_of_segment(codes, offsets, n_entries, segments, there):
    """Code, first entry and end of the ``segments`` of a packed batch's index."""
    code = tl.load(codes + segments, mask=there, other=-1)
    begin = tl.load(offsets + segments, mask=there, other=0)
    end = tl.load(offsets + segments + 1, mask=there, other=0)
    return code, tl.maximum(begin, 0), tl.minimum(end, n_entries)


@triton.jit
def _bounds_of_code(codes, offsets, n_segments, n_entries, wanted):
    """First entry and end of the segments of the codes ``wanted``; equal where a code does not
    occur."""
    if offsets is None:
        begin = lower_bound(codes, n_entries, wanted)
        end = lower_bound(codes, n_entries, wanted + 1)
    else:
        segments = lower_bound(codes, n_segments, wanted)
        code, begin, end = _bounds_of_segment(
            codes, offsets, n_entries, segments, segments < n_segments
        )
        end = tl.where(code == wanted, end, begin)
    return begin, end


@triton.jit
def _segment_at(codes, offsets, n_segments, n_entries, entries):
    """Number (in a packed batch's index), code, first entry and end of the segments that hold
    ``entries``."""
    if offsets is None:
        code = tl.load(codes + entries)
        begin = lower_bound(codes, n_entries, code)
        end = lower_bound(codes, n_entries, code + 1)
        segments = begin  # it has none
    else:
        segments = lower_bound(offsets, n_segments + 1, entries + 1) - 1
        there = (segments >= 0) & (segments < n_segments)
        code, begin, end = _bounds_of_segment(codes, offsets, n_entries, segments, there)
    return segments, code, begin, end


@triton.jit
def _write_bounds(bounds, n_bounds, at, there, code, row, begin, end):
    wide = n_bounds.to(tl.int64)  # four times a large vocabulary passes 2^31
    tl.store(bounds + CODE * wide + at, code, mask=there)
    tl.store(bounds + ROW * wide + at, row, mask=there)
    tl.store(bounds + BEGIN * wide + at, begin, mask=there)
    tl.store(bounds + END * wide + at, end, mask=there)


@triton.jit(
    do_not_specialize=[
        "n_segments", "n_entries", "windows", "n_rows", "vocabulary", "padding_idx",
        "padding_segment", "window_programs",
    ],
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
)  # fmt: skip
def find_segments(
    codes, offsets, count, bounds,
    n_segments, n_entries, windows, n_rows, vocabulary, padding_idx, padding_segment,
    window_programs,
    SPARSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The long segment that each window's last entry is in, and the short segment of each row. Rows
    are codes or, if ``SPARSE``, the segments of the index but ``padding_segment``.

    Grid: ``window_programs`` programs that walk over the windows, then one per ``BLOCK`` rows. A
    tile is ``[BLOCK]`` windows or rows. Reads the index (``codes``, ``offsets``, ``count``), writes
    ``bounds``.
    """
    n_bounds = windows + n_rows
    if count is not None:
        n_entries = tl.load(count)
    lanes = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    if program < window_programs:
        for first in range(program * BLOCK, n_entries // CHUNK, window_programs * BLOCK):
            window = first + lanes
            there = window < n_entries // CHUNK
            last = tl.where(there, window * CHUNK + (CHUNK - 1), 0)
            segment, code, begin, end = _segment_at(codes, offsets, n_segments, n_entries, last)
            wanted = (code >= 0) & (code < vocabulary) & (end - begin >= 2 * CHUNK)
            if SPARSE:
                wanted = wanted & (segment != padding_segment)
                row = segment - (segment > padding_segment).to(tl.int32)
            else:
                wanted = wanted & (code != padding_idx)
                row = code
            end = tl.where(wanted, end, begin)
            _write_bounds(bounds, n_bounds, window, there, code, row, begin, end)
    else:
        row = (program - window_programs) * BLOCK + lanes
        there = row < n_rows
        if SPARSE:
            segment = row + (row >= padding_segment).to(tl.int32)
            code, begin, end = _bounds_of_segment(codes, offsets, n_entries, segment, there)
            wanted = (code >= 0) & (code < vocabulary)
        else:
            code = row
            begin, end = _bounds_of_code(codes, offsets, n_segments, n_entries, row)
            wanted = row != padding_idx
        is_long = wanted & (end - begin >= 2 * CHUNK)
        end = tl.where(wanted & (is_long == 0), end, begin)
        _write_bounds(
            bounds, n_bounds, windows + row, there, code, tl.where(is_long, -1, row), begin, end
        )


@triton.jit
def visits_of(entries, at, taken, n_slots, n_visits):
    """What the entries ``at`` hold, their visits, and which of them are to be read."""
    held = tl.load(entries + at, mask=taken, other=0)
    if n_slots is None:
        visits = held
        taken = taken & (held >= 0) & (held < n_visits)
    else:
        visits = held // n_slots
    return held, visits, taken


@triton.jit
def _factors(
    held, visits, taken, code_offsets, scales, mask, n_slots,
    MODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What each entry multiplies its visit's gradient by."""
    factors = taken.to(ACC)
    if MODE == MEAN:
        if code_offsets is not None:
            first = tl.load(code_offsets + visits, mask=taken, other=0)
            last = tl.load(code_offsets + visits + 1, mask=taken, other=1)
            factors = 1.0 / tl.maximum(last - first, 1).to(ACC)
        elif scales is not None:
            factors = tl.load(scales + visits, mask=taken, other=0.0)
        else:
            factors = factors * (1.0 / (tl.zeros_like(factors) + n_slots))
    if mask is not None:
        factors = factors * tl.load(mask + held, mask=taken, other=0).to(ACC)
    return factors


@triton.jit
def _weighted_factors(
    entry, visits, taken, code_weights, positions, totals, n_entries,
    MODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What each entry multiplies its visit's gradient by, with weights of codes; and which entries
    are to be read: those whose weight is not 0."""
    position = tl.load(positions + entry, mask=taken, other=-1)
    taken = taken & (position >= 0) & (position < n_entries)
    weights = tl.load(code_weights + position, mask=taken, other=0.0)
    taken = taken & (weights != 0)
    factors = weights.to(ACC)
    if MODE == MEAN:
        total = tl.load(totals + visits, mask=taken, other=1.0)
        factors = (1.0 / tl.where(total < 1, 1.0, total)) * factors
    return factors, taken


@triton.jit
def load_bounds(
    bounds, tile, n_entries, windows, n_rows, CHUNK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """What a tile sums: window, whether it is one (or a row), whether it exists, code, row, the
    first entry of its segment, and the first entry and end of what is summed."""
    n_bounds = windows + n_rows
    used_windows = n_entries // CHUNK
    window_tiles = tl.cdiv(used_windows, ROWS)
    window = tile * ROWS + tl.arange(0, ROWS)
    is_window = window < window_tiles * ROWS
    at = tl.where(is_window, window, windows + window - window_tiles * ROWS)
    there = tl.where(is_window, window < used_windows, at < n_bounds)
    wide = n_bounds.to(tl.int64)
    code = tl.load(bounds + CODE * wide + at, mask=there, other=-1)
    row = tl.load(bounds + ROW * wide + at, mask=there, other=-1)
    segment_begin = tl.load(bounds + BEGIN * wide + at, mask=there, other=0)
    segment_end = tl.load(bounds + END * wide + at, mask=there, other=0)
    piece = tl.maximum(window * CHUNK - segment_begin + (CHUNK - 1), 0) // CHUNK
    pieces = (segment_end - segment_begin) // CHUNK
    begin = tl.where(is_window, segment_begin + piece * CHUNK, segment_begin)
    end = tl.where(is_window & (piece + 1 < pieces), begin + CHUNK, segment_end)
    return window, is_window, there, code, row, segment_begin, begin, end


@triton.jit(
    do_not_specialize=["n_entries", "n_slots", "n_visits", "windows", "n_rows"],
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
)
def sum_segments(
    grad, arg_max, bounds, entries, count, code_offsets, scales, mask, code_weights, positions,
    totals, out, partials,
    n_entries, n_slots, n_visits, windows, n_rows,
    ROW_SIZE: tl.constexpr, MODE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Short segments summed into their rows, and pieces of long ones into partials.

    Grid: programs that walk over the tiles of windows and of rows, by tiles of columns. A tile is
    ``[ROWS, COLUMNS]`` sums: one entry of each segment or piece at a time, ``UNROLL`` of them
    without waiting for one another. Reads ``bounds``, the index's ``entries`` and rows of ``grad``
    (in mode max ``arg_max`` too); writes ``partials`` and rows of ``out``, each once.
    """
    ACC: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    columns, inside = tile_columns(ROW_SIZE, COLUMNS)
    if count is not None:
        n_entries = tl.load(count)
    tiles = tl.cdiv(n_entries // CHUNK, ROWS) + tl.cdiv(n_rows, ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        window, is_window, there, code, row, segment_begin, begin, end = load_bounds(
            bounds, tile, n_entries, windows, n_rows, CHUNK, ROWS
        )
        sums = tl.zeros([ROWS, COLUMNS], ACC)
        longest = tl.max(end - begin, axis=0)
        for step in range(0, longest, UNROLL):
            for i in tl.static_range(UNROLL):
                entry = begin + (step + i)
                held, visits, taken = visits_of(entries, entry, entry < end, n_slots, n_visits)
                if MODE == MAX:
                    # a code that a visit holds twice wins once
                    _, before, repeated = visits_of(
                        entries, entry - 1, taken & (entry > segment_begin), n_slots, n_visits
                    )
                    taken = taken & ((repeated == 0) | (before != visits))
                if code_weights is not None:
                    factors, taken = _weighted_factors(
                        entry, visits, taken, code_weights, positions, totals, n_entries, MODE, ACC
                    )
                grads = load_rows(grad, visits, columns, taken, inside, ROW_SIZE, ACC)
                if MODE == MAX:
                    winners = tl.load(
                        arg_max + visits.to(tl.int64)[:, None] * ROW_SIZE + columns[None, :],
                        mask=taken[:, None] & inside[None, :],
                        other=-1,
                    )
                    grads = tl.where(winners == code[:, None], grads, 0.0)
                elif code_weights is not None:
                    grads = tl.where(taken[:, None], grads * factors[:, None], 0.0)
                elif (MODE == MEAN) | (mask is not None):
                    factors = _factors(
                        held, visits, taken, code_offsets, scales, mask, n_slots, MODE, ACC
                    )
                    grads = grads * factors[:, None]
                sums += grads

        columns_of = columns[None, :]
        to_partial = is_window & (begin < end)
        tl.store(
            partials + window.to(tl.int64)[:, None] * ROW_SIZE + columns_of,
            sums,
            mask=to_partial[:, None] & inside[None, :],
        )
        to_row = there & (is_window == 0) & (row >= 0)
        tl.store(
            out + row.to(tl.int64)[:, None] * ROW_SIZE + columns_of,
            sums.to(out.dtype.element_ty),
            mask=to_row[:, None] & inside[None, :],
        )


@triton.jit(do_not_specialize=["n_entries", "windows", "n_rows", "padding_idx"])
def sum_pieces(
    bounds, count, out, score_out, partials, score_partials,
    n_entries, windows, n_rows, padding_idx,
    ROW_SIZE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The row of every long segment, and with attention its score's gradient.

    Grid: programs that walk over the windows, by tiles of columns; a segment is taken by the window
    in which it begins. A tile is ``[ROWS, COLUMNS]`` partials, added up over ``ROWS`` at the end.
    Reads ``bounds``, ``partials`` and ``score_partials``; writes rows of ``out`` and ``score_out``.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    columns, inside = tile_columns(ROW_SIZE, COLUMNS)
    n_bounds = (windows + n_rows).to(tl.int64)
    if count is not None:
        n_entries = tl.load(count)
    lanes = tl.arange(0, ROWS)
    for window in range(tl.program_id(0), n_entries // CHUNK, tl.num_programs(0)):
        begin = tl.load(bounds + BEGIN * n_bounds + window)
        end = tl.load(bounds + END * n_bounds + window)
        pieces = (end - begin) // CHUNK
        if (pieces > 0) & (begin >= window * CHUNK):
            sums = tl.zeros([ROWS, COLUMNS], ACC)
            for step in range(0, pieces, ROWS * UNROLL):
                for i in tl.static_range(UNROLL):
                    piece = step + i * ROWS + lanes
                    sums += load_rows(
                        partials, window + piece, columns, piece < pieces, inside, ROW_SIZE, ACC
                    )
            row = tl.load(bounds + ROW * n_bounds + window).to(tl.int64)
            total = tl.where(row == padding_idx, 0.0, tl.sum(sums, axis=0))
            tl.store(out + row * ROW_SIZE + columns, total.to(out.dtype.element_ty), mask=inside)
            if score_out is not None:
                score_sums = tl.zeros([ROWS], ACC)
                for step in range(0, pieces, ROWS):
                    piece = step + lanes
                    score_sums += tl.load(
                        score_partials + window + piece, mask=piece < pieces, other=0.0
                    )
                score = tl.sum(score_sums, axis=0).to(score_out.dtype.element_ty)
                tl.store(score_out + row, score, mask=tl.program_id(1) == 0)
