"""The gradient of the embedding table in Triton, from a code index: three launches, every row
written once, no atomics.

The entries of an index are sorted by code, so that a code is a *run* of them, and each entry names
a visit. A run shorter than ``2 * CHUNK`` is summed at once. A longer one is cut, from its first
entry on, into *pieces* of ``CHUNK`` entries, the last of which takes the rest (at most
``2 * CHUNK - 1``). Every piece is at least a ``CHUNK`` long, so at most one begins in any *window*
of ``CHUNK`` entries, and it reaches over that window's last entry: window ``w`` finds its piece
with one search and keeps the sum as partial ``w``, and the partials of a run stand in a row.

1. ``find_runs`` looks up the run of every row of the gradient and of every window;
2. ``sum_runs`` sums short runs into their rows, and pieces into partials: no more than
   ``2 * CHUNK - 1`` entries each, however the codes are distributed;
3. ``sum_pieces`` adds the partials of each long run, in their order.

Who computes what depends on the shapes alone, so that the bits are the same on every run.

The runs of an index are told in one of two ways: ``codes`` holds the distinct codes, ascending, and
``offsets`` where the entries of each begin; or, with ``offsets`` None, ``codes`` holds the code of
every entry. Its ``entries`` are visits or, with ``n_slots``, slots of a padded batch
(``visit * n_slots + slot``). Where only the device knows their number, it is in ``count``.
"""

import triton
import triton.language as tl

from .triton_forward import ANY_ALIGNMENT, MAX, MEAN, highest_bit, load_rows, tile_columns

# What find_runs writes of every run: [4, windows + rows]. A row of -1 is not to be written.
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
def _run_of_segment(codes, offsets, n_entries, segments, there):
    """Code, first and last entry of the ``segments`` of a packed batch's index."""
    code = tl.load(codes + segments, mask=there, other=-1)
    begin = tl.load(offsets + segments, mask=there, other=0)
    end = tl.load(offsets + segments + 1, mask=there, other=0)
    return code, tl.maximum(begin, 0), tl.minimum(end, n_entries)


@triton.jit
def _run_of_code(codes, offsets, n_segments, n_entries, wanted):
    """First and last entry of the codes ``wanted``; the same where a code does not occur."""
    if offsets is None:
        begin = lower_bound(codes, n_entries, wanted)
        end = lower_bound(codes, n_entries, wanted + 1)
    else:
        segments = lower_bound(codes, n_segments, wanted)
        code, begin, end = _run_of_segment(
            codes, offsets, n_entries, segments, segments < n_segments
        )
        end = tl.where(code == wanted, end, begin)
    return begin, end


@triton.jit
def _run_at(codes, offsets, n_segments, n_entries, entries):
    """Segment (of a packed batch's index), code, first and last entry of the run that ``entries``
    are in."""
    if offsets is None:
        code = tl.load(codes + entries)
        begin = lower_bound(codes, n_entries, code)
        end = lower_bound(codes, n_entries, code + 1)
        segments = begin  # it has none
    else:
        segments = lower_bound(offsets, n_segments + 1, entries + 1) - 1
        there = (segments >= 0) & (segments < n_segments)
        code, begin, end = _run_of_segment(codes, offsets, n_entries, segments, there)
    return segments, code, begin, end


@triton.jit
def _write_runs(runs, n_runs, at, there, code, row, begin, end):
    wide = n_runs.to(tl.int64)  # four times a large vocabulary passes 2^31
    tl.store(runs + CODE * wide + at, code, mask=there)
    tl.store(runs + ROW * wide + at, row, mask=there)
    tl.store(runs + BEGIN * wide + at, begin, mask=there)
    tl.store(runs + END * wide + at, end, mask=there)


