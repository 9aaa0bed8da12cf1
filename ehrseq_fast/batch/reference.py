"""The NumPy twin of the compiled module ``_batching``: the same functions, the same arrays bit for
bit, the same errors word for word (``csrc/batching``). It serves where nothing is compiled, and is
what the compiled builder is tested against.

Each function returns ``(sizes, host, fields, source_rows)``; ``csrc/batching/pack.h`` and
``layout.py`` say what lies where in ``host`` and ``fields``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

Longs = npt.NDArray[np.int64]
Sizes = tuple[int, int, int, int, int]
Packed = tuple[Sizes, Longs, Longs, "Longs | None"]

MOST = 2**31 - 2  # codes, and visits, that int32 offsets can count
FRACTIONAL = 2  # of a mask's states: 0 padding, 1 real, 2 neither


def pack_flat(
    codes: npt.NDArray[Any],
    visit_offsets: npt.NDArray[Any],
    patient_offsets: npt.NDArray[Any],
    patients: Longs | None,
    vocab_size: int,
    event_times: Longs | None,
    event_indicators: Longs | None,
    event_types: Longs | None,
    with_source_rows: bool,
) -> Packed:
    """Pack the chosen patients of flat records, reading no other patient's rows."""
    names = _Names(patients)
    first_visit, lengths = _find_visits(patient_offsets, patients, len(visit_offsets) - 1, names)
    _check_visit_offsets(visit_offsets, first_visit, lengths, len(codes), names)
    order = _PatientOrder(lengths)
    rows = first_visit[order.patient_of_row] + order.time_of_row
    begins = np.take(visit_offsets, rows).astype(np.int64)
    counts = np.take(visit_offsets, rows + 1) - begins
    _check_sizes(int(counts.sum()), len(rows))
    positions = np.repeat(begins - _starts(counts), counts) + np.arange(counts.sum())
    return _pack(
        order,
        counts,
        np.take(codes, positions),
        vocab_size,
        (event_times, event_indicators, event_types),
        names,
        rows if with_source_rows else None,
    )


def pack_lists(
    patients: Sequence[Sequence[Sequence[int]]],
    vocab_size: int,
    event_times: Longs | None,
    event_indicators: Longs | None,
    event_types: Longs | None,
    with_source_rows: bool,
) -> Packed:
    """Pack nested Python sequences: patients -> visits -> code ids."""
    codes: list[int] = []
    visit_offsets = [0]
    patient_offsets = [0]
    for p, patient in enumerate(patients):
        for v, visit in enumerate(_listed(patient, "a sequence of visits", "patient {}", p)):
            listed = _listed(visit, "a sequence of codes", "patient {}, visit {}", p, v)
            try:
                codes.extend(map(operator.index, listed))
            except TypeError:
                c = len(codes) - visit_offsets[-1]
                raise TypeError(
                    f"patient {p}, visit {v}, code {c}: expected an integer code, "
                    f"got {type(listed[c]).__name__}."
                ) from None
            visit_offsets.append(len(codes))
        patient_offsets.append(len(visit_offsets) - 1)
    return pack_flat(
        _as_longs(codes),
        np.array(visit_offsets),
        np.array(patient_offsets),
        None,
        vocab_size,
        event_times,
        event_indicators,
        event_types,
        with_source_rows,
    )


