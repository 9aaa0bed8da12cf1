"""Records as a ``torch.utils.data.Dataset`` whose batches are packed or padded."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from ..arrays import selection
from ..batch import PackedVisits
from .packed import packed_batch
from .padded import PaddedBatch, padded_batch
from .records import EventRecords


class PatientDataset(Dataset[int]):
    """Some patients of ``records`` (all, where ``patients`` is None): their indices, in that order,
    or one boolean for each patient of the records.

    An item is a patient's index into the records; :meth:`collate` (packed) and
    :meth:`collate_padded` cut the batch from the flat arrays in one go, so that a worker handles no
    patient one by one.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from ehrseq_fast.data import EventRecords, Vocabulary
        >>> records = EventRecords(
        ...     codes=np.array([1, 2, 1], np.int32), visit_offsets=np.array([0, 2, 3]),
        ...     patient_offsets=np.array([0, 1, 2]),
        ...     visit_days=np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"),
        ...     person_ids=np.array([7, 8]), event_times=np.array([0, 0]),
        ...     event_indicators=np.array([1, 0], np.uint8),
        ...     vocabulary=Vocabulary(np.array([0, 40, 41]), ("", "a", "b")))
        >>> data = PatientDataset(records)
        >>> for batch in DataLoader(data, batch_size=2, collate_fn=data.collate):
        ...     print(batch)
        PackedVisits(patients=2, visits=2, codes=3, distinct_codes=2, max_visits=1, device=cpu)

    Raises:
        ValueError: a mask of another length, an array of another shape.
        IndexError: if an index is not that of a patient.
        TypeError: neither integers nor booleans.
    """

    def __init__(
        self,
        records: EventRecords,
        patients: ArrayLike | None = None,
        *,
        with_time_features: bool = False,
    ) -> None:
        self.records = records
        self.with_time_features = with_time_features
        n = records.n_patients
        if patients is None:
            self.patients = np.arange(n)
        else:
            self.patients = selection("patients", patients, n, "patients of these records")

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> int:
        return int(self.patients[operator.index(index)])

    def collate(self, patients: Sequence[int]) -> PackedVisits:
        """``collate_fn`` for batches with nothing padded."""
        return packed_batch(self.records, patients, with_time_features=self.with_time_features)

    def collate_padded(self, patients: Sequence[int]) -> PaddedBatch:
        """``collate_fn`` for padded batches."""
        return padded_batch(self.records, patients)
