"""What a task makes of a store: whom, from when, until when, and what happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import ArrayLike, selection
from ..records import spans
from .attrition import Attrition
from .search import DAY_US, NAT, latest_so_far, microseconds

if TYPE_CHECKING:
    from ..store import EventStore

Ints = NDArray[np.int64]
_PER_ROW = (
    "patients",
    "n_visits",
    "entry_times",
    "event_times",
    "event_indicators",
    "index_times",
    "risk_starts",
    "end_times",
)


class SameDayWarning(UserWarning):
    """Outcomes whose order against other events of their day is unknown."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The study population of a task, one row for each patient or each prediction.

    With ``index="each_visit"`` a row is a patient who is followed from visit to visit, and the
    hazard at visit t is that of the event at visit t + 1. With an index date (``each_visit`` false)
    a row is one prediction from the visits up to that date: its only hazard is that of its last
    visit, ``entry_times == event_times``.

    Attributes:
        patients: int64 ``[n]``, indices into the store.
        n_visits: int64 ``[n]``, how many of the patient's visits are seen, from the first.
        entry_times: int64 ``[n]``, 0-based index of the visit from which the patient is at risk.
        event_times: int64 ``[n]``, of the visit whose hazard the outcome belongs to: the last that
            is seen.
        event_indicators: uint8 ``[n]``: 1 = the event follows, 0 = censored.
        index_times: datetime64[us] ``[n]``, the index date.
        risk_starts: datetime64[us] ``[n]``, the start of the risk window: ``gap_days`` after the
            index, or after the last possible day of what is seen there. Days to the event count
            from it, where that is later than the visit.
        end_times: datetime64[us] ``[n]``, the time of the event or the end of observation; NaT
            where label files do not say.
        attrition: how many persons each rule has left.
        each_visit: whether every visit from ``entry_times`` on is a prediction.
        warnings: what to know before trusting the numbers, with counts.
        left_out: outcomes and index dates that were not used, by reason.
        censored_by: what ended the observation of those without the event, with counts.
        causes: the names of competing outcomes, or none.
        event_types: uint8 ``[n]``, 0 censored, 1, 2, ... which of ``causes`` the event is; None
            without such.
        labels: float32 ``[n]``, values of label files, or None.
        categories: the meaning of whole ``labels`` that stand for categories.
        store_sha256: the content of the store that the rows point into, where known.
    """

    patients: Ints
    n_visits: Ints
    entry_times: Ints
    event_times: Ints
    event_indicators: NDArray[np.uint8]
    index_times: NDArray[np.datetime64]
    risk_starts: NDArray[np.datetime64]
    end_times: NDArray[np.datetime64]
    attrition: Attrition
    each_visit: bool = True
    warnings: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    censored_by: Mapping[str, int] = field(default_factory=dict)
    labels: NDArray[np.float32] | None = None
    categories: tuple[str, ...] = ()
    store_sha256: str | None = None
    causes: tuple[str, ...] = ()
    event_types: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        n = len(self.patients)
        for name in _PER_ROW:
            if getattr(self, name).shape != (n,):
                raise ValueError(
                    f"{name}: expected one per row, shape [{n}], got "
                    f"{list(getattr(self, name).shape)}"
                )
        for name in ("labels", "event_types"):
            values = getattr(self, name)
            if values is not None and values.shape != (n,):
                raise ValueError(f"{name}: expected shape [{n}], got {list(values.shape)}")

    def __len__(self) -> int:
        return len(self.patients)

    def __str__(self) -> str:
        ends = ", ".join(f"{number:,} by {what}" for what, number in self.censored_by.items())
        lines = [str(self.attrition)]
        if self.causes:
            of_each = ", ".join(f"{n:,} {cause}" for cause, n in self.events_by_cause().items())
            lines.append(f"of them the first: {of_each}")
        lines.append(f"censored: {ends}" if ends else "")
        lines += [f"left out: {number:,} {what}" for what, number in self.left_out.items()]
        lines += [f"note: {text}" for text in self.warnings]
        return "\n".join(filter(None, lines))

    def select(self, rows: ArrayLike) -> Outcomes:
        """Some of the rows, by number or one boolean for each; the attrition table stays.

        Raises:
            ValueError, IndexError, TypeError: as for an index into the rows.
        """
        chosen = selection("rows", rows, len(self), "rows")
        parts: dict[str, Any] = {name: getattr(self, name)[chosen] for name in _PER_ROW}
        for name in ("labels", "event_types"):
            values = getattr(self, name)
            parts[name] = None if values is None else values[chosen]
        return replace(self, **parts)

    def events_by_cause(self) -> dict[str, int]:
        """How many rows have each of competing outcomes; empty without such."""
        if self.event_types is None:
            return {}
        counts = np.bincount(self.event_types, minlength=len(self.causes) + 1)[1:].tolist()
        return dict(zip(self.causes, counts, strict=True))

    def visits(self, store: EventStore) -> tuple[Ints, Ints]:
        """The seen visits of all rows, one row after the other: int64 ``[sum(n_visits)]`` each, the
        row of these outcomes, and the visit's index in the store."""
        starts = store.patient_offsets[self.patients]
        row, _, visit = spans(starts, self.n_visits)
        return row, visit

    def days_to_end(self, store: EventStore) -> NDArray[np.float64]:
        """float64 ``[sum(n_visits)]``: days from the last code of each seen visit and of those
        before it, or from the start of the risk window where that is later, to the event or the end
        of observation, never below 0; NaN where ``end_times`` is unknown.

        Nobody in the study population has the event before the risk window starts, nor before the
        end of a visit that is seen. Days that counted from a visit before it (the last one before
        an index date, the one before a gap, one in the course of a long stay that began earlier)
        would hold a time in which the event was impossible, and risks would come out too low.
        """
        row, visit = self.visits(store)
        begins = np.concatenate([[0], self.n_visits.cumsum()])
        until = latest_so_far(microseconds(store.visit_ends[visit]), begins)
        starts, ends = microseconds(self.risk_starts)[row], microseconds(self.end_times)[row]
        return days_at_risk(until, starts, ends)


def days_at_risk(visits: Ints, risk_starts: Ints, ends: Ints) -> NDArray[np.float64]:
    """See :meth:`Outcomes.days_to_end`: of visits of which all is seen at these times, all in
    microseconds."""
    days = np.maximum(ends - np.maximum(visits, risk_starts), 0) / DAY_US
    days[ends == NAT] = np.nan
    return days


def within_visits(n: int) -> str:
    """What to know of predictions within a visit."""
    return (
        f"{n:,} predictions fall into a visit with codes recorded after them, which is not seen "
        "(visits by 'time' or shorter ones would let what came before be seen)"
    )
