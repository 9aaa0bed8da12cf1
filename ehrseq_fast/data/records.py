"""Ragged patient records as flat arrays: what the readers make and the batches are cut from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, ArrayLike, as_array, integers, longs, selection

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Vocabulary:
    """The codes of a model: index 0 is padding, 1.. are concepts in ascending order of their id.

    ``concept_ids`` int64 ``[size]`` and ``names`` (one string each, ``""`` where the source names
    none) both begin with an entry for padding.
    """

    concept_ids: Ints
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "concept_ids", longs("concept_ids", self.concept_ids))
        object.__setattr__(self, "names", tuple(self.names))
        if self.concept_ids.ndim != 1:
            raise ValueError(
                f"concept_ids: expected 1 dimension, got shape {list(self.concept_ids.shape)}"
            )
        if len(self.concept_ids) != len(self.names):
            raise ValueError(
                f"names: expected one per concept, {len(self.concept_ids)}, got {len(self.names)}"
            )
        if not (self.concept_ids[1:-1] < self.concept_ids[2:]).all():
            raise ValueError("concept_ids: expected ascending ids behind the entry for padding")

    def __len__(self) -> int:
        return len(self.names)

    def index_of(self, concept_id: int) -> int:
        """The code of one concept. ``KeyError`` where the vocabulary lacks it."""
        at = int(np.searchsorted(self.concept_ids[1:], concept_id)) + 1
        if at == len(self) or self.concept_ids[at] != concept_id:
            raise KeyError(f"concept_id: expected one in this vocabulary, got {concept_id}")
        return at


@dataclass(frozen=True)
class EventRecords:
    """Patients, their visits, the codes of each visit, and one outcome per patient.

    Flat arrays with offsets, nothing padded: visit ``v`` holds ``codes[visit_offsets[v]:
    visit_offsets[v + 1]]``, patient ``p`` the visits ``patient_offsets[p]`` up to
    ``patient_offsets[p + 1]``, in order of time. Arrays of int32 or int64 are kept, not copied:
    they may be memory-mapped, and must not be written to.

    Attributes:
        codes: int32 ``[n_codes]``, indices into ``vocabulary``, never 0, ascending and distinct
            within a visit.
        visit_offsets: int64 ``[n_visits + 1]``, from 0 to ``n_codes``.
        patient_offsets: int64 ``[n_patients + 1]``, from 0 to ``n_visits``; every patient has a
            visit.
        visit_days: ``datetime64[D]`` ``[n_visits]``.
        person_ids: int64 ``[n_patients]``, the source's identifiers.
        event_times: int64 ``[n_patients]``, 0-based index of the visit whose hazard the outcome
            belongs to: the last visit of the record.
        event_indicators: uint8 ``[n_patients]``: 1 = the event follows at the next visit,
            0 = censored.
        vocabulary: the meaning of the codes.
        left_out: what the reader did not take up, by reason.

    Raises:
        ValueError: arrays whose lengths do not belong together, offsets that fall or point outside,
            codes of no visit, visits of no patient, a patient without visits or with days that
            fall, an outcome outside the visits.
        IndexError: a code outside the vocabulary (memory-mapped codes are not read for this).
        TypeError: arrays of another kind.
    """

    codes: NDArray[np.int32]
    visit_offsets: Ints
    patient_offsets: Ints
    visit_days: NDArray[np.datetime64]
    person_ids: Ints
    event_times: Ints
    event_indicators: NDArray[np.uint8]
    vocabulary: Vocabulary
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_records(self)

    @property
    def n_patients(self) -> int:
        return len(self.person_ids)

    @property
    def n_visits(self) -> int:
        return len(self.visit_days)

    @property
    def visits_per_patient(self) -> Ints:
        """int64 ``[n_patients]``."""
        return np.diff(self.patient_offsets)

    @property
    def codes_per_visit(self) -> Ints:
        """int64 ``[n_visits]``."""
        return np.diff(self.visit_offsets)

    def time_features(self) -> NDArray[np.float32]:
        """float32 ``[n_visits, 3]``, a copy: days since the patient's last visit, days since the
        first, and the visit's index. All three are 0 at a patient's first visit.

        The days are not scaled: what suits a model is the model's to know.
        """
        return self._time_features.copy()

    @cached_property
    def _time_features(self) -> NDArray[np.float32]:
        """Computed once, for every batch to read from; nothing may write to it."""
        days = self.visit_days.astype(np.int64)
        first = np.repeat(self.patient_offsets[:-1], self.visits_per_patient)
        since_last = np.diff(days, prepend=days[:1])
        since_last[self.patient_offsets[:-1]] = 0
        index = np.arange(self.n_visits) - first
        return np.stack([since_last, days - days[first], index], axis=1).astype(np.float32)


def select(records: EventRecords, patients: ArrayLike) -> EventRecords:
    """The given patients alone (indices into ``records``, or one boolean for each patient), in that
    order; vocabulary and ``left_out`` stay as they are.

    Raises:
        IndexError: if an index is not that of a patient.
        TypeError: neither integers nor booleans.
    """
    patients = selection("patients", patients, records.n_patients, "patients")
    starts = records.patient_offsets[patients]
    lengths = records.patient_offsets[patients + 1] - starts
    visit = spans(starts, lengths)[2]
    widths = records.codes_per_visit[visit]
    return replace(
        records,
        codes=records.codes[spans(records.visit_offsets[visit], widths)[2]],
        visit_offsets=_offsets(widths),
        patient_offsets=_offsets(lengths),
        visit_days=records.visit_days[visit],
        person_ids=records.person_ids[patients],
        event_times=records.event_times[patients],
        event_indicators=records.event_indicators[patients],
    )


def _offsets(lengths: Ints) -> Ints:
    return np.append(0, np.cumsum(lengths))


def spans(starts: Ints, lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """Enumerate ragged rows: the positions ``starts[i] .. starts[i] + lengths[i]`` of every row i.

    Returns three int64 arrays of ``lengths.sum()`` entries: the row, the place within the row, and
    the position.

    Example:
        >>> row, place, position = spans(np.array([10, 20]), np.array([2, 1]))
        >>> row.tolist(), place.tolist(), position.tolist()
        ([0, 0, 1], [0, 1, 0], [10, 11, 20])
    """
    row = np.repeat(np.arange(len(lengths)), lengths)
    before = np.cumsum(lengths) - lengths
    place = np.arange(len(row)) - before[row]
    return row, place, starts[row] + place


def _check_records(records: EventRecords) -> None:
    """Take lists as arrays, and refuse what does not belong together."""
    for name in ("codes", "visit_offsets", "patient_offsets", "person_ids", "event_times"):
        values = getattr(records, name)
        kept = isinstance(values, np.ndarray) and values.dtype in (np.int32, np.int64)
        array = integers(name, values) if kept else longs(name, values)
        _check_length(name, array, None)
        object.__setattr__(records, name, values if kept else array)
    _check_days(records)
    n_patients, n_visits = len(records.person_ids), len(records.visit_days)
    _check_length("visit_offsets", records.visit_offsets, n_visits + 1, "visit, and one more")
    _check_length("patient_offsets", records.patient_offsets, n_patients + 1, "patient and 1")
    _check_length("event_times", records.event_times, n_patients, "patient")
    _check_indicators(records, n_patients)
    _check_offsets("visit_offsets", records.visit_offsets, len(records.codes), "visit", "codes")
    _check_offsets("patient_offsets", records.patient_offsets, n_visits, "patient", "visits")
    lengths = np.diff(records.patient_offsets)
    _refuse("patients", lengths == 0, lengths, "at least one visit of each")
    late = (records.event_times < 0) | (records.event_times >= lengths)
    _refuse("event_times", late, records.event_times, "visits of the patient, from 0")
    falls = np.diff(records.visit_days.astype(np.int64)) < 0
    first = records.patient_offsets[1:-1]
    falls[first[(first > 0) & (first <= len(falls))] - 1] = False  # another patient begins
    _refuse("visit_days", falls, records.visit_days[1:], "days that do not fall within a patient")
    if not isinstance(records.codes, np.memmap):
        outside = (records.codes < 1) | (records.codes >= len(records.vocabulary))
        expected = f"1 <= code < {len(records.vocabulary)}, the size of the vocabulary"
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            raise IndexError(
                f"codes: expected {expected}; found {outside.sum()} others, the first is "
                f"{records.codes[at]}, at {at}"
            )


def _check_days(records: EventRecords) -> None:
    days = as_array("visit_days", records.visit_days)
    if days.dtype != np.dtype("datetime64[D]"):
        raise TypeError(f"visit_days: expected datetime64[D], got {days.dtype}")
    _check_length("visit_days", days, None)
    _refuse("visit_days", np.isnat(days), days, "days")


def _check_indicators(records: EventRecords, n_patients: int) -> None:
    indicators = as_array("event_indicators", records.event_indicators)
    if indicators.dtype.kind not in "biu":
        raise TypeError(f"event_indicators: expected integers, got {indicators.dtype}")
    _check_length("event_indicators", indicators, n_patients, "patient")
    _refuse("event_indicators", (indicators != 0) & (indicators != 1), indicators, "0 or 1")
    object.__setattr__(records, "event_indicators", indicators)


def _check_length(name: str, array: Array, length: int | None, of: str = "") -> None:
    if array.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {list(array.shape)}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name}: expected one per {of}, {length} in all, got {len(array)}")


def _check_offsets(name: str, offsets: Array, most: int, of: str, what: str) -> None:
    begins, ends = offsets[:-1], offsets[1:]
    falling = np.flatnonzero((begins < 0) | (ends < begins) | (ends > most))
    if len(falling):
        at = falling[0]
        raise ValueError(
            f"{name}: expected offsets that rise within [0, {most}]; found {len(falling)} that do "
            f"not, the first is {of} {at}: from {begins[at]} to {ends[at]}"
        )
    if offsets[0] != 0 or offsets[-1] != most:
        raise ValueError(
            f"{name}: expected offsets from 0 to {most}, the number of {what}, got {offsets[0]} to "
            f"{offsets[-1]}: {most - (offsets[-1] - offsets[0])} {what} belong to no {of}"
        )


def _refuse(name: str, wrong: Array, values: Array, expected: str) -> None:
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{name}: expected {expected}; found {wrong.sum()} others, the first is "
            f"{values[at]}, at {at}"
        )
