"""Ranges of person ids that hold about as many rows each: the parts in which a database is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .connection import reading
from .sources import Source

BUCKETS = 1 << 14  # of a histogram: what it costs in memory, whatever the number of persons


class PersonRange(NamedTuple):
    """The persons ``low`` to ``high``, both included, and how many rows they have."""

    low: int
    high: int
    rows: int


def person_ranges(
    connection: Any, sources: Sequence[Source], low: int, high: int, most: int
) -> list[PersonRange]:
    """Ranges that together hold every row of the persons ``low`` to ``high``, in ascending order.

    A range has at most ``most`` rows, unless it is of one person. The ranges depend on the rows
    and on ``most`` alone. Memory is bounded for any number of persons: rows are counted in a
    histogram, and a bucket that holds more than ``most`` is counted again in buckets of its own.
    """
    width = -(-(high - low + 1) // BUCKETS)
    rows = np.zeros(BUCKETS, np.int64)
    first = np.full(BUCKETS, high, np.int64)
    last = np.full(BUCKETS, low, np.int64)
    for source in sources:
        found = _histogram(connection, source, low, high, width)
        at = found["bucket"].astype(np.int64)
        rows[at] += found["n"].astype(np.int64)
        np.minimum.at(first, at, found["first"])
        np.maximum.at(last, at, found["last"])

    ranges: list[PersonRange] = []
    filling: PersonRange | None = None
    for bucket in np.flatnonzero(rows).tolist():
        one = PersonRange(int(first[bucket]), int(last[bucket]), int(rows[bucket]))
        if filling is not None and filling.rows + one.rows <= most:
            filling = PersonRange(filling.low, one.high, filling.rows + one.rows)
            continue
        if filling is not None:
            ranges.append(filling)
            filling = None
        if one.rows > most and one.low < one.high:
            ranges += person_ranges(connection, sources, one.low, one.high, most)
        else:
            filling = one
    return ranges if filling is None else [*ranges, filling]


def _histogram(
    connection: Any, source: Source, low: int, high: int, width: int
) -> dict[str, np.ndarray]:
    person = source.columns["person"]
    if high - low >= 2**62:  # their difference may be no BIGINT
        person = f"CAST({person} AS HUGEINT)"
    query = (
        f"SELECT CAST(({person} - ({low})) // {width} AS BIGINT) AS bucket, count(*) AS n,"
        f" min({source.columns['person']}) AS first, max({source.columns['person']}) AS last"
        f" FROM {source.table.name} WHERE {source.person} BETWEEN {low} AND {high} GROUP BY 1"
    )
    with reading(f"table {source.table.name}, column person_id"):
        return connection.execute(query).fetchnumpy()
