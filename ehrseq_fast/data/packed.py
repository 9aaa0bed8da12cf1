"""Packed batches straight from the flat records."""

from __future__ import annotations

from numpy.typing import ArrayLike

from ..batch import PackedVisits
from .padded import checked_patients
from .records import EventRecords


def packed_batch(
    records: EventRecords, patients: ArrayLike, *, with_time_features: bool = False
) -> PackedVisits:
    """The given patients (indices into ``records``, in that order, at least one), nothing padded.

    Args:
        records: flat records.
        patients: which of them.
        with_time_features: give the batch :meth:`EventRecords.time_features` as visit features, for
            :class:`~ehrseq_fast.models.DiscreteTimeSurvivalLSTMWithTime`.

    Raises:
        ValueError: if no patient is given.
        IndexError: if an index is not that of a patient.
    """
    return PackedVisits.from_flat(
        records.codes,
        records.visit_offsets,
        records.patient_offsets,
        checked_patients(records, patients),
        vocab_size=len(records.vocabulary),
        event_times=records.event_times,
        event_indicators=records.event_indicators,
        visit_features=records._time_features if with_time_features else None,
    )
