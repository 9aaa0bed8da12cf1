"""Records as a ``torch.utils.data.Dataset`` whose batches are packed or padded."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from ..arrays import kind_of, selection
from ..batch import PackedVisits
from .packed import packed_batch
from .padded import PaddedBatch, padded_batch
from .records import EventRecords
from .store import EventStore
from .store_batches import StoreBatches
from .tasks import Outcomes


class Task(Protocol):
    """What makes outcomes of a store: a :class:`FirstEvent`, :class:`Labels`, or one's own."""

    def apply(self, store: EventStore, split: str | None = None) -> Outcomes: ...


class PatientDataset(Dataset[Any]):
    """Patients of an :class:`EventStore` with the outcomes of a task, or of :class:`EventRecords`.

    ``PatientDataset(store, task, split)``: an item is a row of the task's outcomes. Batches are cut
    from the memory-mapped files in one go (``__getitems__``, which a ``DataLoader`` calls with a
    batch's indices), as :class:`~ehrseq_fast.PackedVisits` with ``event_times``,
    ``event_indicators``, of competing outcomes ``event_types``, ``targets["patient"]`` (the index
    into the store), ``["entry_times"]`` and, of label files, ``["labels"]``, and
    ``visit_targets["days_to_end"]``. Codes are those of
    the store's vocabulary; a visit's codes that the vocabulary does not tell apart (the unknown
    ones) are one code. No indices give a batch without patients. :func:`loader` makes a right
    ``DataLoader``.

    ``PatientDataset(records, patients)``: an item is a patient's index into the records;
    :meth:`collate` (packed) and :meth:`collate_padded` cut the batch from the flat arrays in one
    go.

    Args:
        records: an :class:`EventStore` or :class:`EventRecords`.
        patients: of a store, a task, :class:`Outcomes`, or else patients without outcomes, whose
            visits are all seen; of records, patients alone: their indices, in that order, or one
            boolean for each patient. None: all of them; of a store, all who have a visit.
        split: of a store, the split. :class:`Outcomes` are those of a split already.
        task: the same as ``patients``, by another name.
        with_time_features: give batches :meth:`EventRecords.time_features` as visit features, for
            :class:`~ehrseq_fast.models.DiscreteTimeSurvivalLSTMWithTime`; of a store, days with
            fractions.
        with_visits: of a store, give batches ``visit_targets["visit"]``, each visit's index in it.
        code_map: of a store, integers ``[n_codes]``: the model's code of each of its dictionary's,
            in place of its own vocabulary: that of another store, say, on which the model was
            trained.
        vocab_size: what the codes of ``code_map`` are below.

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
        ValueError: a mask of another length, an array of another shape, outcomes of another store,
            no such split, and what the task's ``apply`` raises.
        IndexError: if an index is not that of a patient.
        TypeError: neither integers nor booleans.
    """

    def __init__(
        self,
        records: EventRecords | EventStore,
        patients: ArrayLike | Task | Outcomes | None = None,
        split: str | None = None,
        *,
        task: Task | Outcomes | None = None,
        with_time_features: bool = False,
        with_visits: bool = False,
        code_map: ArrayLike | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if task is not None:
            if patients is not None:
                raise TypeError("task: expected none beside patients, got both")
            patients = task
        self.records = records
        self.with_time_features = with_time_features
        self.outcomes: Outcomes | None = None
        self._batches: StoreBatches | None = None
        if isinstance(records, EventStore):
            self.patients = self._choose(records, patients, split)
            self._batches = StoreBatches(
                records,
                self.outcomes,
                self.patients,
                with_time_features=with_time_features,
                with_visits=with_visits,
                code_map=code_map,
                vocab_size=vocab_size,
            )
            return
        if not isinstance(records, EventRecords):
            raise TypeError(f"expected an EventStore or EventRecords, got {kind_of(records)}")
        options = {
            "split": split,
            "with_visits": with_visits or None,
            "code_map": code_map,
            "vocab_size": vocab_size,
        }
        for name, option in options.items():
            if option is not None:
                raise ValueError(f"{name}: expected none with EventRecords, only with a store")
        n = records.n_patients
        if patients is None:
            self.patients = np.arange(n)
        else:
            self.patients = selection("patients", patients, n, "patients of these records")

    def _choose(self, store: EventStore, chosen: Any, split: str | None) -> NDArray[np.int64]:
        if hasattr(chosen, "apply"):
            chosen = chosen.apply(store, split)
        elif chosen is not None and split is not None:
            raise ValueError(
                "split: expected None beside outcomes or patients, which are chosen already, got "
                f"{split!r}"
            )
        if isinstance(chosen, Outcomes):
            self.outcomes = chosen
            return chosen.patients
        if chosen is not None:
            return selection("patients", chosen, store.n_patients, "patients of the store")
        of_split = store.patients_of(split)
        offsets = store.patient_offsets
        return of_split[offsets[of_split + 1] > offsets[of_split]]

    @classmethod
    def of_records(
        cls,
        store: EventStore,
        *,
        code_map: ArrayLike | None = None,
        vocab_size: int | None = None,
        with_time_features: bool = False,
        with_visits: bool = False,
    ) -> PatientDataset:
        """Whole records without outcomes: item i is patient i of the store. Those without a visit
        are refused when they are asked for."""
        return cls(
            store,
            np.arange(store.n_patients),
            code_map=code_map,
            vocab_size=vocab_size,
            with_time_features=with_time_features,
            with_visits=with_visits,
        )

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> Any:
        """Of records a patient's index; of a store a batch of one patient."""
        place = operator.index(index)
        if self._batches is None:
            return int(self.patients[place])
        if not -len(self) <= place < len(self):
            raise IndexError(f"index: expected one of {len(self)} items, got {place}")
        return self._batches.pack(np.array([place % len(self)]))

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """The items of a batch at once: of a store packed, of records patients' indices."""
        return [self[index] for index in indices] if self._batches is None else self.batch(indices)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> PackedVisits:
        """One packed batch of these items, in that order.

        Raises:
            IndexError: a number that is not that of an item.
        """
        if self._batches is None:
            return self.collate([self[index] for index in indices])
        rows = np.array(indices, np.int64) if len(indices) else np.zeros(0, np.int64)
        outside = (rows < 0) | (rows >= len(self))
        if outside.any():
            raise IndexError(
                f"indices: expected numbers in [0, {len(self)}), got {rows[outside][0]} "
                f"({int(outside.sum())} outside)"
            )
        return self._batches.pack(rows)

    def collate(self, patients: Any) -> PackedVisits:
        """``collate_fn`` for batches with nothing padded."""
        if isinstance(patients, PackedVisits):
            return patients
        records = self.records
        if isinstance(records, EventRecords):
            return packed_batch(records, patients, with_time_features=self.with_time_features)
        return PackedVisits.cat(patients)

    def collate_padded(self, patients: Any) -> PaddedBatch:
        """``collate_fn`` for padded batches. Those of a store need ``with_time_features`` and a
        task."""
        if isinstance(self.records, EventRecords):
            return padded_batch(self.records, patients)
        batch = self.collate(patients)
        if batch.visit_features is None or batch.event_times is None:
            raise ValueError(
                "collate_padded: expected a data set with with_time_features=True and a task"
            )
        assert batch.event_indicators is not None
        codes, code_mask, visit_mask = batch.to_padded()
        return PaddedBatch(
            codes,
            code_mask,
            visit_mask,
            batch.pad(batch.visit_features),
            batch.event_times,
            batch.event_indicators.byte(),
        )

    def visits_per_item(self) -> NDArray[np.int64]:
        """int64 ``[len]``: how many visits each item has."""
        if self._batches is not None:
            return self._batches.n_visits
        assert isinstance(self.records, EventRecords)
        return self.records.visits_per_patient[self.patients]

    def codes_per_item(self) -> NDArray[np.int64]:
        """int64 ``[len]``: how many codes each item has; of a store before those that its
        vocabulary does not tell apart become one."""
        if self._batches is not None:
            return self._batches.codes_per_item()
        assert isinstance(self.records, EventRecords)
        first = self.records.patient_offsets[self.patients]
        last = self.records.patient_offsets[self.patients + 1]
        return self.records.visit_offsets[last] - self.records.visit_offsets[first]

    def prefetch(self) -> bool:
        """Have a store's files read ahead in the background, where half of the free memory holds
        them, so that the first batches do not wait for each of their pages; whether that was asked
        of the system."""
        return self._batches is not None and self._batches.prefetch()
