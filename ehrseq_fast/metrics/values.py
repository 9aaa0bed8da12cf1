"""What metrics read: one value per visit, in whatever layout, and one outcome per patient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import ArrayLike, as_array, got, integer, truth, whole
from ..batch import PackedVisits
from ..checks import expect_option
from ..rows import PackedRows
from ..rows.beside import with_batch

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CENSORED_VISITS = ("excluded", "included")


@dataclass(frozen=True)
class VisitValues:
    """Values of visits, patient by patient: visit t of patient i is ``values[starts[i] + t]``.

    Attributes:
        name: what error messages call them.
        values: float32 or float64 ``[N, ...]``.
        starts: int64 ``[B]``.
        lengths: int64 ``[B]``, visits of each patient.
        outcomes: event times, indicators and types of the batch that the values came with, or None.
        rows: the one PackedRows that they came as, or None.
        packed: whether they came as PackedRows, one or several.
    """

    name: str
    values: NDArray[Any]
    starts: Ints
    lengths: Ints
    outcomes: tuple[Ints | None, Ints | None, Ints | None] = (None, None, None)
    rows: PackedRows | None = None
    packed: bool = False

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, patients: Ints, visits: Ints | int) -> NDArray[Any]:
        """The values at these visits of these patients; NaN is refused."""
        found = self.values[self.starts[patients] + visits]
        missing = np.isnan(found)
        if missing.any():
            missing = missing.reshape(len(found), -1).any(1)
            first = int(missing.argmax())
            visit = visits if isinstance(visits, int) else visits[first]
            raise ValueError(
                f"{self.name}: expected numbers, got NaN (patient {patients[first]}, visit "
                f"{visit}; {int(missing.sum())} in all)"
            )
        return found

    def column(self, number: int) -> VisitValues:
        """One of the last dimension's values."""
        return VisitValues(
            self.name,
            self.values[..., number],
            self.starts,
            self.lengths,
            self.outcomes,
            self.rows,
            self.packed,
        )

    def take(self, patients: Ints) -> VisitValues:
        """Of some patients, who may be repeated; nothing is copied."""
        return VisitValues(self.name, self.values, self.starts[patients], self.lengths[patients])


def read_values(
    name: str, given: Any, lengths: ArrayLike | None = None, *, trailing: int = 0
) -> VisitValues:
    """Values of visits as users have them.

    Args:
        given: ``[B, V, ...]`` padded, of which ``lengths`` says how many are real; ``[n_visits,
            ...]`` patient by patient with ``lengths``; ``[B, ...]`` without, one per patient;
            :class:`~ehrseq_fast.PackedRows`; or a list of these, one per batch.
        trailing: the number of dimensions of a visit's value.

    Raises:
        ValueError: for shapes that do not fit, and lengths below 1.
        TypeError: for values that are not real numbers, and lengths beside PackedRows.
    """
    if isinstance(given, VisitValues):
        return given
    if isinstance(given, PackedRows):
        given = [given]
    if isinstance(given, (list, tuple)) and given and isinstance(given[0], PackedRows):
        if lengths is not None:
            raise TypeError("lengths: expected None beside PackedRows, which have their own")
        return _of_rows(name, given, trailing)
    array = _floating(name, given)
    sizes = None if lengths is None else whole("lengths", lengths)
    if sizes is not None and sizes.ndim != 1:
        raise ValueError(f"lengths: expected [B], got shape {list(sizes.shape)}")
    if sizes is not None and (sizes < 1).any():
        patient = int((sizes < 1).argmax())
        raise ValueError(f"lengths: expected 1 or more, got {sizes[patient]} (patient {patient})")
    if array.ndim == 2 + trailing:
        patients, slots = array.shape[:2]
        if sizes is None:
            sizes = np.full(patients, slots)
        if sizes.shape != (patients,):
            raise ValueError(f"lengths: expected [B] = [{patients}], got {list(sizes.shape)}")
        if (sizes > slots).any():
            patient = int((sizes > slots).argmax())
            raise ValueError(
                f"lengths: expected at most V = {slots}, got {sizes[patient]} (patient {patient})"
            )
        flat = np.ascontiguousarray(array).reshape(patients * slots, *array.shape[2:])
        return VisitValues(name, flat, np.arange(patients) * slots, sizes)
    if array.ndim != 1 + trailing:
        raise ValueError(
            f"{name}: expected [B, V] or [n_visits]{' and a last dimension' if trailing else ''}, "
            f"got shape {list(array.shape)}"
        )
    if sizes is None:
        sizes = np.ones(len(array), np.int64)
    if sizes.sum() != len(array):
        raise ValueError(
            f"{name}: expected one row per visit ({sizes.sum()} by lengths), got {len(array)}"
        )
    return VisitValues(name, array, np.cumsum(sizes) - sizes, sizes)


