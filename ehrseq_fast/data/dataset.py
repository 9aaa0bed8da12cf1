"""Records as a ``torch.utils.data.Dataset`` whose batches are padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from .padded import PaddedBatch, padded_batch
from .records import EventRecords


class PatientDataset(Dataset[int]):
    """Some patients of ``records`` (all, where ``patients`` is None).

    An item is a patient's index into the records; :meth:`collate` cuts the batch from the flat
    arrays in one go, so that a worker handles no patient one by one.

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
        ...     print(batch.visit_codes.tolist())
        [[[1, 2]], [[1, 0]]]
    """

    def __init__(self, records: EventRecords, patients: ArrayLike | None = None) -> None:
        self.records = records
        chosen = np.arange(records.n_patients) if patients is None else np.asarray(patients)
        self.patients = chosen.astype(np.int64)

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> int:
        return int(self.patients[index])

    def collate(self, patients: Sequence[int]) -> PaddedBatch:
        return padded_batch(self.records, patients)
