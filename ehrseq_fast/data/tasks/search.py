"""Binary search in many ascending ranges of one array at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array

Ints = NDArray[np.int64]
DAY_US = 86_400_000_000
NAT = np.iinfo(np.int64).min  # how datetime64 stores "not a time"


def first_not_below(values: Array, begins: Array, ends: Array, limits: Any) -> Ints:
    """Of each range ``values[begins:ends]``, which ascends, where the first value at or above its
    limit is; the range's end where there is none.

    Example:
        >>> days = np.array([1, 5, 9, 2, 3])
        >>> first_not_below(days, np.array([0, 3]), np.array([3, 5]), np.array([5, 9])).tolist()
        [1, 5]
    """
    low, high = np.array(begins, np.int64), np.array(ends, np.int64)
    limits = np.broadcast_to(np.asarray(limits, np.int64), low.shape)
    at = np.flatnonzero(low < high)
    while len(at):
        middle = (low[at] + high[at]) >> 1
        below = values[middle] < limits[at]
        low[at] = np.where(below, middle + 1, low[at])
        high[at] = np.where(below, high[at], middle)
        at = at[low[at] < high[at]]
    return low


def latest_so_far(values: Ints, begins: Ints) -> Ints:
    """The running maximum of each range that begins at ``begins[i]`` and ends where the next does
    (``begins`` has one more, the end of the last).

    Example:
        >>> latest_so_far(np.array([5, 3, 7, 1, 2]), np.array([0, 3, 3, 5])).tolist()
        [5, 5, 7, 1, 2]
    """
    falls = values[1:] < values[:-1]
    inner = begins[1:-1]
    falls[inner[(inner > 0) & (inner < len(values))] - 1] = False
    if not falls.any():
        return values
    # as a running maximum over all ranges of (range, rank of the value)
    order = np.argsort(values, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    base = np.repeat(np.arange(len(begins) - 1), np.diff(begins)) * len(values)
    return values[order[np.maximum.accumulate(base + rank) - base]]


def at_or(values: Array, places: Array, inside: Array, otherwise: int) -> Ints:
    """``values[places]`` where ``inside``, else ``otherwise``."""
    result = np.full(len(places), otherwise, np.int64)
    result[inside] = values[places[inside]]
    return result


def days_of(times: Array) -> Ints:
    """The day in UTC of times in microseconds since 1970-01-01."""
    return np.asarray(times, np.int64) // DAY_US


def microseconds(times: Array) -> Ints:
    """datetime64[us] as int64, without a copy."""
    return times.view(np.int64)


def as_times(us: Array) -> NDArray[np.datetime64]:
    """int64 microseconds as datetime64[us]."""
    return np.ascontiguousarray(us, np.int64).view("datetime64[us]")
