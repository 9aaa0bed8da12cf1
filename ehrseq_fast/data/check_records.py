"""What flat records must be, whoever makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Array, as_array, integers, longs

if TYPE_CHECKING:
    from .records import EventRecords


def check_records(records: EventRecords) -> None:
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
    _check_offsets("visit_offsets", records.visit_offsets, len(records.codes), "visit")
    _check_offsets("patient_offsets", records.patient_offsets, n_visits, "patient")
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


def _check_offsets(name: str, offsets: Array, most: int, of: str) -> None:
    begins, ends = offsets[:-1], offsets[1:]
    falling = np.flatnonzero((begins < 0) | (ends < begins) | (ends > most))
    if len(falling):
        at = falling[0]
        raise ValueError(
            f"{name}: expected offsets that rise within [0, {most}]; found {len(falling)} that do "
            f"not, the first is {of} {at}: from {begins[at]} to {ends[at]}"
        )


def _refuse(name: str, wrong: Array, values: Array, expected: str) -> None:
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{name}: expected {expected}; found {wrong.sum()} others, the first is "
            f"{values[at]}, at {at}"
        )
