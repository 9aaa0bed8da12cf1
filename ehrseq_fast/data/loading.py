"""A ``DataLoader`` for the batches of a :class:`PatientDataset`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..arrays import integer
from .dataset import PatientDataset


def loader(
    dataset: PatientDataset,
    sampler: Iterable[list[int]],
    *,
    workers: int = 0,
    pin_memory: bool | None = None,
    start_method: str | None = None,
    prefetch_batches: int = 4,
    read_ahead: bool = True,
) -> DataLoader[Any]:
    """Batches of packed patients in the order of a batch sampler.

    Workers stay alive between epochs, and the sampler is asked in this process alone: its
    ``set_epoch`` and ``set_position`` act on the next iteration with any number of workers. Nothing
    is drawn from torch's generator.

    Args:
        dataset: of an :class:`EventStore` or of :class:`EventRecords`.
        sampler: gives the items of each batch, a :class:`TokenBudgetSampler` for example; a batch
            may have none.
        workers: processes that build batches; 0: this one.
        pin_memory: batches in page-locked memory, for ``batch.to(device, non_blocking=True)``;
            None: where there is a GPU.
        start_method: ``"spawn"``, ``"fork"`` or ``"forkserver"``; None: Python's default. A process
            that has used a GPU must not fork.
        prefetch_batches: how many batches each worker builds ahead.
        read_ahead: :meth:`PatientDataset.prefetch`, once, now.

    Raises:
        ValueError, TypeError: options outside their range.

    Example:
        >>> import numpy as np
        >>> from ehrseq_fast.data import EventRecords, TokenBudgetSampler, Vocabulary
        >>> records = EventRecords(
        ...     codes=np.array([1, 2, 1], np.int32), visit_offsets=np.array([0, 2, 3]),
        ...     patient_offsets=np.array([0, 1, 2]),
        ...     visit_days=np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"),
        ...     person_ids=np.array([7, 8]), event_times=np.array([0, 0]),
        ...     event_indicators=np.array([1, 0], np.uint8),
        ...     vocabulary=Vocabulary(np.array([0, 40, 41]), ("", "a", "b")))
        >>> data = PatientDataset(records)
        >>> sampler = TokenBudgetSampler(data, visits_per_batch=8)
        >>> [batch.n_patients for batch in loader(data, sampler)]
        [2]
    """
    workers = integer("workers", workers, 0, 4096)
    ahead = integer("prefetch_batches", prefetch_batches, 1, 4096)
    if read_ahead:
        dataset.prefetch()
    return DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=dataset.collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=ahead if workers else None,
        multiprocessing_context=start_method if workers else None,
        generator=torch.Generator(),  # or each iteration would draw from torch's own
    )