def read_scores(
    name: str, given: Any, lengths: ArrayLike | None, cause: int | None
) -> tuple[VisitValues, int | None]:
    """One value per visit; of ``[B, V, K]`` and PackedRows ``[n_visits, K]`` the column of a cause,
    and K.

    Raises:
        ValueError, TypeError: as :func:`read_values`; a cause below 1 or above K.
    """
    first = given[0] if isinstance(given, (list, tuple)) and given else given
    dims = first.values.dim() + 1 if isinstance(first, PackedRows) else np.ndim(given)
    if cause is None or dims != 3:
        return read_values(name, given, lengths), None
    values = read_values(name, given, lengths, trailing=1)
    n_causes = values.values.shape[1]
    column = values.column(integer("cause", cause, 1, n_causes) - 1)
    return column, n_causes


def _floating(name: str, given: Any) -> NDArray[Any]:
    array = as_array(name, given)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected real numbers, got {got(array)}")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _of_rows(name: str, parts: Any, trailing: int) -> VisitValues:
    values, sizes, outcomes = [], [], []
    for part in parts:
        if not isinstance(part, PackedRows):
            raise TypeError(f"{name}: expected PackedRows alone, got {type(part).__name__} too")
        batch = part.batch
        if part.values.dim() != 1 + trailing:
            raise ValueError(
                f"{name}: expected PackedRows [n_visits{', J' if trailing else ''}], got "
                f"{list(part.values.shape)}"
            )
        rows = _floating(name, part.values)
        lengths = batch.lengths.numpy()
        patient, time = (x.cpu().numpy() for x in (batch.patient_of_row, batch.time_of_row))
        flat = np.empty_like(rows)
        flat[(np.cumsum(lengths) - lengths)[patient] + time] = rows
        values.append(flat)
        sizes.append(lengths)
        outcomes.append(
            tuple(
                None if x is None else x.cpu().numpy()
                for x in (batch.event_times, batch.event_indicators, batch.event_types)
            )
        )
    lengths = np.concatenate(sizes)
    times, seen, types = (
        None if any(x is None for x in found) else np.concatenate(found)
        for found in zip(*outcomes, strict=True)
    )
    return VisitValues(
        name,
        np.concatenate(values),
        np.cumsum(lengths) - lengths,
        lengths,
        (times, seen, types),
        parts[0] if len(parts) == 1 else None,
        packed=True,
    )


def read_outcomes(
    values: VisitValues, event_times: ArrayLike | None, event_indicators: ArrayLike | None
) -> tuple[NDArray[Any], Bools]:
    """Times ``[B]`` as they are (numbers) and indicators ``[B]``; by default the batch's.

    Raises:
        ValueError: for shapes that do not fit, times that are NaN or negative, indicators other
            than 0 and 1; with the first patient at fault.
        TypeError: where outcomes are missing or no numbers.
    """
    times, seen = _times_and(
        "event_indicators", values, event_times, event_indicators, values.outcomes[1]
    )
    if seen.dtype == np.bool_:
        return times, truth(seen)
    refuse("event_indicators", seen, ~((seen == 0) | (seen == 1)), "0 (censored) or 1 (event)")
    return times, seen != 0


def read_types(
    values: VisitValues,
    event_times: ArrayLike | None,
    event_types: ArrayLike | None,
    n_causes: int | None = None,
) -> tuple[NDArray[Any], Ints]:
    """Times ``[B]`` and types ``[B]``, 0 censored, 1 to ``n_causes``; by default the batch's.

    Raises:
        ValueError, TypeError: as :func:`read_outcomes`; types that are not of these numbers.
    """
    times, types = _times_and("event_types", values, event_times, event_types, values.outcomes[2])
    most = "the number of causes" if n_causes is None else f"K = {n_causes}"
    wrong = ~(types >= 0) if n_causes is None else ~((types >= 0) & (types <= n_causes))
    if types.dtype.kind == "f":
        wrong |= types != np.trunc(types)
    refuse("event_types", types, wrong, f"whole numbers from 0 (censored) to {most}")
    return times, types.astype(np.int64)


