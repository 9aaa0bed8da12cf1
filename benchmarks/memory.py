"""The peak memory of one computation on the CPU, counted and therefore the same on every run.

torch's profiler reports each allocation and release that goes through torch's CPU allocator:
tensors, saved activations, gradients, and the buffers that operators take as tensors, in Python or
C++. Replayed in order they give the highest level above the start. What it cannot see: scratch
memory that a library takes from the C heap itself (oneDNN and MKL work space, std::vector in a
kernel), allocations made on a worker thread inside a parallel loop, and the interpreter's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which the live tensors of ``run()`` exceed those before it, at the highest.

    A release of memory that was taken before ``run()`` is not credited: nothing that lives at the
    start makes the peak smaller.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kineto: Any = profiler.profiler
    changes = sorted(
        _changes(kineto.kineto_results.experimental_event_tree()), key=lambda change: change[0]
    )
    taken: dict[int, int] = {}
    level = peak = 0
    for _, address, size in changes:
        if size > 0:
            taken[address] = size
            level += size
            peak = max(peak, level)
        else:
            level -= taken.pop(address, 0)
    return peak


def _changes(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """When, where and how much was taken (or, negative, given back)."""
    for event in events:
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        yield from _changes(event.children)
