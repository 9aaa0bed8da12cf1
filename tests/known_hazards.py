"""Records whose hazards are known: patients drawn from a model that says, at each visit, how likely
the event is at the next one.

The log-odds of the hazard are a constant, plus what each of a few codes of this visit adds, plus
half of what those of the visit before added. All other codes mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehrseq_fast.data import EventStore, PartWriter, SubjectChunk, write_store

EVENT = "EVENT"
EFFECTS = np.array([2.0, 1.5, 1.0, -1.0, -1.5])  # of codes 0 to 4
BASE = -3.0
CODES = 40
DAY = np.timedelta64(1, "D")


@dataclass(frozen=True)
class KnownHazards:
    """Visits in a store's order.

    Attributes:
        subject_ids: int64 ``[P]``.
        lengths: int64 ``[P]``, visits of each, without that of the event.
        times: datetime64[us] ``[N]``.
        has: bool ``[N, CODES]``, which codes a visit has.
        hazards: float64 ``[N]``: the probability of the event at the next visit.
        events: bool ``[P]``: the event follows the last visit.
    """

    subject_ids: np.ndarray
    lengths: np.ndarray
    times: np.ndarray
    has: np.ndarray
    hazards: np.ndarray
    events: np.ndarray

    @classmethod
    def draw(cls, patients: int, *, seed: int = 0, most_visits: int = 12) -> KnownHazards:
        """So many patients of 2 to ``most_visits`` visits, if the event does not end them."""
        random = np.random.default_rng(seed)
        lengths = random.integers(2, most_visits + 1, patients)
        has = random.random((patients, most_visits, CODES)) < np.linspace(0.2, 0.02, CODES)
        has[..., -1] |= ~has.any(-1)  # a visit has a code
        effect = has[..., : len(EFFECTS)] @ EFFECTS
        before = np.concatenate([np.zeros((patients, 1)), effect[:, :-1]], 1)
        hazards = 1 / (1 + np.exp(-(BASE + effect + before / 2)))
        event_next = random.random(hazards.shape) < hazards
        # the event at visit t + 1 must lie within the record
        event_next &= np.arange(most_visits) < (lengths - 1)[:, None]
        events = event_next.any(1)
        kept = np.where(events, event_next.argmax(1) + 1, lengths)
        real = np.arange(most_visits) < kept[:, None]
        starts = np.datetime64("2015-01-01", "us") + random.integers(0, 1000, patients) * DAY
        gaps = random.integers(10, 60, (patients, most_visits)).cumsum(1)
        return cls(
            subject_ids=np.arange(patients) + 1000,
            lengths=kept,
            times=(starts[:, None] + gaps * DAY)[real],
            has=has[real],
            hazards=hazards[real],
            events=events,
        )

    def store(self, folder: Path, **options) -> EventStore:
        """A store of them; the event is a visit of its own 20 days after the last one."""
        visit, code = np.nonzero(self.has)
        patient = np.repeat(np.arange(len(self.lengths)), self.lengths)
        last = np.cumsum(self.lengths) - 1
        ill = np.flatnonzero(self.events)
        names = [f"C{i:02d}" for i in range(CODES)] + [EVENT]
        part = PartWriter(folder / "part")
        part.add(
            SubjectChunk(
                subject_ids=self.subject_ids,
                event_subject=np.concatenate([patient[visit], ill]),
                event_times=np.concatenate([self.times[visit], self.times[last[ill]] + 20 * DAY]),
                event_codes=np.concatenate([code, np.full(len(ill), CODES)]),
                chunk_codes=names,
            )
        )
        part.finish()
        return write_store(folder / "store", [folder / "part"], source={"kind": "test"}, **options)

    def loss(self, patients: np.ndarray) -> float:
        """The mean negative log-likelihood of the true hazards; a censored patient's last visit
        says nothing."""
        nll = -np.log1p(-self.hazards)
        last = np.cumsum(self.lengths) - 1
        nll[last] = np.where(self.events, -np.log(self.hazards[last]), 0)
        starts = np.cumsum(self.lengths) - self.lengths
        return float(np.add.reduceat(nll, starts)[patients].mean())
