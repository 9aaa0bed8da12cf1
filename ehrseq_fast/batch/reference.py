"""The NumPy counterpart of the compiled module ``_batching``: the same functions, the same arrays
bit for bit, the same errors word for word (``csrc/batching``). It serves where nothing is compiled,
and is what the compiled builder is tested against.

Each function returns ``(sizes, host, fields, source_rows)``; ``csrc/batching/pack.h`` and
``layout.py`` give the layout of ``host`` and ``fields``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import clamped_longs
from .patient_order import Longs, PatientOrder, offsets_of
from .reference_checks import (
    Names,
    check_codes,
    check_mapped,
    check_outcomes,
    check_sizes,
    check_visit_count,
    check_visit_offsets,
    check_vocabulary,
    expect_codes,
    expect_integers,
    expect_offsets,
    expect_outcomes,
    expect_shape,
    find_visits,
    first_visits,
    padded_lengths,
    refuse_empty,
    refuse_fractional,
)

Outcomes = tuple["Longs | None", "Longs | None", "Longs | None"]
Sizes = tuple[int, int, int, int, int]
Packed = tuple[Sizes, Longs, Longs, "Longs | None"]


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
    expect_codes(codes)
    expect_offsets("visit_offsets", visit_offsets)
    expect_offsets("patient_offsets", patient_offsets)
    if patients is not None:
        expect_shape("patients", patients, (patients.size,))
        patients = patients.copy()  # as everything that is indexed by: other threads may write
    check_vocabulary(vocab_size)
    n_patients = len(patient_offsets) - 1 if patients is None else len(patients)
    outcomes = expect_outcomes(event_times, event_indicators, event_types, n_patients)
    return _pack_flat(
        codes,
        visit_offsets,
        patient_offsets,
        patients,
        vocab_size,
        outcomes,
        with_source_rows,
        {},
    )


def _pack_flat(
    codes: npt.NDArray[Any],
    visit_offsets: npt.NDArray[Any],
    patient_offsets: npt.NDArray[Any],
    patients: Longs | None,
    vocab_size: int,
    outcomes: Outcomes,
    with_source_rows: bool,
    huge: dict[int, str],
) -> Packed:
    names = Names(patients)
    order, rows, counts, positions = _visits_of(
        len(codes), visit_offsets, patient_offsets, patients, None, outcomes, names
    )
    return _pack(
        order,
        counts,
        clamped_longs(np.take(codes, positions)),
        vocab_size,
        outcomes,
        names,
        rows if with_source_rows else None,
        huge={place: huge[at] for place, at in enumerate(positions.tolist()) if at in huge}
        if huge
        else {},
    )


def _visits_of(
    n_codes: int,
    visit_offsets: npt.NDArray[Any],
    patient_offsets: npt.NDArray[Any],
    patients: Longs | None,
    n_visits: Longs | None,
    outcomes: Outcomes,
    names: Names,
) -> tuple[PatientOrder, Longs, Longs, Longs]:
    """The order of the patients, the source row of each packed one, how many codes it has, and
    where each of them is."""
    first_visit, lengths = find_visits(patient_offsets, patients, len(visit_offsets) - 1, names)
    if n_visits is not None:
        lengths = first_visits(n_visits, lengths, names)
    check_visit_count(int(lengths.sum(dtype=np.float64)))
    order = PatientOrder(lengths)
    rows = first_visit[order.patient_of_row] + order.time_of_row
    begins = np.take(visit_offsets, rows).astype(np.int64)
    ends = np.take(visit_offsets, rows + 1).astype(np.int64)
    check_visit_offsets(begins, ends, order, n_codes, names)
    check_outcomes(lengths, outcomes, names)
    counts = ends - begins
    check_sizes(counts, len(rows))
    positions = np.repeat(begins - _starts(counts), counts) + np.arange(counts.sum())
    return order, rows, counts, positions


def pack_mapped(
    codes: npt.NDArray[Any],
    visit_offsets: npt.NDArray[Any],
    patient_offsets: npt.NDArray[Any],
    patients: Longs,
    n_visits: Longs,
    code_map: npt.NDArray[np.int32],
    vocab_size: int,
    event_times: Longs | None,
    event_indicators: Longs | None,
    event_types: Longs | None,
    with_source_rows: bool,
) -> Packed:
    """Pack the first ``n_visits`` visits of the chosen patients of flat records, with
    ``code_map[code]`` in place of each code; a visit's codes come out ascending and distinct."""
    expect_integers("codes", codes, 1)
    expect_offsets("visit_offsets", visit_offsets)
    expect_offsets("patient_offsets", patient_offsets)
    expect_shape("patients", patients, (patients.size,))
    expect_shape("n_visits", n_visits, (patients.size,))
    expect_shape("code_map", code_map, (code_map.size,))
    check_vocabulary(vocab_size)
    patients, n_visits, code_map = patients.copy(), n_visits.copy(), code_map.copy()
    outcomes = expect_outcomes(event_times, event_indicators, event_types, len(patients))
    names = Names(patients)
    order, rows, counts, positions = _visits_of(
        len(codes), visit_offsets, patient_offsets, patients, n_visits, outcomes, names
    )
    taken = np.take(codes, positions).astype(np.int64)
    row_of_code = np.repeat(np.arange(len(counts)), counts)
    slots = np.arange(len(taken)) - np.repeat(_starts(counts), counts)
    check_mapped(taken, code_map, vocab_size, order, row_of_code, slots, names)
    kept = np.unique(row_of_code * vocab_size + code_map[taken])  # below 2**62
    counts = np.bincount(kept // vocab_size, minlength=len(counts))
    return _pack(
        order,
        counts,
        kept % vocab_size,
        vocab_size,
        outcomes,
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
    check_vocabulary(vocab_size)
    codes: list[int] = []
    visit_offsets = [0]
    patient_offsets = [0]
    listed_patients = _listed(patients, "a sequence of patients", "patients")
    for p, patient in enumerate(listed_patients):
        for v, visit in enumerate(_listed(patient, "a sequence of visits", f"patient {p}")):
            where = f"patient {p}, visit {v}"
            listed = _listed(visit, "a sequence of codes", where)
            if set(map(type, listed)) <= {int}:
                codes.extend(listed)
            else:
                codes.extend(_code(item, f"{where}, code {c}") for c, item in enumerate(listed))
            visit_offsets.append(len(codes))
        patient_offsets.append(len(visit_offsets) - 1)
    longs, huge = _as_longs(codes)
    outcomes = expect_outcomes(event_times, event_indicators, event_types, len(listed_patients))
    return _pack_flat(
        longs,
        np.array(visit_offsets),
        np.array(patient_offsets),
        None,
        vocab_size,
        outcomes,
        with_source_rows,
        huge,
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
    expect_integers("codes", codes, 3)
    if not codes.flags.c_contiguous or not codes.flags.aligned:
        raise ValueError("codes: expected a contiguous array")
    n_patients, n_visits, n_slots = codes.shape
    expect_shape("code_states", code_states, codes.shape)
    expect_shape("visit_states", visit_states, codes.shape[:2])
    expect_shape("lengths", lengths, codes.shape[:1])
    check_vocabulary(vocab_size)
    outcomes = expect_outcomes(event_times, event_indicators, event_types, n_patients)
    names = Names(None)
    real_lengths = padded_lengths(n_patients, n_visits, visit_states, lengths, names)
    refuse_empty(real_lengths, names)
    order = PatientOrder(real_lengths)
    rows = order.patient_of_row * n_visits + order.time_of_row
    states = np.ones((len(rows), n_slots), np.uint8)
    if code_states is not None:
        states = code_states.reshape(n_patients * n_visits, n_slots)[rows]
        refuse_fractional(states, order, names)
    check_outcomes(real_lengths, outcomes, names)
    real = states == 1
    counts = real.sum(1)
    check_sizes(counts, len(rows))
    slots = np.broadcast_to(np.arange(n_slots), real.shape)[real]
    return _pack(
        order,
        counts,
        codes.reshape(n_patients * n_visits, n_slots)[rows][real],
        vocab_size,
        outcomes,
        names,
        None,
        slots,
    )


def _pack(
    order: PatientOrder,
    counts: Longs,
    codes: npt.NDArray[Any],
    vocab_size: int,
    outcomes: Outcomes,
    names: Names,
    source_rows: Longs | None,
    slots: Longs | None = None,
    huge: dict[int, str] | None = None,
) -> Packed:
    row_of_code = np.repeat(np.arange(len(counts)), counts)
    if slots is None:
        slots = np.arange(len(codes)) - np.repeat(_starts(counts), counts)
    check_codes(codes, vocab_size, order, row_of_code, slots, names, huge or {})
    by_code = np.argsort(codes, kind="stable")
    index_codes, first = np.unique(codes[by_code], return_index=True)
    ints = np.concatenate(
        [
            offsets_of(counts),
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


def _as_longs(codes: list[int]) -> tuple[Longs, dict[int, str]]:
    """What does not fit 64 bits is outside every vocabulary: it becomes a code that is refused as
    such, and where each of them was, with how a message writes it."""
    try:
        return np.array(codes, np.int64), {}
    except OverflowError:
        huge = {at: _text(code) for at, code in enumerate(codes) if not _fits(code)}
        return np.array([code if _fits(code) else -1 for code in codes], np.int64), huge


def _fits(code: int) -> bool:
    return -(2**63) <= code < 2**63


def _text(code: int) -> str:
    bits = code.bit_length()
    return f"an integer of {bits} bits" if bits > 256 else str(code)


def _listed(items: Any, expected: str, where: str) -> tuple[Any, ...]:
    """A copy: what the caller's Python does to the list while its items are read changes nothing.
    Text and mappings can be iterated over, but hold no codes in an order."""
    cause: Exception | None = None
    if not isinstance(items, (str, bytes, bytearray, dict)):
        try:
            return tuple(items)
        except TypeError as error:
            cause = error
    raise TypeError(f"{where}: expected {expected}, got {type(items).__name__}.") from cause


def _code(item: Any, where: str) -> int:
    """A code as an int. A boolean scalar, or a tensor of one element in several dimensions, would
    be an index too."""
    value, cause = item, None
    is_scalar = True
    if hasattr(item, "ndim"):
        is_scalar = item.ndim == 0
        value = item.item() if is_scalar else item
    if is_scalar and not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError as error:
            cause = error
    raise TypeError(f"{where}: expected an integer code, got {type(item).__name__}.") from cause
