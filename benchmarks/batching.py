"""Building one batch of 256 real patients: packed, against padded collates.

The padded collates make the triple ``visit_codes [B, V, C], visit_mask, sequence_mask``; the packed
batch holds the same and the transposed code index besides. Before anything is timed, all are found
to hold the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ehrseq_fast import PackedVisits, backend
from ehrseq_fast.data import EventRecords, PaddedBatch, padded_batch

from .cases import Case, Variant
from .jobs import Benchmark, Job, Settings, of_case
from .workloads import eunomia_records

BATCH_SIZE = 256
OPERATION = "building a batch"
OURS = "packed, from flat arrays"
LOOPS = "padded, Python loops"
LISTS = "padded, Python lists"
ARRAYS = "padded, NumPy"
Patients = Sequence[Sequence[Sequence[int]]]
Triple = tuple[Tensor, Tensor, Tensor]


def as_lists(records: EventRecords, patients: np.ndarray) -> list[list[list[int]]]:
    """The patients as nested lists: visits, and the codes of each."""
    return [
        [
            records.codes[records.visit_offsets[v] : records.visit_offsets[v + 1]].tolist()
            for v in range(records.patient_offsets[p], records.patient_offsets[p + 1])
        ]
        for p in patients
    ]


def collate_loops(patients: Patients) -> Triple:
    """Nested loops that fill padded tensors: what EHR repositories do."""
    max_visits = max(len(visits) for visits in patients)
    max_codes = max(len(codes) for visits in patients for codes in visits)
    visit_codes = torch.zeros(len(patients), max_visits, max_codes, dtype=torch.long)
    visit_mask = torch.zeros(len(patients), max_visits, max_codes, dtype=torch.bool)
    sequence_mask = torch.zeros(len(patients), max_visits, dtype=torch.bool)
    for i, visits in enumerate(patients):
        for j, codes in enumerate(visits):
            visit_codes[i, j, : len(codes)] = torch.tensor(codes)
            visit_mask[i, j, : len(codes)] = True
        sequence_mask[i, : len(visits)] = True
    return visit_codes, visit_mask, sequence_mask


def collate_lists(patients: Patients) -> Triple:
    """Pads the lists themselves and makes one tensor of them: no tensor call in any loop."""
    max_visits = max(len(visits) for visits in patients)
    max_codes = max(len(codes) for visits in patients for codes in visits)
    no_visit = [0] * max_codes
    visit_codes = torch.tensor(
        [
            [[*codes, *no_visit[len(codes) :]] for codes in visits]
            + [no_visit] * (max_visits - len(visits))
            for visits in patients
        ]
    )
    lengths = torch.tensor([len(visits) for visits in patients])
    return visit_codes, visit_codes != 0, torch.arange(max_visits) < lengths[:, None]


def case(batch_size: int = BATCH_SIZE) -> Case:
    """Each way to build the same batch, compared as padded triples."""
    return Case(
        OPERATION,
        "D",
        batch_size,
        "on the host",
        "int32",
        {name: Variant(build, as_triple, **kind) for name, build, kind in _builders(batch_size)},
        tolerance=0.0,
    )


def _builders(batch_size: int) -> Iterator[tuple[str, Callable[[], Any], dict[str, Any]]]:
    records = eunomia_records()
    flat = (records.codes, records.visit_offsets, records.patient_offsets)
    vocab_size = len(records.vocabulary)
    chosen = np.random.default_rng(0).permutation(records.n_patients)[:batch_size]
    lists = as_lists(records, chosen)
    triple = collate_lists(lists)
    compiled = backend.why_not_loaded("cpu") is None
    here: dict[str, Any] = {"backend": "cpu" if compiled else "reference", "ours": True}

    def from_flat() -> PackedVisits:
        return PackedVisits.from_flat(*flat, chosen, vocab_size=vocab_size)

    yield LOOPS, lambda: collate_loops(lists), {}
    yield LISTS, lambda: collate_lists(lists), {}
    yield ARRAYS, lambda: padded_batch(records, chosen), {}
    yield OURS, from_flat, here
    yield (
        "packed, from lists",
        lambda: PackedVisits.from_lists(lists, vocab_size=vocab_size),
        here,
    )
    yield (
        "packed, from padded tensors",
        lambda: PackedVisits.from_padded(*triple, vocab_size=vocab_size),
        here,
    )
    yield "packed, NumPy", from_flat, {"backend": "reference", "ours": True}


def as_triple(batch: Any) -> Triple:
    if isinstance(batch, PackedVisits):
        return batch.to_padded()
    if isinstance(batch, PaddedBatch):
        return batch.visit_codes, batch.visit_mask, batch.sequence_mask
    return batch


def jobs(settings: Settings) -> Iterator[Job]:
    if "D" in settings.workloads and settings.device == "cpu":
        size = 32 if settings.quick else BATCH_SIZE
        yield of_case(OPERATION, 6, lambda session: case(size))


BENCHMARK = Benchmark(jobs={"ops": jobs}, page={OPERATION: None})
