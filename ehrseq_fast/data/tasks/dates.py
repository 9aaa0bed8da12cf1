"""Index dates: when, for whom, a prediction is made."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array, as_array, labels_of, longs
from .search import DAY_US, NAT, days_of, microseconds

Ints = NDArray[np.int64]
_ENDS_WITH_A_ZONE = re.compile(r"(Z|[+-]\d{2}:\d{2})$")
_STARTS_WITH_A_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")  # NumPy takes "today" and "2020" too
LENGTH_OF_A_DATE = len("2020-01-31")


@dataclass(frozen=True, eq=False)
class IndexDates:
    """Times of predictions, several for one person where wanted.

    Attributes:
        subject_ids: int64 ``[n]``; None where row i is the store's patient i.
        times: datetime64[us] ``[n]``, in UTC; without ``subject_ids`` NaT for whom there is none.
        whole_days: bool ``[n]``: a date without a time of day, which means all of that day.
    """

    subject_ids: Ints | None
    times: NDArray[np.datetime64]
    whole_days: NDArray[np.bool_]

    @classmethod
    def of(cls, values: Any) -> IndexDates:
        """From a mapping of subject ids to dates (or a pandas ``Series`` with them as its index),
        label files that were read, the columns that :meth:`to_dict` gives, or an array with one
        date for each patient of a store.

        Raises:
            TypeError, ValueError: something else, or a date that cannot be read.
        """
        if isinstance(values, IndexDates):
            return values
        if hasattr(values, "prediction_times"):
            times = np.asarray(values.prediction_times, "datetime64[us]")
            return cls(values.subject_ids, times, np.zeros(len(times), bool))
        if isinstance(values, Mapping):
            if set(values) == {"subject_id", "time"}:
                ids, given = values["subject_id"], list(values["time"])
                if ids is not None and len(list(ids)) != len(given):
                    raise ValueError(
                        f"index: expected one time for each of {len(list(ids))} subject ids, got "
                        f"{len(given)}"
                    )
            else:
                ids, given = list(values), list(values.values())
            names = range(len(given)) if ids is None else ids
            times, whole = _read(given, names, or_none=ids is None)
            subject_ids = None if ids is None else longs("index", list(ids))
            return cls(subject_ids, times, whole)
        labels = labels_of(values)
        if labels is not None:  # a Series by subject id: groupby(...).min() has its own order
            times, whole = _read(values.tolist(), labels, or_none=False)
            return cls(longs("index", labels), times, whole)
        array = as_array("index", values)
        if array.dtype.kind != "M" or array.ndim != 1:
            raise TypeError(
                "index: expected 'each_visit', 'first_visit', a mapping of subject ids to dates, "
                f"label files, or datetime64 [n_patients], got {array.dtype} of shape "
                f"{list(array.shape)}"
            )
        coarse = np.datetime_data(array.dtype)[0] in ("Y", "M", "W", "D")
        return cls(None, array.astype("datetime64[us]"), ~np.isnat(array) & coarse)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexDates) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __len__(self) -> int:
        return len(self.times)

    def _key(self) -> tuple[bytes | None, ...]:
        ids = None if self.subject_ids is None else self.subject_ids.tobytes()
        return ids, microseconds(self.times).tobytes(), self.whole_days.tobytes()

    def to_dict(self) -> dict[str, Any]:
        """Columns of plain values, as JSON and YAML hold them."""
        texts = np.datetime_as_string(self.times).tolist()
        return {
            "subject_id": None if self.subject_ids is None else self.subject_ids.tolist(),
            "time": [
                text[:LENGTH_OF_A_DATE] if whole else text
                for text, whole in zip(texts, self.whole_days.tolist(), strict=True)
            ],
        }

    def rows(self, subject_ids: Array) -> tuple[Ints, Ints, Ints, int]:
        """For each date of a patient of the store, by patient and time: int64 the patient's index,
        the time in microseconds, its number in these dates; and how many dates are of nobody.

        Raises:
            ValueError: one date per patient was given, but not as many as patients.
        """
        times = microseconds(self.times)
        if self.subject_ids is None:
            if len(times) != len(subject_ids):
                raise ValueError(
                    f"index: expected one date for each of {len(subject_ids)} patients of the "
                    f"store, got {len(times)}"
                )
            at = np.flatnonzero(times != NAT)
            return at, times[at], at, 0
        patients = places_of(subject_ids, self.subject_ids)
        known = np.flatnonzero(patients >= 0)
        order = known[np.lexsort((times[known], patients[known]))]
        return patients[order], times[order], order, len(times) - len(known)

    def seen_before(self, number: Ints) -> Ints:
        """int64 microseconds: of dates by their number, the time that what is seen is before where
        the day is included."""
        times = microseconds(self.times)[number]
        next_day = (days_of(times) + 1) * DAY_US
        return np.where(self.whole_days[number], next_day, times + 1)


def places_of(subject_ids: Array, wanted: Array) -> Ints:
    """The index of each wanted id among a store's, -1 where it has none."""
    ids = np.asarray(subject_ids)
    if not len(ids):
        return np.full(len(wanted), -1, np.int64)
    order = None if (ids[1:] > ids[:-1]).all() else np.argsort(ids, kind="stable")
    ordered = ids if order is None else ids[order]
    at = np.minimum(np.searchsorted(ordered, wanted), len(ids) - 1)
    found = ordered[at] == wanted
    return np.where(found, at if order is None else order[at], -1)


def _read(
    values: list[Any], names: Iterable[Any], *, or_none: bool
) -> tuple[NDArray[np.datetime64], NDArray[np.bool_]]:
    times, whole = np.empty(len(values), "datetime64[us]"), np.zeros(len(values), bool)
    for at, (value, name) in enumerate(zip(values, names, strict=True)):
        times[at], whole[at] = _date(value)
        if np.isnat(times[at]) and not or_none:
            raise ValueError(f"index[{name!r}]: expected a date, got {value!r}")
    return times, whole


def _date(value: Any) -> tuple[np.datetime64, bool]:
    """NaT for what is no date."""
    if isinstance(value, str):
        value = _of_text(value)
    if isinstance(value, dt.datetime):
        if value.tzinfo is not None:
            value = value.astimezone(dt.timezone.utc).replace(tzinfo=None)
        # pandas' NaT is an instance of datetime
        return np.datetime64("NaT" if str(value) == "NaT" else value, "us"), False
    if isinstance(value, dt.date):
        return np.datetime64(value, "us"), True
    if isinstance(value, np.datetime64):
        whole = np.datetime_data(value.dtype)[0] in ("Y", "M", "W", "D")
        return value.astype("datetime64[us]"), whole
    return np.datetime64("NaT"), False


def _of_text(text: str) -> dt.datetime | np.datetime64:
    """NaT for what is no date."""
    if not _STARTS_WITH_A_DAY.match(text):
        return np.datetime64("NaT")
    if _ENDS_WITH_A_ZONE.search(text, LENGTH_OF_A_DATE):  # of which NumPy warns
        with suppress(ValueError):
            return dt.datetime.fromisoformat(text.replace("Z", "+00:00"))
    try:
        return np.datetime64(text)
    except ValueError:
        return np.datetime64("NaT")
