"""Padded batches, the form that most EHR models take: patients x visits x codes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..arrays import as_array, got, selection
from .records import EventRecords, spans


class PaddedBatch(NamedTuple):
    """B patients, padded to the most visits V and the most codes per visit C among them.

    Attributes:
        visit_codes: int64 ``[B, V, C]``, 0 on padding; the codes of a visit come first.
        visit_mask: bool ``[B, V, C]``, true where there is a code.
        sequence_mask: bool ``[B, V]``, true where there is a visit; a patient's visits come first.
        time_features: float32 ``[B, V, 3]``, see :meth:`EventRecords.time_features`; 0 on padding.
        event_times: int64 ``[B]``, see :class:`EventRecords`.
        event_indicators: uint8 ``[B]``.
    """

    visit_codes: Tensor
    visit_mask: Tensor
    sequence_mask: Tensor
    time_features: Tensor
    event_times: Tensor
    event_indicators: Tensor


def padded_batch(records: EventRecords, patients: ArrayLike) -> PaddedBatch:
    """The given patients (indices into ``records``, in that order, at least one) as one batch.

    Raises:
        ValueError: if no patient is given.
        IndexError: if an index is not that of a patient.
    """
    chosen = checked_patients(records, patients)
    starts = records.patient_offsets[chosen]
    row, column, visit = spans(starts, records.patient_offsets[chosen + 1] - starts)
    first_code = records.visit_offsets[visit]
    of_visit, slot, code = spans(first_code, records.visit_offsets[visit + 1] - first_code)

    n_visits, n_codes = int(column.max()) + 1, int(slot.max(initial=-1)) + 1
    sequence_mask = np.zeros((len(chosen), n_visits), bool)
    sequence_mask[row, column] = True
    visit_codes = np.zeros((len(chosen), n_visits, n_codes), np.int64)
    visit_codes[row[of_visit], column[of_visit], slot] = records.codes[code]
    time_features = np.zeros((len(chosen), n_visits, 3), np.float32)
    time_features[row, column] = records._time_features[visit]
    codes = torch.from_numpy(visit_codes)
    return PaddedBatch(
        visit_codes=codes,
        visit_mask=codes != 0,
        sequence_mask=torch.from_numpy(sequence_mask),
        time_features=torch.from_numpy(time_features),
        event_times=torch.from_numpy(records.event_times[chosen]),
        event_indicators=torch.from_numpy(records.event_indicators[chosen]),
    )


def checked_patients(records: EventRecords, patients: ArrayLike) -> NDArray[np.int64]:
    """Indices of patients, as int64, or those of a boolean mask; refused where they are not."""
    chosen = as_array("patients", patients)
    if chosen.ndim == 1 and chosen.dtype == np.bool_:
        chosen = selection("patients", patients, records.n_patients, "patients")
    if chosen.ndim != 1 or len(chosen) == 0:
        raise ValueError(
            f"patients: expected a list of at least one, got shape {list(chosen.shape)}"
        )
    if chosen.dtype.kind not in "iu":
        raise TypeError(f"patients: expected integer indices, got {got(chosen)}")
    for name in ("codes", "visit_offsets", "patient_offsets"):
        as_array(name, getattr(records, name))  # a file that became shorter since it was opened
    wrong = (chosen < 0) | (chosen >= records.n_patients)
    if wrong.any():
        raise IndexError(
            f"patients: expected indices in [0, {records.n_patients}), got {chosen[wrong][0]} "
            f"({int(wrong.sum())} outside)"
        )
    return chosen.astype(np.int64)
