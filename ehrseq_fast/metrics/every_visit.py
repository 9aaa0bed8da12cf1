"""Every visit as a landmark of its own: the risk within w from wherever a patient is.

A visit at time s of a patient at risk is a landmark; what follows is counted from it, and figures
are averages over the visits that were observed. A patient who has many visits counts many times,
which no estimate minds, but its interval does: resample patients.

Weights are those of one landmark, ``1 / Ĝ(T−|s) = Ĝ(s) / Ĝ(T−)`` and ``1 / Ĝ(s + w|s)``, with one Ĝ
of the patients' times since their first visit (or entry). Ĝ of the times since each visit would mix
early visits, which are observed for long and have low risks, with late ones.

Visits from which no horizon is observed, Ĝ(s + w) = 0, are no landmarks: which they are depends on
s alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .censoring import Censoring
from .landmark import AtLandmark
from .values import Bools, Floats, Ints, VisitValues

EVERY_VISIT = "every visit"


@dataclass(frozen=True)
class EveryVisit:
    """Patients, and the visits that are landmarks.

    Attributes:
        since: time from each visit to the event or the end of observation.
        first: ``[B]``, the first visit that is a landmark, at time 0.
        visits: ``[B]``, the last one.
        seen: ``[B]``, the indicators.
        with_censored: whether the time of a censoring was survived.
        competing: ``[B]``, who had an event of another cause; None where there is none.
    """

    since: VisitValues
    first: Ints
    visits: Ints
    seen: Bools
    with_censored: bool
    competing: Bools | None = None
    days: str = EVERY_VISIT

    def of(self, chosen: Ints) -> VisitsOf:
        """Of some patients, who are then called by their place among them."""
        first, count = self.first[chosen], self.visits[chosen] - self.first[chosen] + 1
        patients = np.repeat(np.arange(len(chosen)), count)
        visits = np.arange(len(patients)) - np.repeat(count.cumsum() - count - first, count)
        since = self.since.values[self.since.starts[chosen][patients] + visits]
        total = self.since.values[self.since.starts[chosen] + first]
        seen = self.seen[chosen]
        any_event = seen if self.competing is None else seen | self.competing[chosen]
        at_risk = since > 0
        if self.with_censored:
            at_risk |= ~any_event[patients] & (since >= 0)
        if not at_risk.all():
            patients, visits, since = patients[at_risk], visits[at_risk], since[at_risk]
        return VisitsOf(
            patients,
            visits,
            since,
            total,
            seen,
            any_event,
            Censoring.fit(total, any_event, self.with_censored),
        )


class VisitsOf:
    """The visits of some patients that are at risk, and Ĝ at them."""

    def __init__(
        self,
        patients: Ints,
        visits: Ints,
        since: Floats,
        total: Floats,
        seen: Bools,
        any_event: Bools,
        censoring: Censoring,
    ) -> None:
        self.patients, self.visits, self.since = patients, visits, since
        self.seen, self.any_event = seen[patients], any_event[patients]
        self.landmark = total[patients] - since
        self.censoring = censoring
        self.last = float(total.max())
        self.free = censoring.seen(self.landmark)
        self.known = censoring.seen(total)[patients]

    def select(self, horizon: float) -> AtLandmark:
        """Those from which the horizon is observed.

        Raises:
            ValueError: where there is none.
        """
        end = self.landmark + horizon
        at_horizon = self.censoring.seen(end)
        # behind the last time nothing is observed, whatever the estimate says there
        kept = np.flatnonzero((at_horizon > 0) & (end <= self.last))
        if not len(kept):
            raise ValueError(
                f"horizon: expected visits from which it is observed, got {horizon:g} and none of "
                f"{len(end)} visits (Ĝ = 0)"
            )
        since, seen, any_event = self.since[kept], self.seen[kept], self.any_event[kept]
        event = any_event & (since <= horizon)
        control = since > horizon
        if self.censoring.with_censored:
            control |= ~any_event & (since == horizon)
        weight = np.zeros(len(kept))
        known = np.where(event, self.known[kept], at_horizon[kept])
        np.divide(self.free[kept], known, out=weight, where=event | control)
        control |= event & ~seen
        return AtLandmark(self.patients[kept], self.visits[kept], event & seen, control, weight)
