"""Split patients by a hash of their identifiers: none changes its split when the data set grows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..arrays import ArrayLike, as_array, got, integer, longs


def split_by_person(
    person_ids: ArrayLike,
    fractions: Mapping[str, float] = {"train": 0.8, "held_out": 0.2},
    *,
    seed: int = 0,
) -> dict[str, NDArray[np.int64]]:
    """The patients of each part, as ascending indices into ``person_ids``.

    A person's part depends on the identifier and the seed alone, not on who else is there or in
    what order. The parts have the fractions' sizes up to chance.

    Raises:
        ValueError: if the fractions are negative or do not sum to 1, or the seed is negative.
        TypeError: if the identifiers are not integers.

    Example:
        >>> parts = split_by_person(np.arange(1000), {"train": 0.9, "held_out": 0.1})
        >>> len(parts["train"]) + len(parts["held_out"])
        1000
        >>> alone = split_by_person(np.array([parts["held_out"][0]]))["held_out"]
        >>> alone.tolist()
        [0]
    """
    numbers = as_array("fractions", list(fractions.values()))
    if numbers.dtype.kind not in "fiu":
        raise TypeError(f"fractions: expected numbers, got {got(numbers)}")
    shares = numbers.astype(np.float64)
    if (shares < 0).any() or not np.isclose(shares.sum(), 1.0):
        raise ValueError(
            f"fractions: expected non-negative numbers that sum to 1, got {dict(fractions)}"
        )
    ids = as_array("person_ids", person_ids)
    if ids.dtype.kind != "u":  # of unsigned ones all 64 bits identify persons
        ids = longs("person_ids", person_ids)
    if ids.ndim != 1:
        raise ValueError(f"person_ids: expected 1 dimension, got shape {list(ids.shape)}")
    place = _uniform_hash(ids, integer("seed", seed, 0, 2**64 - 1))
    edges = np.append(0.0, np.cumsum(shares))
    edges[-1] = np.inf
    return {
        name: np.flatnonzero((edges[i] <= place) & (place < edges[i + 1]))
        for i, name in enumerate(fractions)
    }


def _uniform_hash(ids: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each id: the splitmix64 mix (Steele, Lea and Flood, 2014)."""
    mixed = splitmix64(ids.astype(np.uint64) ^ splitmix64(np.array([seed], np.uint64)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of each number, which is a permutation of all 64-bit numbers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
