"""The rows of patients' visits in padded and in packed hazards, in Triton."""

import triton
import triton.language as tl


@triton.jit
def rows_of(patient, exists, visit, slots, n_rows, row_starts, ranks, last_rows):
    """The rows of the visits of patients, [P, V], and which of them exist."""
    inside = exists[:, None] & (visit < slots)[None, :]
    if row_starts is None:
        row = patient[:, None] * slots + visit[None, :]
    else:
        start = tl.load(row_starts + visit, mask=visit < slots, other=0)
        rank = tl.load(ranks + patient, mask=exists, other=0)
        last = tl.load(last_rows + patient, mask=exists, other=-1)
        row = start[None, :] + rank[:, None]
        # the last two hold for every batch; they keep a tampered one inside its memory
        inside = inside & (row <= last[:, None]) & (row >= 0) & (row < n_rows)
    return row, inside
