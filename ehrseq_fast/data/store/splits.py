"""Which split a subject belongs to: by the source's own assignment, or by a hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...arrays import as_array, integer, longs
from ..split import split_by_person

TRAIN = "train"
FRACTIONS: Mapping[str, float] = {"train": 0.8, "tuning": 0.1, "held_out": 0.1}
MOST_SPLITS = 127


@dataclass(frozen=True)
class SplitRule:
    """How subjects are assigned, and :meth:`of`, which does it.

    Attributes:
        rule: ``"hash"`` (of the identifier and ``seed``, see
            :func:`~ehrseq_fast.data.split_by_person`) or ``"subject_splits"`` (of the source).
        names: the splits; one is ``"train"``.
    """

    rule: str
    names: tuple[str, ...]
    fractions: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    _ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    _split: NDArray[np.int8] = field(default_factory=lambda: np.empty(0, np.int8), repr=False)

    def of(self, subject_ids: NDArray[np.int64]) -> NDArray[np.int8]:
        """int8 ``[n]``, indices into ``names``; -1 for a subject in none."""
        split = np.full(len(subject_ids), -1, np.int8)
        if self.rule == "hash":
            parts = split_by_person(subject_ids, self.fractions, seed=self.seed)
            for index, name in enumerate(self.names):
                split[parts[name]] = index
        elif len(self._ids):
            at = np.minimum(np.searchsorted(self._ids, subject_ids), len(self._ids) - 1)
            found = self._ids[at] == subject_ids
            split[found] = self._split[at[found]]
        return split

    def header(self) -> dict[str, Any]:
        if self.rule == "hash":
            fractions = {name: float(share) for name, share in self.fractions.items()}
            return {
                "rule": "hash",
                "names": list(self.names),
                "fractions": fractions,
                "seed": self.seed,
            }
        return {"rule": self.rule, "names": list(self.names)}


def by_hash(fractions: Mapping[str, float] | None = None, *, seed: int = 0) -> SplitRule:
    """Splits of these sizes up to chance: by default 80 % train, 10 % tuning, 10 % held out.

    Raises:
        ValueError: fractions that are negative or do not sum to 1, no ``"train"`` among them, a
            negative seed.
    """
    fractions = dict(FRACTIONS if fractions is None else fractions)
    _check_names(tuple(fractions), "split")
    seed = integer("seed", seed, 0, 2**63 - 1)
    split_by_person(np.empty(0, np.int64), fractions, seed=seed)  # refuses wrong fractions
    return SplitRule("hash", tuple(fractions), fractions, seed)


def by_subject(
    subject_splits: Mapping[int, str] | tuple[ArrayLike, ArrayLike],
    *,
    names: tuple[str, ...] | None = None,
) -> SplitRule:
    """Splits that the source has assigned: a mapping from subject to split, or two columns.

    Args:
        subject_splits: the subjects' identifiers and the names of their splits.
        names: the order of the names; by default train, tuning, held_out, then others by name.

    Raises:
        ValueError: no ``"train"`` among the names, a subject in two splits.
        TypeError: identifiers that are not integers.
    """
    columns = (
        (list(subject_splits.keys()), list(subject_splits.values()))
        if isinstance(subject_splits, Mapping)
        else subject_splits
    )
    ids = longs("subject_splits", columns[0])
    named = as_array("subject_splits", list(columns[1]))  # type: ignore[arg-type]
    if ids.shape != named.shape or ids.ndim != 1:
        raise ValueError(
            f"subject_splits: expected one split per subject, got {ids.size} subjects and "
            f"{named.size} splits"
        )
    if named.size and named.dtype.kind != "U":
        raise TypeError(f"subject_splits: expected the splits' names, got {named.dtype}")
    found, index = np.unique(named, return_inverse=True)
    known = {name: rank for rank, name in enumerate(FRACTIONS)}
    ordered = names or tuple(sorted(map(str, found), key=lambda n: (known.get(n, 9), n)))
    missing = sorted(set(map(str, found)) - set(ordered))
    if missing:
        raise ValueError(f"subject_splits: expected one of {list(ordered)}, got {missing[0]!r}")
    _check_names(ordered, "subject_splits")
    place = np.array([ordered.index(str(name)) for name in found], np.int8)
    split = place[index] if len(found) else np.empty(0, np.int8)
    order = np.lexsort((split, ids))
    ids, split = ids[order], split[order]
    twice = np.flatnonzero((ids[1:] == ids[:-1]) & (split[1:] != split[:-1]))
    if len(twice):
        at = twice[0]
        raise ValueError(
            f"subject_splits: expected each subject in one split, got subject {ids[at]} in "
            f"{ordered[split[at]]!r} and {ordered[split[at + 1]]!r}"
        )
    return SplitRule("subject_splits", ordered, _ids=ids, _split=split)


def _check_names(names: tuple[str, ...], where: str) -> None:
    if TRAIN not in names:
        raise ValueError(
            f"{where}: expected a split named {TRAIN!r}, on which the vocabulary is fitted, "
            f"got {', '.join(map(repr, names)) or 'none'}"
        )
    if len(names) > MOST_SPLITS:
        raise ValueError(f"{where}: expected at most {MOST_SPLITS} splits, got {len(names)}")
