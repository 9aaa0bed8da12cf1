"""Loading batches of a store: packed straight from its files, against a data set that reads one
patient at a time.

The records are the real ones, many times over, in a store on disk. ``cold`` rows begin with none of
the store's files in memory: their pages are given back to the system (``posix_fadvise``, which is
timed too), and that they are gone is checked (``mincore``). Of a store on a file system in memory
nothing can be measured cold. Each run opens the store anew, plans an epoch and goes through all of
its batches in this process.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ehrseq_fast import backend
from ehrseq_fast.data import (
    EventStore,
    Outcomes,
    PartWriter,
    PatientDataset,
    SubjectChunk,
    TokenBudgetSampler,
    loader,
    write_store,
)
from ehrseq_fast.data.tasks import Attrition

from .cases import Case, Missing, Tensors, Variant
from .jobs import Benchmark, Job, Settings, of_case
from .workloads import eunomia_records

OPERATION, EPOCH = "loading batches", "loading an epoch"
COPIES, PATIENTS, BATCH_SIZE = 20, 512, 256
OURS, PLAIN = "packed, from the store", "padded, patient by patient"
COLD, CACHED = "from disk, nothing in memory", "from the page cache"


@cache
def store_folder(copies: int) -> Path:
    """A store of the real records so many times over; removed when Python ends."""
    records = eunomia_records()
    temporary = tempfile.TemporaryDirectory(prefix="ehrseq_fast_loading_")
    _REMOVED_AT_EXIT.append(temporary)
    folder = Path(temporary.name)
    names = [f"{concept}" for concept in records.vocabulary.concept_ids.tolist()]
    subject = np.repeat(np.arange(records.n_patients), records.visits_per_patient)
    per_visit = records.codes_per_visit
    part = PartWriter(folder / "part", visit_rule="day")
    for copy in range(copies):
        part.add(
            SubjectChunk(
                subject_ids=np.arange(records.n_patients) + copy * records.n_patients,
                event_subject=np.repeat(subject, per_visit),
                event_times=np.repeat(records.visit_days, per_visit).astype("M8[us]"),
                event_codes=records.codes.astype(np.int64),
                chunk_codes=names,
            )
        )
    part.finish()
    write_store(folder / "store", [folder / "part"], source={"kind": "benchmark"})
    return folder / "store"


_REMOVED_AT_EXIT: list[tempfile.TemporaryDirectory[str]] = []


def outcomes_of(store: EventStore) -> Outcomes:
    """All visits of everybody, the event after the last of every third patient."""
    n = store.n_patients
    lengths = np.diff(store.patient_offsets)
    ends = store.visit_times[store.patient_offsets[1:] - 1]
    return Outcomes(
        patients=np.arange(n),
        n_visits=lengths,
        entry_times=np.zeros(n, np.int64),
        event_times=lengths - 1,
        event_indicators=(np.arange(n) % 3 == 0).astype(np.uint8),
        index_times=store.visit_times[store.patient_offsets[:-1]],
        risk_starts=store.visit_times[store.patient_offsets[:-1]],
        end_times=ends + np.timedelta64(1, "D"),
        attrition=Attrition((), n // 3),
    )


class PatientByPatient(Dataset[Any]):
    """What data sets of EHR repositories do: one item is one patient, as tensors."""

    def __init__(self, store: EventStore, outcomes: Outcomes) -> None:
        self.store, self.outcomes = store, outcomes

    def __len__(self) -> int:
        return len(self.outcomes)

    def __getitem__(self, row: int) -> dict[str, Any]:
        store, outcomes = self.store, self.outcomes
        first = int(store.patient_offsets[outcomes.patients[row]])
        last = first + int(outcomes.n_visits[row])
        offsets = store.visit_offsets[first : last + 1]
        days = (outcomes.end_times[row] - store.visit_times[first:last]).astype(np.int64) / 86_400e6
        return {
            "visits": [
                torch.from_numpy(store.vocabulary[store.codes[begin:end]])
                for begin, end in pairwise(offsets.tolist())
            ],
            "days_to_end": torch.from_numpy(days.astype(np.float32)),
            "event_time": int(outcomes.event_times[row]),
            "event_indicator": int(outcomes.event_indicators[row]),
        }


def collate(patients: Sequence[dict[str, Any]]) -> Tensors:
    """Padded codes, days to the end, event times and indicators."""
    most = max(len(patient["visits"]) for patient in patients)
    widest = max(len(codes) for patient in patients for codes in patient["visits"])
    codes = torch.zeros(len(patients), most, widest, dtype=torch.long)
    days = torch.zeros(len(patients), most)
    for i, patient in enumerate(patients):
        days[i, : len(patient["visits"])] = patient["days_to_end"]
        for j, visit in enumerate(patient["visits"]):
            codes[i, j, : len(visit)] = visit
    times = torch.tensor([patient["event_time"] for patient in patients])
    return codes, days, times, torch.tensor([patient["event_indicator"] for patient in patients])


def as_padded(batches: Sequence[Any]) -> list[Tensor]:
    """All batches' tensors in the form of :func:`collate`."""
    tensors: list[Tensor] = []
    for batch in batches:
        if isinstance(batch, tuple):
            tensors += batch
            continue
        codes, _, _ = batch.to_padded()
        days = batch.pad(batch.visit_targets["days_to_end"])
        tensors += [codes, days, batch.event_times, batch.event_indicators]
    return tensors


