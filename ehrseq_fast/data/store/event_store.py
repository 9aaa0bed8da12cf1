"""Records on disk: events once, for any number of tasks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...arrays import Array, longs
from .atomic import recovered
from .dictionary import matching, read_dictionary
from .format import (
    ARRAYS,
    DICTIONARY,
    FORMAT,
    HEADER,
    OPTIONAL,
    VERSION,
    content_sha256,
    open_array,
    read_json,
    sha256_of,
)
from .summary import describe_store

PIECE = 1 << 20  # patients that are checked at a time

Ints = NDArray[np.int64]
Times = NDArray[np.datetime64]
Floats = NDArray[np.float32]


class EventStore:
    """A folder of records, memory-mapped: P patients, N visits, M entries, D distinct codes.

    Visit ``v`` has the entries ``visit_offsets[v] : visit_offsets[v + 1]``, patient ``p`` the
    visits ``patient_offsets[p] : patient_offsets[p + 1]``. A patient may have no visit, a visit has
    an entry or more. The arrays are read-only. A store is pickled by its path: a process that
    unpickles it opens the same files.

    Attributes:
        path: the folder.
        header: what ``store.json`` holds: visit rule, source, split, counts, what was left out.
        subject_ids: int64 ``[P]``, the source's identifiers, in its order.
        patient_offsets: int64 ``[P + 1]``.
        visit_times: ``datetime64[us]`` ``[N]``, the start of each visit, ascending within a
            patient.
        visit_ends: ``datetime64[us]`` ``[N]``, the time of the visit's latest event, not before its
            start; in no order, for visits can overlap.
        visit_offsets: int64 ``[N + 1]``.
        codes: int32 ``[M]``, indices into ``codes_of``, ascending and distinct within a visit.
        values: float32 ``[M]``, the entries' numeric values, NaN = none; None where the source has
            none.
        static_offsets, static_codes, static_values: int64 ``[P + 1]``, int32, float32 or None:
            each patient's events without a time.
        birth_times, death_times: ``datetime64[us]`` ``[P]``, NaT = unknown.
        period_offsets, period_starts, period_ends: int64 ``[P + 1]``, ``datetime64[us]``: each
            patient's observation periods, ascending, without overlap; the end is exclusive.
        splits: int8 ``[P]``, indices into ``split_names``, -1 = in none.
        vocabulary: int32 ``[D]``, from an index into ``codes_of`` to a model's code: 1 for a code
            that the training split has too seldom or never, 2 and above for the others; 0 is a
            model's padding.

    Args:
        path: the folder.
        verify: read all files and compare their SHA-256 with the header's.

    Raises:
        FileNotFoundError: no store there, or a file is missing.
        ValueError: a file of another format, version, size, dtype or (``verify``) content.

    Example:
        >>> import tempfile
        >>> from ehrseq_fast.data import PartWriter, SubjectChunk, write_store
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     part = PartWriter(f"{folder}/part", visit_rule="day")
        ...     part.add(SubjectChunk(
        ...         subject_ids=np.array([7, 8]), event_subject=np.array([0, 0, 0, 1]),
        ...         event_times=np.array(["2020-01-01", "2020-01-01", "2020-03-01", "2021-01-01"],
        ...                              "M8[us]"),
        ...         event_codes=["A", "B", "A", "C"]))
        ...     part.finish()
        ...     store = write_store(f"{folder}/store", [f"{folder}/part"], source={})
        ...     store.n_patients, store.n_visits, store.codes_of, store.patients_of(None).tolist()
        (2, 3, ('A', 'B', 'C'), [0, 1])
    """

    subject_ids: Ints
    patient_offsets: Ints
    visit_times: Times
    visit_ends: Times
    visit_offsets: Ints
    codes: NDArray[np.int32]
    values: Floats | None
    static_offsets: Ints
    static_codes: NDArray[np.int32]
    static_values: Floats | None
    birth_times: Times
    death_times: Times
    period_offsets: Ints
    period_starts: Times
    period_ends: Times
    splits: NDArray[np.int8]
    vocabulary: NDArray[np.int32]

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = False) -> None:
        self.path = recovered(Path(os.path.abspath(path)))
        self.header: dict[str, Any] = {}
        self._open()
        self._check_patients()
        if verify:
            self._verify()

    def _open(self) -> None:
        """Open all files, of one store: another may take its place meanwhile."""
        for _ in range(100):
            self.header = _read_header(self.path)
            try:
                self._open_arrays()
            except (OSError, ValueError):
                if self.header == _read_header(self.path):
                    raise
            else:
                if self.header == _read_header(self.path):
                    return
        raise RuntimeError(f"{self.path}: the store was replaced whenever it was opened")

    def _open_arrays(self) -> None:
        folder = self.path
        entries: Mapping[str, Mapping[str, Any]] = self.header["arrays"]
        for name in ARRAYS:
            if name in entries:
                setattr(self, name, open_array(folder, name, entries[name]))
            elif name in OPTIONAL:
                setattr(self, name, None)
            else:
                raise ValueError(f"{folder / HEADER}: expected the array {name!r}, it lists none")
        self._check_lengths()
        try:
            content = content_sha256(self.header)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / HEADER}: expected an EventStore's header, got one that was changed: "
                f"{type(error).__name__} {error}"
            ) from error
        _expect_sha256(folder / HEADER, content, self.header["content_sha256"])

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> EventStore:
        """As ``EventStore(path)``."""
        return cls(path, verify=verify)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (str(self.path), self.header["content_sha256"])

    def __repr__(self) -> str:
        return (
            f"EventStore({str(self.path)!r}: {self.n_patients:,} patients, "
            f"{self.n_visits:,} visits, {len(self.codes):,} entries, {self.n_codes:,} codes)"
        )

    @property
    def n_patients(self) -> int:
        return len(self.subject_ids)

    @property
    def n_visits(self) -> int:
        return len(self.visit_times)

    @property
    def n_codes(self) -> int:
        """How many distinct codes the records have, all splits together."""
        return len(self.vocabulary)

    @property
    def vocab_size(self) -> int:
        """How many codes a model has: padding, unknown, and those of the training split."""
        return int(self.header["vocabulary"]["size"])

    @property
    def visit_rule(self) -> str | float:
        return self.header["visit_rule"]

    @property
    def split_names(self) -> tuple[str, ...]:
        return tuple(self.header["split"]["names"])

    @property
    def left_out(self) -> dict[str, int]:
        """What the reader has not taken up: how much, by reason."""
        return dict(self.header["left_out"])

    @cached_property
    def _dictionary(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        path, expected = self.path / DICTIONARY, self.header[DICTIONARY]["sha256"]
        if sha256_of(path, skip_npy_header=False) != expected:
            raise ValueError(
                f"{path}: expected SHA-256 {expected}: the file was changed, or the store replaced "
                "after it was opened"
            )
        return read_dictionary(self.path, self.n_codes)

    @property
    def codes_of(self) -> tuple[str, ...]:
        """The dictionary: the string of every code, in ascending order."""
        return self._dictionary[0]

    @property
    def descriptions(self) -> tuple[str, ...]:
        """One of each code of the dictionary, ``""`` where the source has none."""
        return self._dictionary[1]

    @cached_property
    def code_index(self) -> dict[str, int]:
        """From a code's string to its index in the dictionary."""
        return {code: i for i, code in enumerate(self.codes_of)}

    def patients_of(self, split: str | None = None) -> Ints:
        """int64, ascending: the patients (0 .. P - 1) of a split; of all, where it is None.

        Raises:
            ValueError: a split that the store does not have.
        """
        if split is None:
            return np.arange(self.n_patients)
        if split not in self.split_names:
            names = ", ".join(map(repr, self.split_names))
            raise ValueError(f"split: expected one of {names} or None, got {split!r}")
        return np.flatnonzero(self.splits == self.split_names.index(split))

    @cached_property
    def _by_id(self) -> tuple[Ints, Ints | None]:
        """Ascending identifiers, and whose they are (None: of patient 0, 1, ...)."""
        if (self.subject_ids[1:] > self.subject_ids[:-1]).all():
            return self.subject_ids, None
        order = np.argsort(self.subject_ids, kind="stable")
        return self.subject_ids[order], order

    def indices_of(self, subject_ids: ArrayLike) -> Ints:
        """int64: the patients (0 .. P - 1) with these identifiers, in that order.

        Raises:
            LookupError: an identifier that the store does not have.
        """
        wanted = longs("subject_ids", subject_ids)
        ids, order = self._by_id
        at = np.minimum(np.searchsorted(ids, wanted), max(len(ids) - 1, 0))
        missing = ids[at] != wanted if len(ids) else np.ones(wanted.shape, bool)
        if missing.any():
            raise LookupError(
                f"subject_ids: expected subjects of this store, got {wanted[missing].flat[0]} "
                f"({int(missing.sum())} are not in it)"
            )
        return at if order is None else order[at]

    def matching(
        self,
        codes: Iterable[str | int] | str | int | None = None,
        prefix: str | Sequence[str] | None = None,
    ) -> NDArray[np.bool_]:
        """bool ``[D]``: the dictionary's codes that are among ``codes`` (an integer is an OMOP
        concept's) or begin with ``prefix``, or with one of several.

        Raises:
            LookupError: a code or prefix of no record; near codes are named.
            ValueError: neither is given.
        """
        return matching(self.codes_of, self.code_index, codes, prefix)

    def describe(self) -> str:
        """A summary in lines: counts, splits, vocabulary, times, what was left out."""
        return describe_store(self)

    def _check_lengths(self) -> None:
        patients, visits = self.n_patients, self.n_visits
        expected = {
            "patient_offsets": patients + 1,
            "static_offsets": patients + 1,
            "period_offsets": patients + 1,
            "birth_times": patients,
            "death_times": patients,
            "splits": patients,
            "visit_ends": visits,
            "visit_offsets": visits + 1,
            "values": len(self.codes),
            "static_values": len(self.static_codes),
            "period_ends": len(self.period_starts),
            "vocabulary": self.header[DICTIONARY]["size"],
        }
        for name, length in expected.items():
            array: Array | None = getattr(self, name)
            if array is not None and len(array) != length:
                raise ValueError(
                    f"{self.path / (name + '.npy')}: expected {length} elements, got {len(array)}"
                )
        for offsets, what in (
            ("patient_offsets", "visit_times"),
            ("visit_offsets", "codes"),
            ("static_offsets", "static_codes"),
            ("period_offsets", "period_starts"),
        ):
            ends = getattr(self, offsets)
            most = len(getattr(self, what))
            if ends[0] != 0 or ends[-1] != most:
                raise ValueError(
                    f"{self.path / (offsets + '.npy')}: expected offsets from 0 to {most}, the "
                    f"length of {what}, got {ends[0]} to {ends[-1]}"
                )
        path = self.path / DICTIONARY
        size, most = path.stat().st_size, self.header[DICTIONARY]["bytes"]
        if size != most:
            raise ValueError(
                f"{path}: expected {most} bytes, got {size}: it was cut off or changed"
            )

    def _check_patients(self) -> None:
        """Of what there is one of per patient: wrong ones would give a patient another's visits,
        or the training split held-out patients."""
        most = len(self.split_names) - 1
        for begin in range(0, self.n_patients, PIECE):
            for name in ("patient_offsets", "static_offsets", "period_offsets"):
                offsets: Ints = getattr(self, name)[begin : begin + PIECE + 1]
                falls = np.flatnonzero(offsets[1:] < offsets[:-1])
                if len(falls):
                    at = int(falls[0])
                    raise ValueError(
                        f"{self.path / (name + '.npy')}: expected offsets that do not fall, got "
                        f"{offsets[at + 1]} after {offsets[at]} (patient {begin + at})"
                    )
            splits = self.splits[begin : begin + PIECE]
            wrong = np.flatnonzero((splits < -1) | (splits > most))
            if len(wrong):
                at = int(wrong[0])
                raise ValueError(
                    f"{self.path / 'splits.npy'}: expected splits from -1 to {most}, got "
                    f"{splits[at]} (patient {begin + at})"
                )

    def _verify(self) -> None:
        entries = self.header["arrays"]
        for name, entry in entries.items():
            path = self.path / f"{name}.npy"
            _expect_sha256(path, sha256_of(path, skip_npy_header=True), entry["sha256"])
        path = self.path / DICTIONARY
        dictionary = self.header[DICTIONARY]["sha256"]
        _expect_sha256(path, sha256_of(path, skip_npy_header=False), dictionary)


