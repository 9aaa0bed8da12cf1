"""From parts to a store: one pass over the parts in their order, in pieces of bounded size."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...arrays import Array, integer
from .atomic import NewFolder, new_folder
from .dictionary import fitted_vocabulary, places, united, write_dictionary
from .event_store import EventStore, is_store
from .format import (
    DICTIONARY,
    FIRST_CODE,
    FORMAT,
    HEADER,
    OPTIONAL,
    VERSION,
    ArrayWriter,
    content_sha256,
    offsets_of,
    write_json,
)
from .parts import Part
from .splits import TRAIN, SplitRule, by_hash, by_subject
from .visits import VisitRule, checked_rule

PIECE = 1 << 18  # entries, visits or patients that are held in memory at a time
WHAT = "an EventStore"

Ints = NDArray[np.int64]
Parts = Sequence[str | os.PathLike[str]]


def write_store(
    out: str | os.PathLike[str] | NewFolder,
    parts: Parts,
    *,
    source: Mapping[str, Any],
    visit_rule: VisitRule | None = None,
    min_count: int = 1,
    split: Mapping[str, float] | SplitRule | None = None,
    subject_splits: Mapping[int, str] | tuple[ArrayLike, ArrayLike] | None = None,
    descriptions: Mapping[str, str] | None = None,
    left_out: Mapping[str, int] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> EventStore:
    """Merge parts, in the order given, into the store ``out``. It appears whole or not at all.

    In memory are what there is one of per patient, per distinct code, and pieces of the rest.

    Args:
        out: the folder to make, or one that :func:`new_store` has opened.
        parts: folders that :class:`PartWriter` has finished.
        source: what was read, for the header.
        visit_rule: the rule for the header, where it is not the parts' own.
        min_count: how often a code must occur in the training split to be in the vocabulary.
        split: fractions by name for a hash split (by default 80 % train, 10 % tuning, 10 %
            held_out), or a rule.
        subject_splits: the source's own splits instead, see :func:`~.splits.by_subject`.
        descriptions: of codes.
        left_out: what was not taken up, besides what the parts have counted.
        seed: of the hash split.
        overwrite: replace a store that is there.

    Raises:
        ValueError: a subject in two parts, parts of different rules, wrong options.
        FileExistsError: ``out`` exists.
    """
    min_count = integer("min_count", min_count, 1, 2**62)
    if split is not None and subject_splits is not None:
        raise ValueError("split, subject_splits: expected one of them, got both")
    if subject_splits is not None:
        rule = by_subject(subject_splits)
    else:
        rule = split if isinstance(split, SplitRule) else by_hash(split, seed=seed)
    if not isinstance(out, NewFolder):
        with new_store(out, overwrite=overwrite) as folder:
            return _merge_into(
                folder, parts, source, visit_rule, min_count, rule, descriptions, left_out
            )
    return _merge_into(out, parts, source, visit_rule, min_count, rule, descriptions, left_out)


def new_store(out: str | os.PathLike[str], *, overwrite: bool) -> Any:
    """A context: the :class:`NewFolder` in whose ``parts`` a reader writes parts before it gives
    it to :func:`write_store`."""
    return new_folder(out, overwrite=overwrite, what=WHAT, is_one=is_store)


def _merge_into(
    folder: NewFolder,
    paths: Parts,
    source: Mapping[str, Any],
    visit_rule: VisitRule | None,
    min_count: int,
    rule: SplitRule,
    descriptions: Mapping[str, str] | None,
    left_out: Mapping[str, int] | None,
) -> EventStore:
    parts = [Part(path) for path in paths]
    counts, counted = _totals(parts, left_out)
    rules = {part.visit_rule for part in parts}
    if len(rules) > 1:
        raise ValueError(f"parts: expected one visit rule, got {sorted(map(str, rules))}")
    kept_rule = checked_rule(visit_rule) if visit_rule is not None else next(iter(rules), "day")
    codes = united(part.codes() for part in parts)
    with ExitStack() as stack:
        merge = _Merge(folder.new, parts, counts, len(codes), rule, stack)
        index = {code: i for i, code in enumerate(codes)}
        for part in parts:
            merge.add(part, places(part.codes(), index))
        del index
        split_counts = merge.split_counts()
        vocabulary = fitted_vocabulary(merge.occurrences, min_count)
        merge.writers["vocabulary"].write(vocabulary)
        arrays = {name: writer.finish() for name, writer in merge.writers.items()}
    dictionary = write_dictionary(folder.new, codes, descriptions)
    size = FIRST_CODE + int(np.count_nonzero(vocabulary >= FIRST_CODE))
    if counts["patients"] and not split_counts[TRAIN]:
        warnings.warn(
            f"{folder.out}: no subject is in the split {TRAIN!r}, so every code is unknown to the "
            "vocabulary",
            stacklevel=3,
        )
    header = {
        "format": FORMAT,
        "version": VERSION,
        "visit_rule": kept_rule,
        "source": dict(source),
        "split": {**rule.header(), "patients": split_counts},
        "vocabulary": {"min_count": min_count, "size": size},
        "counts": {**counts, "codes": len(codes)},
        "left_out": counted,
        "arrays": arrays,
        DICTIONARY: dictionary,
    }
    header["content_sha256"] = content_sha256(header)
    write_json(folder.new / HEADER, header, indent=1)
    folder.commit()
    return EventStore(folder.out)


_COUNTS = (
    "patients",
    "patients without visits",
    "visits",
    "events",
    "entries",
    "values",
    "static_entries",
    "static_values",
    "births",
    "deaths",
    "periods",
)


def _totals(
    parts: Sequence[Part], left_out: Mapping[str, int] | None
) -> tuple[dict[str, int], dict[str, int]]:
    counts, counted = Counter[str](), Counter[str](left_out or {})
    for part in parts:
        counts.update(part.counts)
        counted.update(part.left_out)
    return {name: counts[name] for name in _COUNTS}, {k: int(n) for k, n in counted.items()}


_AS_THEY_ARE = (  # arrays whose parts follow one another unchanged
    "birth_times",
    "death_times",
    "visit_times",
    "visit_ends",
    "period_starts",
    "period_ends",
)


class _Merge:
    """The arrays being written, and how far they are."""

    def __init__(
        self,
        folder: Path,
        parts: Sequence[Part],
        counts: Mapping[str, int],
        n_codes: int,
        rule: SplitRule,
        stack: ExitStack,
    ) -> None:
        self.rule, self.stack = rule, stack
        lengths = {
            "subject_ids": counts["patients"],
            "patient_offsets": counts["patients"] + 1,
            "visit_times": counts["visits"],
            "visit_ends": counts["visits"],
            "visit_offsets": counts["visits"] + 1,
            "codes": counts["entries"],
            "values": counts["entries"] if counts["values"] else 0,
            "static_offsets": counts["patients"] + 1,
            "static_codes": counts["static_entries"],
            "static_values": counts["static_entries"] if counts["static_values"] else 0,
            "birth_times": counts["patients"],
            "death_times": counts["patients"],
            "period_offsets": counts["patients"] + 1,
            "period_starts": counts["periods"],
            "period_ends": counts["periods"],
            "splits": counts["patients"],
            "vocabulary": n_codes,
        }
        self.writers: dict[str, ArrayWriter] = {}
        for name, length in lengths.items():
            if name not in OPTIONAL or counts[name]:
                self.writers[name] = writer = ArrayWriter(folder, name, length)
                stack.callback(writer.close)
        self.ends = dict.fromkeys(("patient", "visit", "static", "period"), 0)
        for name in self.ends:
            self.writers[f"{name}_offsets"].write(np.zeros(1, np.int64))
        self.occurrences = np.zeros(n_codes, np.int64)
        self.split_sizes = np.zeros(len(rule.names) + 1, np.int64)
        self.train = rule.names.index(TRAIN)
        _refuse_shared_subjects(parts)

    def add(self, part: Part, remap: NDArray[np.int32]) -> None:
        ids = part.whole("subject_ids")
        split = self.rule.of(ids)
        self.split_sizes += np.bincount(split + 1, minlength=len(self.split_sizes))
        self.writers["subject_ids"].write(ids)
        self.writers["splits"].write(split)
        for name in _AS_THEY_ARE:
            for piece in part.pieces(name, PIECE):
                self.writers[name].write(piece)
        for name, stream in (("patient", "patient_visits"), ("period", "patient_periods")):
            self._offsets(name, part, stream)
        in_training = split == self.train
        visits = offsets_of(part.whole("patient_visits"))
        for rows in self._entries(part, remap, "visit", "visit_entries", ""):
            # whose visits they are
            of_visit = np.searchsorted(visits, rows.numbers, side="right") - 1
            in_train = np.repeat(in_training[of_visit], rows.lengths)
            self.occurrences += np.bincount(rows.codes[in_train], minlength=len(self.occurrences))
        for _ in self._entries(part, remap, "static", "patient_statics", "static_"):
            pass

    def split_counts(self) -> dict[str, int]:
        named = dict(zip(self.rule.names, self.split_sizes[1:].tolist(), strict=True))
        return {**named, "none": int(self.split_sizes[0])} if self.split_sizes[0] else named

    def _offsets(self, name: str, part: Part, stream: str) -> None:
        for lengths in part.pieces(stream, PIECE):
            self._write_offsets(name, lengths)

    def _write_offsets(self, name: str, lengths: Array) -> None:
        offsets = offsets_of(lengths, self.ends[name])
        self.writers[f"{name}_offsets"].write(offsets[1:])
        self.ends[name] = int(offsets[-1])

    def _entries(
        self, part: Part, remap: NDArray[np.int32], offsets: str, stream: str, prefix: str
    ) -> Iterator[_Rows]:
        """Write a part's codes and values, ascending within each row, and give every piece."""
        codes = part.reader(f"{prefix}codes")
        self.stack.callback(codes.close)
        values = part.reader(f"{prefix}values") if part.with_values else None
        if values is not None:
            self.stack.callback(values.close)
        keeps = self.writers.get(f"{prefix}values")
        row = 0
        for block in part.pieces(stream, PIECE):
            self._write_offsets(offsets, block)
            for lengths in _pieces_of(block):
                n = int(lengths.sum())
                of_row = np.repeat(np.arange(len(lengths)), lengths)
                taken = remap[codes.take(n)]
                taken_values = values.take(n) if values is not None else None
                order = _order(of_row, taken)
                if order is not None:
                    taken = taken[order]
                self.writers[f"{prefix}codes"].write(taken)
                if keeps is not None:
                    if taken_values is None:
                        taken_values = np.full(n, np.nan, np.float32)
                    keeps.write(taken_values if order is None else taken_values[order])
                yield _Rows(np.arange(row, row + len(lengths)), lengths, taken)
                row += len(lengths)
        codes.close()
        if values is not None:
            values.close()