def case(n_patients: int = PATIENTS, batch_size: int = BATCH_SIZE) -> Case:
    """So many patients, in batches: packed, and padded patient by patient."""
    store = EventStore(store_folder(1))
    outcomes = outcomes_of(store)
    order = np.random.default_rng(0).permutation(len(outcomes))[:n_patients]
    items = [part.tolist() for part in np.array_split(order, -(-len(order) // batch_size))]
    dataset, plain = PatientDataset(store, outcomes), PatientByPatient(store, outcomes)
    return Case(
        OPERATION,
        "D",
        len(order),
        "on the host",
        "int32",
        {
            PLAIN: Variant(
                lambda: list(DataLoader(plain, batch_sampler=items, collate_fn=collate)), as_padded
            ),
            OURS: Variant(lambda: list(loader(dataset, items)), as_padded, **_ours()),
        },
        tolerance=0.0,
    )


def epoch_case(copies: int = COPIES, visits_per_batch: int = 10_000) -> Case:
    """An epoch from a store that was just opened, with and without its files in memory."""
    folder = store_folder(copies)

    def epoch() -> Tensors:
        store = EventStore(folder)
        dataset = PatientDataset(store, outcomes_of(store))
        sampler = TokenBudgetSampler(dataset, visits_per_batch=visits_per_batch)
        sums = [
            (batch.n_patients, batch.n_codes, int(batch.codes.sum(dtype=torch.long)))
            for batch in loader(dataset, sampler)
        ]
        return (torch.tensor(sums),)

    def cold_epoch() -> Tensors:
        if pages_stay(folder):
            gc.collect()  # a store of an earlier epoch that is still open has its files mapped
            if stays := pages_stay(folder):
                raise RuntimeError(f"a cold epoch cannot be timed: {stays}")
        return epoch()

    kept = pages_stay(folder)
    records = eunomia_records()
    return Case(
        EPOCH,
        "D",
        copies * records.n_patients,
        "on the host",
        "int32",
        {
            CACHED: Variant(epoch, **_ours()),
            COLD: Missing(kept) if kept else Variant(cold_epoch, **_ours()),
        },
        tolerance=0.0,
        cache="cold",
    )


def pages_stay(folder: Path, seconds: float = 2.0) -> str | None:
    """Drop a folder's files from memory. Why one of them stays there, None where all are gone.

    A page that is being read or written at the moment cannot be dropped, so it is tried again.
    """
    if not hasattr(os, "posix_fadvise") or _MINCORE is None:
        return "this system cannot drop files from memory"
    tried_until = perf_counter() + seconds
    for path in sorted(folder.iterdir()):
        try:
            while not _dropped(path):
                if perf_counter() > tried_until:
                    return f"{path.name} stays in memory"
                sleep(0.005)
        except OSError as error:
            return f"this system does not say what is in memory: {error}"
    return None


def _dropped(path: Path) -> bool:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return not _pages_in_memory(file.fileno())


def _pages_in_memory(descriptor: int) -> int:
    """Of a file, told without reading from it: a read would bring them back."""
    size = os.fstat(descriptor).st_size
    if not size:
        return 0
    assert _MINCORE is not None
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        failed = _MINCORE(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(size),
            ctypes.c_void_p(pages.ctypes.data),
        )
        del view  # a mapping with views of it cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return int((pages & 1).sum())


_MINCORE = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)


def _ours() -> dict[str, Any]:
    compiled = backend.why_not_loaded("cpu") is None
    return {"backend": "cpu" if compiled else "reference", "ours": True}


def jobs(settings: Settings) -> Iterator[Job]:
    if "D" not in settings.workloads or settings.device != "cpu":
        return
    quick = settings.quick
    yield of_case(OPERATION, 1.2, lambda session: case(32 if quick else PATIENTS))
    yield of_case(EPOCH, 1.6, lambda session: epoch_case(2 if quick else COPIES))


BENCHMARK = Benchmark(jobs={"ops": jobs}, page={OPERATION: None, EPOCH: None})
