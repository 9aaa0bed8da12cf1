"""What a set of records looks like, and how much of it padding would be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..arrays import integer
from .records import EventRecords

MOST_PATIENTS = 2**31 - 1


@dataclass(frozen=True)
class Description:
    """The figures of :func:`describe`; ``str()`` lays them out."""

    patients: int
    events: int
    left_out: dict[str, int]
    visits: int
    visits_mean: float
    visits_p90: float
    visits_max: int
    codes: int
    codes_mean: float
    codes_max: int
    vocabulary: int
    batch_size: int
    real_visits: float
    real_codes: float

    def __str__(self) -> str:
        lines = [
            f"patients            {self.patients:,} ({self.events:,} with the event)",
            f"visits              {self.visits:,}; per patient mean {self.visits_mean:.1f}, "
            f"p90 {self.visits_p90:.0f}, max {self.visits_max}",
            f"codes               {self.codes:,}; per visit mean {self.codes_mean:.2f}, "
            f"max {self.codes_max}",
            f"vocabulary          {self.vocabulary - 1:,} concepts and padding",
            f"in batches of {self.batch_size:<5} {self.real_visits:.1%} of the visit slots and "
            f"{self.real_codes:.1%} of the code slots are real",
        ]
        lines += [f"left out            {n:,} {what}" for what, n in self.left_out.items() if n]
        return "\n".join(lines)


def describe(records: EventRecords, *, batch_size: int = 64, seed: int = 0) -> Description:
    """Count patients, visits and codes, and the share of real slots in shuffled padded batches.

    The shares are over one pass in batches of ``batch_size``: real entries over padded slots, each
    batch padded to its own maxima. Of no patients, means and shares are NaN.

    Raises:
        ValueError: a ``batch_size`` below 1.
    """
    integer("batch_size", batch_size, 1, MOST_PATIENTS)
    lengths, widths = records.visits_per_patient, records.codes_per_visit
    if not records.n_patients:
        return _no_patients(records, batch_size)
    widest = np.maximum.reduceat(widths, records.patient_offsets[:-1])
    order = np.random.default_rng(seed).permutation(records.n_patients)
    starts = np.arange(0, len(order), batch_size)
    in_batch = np.diff(np.append(starts, len(order)))
    visit_slots = in_batch * np.maximum.reduceat(lengths[order], starts)
    code_slots = visit_slots * np.maximum.reduceat(widest[order], starts)
    return Description(
        patients=records.n_patients,
        events=int(records.event_indicators.sum()),
        left_out=dict(records.left_out),
        visits=records.n_visits,
        visits_mean=float(lengths.mean()),
        visits_p90=float(np.percentile(lengths, 90)),
        visits_max=int(lengths.max()),
        codes=int(widths.sum()),
        codes_mean=float(widths.mean()),
        codes_max=int(widths.max()),
        vocabulary=len(records.vocabulary),
        batch_size=batch_size,
        real_visits=float(lengths.sum() / visit_slots.sum()),
        real_codes=float(widths.sum() / code_slots.sum()) if code_slots.any() else math.nan,
    )


def _no_patients(records: EventRecords, batch_size: int) -> Description:
    return Description(
        patients=0,
        events=0,
        left_out=dict(records.left_out),
        visits=0,
        visits_mean=math.nan,
        visits_p90=math.nan,
        visits_max=0,
        codes=0,
        codes_mean=math.nan,
        codes_max=0,
        vocabulary=len(records.vocabulary),
        batch_size=batch_size,
        real_visits=math.nan,
        real_codes=math.nan,
    )