class _Rows:
    """Rows of a part (visits, patients), how many entries each has, and these entries' codes."""

    def __init__(self, numbers: Ints, lengths: Ints, codes: NDArray[np.int32]) -> None:
        self.numbers, self.lengths, self.codes = numbers, lengths, codes


def _pieces_of(lengths: Ints) -> Iterator[Ints]:
    """Rows in pieces of at most ``PIECE`` entries, or of one row."""
    ends = np.cumsum(lengths)
    begin = 0
    while begin < len(lengths):
        before = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, before + PIECE, side="right"))
        end = max(end, begin + 1)
        yield lengths[begin:end]
        begin = end


def _order(of_row: Ints, codes: NDArray[np.int32]) -> Ints | None:
    """What sorts the codes of each row; None where they are sorted."""
    key = of_row * (int(codes.max(initial=0)) + 1) + codes  # distinct: any sort is stable
    return None if (key[1:] > key[:-1]).all() else np.argsort(key)


def _refuse_shared_subjects(parts: Sequence[Part]) -> None:
    """``ValueError`` where a subject is in two parts, or twice in one."""
    ids = np.concatenate([part.whole("subject_ids") for part in parts] or [np.empty(0, np.int64)])
    if (ids[1:] > ids[:-1]).all():
        return
    ids.sort()
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if not len(twice):
        return
    subject = ids[twice[0]]
    where = [
        part.name for part in parts for _ in np.flatnonzero(part.whole("subject_ids") == subject)
    ]
    raise ValueError(
        f"subject {subject}: expected all its events in one place, got them in {where[0]} and "
        f"again in {where[1]} ({len(np.unique(ids[twice]))} such subjects)"
    )
