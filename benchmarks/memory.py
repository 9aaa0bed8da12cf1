"""The peak memory of one computation on the CPU, counted and therefore the same on every run.

torch's profiler reports each allocation and release that goes through torch's CPU allocator:
tensors, saved activations, gradients, and the buffers that operators take as tensors, in Python or
C++. Replayed in order they give the highest level above the start. What it cannot see: scratch
memory that a library takes from the C heap itself (oneDNN and MKL work space, std::vector in a
kernel), allocations made on a worker thread inside a parallel loop, and the interpreter's own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which the live tensors of ``run()`` exceed those before it, at the highest.

    A release of memory that was taken before ``run()`` is not credited: nothing that lives at the
    start makes the peak smaller.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    changes.sort(key=lambda change: change[0])
    return max(accumulate((size for _, size in changes), initial=0))
