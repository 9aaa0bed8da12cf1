"""MEDS label files: a label for each person and prediction time, and times to event beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...checks import expect_option
from .attrition import Funnel
from .chunks import chunks
from .dates import places_of
from .label_columns import VALUES, read_columns, write_columns
from .outcomes import Outcomes, within_visits
from .search import (
    DAY_US,
    NAT,
    as_times,
    days_of,
    first_not_below,
    latest_so_far,
    microseconds,
)

if TYPE_CHECKING:
    from ..store import EventStore

Ints = NDArray[np.int64]
ROWS_AT_ONCE = 1 << 20
EXACT_IN_FLOAT32 = 2**24  # integers beyond may be other ones as float32


@dataclass(frozen=True, eq=False)
class Labels:
    """Label files as they were read; a task whose predictions are their rows.

    :meth:`apply` gives :class:`Outcomes` with ``labels``. As the ``index`` of a
    :class:`FirstEvent`, the prediction times alone are taken.

    Attributes:
        subject_ids: int64 ``[n]``.
        prediction_times: datetime64[us] ``[n]``, in UTC.
        values: by column, ``[n]`` each: ``boolean_value`` (0, 1), ``integer_value``,
            ``float_value``, ``event_time_days``, ``event_indicator`` as float64, NaN where there is
            none; ``categorical_value`` as objects, None where there is none.
        value: which column :meth:`apply` takes as the label.
        prediction_day: whether what was recorded at the prediction time is seen: ``"included"``, as
            MEDS has it, or ``"excluded"``: only days before that of the prediction.
        source: where they were read from.
    """

    subject_ids: Ints
    prediction_times: NDArray[np.datetime64]
    values: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    value: str | None = None
    prediction_day: str = "included"
    source: str = "labels"

    def __post_init__(self) -> None:
        expect_option("prediction_day", self.prediction_day, ("included", "excluded"))
        if self.value is not None and self.value not in self.values:
            raise ValueError(
                f"value: expected a column of {self.source}, {', '.join(self.values) or 'none'}, "
                f"got {self.value!r}"
            )

    def __len__(self) -> int:
        return len(self.subject_ids)

    @property
    def name(self) -> str:
        """Where the labels come from."""
        return self.source

    def apply(self, store: EventStore, split: str | None = None) -> Outcomes:
        """The predictions for patients of one split, or of the whole store, in the labels' order.

        A row sees the visits up to its prediction time. ``labels`` are the values: of booleans 0
        and 1, of categories their number in ``categories``. ``event_indicators`` and ``end_times``
        are the columns ``event_indicator`` and ``event_time_days``; where a row has none of the
        former, its indicator is the boolean label, or 0. A visit with codes recorded after the
        prediction is not seen; how many rows fall into one is told in ``warnings``.

        Raises:
            ValueError: no such split, labels without any value, whole ones that float32 does not
                hold.
        """
        column = self._label_column()
        label, categories = _as_numbers(self.values[column])
        if column == "integer_value":
            self._refuse_large(label)
        patients = places_of(store.subject_ids, self.subject_ids)
        chosen = np.zeros(store.n_patients, bool)
        chosen[slice(None) if split is None else store.patients_of(split)] = True
        rows = np.flatnonzero(patients >= 0)
        n_unknown = len(self) - len(rows)
        rows = rows[chosen[patients[rows]]]
        positive = label == 1 if column == "boolean_value" else np.zeros(len(self), bool)
        funnel = Funnel()

        def count(name: str) -> None:
            persons = np.unique(patients[rows])
            with_outcome = np.unique(patients[rows][positive[rows]])
            funnel.add(name, len(persons), len(with_outcome), len(rows))

        count("with a label" if split is None else f"with a label, in split {split!r}")
        rows = rows[np.isfinite(label[rows])]
        count("with a value")
        n_visits, started = self._seen_visits(store, patients[rows], rows)
        there = n_visits > 0
        rows, n_visits, started = rows[there], n_visits[there], started[there]
        count("with a visit to predict from")
        indicators = self._indicators(rows, positive)
        left_out = {"labels of persons who are not in the store": n_unknown} if n_unknown else {}
        within = int(np.count_nonzero(started > n_visits))
        notes = [within_visits(within)] if within else []
        return Outcomes(
            patients=patients[rows],
            n_visits=n_visits,
            entry_times=n_visits - 1,
            event_times=n_visits - 1,
            event_indicators=indicators,
            index_times=self.prediction_times[rows],
            risk_starts=self.prediction_times[rows],
            end_times=self._end_times(rows),
            attrition=funnel.table(int(indicators.sum())),
            each_visit=False,
            warnings=tuple(notes),
            left_out=left_out,
            labels=label[rows].astype(np.float32),
            categories=categories,
            store_sha256=store.header.get("content_sha256"),
        )

    def _label_column(self) -> str:
        if self.value is not None:
            return self.value
        for name in VALUES:
            if name in self.values and len(_known(self.values[name])):
                return name
        raise ValueError(
            f"{self.source}: expected a value in one of the columns {', '.join(VALUES)}, got none"
        )

    def _seen_visits(self, store: EventStore, patients: Ints, rows: Ints) -> tuple[Ints, Ints]:
        """How many visits each row sees, and how many have begun by its time."""
        times = microseconds(self.prediction_times)[rows]
        before = times + 1 if self.prediction_day == "included" else days_of(times) * DAY_US
        seen, started = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        order = np.argsort(patients, kind="stable")
        ordered = patients[order]
        for chunk in chunks(store, None):
            bounds = np.searchsorted(ordered, [chunk.first, chunk.first + chunk.n_patients])
            of = order[bounds[0] : bounds[1]]
            begins = chunk.visits[patients[of] - chunk.first]
            ends = chunk.visits[patients[of] - chunk.first + 1]
            seen[of] = first_not_below(chunk.seen_until, begins, ends, before[of]) - begins
            started[of] = first_not_below(chunk.visit_times, begins, ends, before[of]) - begins
        return seen, started

    def _refuse_large(self, label: NDArray[np.float64]) -> None:
        large = np.flatnonzero(np.abs(label) > EXACT_IN_FLOAT32)
        if len(large):
            raise ValueError(
                f"{self.source}, column integer_value: expected integers within 2**24, which "
                f"float32 labels hold, got {label[large[0]]:.0f} (row {large[0]})"
            )

    def _indicators(self, rows: Ints, positive: NDArray[np.bool_]) -> NDArray[np.uint8]:
        indicators = positive[rows].astype(np.float64)
        if "event_indicator" in self.values:
            given = self.values["event_indicator"][rows]
            indicators = np.where(np.isnan(given), indicators, given)
        return (indicators == 1).astype(np.uint8)

    def _end_times(self, rows: Ints) -> NDArray[np.datetime64]:
        ends = np.full(len(rows), NAT)
        if "event_time_days" in self.values:
            days = self.values["event_time_days"][rows]
            known = np.isfinite(days)
            times = microseconds(self.prediction_times)[rows[known]]
            ends[known] = times + np.rint(days[known] * DAY_US).astype(np.int64)
        return as_times(ends)


def labels(
    path: str | os.PathLike[str], *, value: str | None = None, prediction_day: str = "included"
) -> Labels:
    """Read MEDS label files.

    Args:
        path: a Parquet file, or a folder with Parquet files, nested or not, read in the order of
            their paths. Columns: ``subject_id`` (int64), ``prediction_time`` (timestamp, of a zone
            in UTC), and any of ``boolean_value``, ``integer_value``, ``float_value``,
            ``categorical_value``, ``event_time_days``, ``event_indicator``.
        value: which column is the label; None: the first of the four that holds a value.
        prediction_day: see :class:`Labels`.

    Raises:
        FileNotFoundError: no such file, or a folder without any.
        ValueError: a missing column, a person or time that is null, no Parquet file.
        TypeError: a column of another type.
        ImportError: PyArrow is missing.

    Example:
        >>> labels("readmission/train")  # doctest: +SKIP
    """
    subject_ids, times, values = read_columns(Path(path))
    return Labels(
        subject_ids, times, values, value=value, prediction_day=prediction_day, source=str(path)
    )


def write_labels(
    outcomes: Outcomes,
    store: EventStore,
    path: str | os.PathLike[str],
    *,
    horizon_days: float | None = None,
) -> int:
    """Write outcomes as a MEDS label file, and return how many rows it has.

    A row for each prediction: of ``each_visit`` outcomes each visit from the entry on, at the time
    of the last code of it and of those before it; else the index date (of a first visit, the time
    of its last code). Columns:
    ``subject_id``, ``prediction_time``, ``boolean_value``, and beside them ``event_time_days``
    (float64, from the prediction to the event or the end of observation, null where unknown) and
    ``event_indicator`` (boolean, whether that end is the event).

    Args:
        outcomes: what a task gave.
        store: the store that they were made of.
        path: the file, which appears whole or not at all; one that is there is replaced.
        horizon_days: the label is whether the event came within so many whole days of UTC after
            that of the prediction: null where observation ended before without it. None: whether it
            was seen at all.

    Raises:
        ImportError: PyArrow is missing.
        ValueError: outcomes that compete, of which label files do not say which it was; labels
            other than 0 and 1, which ``boolean_value`` does not hold.
    """
    if outcomes.causes:
        raise ValueError(
            "outcomes: expected those of one outcome, as label files hold, got those of "
            f"{len(outcomes.causes)} that compete ({', '.join(outcomes.causes)})"
        )
    if horizon_days is None:
        _refuse_other_labels(outcomes)
    return write_columns(Path(path), _label_rows(outcomes, store, horizon_days))


def _refuse_other_labels(outcomes: Outcomes) -> None:
    labels = outcomes.labels
    wrong = None
    if outcomes.categories:
        wrong = f"those of the categories {', '.join(map(repr, outcomes.categories))}"
    elif labels is not None and (other := ~np.isin(labels, (0, 1))).any():
        wrong = f"{labels[other.argmax()]:g} in row {other.argmax()} ({other.sum()} such rows)"
    if wrong:
        raise ValueError(
            f"outcomes: expected labels of 0 and 1, which boolean_value holds, got {wrong}; "
            "horizon_days= writes whether the event came within so many days"
        )


def _label_rows(
    outcomes: Outcomes, store: EventStore, horizon_days: float | None
) -> Iterator[dict[str, NDArray[Any]]]:
    n = len(outcomes)
    ends = np.cumsum(outcomes.n_visits)
    first = 0
    while first < n:
        before = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, before + ROWS_AT_ONCE, side="right")), first + 1)
        rows = np.arange(first, last)
        of, visit = outcomes.select(rows).visits(store)
        begins = np.concatenate([[0], outcomes.n_visits[rows].cumsum()])
        seen_until = latest_so_far(microseconds(store.visit_ends[visit]), begins)
        if outcomes.each_visit:
            place = np.arange(len(of)) - begins[of]
            predicted = place >= outcomes.entry_times[rows][of]
            row, times = rows[of[predicted]], seen_until[predicted]
        else:
            row = rows
            times = np.maximum(microseconds(outcomes.index_times)[rows], seen_until[begins[1:] - 1])
        end = microseconds(outcomes.end_times)[row]
        days = np.where(end == NAT, np.nan, (end - times) / DAY_US)
        indicator = outcomes.event_indicators[row] == 1
        label = indicator.astype(np.float64)
        if horizon_days is not None:
            # whole days of UTC, as in FirstEvent; observation ends just before its end
            last_day = days_of(np.where(indicator, end, end - 1)) - days_of(times)
            within = np.where(indicator, last_day <= horizon_days, last_day < horizon_days)
            label = np.where(within, np.where(indicator, 1.0, np.nan), 0.0)
            label[np.isnan(days)] = np.nan
        elif outcomes.labels is not None:
            label = outcomes.labels[row].astype(np.float64)
        yield {
            "subject_id": store.subject_ids[outcomes.patients[row]],
            "prediction_time": as_times(times),
            "boolean_value": label,
            "event_time_days": days,
            "event_indicator": indicator,
        }
        first = last


def _as_numbers(values: NDArray[Any]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    if values.dtype.kind == "f":
        return values, ()
    known = _known(values)
    categories = sorted({str(value) for value in values[known]})
    numbers = np.full(len(values), np.nan)
    numbers[known] = np.searchsorted(categories, [str(value) for value in values[known]])
    return numbers, tuple(categories)


def _known(values: NDArray[Any]) -> Ints:
    if values.dtype.kind == "f":
        return np.flatnonzero(np.isfinite(values))
    return np.flatnonzero([value is not None for value in values])