def is_store(path: Path) -> bool:
    """Whether the folder has a store's header, of whatever version."""
    try:
        header = read_json(path / HEADER, "a header")
    except (OSError, ValueError):
        return False
    return isinstance(header, dict) and header.get("format") == FORMAT


def _reopened(path: str, content: str) -> EventStore:
    store = EventStore(path)
    if store.header["content_sha256"] != content:
        raise RuntimeError(f"{path}: the store was replaced after it was opened; open it again")
    return store


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected the folder of an EventStore, there is none")
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected an EventStore, it has no {HEADER}")
    header = read_json(path, "an EventStore's header")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = header.get("format") if isinstance(header, dict) else header
        raise ValueError(f"{path}: expected the format {FORMAT!r}, got {got!r:.100}")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: expected version {VERSION} of the format, got {header.get('version')!r}; "
            "read the source again, or use another version of ehrseq_fast"
        )
    needed = ("visit_rule", "source", "split", "vocabulary", "counts", "left_out", "arrays")
    for key in (*needed, DICTIONARY, "content_sha256"):
        if key not in header:
            raise ValueError(f"{path}: expected the entry {key!r}, it has none")
    if not (folder / DICTIONARY).is_file():
        raise FileNotFoundError(f"{folder / DICTIONARY}: missing")
    return header


def _expect_sha256(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{path}: expected SHA-256 {expected}, got {found}: the file was changed")
