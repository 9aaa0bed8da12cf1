"""How fast the device is at its best, measured in the run that the ceilings are held against.

An operation cannot take less than moving its bytes and doing its products takes at these rates,
nor less than an empty call does: its floor. Bytes that fit into the last-level cache are charged at
the rate of reading there, others at that of memory. With the caches cold, what fits comes from
memory once, and from the cache when it is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .devices import Device
from .memory import MIB

# A GPU reaches its rates on larger copies and products only.
COPY_BYTES = {"cpu": 256 * MIB, "cuda": 1024 * MIB}
PRODUCT_WIDTH = {"cpu": 2048, "cuda": 8192}
QUICK_SHRINKS_BY = 16


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without.

    Attributes:
        bytes: read and written.
        working_set: how many bytes these lie in; the cache's rate holds if they fit into it.
        flops: of matrix products, in ``dtype``.
    """

    bytes: float = 0
    working_set: float = 0
    flops: float = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class Ceilings:
    """Rates in bytes and flops a second; seconds of a call that does nothing."""

    copy: float
    cached_read: float
    product: dict[str, float]
    empty_call_s: float
    empty_call_host_s: float
    cache_bytes: int

    def floor(self, work: Work, *, cold: bool = False) -> float:
        """The seconds below which ``work`` cannot be done."""
        from_memory = work.bytes
        if work.working_set <= self.cache_bytes:
            from_memory = min(work.bytes, work.working_set) if cold else 0
        moving = from_memory / self.copy + (work.bytes - from_memory) / self.cached_read
        return max(moving + work.flops / self.product[work.dtype], self.empty_call_s)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(device: Device, *, quick: bool = False) -> Ceilings:
    """All of them, each the best of several runs; ``quick`` measures smaller ones."""
    shrink = QUICK_SHRINKS_BY if quick else 1
    most = {"cpu": 5, "cuda": 20}[device.name]
    repeats = 2 if quick else most

    def best(run: Callable[[], object]) -> float:
        return min(device.time(run, warm_ups=1).seconds for _ in range(repeats))

    size = COPY_BYTES[device.name] // 4 // shrink
    source, target = (torch.ones(size, device=device.name) for _ in range(2))
    copy_s = best(lambda: target.copy_(source))

    # the same resident bytes again and again, so that starting up weighs little; on a GPU in one
    # launch, since a launch takes as long as one pass, but the CPU's sum would read them once
    resident, passes = torch.ones(device.cache_bytes // 4 // 4, device=device.name), 16
    again = resident.expand(passes, -1)
    if device.name == "cpu":
        read_s = best(lambda: [resident.sum() for _ in range(passes)])
    else:
        read_s = best(lambda: again.sum(1))

    width = PRODUCT_WIDTH[device.name] // (shrink // 4 or 1)
    product = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(width, width, dtype=dtype, device=device.name) for _ in range(2))
        product[str(dtype).removeprefix("torch.")] = 2 * width**3 / best(lambda a=a, b=b: a @ b)
    one = torch.ones(1, device=device.name)
    many = 100 if device.name == "cpu" else 1  # a clock is no finer than a call on the host

    def calls() -> None:
        for _ in range(many):
            one.add_(0.0)

    empty = [device.time(calls, warm_ups=2) for _ in range(4 * repeats)]
    empty_s = min(taken.seconds for taken in empty) / many
    host_s = min(taken.seconds if taken.host is None else taken.host for taken in empty) / many
    return Ceilings(
        copy=2 * source.nbytes / copy_s,
        cached_read=resident.nbytes * passes / read_s,
        product=product,
        empty_call_s=empty_s,
        empty_call_host_s=host_s,
        cache_bytes=device.cache_bytes,
    )