def read_events(
    values: VisitValues,
    event_times: ArrayLike | None,
    event_indicators: ArrayLike | None,
    event_types: ArrayLike | None,
    cause: int | None,
    n_causes: int | None = None,
) -> tuple[NDArray[Any], Bools, Bools | None]:
    """Times ``[B]``, who had the event of interest, and who had an event of another cause; None
    where there is one cause alone.

    Raises:
        ValueError: as :func:`read_outcomes` and :func:`read_types`; a cause below 1 or above
            ``n_causes``.
        TypeError: indicators beside a cause, types without one.
    """
    if cause is None:
        if event_types is not None:
            raise TypeError("cause: expected one of the event types from 1 on, got None")
        return (*read_outcomes(values, event_times, event_indicators), None)
    if event_indicators is not None:
        raise TypeError("event_indicators: expected None with a cause, as event_types say it")
    cause = integer("cause", cause, 1, 2**31 if n_causes is None else n_causes)
    times, types = read_types(values, event_times, event_types, n_causes)
    of_cause = types == cause
    return times, of_cause, (types > 0) & ~of_cause


def _times_and(
    name: str,
    values: VisitValues,
    event_times: ArrayLike | None,
    given: ArrayLike | None,
    of_batch: Ints | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    if isinstance(event_times, PackedVisits):
        batch = with_batch(values.rows, event_times, values.name)[0].batch
        event_times, of_batch = batch.event_times, getattr(batch, name)
    event_times = values.outcomes[0] if event_times is None else event_times
    given = of_batch if given is None else given
    if event_times is None or given is None:
        raise TypeError(f"event_times and {name}: expected one per patient, got None")
    times, what = as_array("event_times", event_times), as_array(name, given)
    for each, array in (("event_times", times), (name, what)):
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{each}: expected real numbers, got {got(array)}")
        if array.shape != (len(values),):
            raise ValueError(
                f"{each}: expected [B] = [{len(values)}], got shape {list(array.shape)}"
            )
    refuse("event_times", times, ~(times >= 0), "times from 0")
    return times, what


def read_visit_times(values: VisitValues, times: NDArray[Any], name: str = "event_times") -> Ints:
    """Times as visits: whole numbers below each patient's number of visits."""
    if times.dtype.kind == "f":
        refuse(name, times, (times != np.trunc(times)) | (times > 2.0**53), "visit numbers")
    visits = times.astype(np.int64)
    if (outside := visits >= values.lengths).any():
        patient = int(outside.argmax())
        raise ValueError(
            f"{name} must be one of the patient's visits, counted from 0: patient {patient} has "
            f"{name.replace('_times', ' time')} {visits[patient]} and {values.lengths[patient]} "
            f"visits (patients at fault: {int(outside.sum())})"
        )
    return visits


def read_entry_times(
    values: VisitValues, entry_times: ArrayLike | None, visits: Ints
) -> Ints | None:
    """The first visit at risk ``[B]``, not after the event."""
    if entry_times is None:
        return None
    entry = whole("entry_times", entry_times)
    if entry.shape != (len(values),):
        raise ValueError(
            f"entry_times: expected [B] = [{len(values)}], got shape {list(entry.shape)}"
        )
    if (outside := (entry < 0) | (entry > visits)).any():
        patient = int(outside.argmax())
        raise ValueError(
            f"entry_times must lie between 0 and the event time: patient {patient} has entry time "
            f"{entry[patient]} and event time {visits[patient]} (patients at fault: "
            f"{int(outside.sum())})"
        )
    return entry


def refuse_unordered(values: VisitValues, *, falls: bool) -> None:
    """``ValueError`` for times of visits that fall from one visit of a patient to the next, or with
    ``falls`` for those that rise, and for NaN."""
    of = np.repeat(np.arange(len(values)), values.lengths)
    visit = np.arange(len(of)) - np.repeat(values.lengths.cumsum() - values.lengths, values.lengths)
    found = values.values[values.starts[of] + visit]
    before, after = found[:-1], found[1:]
    wrong = ~((after <= before) if falls else (after >= before)) & (of[1:] == of[:-1])
    if wrong.any():
        first = int(wrong.argmax())
        way = "rise" if falls else "fall"
        raise ValueError(
            f"{values.name}: expected times that do not {way} from visit to visit, got "
            f"{before[first]:g} and then {after[first]:g} (patient {of[first + 1]}, visit "
            f"{visit[first + 1]}; {int(wrong.sum())} in all)"
        )


def refuse(name: str, array: NDArray[Any], wrong: Bools, expected: str) -> None:
    """``ValueError`` with the first patient at fault."""
    if wrong.any():
        patient = int(wrong.argmax())
        raise ValueError(
            f"{name}: expected {expected}, got {array[patient]} (patient {patient}; "
            f"{int(wrong.sum())} in all)"
        )


def included(censored_visit: str) -> bool:
    """Whether the visit of a censoring was survived."""
    expect_option("censored_visit", censored_visit, CENSORED_VISITS)
    return censored_visit == "included"