def pack_padded(
    codes: npt.NDArray[Any],
    code_states: npt.NDArray[np.uint8] | None,
    visit_states: npt.NDArray[np.uint8] | None,
    lengths: Longs | None,
    vocab_size: int,
    event_times: Longs | None,
    event_indicators: Longs | None,
    event_types: Longs | None,
) -> Packed:
    """Pack the real slots of padded codes ``[B, V, C]``."""
    n_patients, n_visits, n_slots = codes.shape
    names = _Names(None)
    real_lengths = _padded_lengths(n_patients, n_visits, visit_states, lengths, names)
    _refuse_empty(real_lengths, names)
    order = _PatientOrder(real_lengths)
    rows = order.patient_of_row * n_visits + order.time_of_row
    states = np.ones((len(rows), n_slots), np.uint8)
    if code_states is not None:
        states = code_states.reshape(n_patients * n_visits, n_slots)[rows]
        _refuse_fractional(states, order, names)
    real = states == 1
    counts = real.sum(1)
    _check_sizes(int(counts.sum()), len(rows))
    slots = np.broadcast_to(np.arange(n_slots), real.shape)[real]
    return _pack(
        order,
        counts,
        codes.reshape(n_patients * n_visits, n_slots)[rows][real],
        vocab_size,
        (event_times, event_indicators, event_types),
        names,
        None,
        slots,
    )


class _Names:
    """How an error message calls a patient."""

    def __init__(self, records: Longs | None) -> None:
        self.records = records

    def __getitem__(self, patient: int) -> str:
        if self.records is None:
            return f"patient {patient}"
        return f"patient {patient} (record {self.records[patient]})"


class _PatientOrder:
    """Patients by falling length (stable), and whose visit each packed row is."""

    def __init__(self, lengths: Longs) -> None:
        n_patients = len(lengths)
        max_visits = int(lengths.max(initial=0))
        self.lengths = lengths
        self.sorted = np.argsort(-lengths, kind="stable")
        self.unsorted = np.empty_like(self.sorted)
        self.unsorted[self.sorted] = np.arange(n_patients)
        at_least = np.bincount(lengths, minlength=max_visits + 1)[::-1].cumsum()[::-1]
        self.batch_sizes = at_least[1:]
        self.row_starts = _offsets(self.batch_sizes)
        self.time_of_row = np.repeat(np.arange(max_visits), self.batch_sizes)
        ranks = np.arange(len(self.time_of_row)) - self.row_starts[self.time_of_row]
        self.patient_of_row = self.sorted[ranks]

    @property
    def last_rows(self) -> Longs:
        return self.row_starts[self.lengths - 1] + self.unsorted


def _pack(
    order: _PatientOrder,
    counts: Longs,
    codes: npt.NDArray[Any],
    vocab_size: int,
    outcomes: tuple[Longs | None, Longs | None, Longs | None],
    names: _Names,
    source_rows: Longs | None,
    slots: Longs | None = None,
) -> Packed:
    _check_outcomes(order.lengths, outcomes, names)
    row_of_code = np.repeat(np.arange(len(counts)), counts)
    if slots is None:
        slots = np.arange(len(codes)) - np.repeat(_starts(counts), counts)
    _check_codes(codes, vocab_size, order, row_of_code, slots, names)
    by_code = np.argsort(codes, kind="stable")
    index_codes, first = np.unique(codes[by_code], return_index=True)
    ints = np.concatenate(
        [
            _offsets(counts),
            codes,
            row_of_code[by_code],
            index_codes,
            np.append(first, len(codes)),
        ]
    ).astype(np.int32)
    if len(ints) % 2:
        ints = np.append(ints, np.int32(0))
    patients = [order.sorted, order.unsorted, order.last_rows, order.row_starts]
    given = [outcome for outcome in outcomes if outcome is not None]
    sizes = (
        len(order.lengths),
        len(order.batch_sizes),
        len(counts),
        len(codes),
        len(index_codes),
    )
    host = np.concatenate([order.batch_sizes, order.lengths])
    return sizes, host, np.concatenate([*patients, *given, ints.view(np.int64)]), source_rows


def _starts(counts: Longs) -> Longs:
    return np.cumsum(counts, dtype=np.int64) - counts


def _offsets(counts: Longs) -> Longs:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _as_longs(codes: list[int]) -> Longs:
    try:
        return np.array(codes, np.int64)
    except OverflowError:  # what does not fit 64 bits is outside every vocabulary
        return np.array([code if abs(code) < 2**63 else -1 for code in codes], np.int64)


