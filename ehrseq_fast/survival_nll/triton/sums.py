"""The sum of a loss over patients in Triton, in the launch that computes it."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..operators import REDUCTIONS

# So that the last program adds all the others' sums in one load.
MOST_PROGRAMS: tl.constexpr = tl.constexpr(1024)


@triton.jit
def add_up_when_last(loss, partials, ticket, nll, share):
    """Store this program's sum; the last program adds them all, in their order.

    ``ticket`` counts the programs that are done. It is an integer: who is last depends on the
    schedule, what is added does not. Incrementing it releases the sum that this program wrote and
    acquires those of the programs before; the barriers extend both from the one thread that does
    so to the others. The sums are read past the first-level cache, which is not coherent. The last
    program resets the counter to zero for the next launch on this stream.
    """
    programs = tl.num_programs(0)
    tl.store(partials + tl.program_id(0), loss)
    tl.debug_barrier()
    finished_before = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    if finished_before == programs - 1:
        tl.debug_barrier()
        program = tl.arange(0, MOST_PROGRAMS)
        sums = tl.load(partials + program, mask=program < programs, other=0.0, cache_modifier=".cg")
        tl.store(nll, (tl.sum(sums, axis=0) * share).to(nll.dtype.element_ty))
        tl.store(ticket, 0)


def share_of_patient(reduction: int, patients: int) -> float:
    """Of one patient in the loss."""
    if reduction != REDUCTIONS["mean"]:
        return 1.0
    return 1.0 / patients if patients else math.inf  # the mean of none is 0 * inf: nan
