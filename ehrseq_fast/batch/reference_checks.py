"""Input validation of the NumPy builder, in the words of ``csrc/batching``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..checks import codes_outside, zero_lengths
from .patient_order import Longs, PatientOrder

MOST = 2**31 - 2  # codes, and visits, that int32 offsets can count
FRACTIONAL = 2  # of a mask's states: 0 padding, 1 real, from 2 on neither


def expect_codes(codes: npt.NDArray[Any]) -> None:
    _expect_dimensions("codes", codes, 1)
    if codes.dtype.kind not in "iu" or not codes.dtype.isnative:
        raise TypeError(f"codes: expected integers, got {codes.dtype}")


def _expect_dimensions(name: str, array: npt.NDArray[Any], ndim: int) -> None:
    if array.ndim != ndim:
        dimensions = "1 dimension" if ndim == 1 else f"{ndim} dimensions"
        raise ValueError(f"{name}: expected {dimensions}, got shape {list(array.shape)}")


def expect_integers(name: str, array: npt.NDArray[Any], ndim: int) -> None:
    _expect_dimensions(name, array, ndim)
    if array.dtype not in (np.int32, np.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {array.dtype}")


def expect_offsets(name: str, array: npt.NDArray[Any]) -> None:
    expect_integers(name, array, 1)
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one offset (a 0), got an empty array")


def expect_shape(name: str, array: npt.NDArray[Any] | None, shape: tuple[int, ...]) -> None:
    if array is not None and array.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")


def expect_outcomes(
    times: Longs | None, indicators: Longs | None, types: Longs | None, n_patients: int
) -> tuple[Longs | None, Longs | None, Longs | None]:
    expect_shape("event_times", times, (n_patients,))
    expect_shape("event_indicators", indicators, (n_patients,))
    expect_shape("event_types", types, (n_patients,))
    return times, indicators, types


def check_vocabulary(size: int) -> None:
    if not 1 <= size <= MOST + 1:
        raise ValueError(f"vocab_size: expected 1 to {MOST + 1}, got {size}")


class Names:
    """How an error message calls a patient."""

    def __init__(self, records: Longs | None) -> None:
        self.records = records

    def __getitem__(self, patient: int) -> str:
        if self.records is None:
            return f"patient {patient}"
        return f"patient {patient} (record {self.records[patient]})"


def find_visits(
    patient_offsets: npt.NDArray[Any], patients: Longs | None, n_visits: int, names: Names
) -> tuple[Longs, Longs]:
    n_records = len(patient_offsets) - 1
    records = np.arange(n_records) if patients is None else patients
    outside = np.flatnonzero((records < 0) | (records >= n_records))
    if len(outside):
        raise IndexError(
            f"Found {len(outside)} patient numbers outside the {n_records} records. "
            f"The first is {records[outside[0]]}, at position {outside[0]}."
        )
    begins = np.take(patient_offsets, records).astype(np.int64)
    ends = np.take(patient_offsets, records + 1).astype(np.int64)
    falling = np.flatnonzero((begins < 0) | (ends < begins) | (ends > n_visits))
    if len(falling):
        at = falling[0]
        raise ValueError(
            f"patient_offsets must rise within [0, {n_visits}]. Found {len(falling)} patients "
            f"where they do not. The first is {names[at]}: from {begins[at]} to {ends[at]}."
        )
    refuse_empty(ends - begins, names)
    return begins, ends - begins


def first_visits(wanted: Longs, lengths: Longs, names: Names) -> Longs:
    outside = np.flatnonzero((wanted < 1) | (wanted > lengths))
    if len(outside):
        at = outside[0]
        raise ValueError(
            f"n_visits: expected 1 to the patient's number of visits. Found {len(outside)} others. "
            f"The first is {wanted[at]}: {names[at]}, with {lengths[at]} visits."
        )
    return wanted


def refuse_empty(lengths: Longs, names: Names) -> None:
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise zero_lengths(len(empty), names[empty[0]])


def check_visit_offsets(
    begins: Longs, ends: Longs, order: PatientOrder, n_codes: int, names: Names
) -> None:
    falling = np.flatnonzero((begins < 0) | (ends < begins) | (ends > n_codes))
    if len(falling):
        patients, times = order.patient_of_row[falling], order.time_of_row[falling]
        at = np.lexsort((times, patients))[0]
        row = falling[at]
        raise ValueError(
            f"visit_offsets must rise within [0, {n_codes}]. Found {len(falling)} visits where "
            f"they do not. The first is {names[patients[at]]}, visit {times[at]}: from "
            f"{begins[row]} to {ends[row]}."
        )


def padded_lengths(
    n_patients: int,
    n_visits: int,
    visit_states: npt.NDArray[np.uint8] | None,
    lengths: Longs | None,
    names: Names,
) -> Longs:
    masked = np.full(n_patients, n_visits) if visit_states is None else _mask_lengths(visit_states)
    if lengths is None:
        return masked
    outside = np.flatnonzero((lengths < 0) | (lengths > n_visits))
    if len(outside):
        at = outside[0]
        raise ValueError(
            f"Found {len(outside)} lengths outside [1, {n_visits}], the padded visits. "
            f"The first is {lengths[at]}: {names[at]}."
        )
    different = np.flatnonzero(lengths != masked)
    if len(different) and visit_states is not None:
        at = different[0]
        raise ValueError(
            f"Found {len(different)} lengths that disagree with sequence_mask. The first is "
            f"{names[at]}: length {lengths[at]}, but {masked[at]} visits in the mask."
        )
    return lengths


def _mask_lengths(visit_states: npt.NDArray[np.uint8]) -> Longs:
    fractional = np.argwhere(visit_states >= FRACTIONAL)
    if len(fractional):
        patient, visit = fractional[0]
        raise ValueError(
            f"sequence_mask must be 0 or 1. Found {len(fractional)} other values. "
            f"The first is at patient {patient}, visit {visit}."
        )
    ends = np.pad(visit_states, ((0, 0), (0, 1))) == 0
    lengths = ends.argmax(1)
    holes = np.flatnonzero(lengths != visit_states.sum(1))
    if len(holes):
        raise ValueError(
            f"Found {len(holes)} sequence masks with holes: a patient's real visits must come "
            f"first. The first is patient {holes[0]}, visit {lengths[holes[0]]}."
        )
    return lengths


def refuse_fractional(states: npt.NDArray[np.uint8], order: PatientOrder, names: Names) -> None:
    rows, slots = np.nonzero(states >= FRACTIONAL)
    if len(rows):
        patient, visit, slot = _first(order.patient_of_row[rows], order.time_of_row[rows], slots)[
            :3
        ]
        raise ValueError(
            f"visit_mask must be 0 or 1 to be packed. Found {len(rows)} other values. The first is "
            f"at {names[patient]}, visit {visit}, code {slot}. Weights go in as code_weights."
        )


def check_visit_count(n_visits: int) -> None:
    if n_visits > MOST:
        raise ValueError(
            f"A batch holds at most {MOST} codes and as many visits; this one has more visits."
        )


def check_sizes(counts: Longs, n_visits: int) -> None:
    check_visit_count(n_visits)
    n_codes = int(counts.sum())
    if counts.sum(dtype=np.float64) > 2.0**62:  # the sum of int64 wraps
        n_codes = min(sum(counts.tolist()), 2**63 - 1)
    if n_codes > MOST:
        raise ValueError(
            f"A batch holds at most {MOST} codes and as many visits; this one has {n_codes} codes "
            f"and {n_visits} visits."
        )


def check_codes(
    codes: npt.NDArray[Any],
    vocab_size: int,
    order: PatientOrder,
    row_of_code: Longs,
    slots: Longs,
    names: Names,
    huge: dict[int, str],
) -> None:
    outside = np.flatnonzero((codes < 0) | (codes >= vocab_size))
    if len(outside):
        rows = row_of_code[outside]
        patient, visit, slot, at = _first(
            order.patient_of_row[rows], order.time_of_row[rows], slots[outside], outside
        )
        where = f"{names[patient]}, visit {visit}, code {slot}"
        raise codes_outside(len(outside), vocab_size, huge.get(at, codes[at]), where)


def check_mapped(
    codes: Longs,
    code_map: npt.NDArray[np.int32],
    vocab_size: int,
    order: PatientOrder,
    row_of_code: Longs,
    slots: Longs,
    names: Names,
) -> None:
    def refuse(what: str, wrong: npt.NDArray[np.bool_]) -> None:
        outside = np.flatnonzero(wrong)
        if not len(outside):
            return
        rows = row_of_code[outside]
        patient, visit, slot, at = _first(
            order.patient_of_row[rows], order.time_of_row[rows], slots[outside], outside
        )
        raise IndexError(
            f"Found {len(outside)} codes {what}. The first is {codes[at]}: {names[patient]}, "
            f"visit {visit}, code {slot}."
        )

    n_codes = len(code_map)
    refuse(
        f"outside the dictionary: expected 0 <= code < {n_codes}", (codes < 0) | (codes >= n_codes)
    )
    mapped = code_map[codes]
    refuse(
        f"that code_map takes outside the vocabulary: expected 0 <= code_map[code] < {vocab_size}",
        (mapped < 0) | (mapped >= vocab_size),
    )


def _first(*columns: npt.NDArray[Any]) -> tuple[int, ...]:
    """The first place in the caller's order: by patient, then visit, then code."""
    at = np.lexsort((columns[2], columns[1], columns[0]))[0]
    return tuple(int(column[at]) for column in columns)


def check_outcomes(
    lengths: Longs, outcomes: tuple[Longs | None, Longs | None, Longs | None], names: Names
) -> None:
    times, indicators, types = outcomes

    def refuse(message: str, values: Longs, bad: Any, more: Callable[[int], str]) -> NoReturn:
        at = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"Found {bad.sum()} {message} The first is {values[at]}: {names[at]}{more(at)}."
        )

    if times is not None and (late := (times < 0) | (times >= lengths)).any():
        refuse(
            "event times outside their patient's visits: expected 0 <= event_time < length.",
            times,
            late,
            lambda at: f", with {lengths[at]} visits",
        )
    if indicators is not None and (unclear := (indicators != 0) & (indicators != 1)).any():
        refuse(
            "event indicators that are neither 0 (censored) nor 1 (event seen).",
            indicators,
            unclear,
            lambda at: "",
        )
    if types is not None and (negative := types < 0).any():
        refuse(
            "negative event types: expected 0 (censored), 1, 2, ...",
            types,
            negative,
            lambda at: "",
        )