@triton.jit(
    do_not_specialize=[
        "n_segments", "n_entries", "windows", "n_rows", "vocabulary", "padding_idx",
        "padding_segment", "window_programs",
    ],
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
)  # fmt: skip
def find_runs(
    codes, offsets, count, runs,
    n_segments, n_entries, windows, n_rows, vocabulary, padding_idx, padding_segment,
    window_programs,
    SPARSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The long run that each window's last entry is in, and the short run of each row. Rows are
    codes or, if ``SPARSE``, the segments of the index but ``padding_segment``."""
    n_runs = windows + n_rows
    if count is not None:
        n_entries = tl.load(count)
    lanes = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    if program < window_programs:
        for first in range(program * BLOCK, n_entries // CHUNK, window_programs * BLOCK):
            window = first + lanes
            there = window < n_entries // CHUNK
            last = tl.where(there, window * CHUNK + (CHUNK - 1), 0)
            segment, code, begin, end = _run_at(codes, offsets, n_segments, n_entries, last)
            wanted = (code >= 0) & (code < vocabulary) & (end - begin >= 2 * CHUNK)
            if SPARSE:
                wanted = wanted & (segment != padding_segment)
                row = segment - (segment > padding_segment).to(tl.int32)
            else:
                wanted = wanted & (code != padding_idx)
                row = code
            end = tl.where(wanted, end, begin)
            _write_runs(runs, n_runs, window, there, code, row, begin, end)
    else:
        row = (program - window_programs) * BLOCK + lanes
        there = row < n_rows
        if SPARSE:
            segment = row + (row >= padding_segment).to(tl.int32)
            code, begin, end = _run_of_segment(codes, offsets, n_entries, segment, there)
            wanted = (code >= 0) & (code < vocabulary)
        else:
            code = row
            begin, end = _run_of_code(codes, offsets, n_segments, n_entries, row)
            wanted = row != padding_idx
        is_long = wanted & (end - begin >= 2 * CHUNK)
        end = tl.where(wanted & (is_long == 0), end, begin)
        _write_runs(
            runs, n_runs, windows + row, there, code, tl.where(is_long, -1, row), begin, end
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
def load_runs(
    runs, tile, n_entries, windows, n_rows, CHUNK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """What a tile sums: window, whether it is one (or a row), whether it is there, code, row, and
    the first entry of its run, its own first and last."""
    n_runs = windows + n_rows
    used_windows = n_entries // CHUNK
    window_tiles = tl.cdiv(used_windows, ROWS)
    window = tile * ROWS + tl.arange(0, ROWS)
    is_window = window < window_tiles * ROWS
    at = tl.where(is_window, window, windows + window - window_tiles * ROWS)
    there = tl.where(is_window, window < used_windows, at < n_runs)
    wide = n_runs.to(tl.int64)
    code = tl.load(runs + CODE * wide + at, mask=there, other=-1)
    row = tl.load(runs + ROW * wide + at, mask=there, other=-1)
    run_begin = tl.load(runs + BEGIN * wide + at, mask=there, other=0)
    run_end = tl.load(runs + END * wide + at, mask=there, other=0)
    piece = tl.maximum(window * CHUNK - run_begin + (CHUNK - 1), 0) // CHUNK
    pieces = (run_end - run_begin) // CHUNK
    begin = tl.where(is_window, run_begin + piece * CHUNK, run_begin)
    end = tl.where(is_window & (piece + 1 < pieces), begin + CHUNK, run_end)
    return window, is_window, there, code, row, run_begin, begin, end


@triton.jit(
    do_not_specialize=["n_entries", "n_slots", "n_visits", "windows", "n_rows"],
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
)
def sum_runs(
    grad, arg_max, runs, entries, count, code_offsets, scales, mask, out, partials,
    n_entries, n_slots, n_visits, windows, n_rows,
    ROW_SIZE: tl.constexpr, MODE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A tile of ``ROWS`` runs or pieces at a time, one entry of each, ``UNROLL`` of them without
    waiting for one another."""
    ACC: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    columns, inside = tile_columns(ROW_SIZE, COLUMNS)
    if count is not None:
        n_entries = tl.load(count)
    tiles = tl.cdiv(n_entries // CHUNK, ROWS) + tl.cdiv(n_rows, ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        window, is_window, there, code, row, run_begin, begin, end = load_runs(
            runs, tile, n_entries, windows, n_rows, CHUNK, ROWS
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
                        entries, entry - 1, taken & (entry > run_begin), n_slots, n_visits
                    )
                    taken = taken & ((repeated == 0) | (before != visits))
                grads = load_rows(grad, visits, columns, taken, inside, ROW_SIZE, ACC)
                if MODE == MAX:
                    winners = tl.load(
                        arg_max + visits.to(tl.int64)[:, None] * ROW_SIZE + columns[None, :],
                        mask=taken[:, None] & inside[None, :],
                        other=-1,
                    )
                    grads = tl.where(winners == code[:, None], grads, 0.0)
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
    runs, count, out, score_out, partials, score_partials, n_entries, windows, n_rows, padding_idx,
    ROW_SIZE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The row of every long run, and with attention its score's gradient, by the window in which
    the run begins."""
    ACC: tl.constexpr = partials.dtype.element_ty
    columns, inside = tile_columns(ROW_SIZE, COLUMNS)
    n_runs = (windows + n_rows).to(tl.int64)
    if count is not None:
        n_entries = tl.load(count)
    lanes = tl.arange(0, ROWS)
    for window in range(tl.program_id(0), n_entries // CHUNK, tl.num_programs(0)):
        begin = tl.load(runs + BEGIN * n_runs + window)
        end = tl.load(runs + END * n_runs + window)
        pieces = (end - begin) // CHUNK
        if (pieces > 0) & (begin >= window * CHUNK):
            sums = tl.zeros([ROWS, COLUMNS], ACC)
            for step in range(0, pieces, ROWS * UNROLL):
                for i in tl.static_range(UNROLL):
                    piece = step + i * ROWS + lanes
                    sums += load_rows(
                        partials, window + piece, columns, piece < pieces, inside, ROW_SIZE, ACC
                    )
            row = tl.load(runs + ROW * n_runs + window).to(tl.int64)
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
