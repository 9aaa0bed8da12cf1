"""Rows of a table, (person, time, code), as flat records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, kind_of, labels_of, refuse_inexact
from .frames import read_columns


class FlatRecords(NamedTuple):
    """Persons' visits and codes end to end, as :meth:`PackedVisits.from_flat` takes them."""

    codes: Array
    visit_offsets: Array
    patient_offsets: Array
    chosen: Array | None
    values: Array | None
    persons: list[Any]  # of the batch, in its order


def records_of(
    frame: Any,
    columns: tuple[str, str, str],
    value: str | None,
    persons: Iterable[Any] | None,
    vocabulary: Mapping[Any, int] | None,
    unknown: int | None,
    has_outcomes: bool,
) -> FlatRecords:
    """Persons in the order of their first row, visits by time, codes by row."""
    person, time, code = columns
    read = read_columns(frame, columns if value is None else (*columns, value))
    codes = _codes(code, read[code], vocabulary, unknown)
    ids, number = _numbered(person, read[person])
    times = read[time]
    if times.dtype.kind not in "iuf":
        raise TypeError(
            f"column {time!r}: expected times or numbers, got text (pandas.to_datetime reads times)"
        )
    order = np.lexsort((times, number))  # stable: rows of one visit keep their order
    number, times, codes = number[order], times[order], codes[order]
    values = None if value is None else _values(value, read[value])[order]
    new_person = np.ones(len(number), np.bool_)
    new_person[1:] = number[1:] != number[:-1]
    new_visit = new_person.copy()
    new_visit[1:] |= times[1:] != times[:-1]
    starts = np.flatnonzero(new_visit)
    visit_offsets = np.append(starts, len(number))
    patient_offsets = np.append(np.flatnonzero(new_person[starts]), len(starts))
    if has_outcomes and persons is None:
        _refuse_two_orders(ids, person)
    chosen = _chosen(persons, ids, person)
    of_batch = ids if chosen is None else [ids[at] for at in chosen.tolist()]
    return FlatRecords(codes, visit_offsets, patient_offsets, chosen, values, of_batch)


def refuse_another_order(name: str, values: Any, persons: list[Any]) -> None:
    """Raise where what is given for each person is labelled by the persons (a pandas ``Series`` as
    ``groupby`` gives it) in another order than that of the batch: values are taken by position."""
    labels = labels_of(values)
    if labels is None or labels == persons or len(labels) != len(persons):
        return
    if set(labels) == set(persons):
        at = next(i for i, label in enumerate(labels) if label != persons[i])
        raise ValueError(
            f"{name}: expected values in the order of the batch's persons, got an index in another "
            f"order ({labels[at]!r} at {at}, where {persons[at]!r} is): {name}.loc[persons] has "
            "that order, and .to_numpy() none"
        )


def _values(name: str, column: Array) -> Array:
    """float32 or float64 as they are; integers in float64, which must hold them."""
    if column.dtype.kind not in "iuf":
        raise TypeError(f"column {name!r}: expected numbers, got text")
    refuse_inexact(f"column {name!r}", column, np.float64)
    return column if column.dtype in (np.float32, np.float64) else column.astype(np.float64)


def _numbered(name: str, column: Array) -> tuple[list[Any], Array]:
    """The distinct ids in the order of their first rows, and the number of each row's."""
    if column.dtype.kind == "f":
        raise TypeError(f"column {name!r}: expected integers or text, got {column.dtype}")
    distinct, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    by_row = np.argsort(first)
    number = np.empty_like(by_row)
    number[by_row] = np.arange(len(by_row))
    return distinct[by_row].tolist(), number[inverse]


def _codes(
    name: str, column: Array, vocabulary: Mapping[Any, int] | None, unknown: int | None
) -> Array:
    if vocabulary is None:
        if column.dtype.kind not in "iu":
            what = "text" if column.dtype.kind == "O" else str(column.dtype)
            raise TypeError(
                f"column {name!r}: expected integer codes, got {what}; vocabulary={{code: number}} "
                "says which number each code has"
            )
        return column
    if not isinstance(vocabulary, Mapping):
        raise TypeError(f"vocabulary: expected a mapping, got {kind_of(vocabulary)}")
    distinct, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    numbers = [vocabulary.get(code, unknown) for code in distinct.tolist()]
    absent = [i for i, number in enumerate(numbers) if number is None]
    if absent:
        row = min(int(first[i]) for i in absent)
        raise IndexError(
            f"column {name!r}, row {row}: expected a code of the vocabulary, got {column[row]!r} "
            f"({len(absent)} codes of the frame are not in it; unknown=NUMBER is taken for them)"
        )
    return np.array(numbers, np.int64)[inverse]


def _refuse_two_orders(ids: list[Any], name: str) -> None:
    """Raise where outcomes could be meant in the order of the ids, as ``groupby`` gives them, and
    where that is another than that of the rows."""
    for at, (one, following) in enumerate(pairwise(ids)):
        if following < one:
            raise ValueError(
                "persons: expected a list of ids, in the order of the outcomes or targets, got "
                f"None: the first rows of column {name!r} are not in the order of its ids "
                f"({following!r} comes after {one!r}, at {at + 1})"
            )


def _chosen(persons: Iterable[Any] | None, ids: list[Any], name: str) -> Array | None:
    if persons is None:
        return None
    if isinstance(persons, (str, bytes)):
        raise TypeError(f"persons: expected a list of ids, got {kind_of(persons)}")
    place = {person: at for at, person in enumerate(ids)}
    wanted = persons.tolist() if hasattr(persons, "tolist") else list(persons)
    for at, person in enumerate(wanted):
        if person not in place:
            raise ValueError(
                f"persons: expected ids of column {name!r}, got {person!r}, at {at}, which has no "
                "row"
            )
    return np.array([place[person] for person in wanted], np.int64)