def _listed(items: Any, expected: str, where: str, *place: int) -> Sequence[Any]:
    if isinstance(items, (list, tuple)):
        return items
    try:
        return list(items)
    except TypeError:
        raise TypeError(
            f"{where.format(*place)}: expected {expected}, got {type(items).__name__}."
        ) from None


def _find_visits(
    patient_offsets: npt.NDArray[Any], patients: Longs | None, n_visits: int, names: _Names
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
    _refuse_empty(ends - begins, names)
    return begins, ends - begins


def _refuse_empty(lengths: Longs, names: _Names) -> None:
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise ValueError(
            f"Found {len(empty)} sequences with zero length. All sequences must have at least "
            f"1 visit. The first is {names[empty[0]]}."
        )


def _check_visit_offsets(
    visit_offsets: npt.NDArray[Any],
    first_visit: Longs,
    lengths: Longs,
    n_codes: int,
    names: _Names,
) -> None:
    time = np.arange(lengths.sum()) - np.repeat(_starts(lengths), lengths)
    rows = np.repeat(first_visit, lengths) + time
    begins, ends = np.take(visit_offsets, rows), np.take(visit_offsets, rows + 1)
    falling = np.flatnonzero((begins < 0) | (ends < begins) | (ends > n_codes))
    if len(falling):
        at = falling[0]
        patient = np.repeat(np.arange(len(lengths)), lengths)[at]
        raise ValueError(
            f"visit_offsets must rise within [0, {n_codes}]. Found {len(falling)} visits where "
            f"they do not. The first is {names[patient]}, visit {time[at]}: from {begins[at]} to "
            f"{ends[at]}."
        )


def _padded_lengths(
    n_patients: int,
    n_visits: int,
    visit_states: npt.NDArray[np.uint8] | None,
    lengths: Longs | None,
    names: _Names,
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
    fractional = np.argwhere(visit_states == FRACTIONAL)
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


def _refuse_fractional(states: npt.NDArray[np.uint8], order: _PatientOrder, names: _Names) -> None:
    rows, slots = np.nonzero(states == FRACTIONAL)
    if len(rows):
        patient, visit, slot = _first(order.patient_of_row[rows], order.time_of_row[rows], slots)[
            :3
        ]
        raise ValueError(
            f"visit_mask must be 0 or 1 to be packed. Found {len(rows)} other values. The first is "
            f"at {names[patient]}, visit {visit}, code {slot}. Weighted masks need the padded "
            "tensors."
        )


def _check_sizes(n_codes: int, n_visits: int) -> None:
    if n_codes > MOST or n_visits > MOST:
        raise ValueError(
            f"A batch holds at most {MOST} codes and as many visits; this one has {n_codes} codes "
            f"and {n_visits} visits."
        )


def _check_codes(
    codes: npt.NDArray[Any],
    vocab_size: int,
    order: _PatientOrder,
    row_of_code: Longs,
    slots: Longs,
    names: _Names,
) -> None:
    outside = np.flatnonzero((codes < 0) | (codes >= vocab_size))
    if len(outside):
        rows = row_of_code[outside]
        patient, visit, slot, code = _first(
            order.patient_of_row[rows], order.time_of_row[rows], slots[outside], codes[outside]
        )
        raise IndexError(
            f"Found {len(outside)} codes outside the vocabulary: expected 0 <= code < "
            f"{vocab_size}. The first is {code}: {names[patient]}, visit {visit}, code {slot}."
        )


def _first(*columns: npt.NDArray[Any]) -> tuple[int, ...]:
    """The first place in the caller's order: by patient, then visit, then code."""
    at = np.lexsort((columns[2], columns[1], columns[0]))[0]
    return tuple(int(column[at]) for column in columns)


def _check_outcomes(
    lengths: Longs, outcomes: tuple[Longs | None, Longs | None, Longs | None], names: _Names
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
