"""Scores of every visit of a store, as a parquet file, in memory that does not grow with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..batch import PackedVisits
from ..data import EventStore, Outcomes, PatientDataset
from ..optional import need
from .config import DistributedConfig
from .data import unobserved_horizons
from .distributed import Processes, started
from .files import replacing
from .model import predictions
from .run import Run

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

# Visits of one batch, which is one row group of the file: fixed, so that neither the numbers nor
# the file depend on how many processes there are.
VISITS_PER_CHUNK = 32_768


def predict(
    run: Run | str | Path,
    store: EventStore | str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> int:
    """Score every visit of a store's patients, from that visit and those before it.

    The file has a row for each visit, in the store's order: ``subject_id`` int64, ``time``
    timestamp[us], and, as far as the model gives them, ``hazard`` float32 (the probability that
    the event is at the patient's next visit, or follows it before another visit), of competing
    outcomes ``hazard_1``, ``hazard_2``, ... in the task's order, and ``risk_30d``, ``risk_90d``,
    ... float32, the risk within so many days. Visits after a patient's outcome are
    scored too: what is scored are records, not the task's population.

    A store of other patients is scored by its codes: those that the training split did not have
    count as the unknown code. A warning tells how many they are, and where the store's visits are
    by another rule than those of training, or a horizon is longer than anybody was observed there.
    Under ``torchrun`` the processes share the work; the file is the
    same, byte for byte, for any number of them. It appears whole or not at all.

    Args:
        run: a run that has ended, or its folder.
        store: the records, or their folder.
        out: the file to write.
        split: whose visits; None: all patients'.
        device: as in :class:`RunConfig`.
        overwrite: replace ``out``.
        progress: show a progress bar.

    Returns:
        The number of rows.

    Raises:
        FileExistsError: ``out`` exists, without ``overwrite``.
        FileNotFoundError, ValueError: no finished run, no store, no such split.
        ImportError: packages of the extras ``train`` and ``meds`` are missing.
    """
    parquet = need("pyarrow.parquet", "meds", "predict")
    out = Path(out)
    with ExitStack() as stack:
        processes = stack.enter_context(started(DistributedConfig(), device))
        if out.is_dir():
            raise IsADirectoryError(f"{out}: expected a file to write, got a folder")
        run = run if isinstance(run, Run) else Run.open(run)
        records = store if isinstance(store, EventStore) else EventStore(store)
        scorer = Scorer(run, records, processes.device)
        patients = records.patients_of(split)
        lengths = records.patient_offsets[patients + 1] - records.patient_offsets[patients]
        chunks = list(chunks_of(patients, lengths, VISITS_PER_CHUNK))

        def refuse() -> None:
            if out.exists() and not overwrite:
                raise FileExistsError(f"{out}: exists; --overwrite (overwrite=True) replaces it")
            out.parent.mkdir(parents=True, exist_ok=True)
            if notes := cautions(run, records):
                warnings.warn("; ".join(notes), stacklevel=4)

        processes.on_main(refuse)
        part = out.with_name(f"{out.name}.{processes.rank}.part.tmp")
        mine = chunks[processes.rank :: processes.world_size]
        if processes.world_size == 1:
            with replacing(out) as temporary:
                _write(parquet, temporary, scorer, mine, progress)
        else:
            stack.callback(part.unlink, missing_ok=True)
            _write(parquet, part, scorer, mine, progress and processes.is_main)
            processes.wait()
            processes.on_main(lambda: _merge(parquet, out, len(chunks), processes, scorer))
        return int(sum(chunk.n_visits for chunk in chunks))


@dataclass(frozen=True)
class Chunk:
    """What is scored together.

    Attributes:
        items: int64: patients, or rows of a task, each with a visit.
        n_visits: of all of them.
    """

    items: Ints
    n_visits: int


def chunks_of(items: Ints, lengths: Ints, most: int) -> Iterator[Chunk]:
    """Cut items into runs of at most so many visits each (of one item any number); those without a
    visit have nothing to score.

    Example:
        >>> lengths = np.array([3, 0, 2, 9, 1])
        >>> [chunk.items.tolist() for chunk in chunks_of(np.arange(5), lengths, most=5)]
        [[0, 2], [3], [4]]
    """
    items, lengths = items[lengths > 0], lengths[lengths > 0]
    ends = np.cumsum(lengths)
    start = 0
    while start < len(items):
        before = int(ends[start] - lengths[start])
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield Chunk(items[start:stop], int(ends[stop - 1]) - before)
        start = stop


class Scorer:
    """A run's model, applied to the items of a data set.

    Args:
        run: whose model.
        store: the records.
        device: where to compute.
        outcomes: of a task; an item is then one of its rows, otherwise a patient of the store.
    """

    def __init__(
        self,
        run: Run,
        store: EventStore,
        device: torch.device,
        outcomes: Outcomes | None = None,
    ) -> None:
        self.store = store
        self.device = device
        self.model = run.model(device)
        self.config = run.config.model
        self.n_causes = run.config.n_causes
        code_map, _ = code_map_of(run, store)
        self.dataset = PatientDataset(
            store,
            np.arange(store.n_patients) if outcomes is None else outcomes,
            code_map=code_map,
            vocab_size=len(run.codes),
            with_time_features=self.config.name == "hazard_with_time",
        )

    def scores(self, items: Ints) -> tuple[Floats | None, Floats | None]:
        """Hazards ``[n_visits]`` (of competing outcomes ``[n_visits, K]``) and risks
        ``[n_visits, J]`` of the items' visits, one item after the other; None for what the model
        does not give."""
        batch = self.dataset.batch(items)
        order = rows_by_patient(batch)
        hazard, risks = (
            None if found is None else found.float().cpu().numpy()[order]
            for found in predictions(self.model, batch.to(self.device))
        )
        return hazard, risks

    @property
    def schema(self) -> Any:
        """Of the file of predictions."""
        arrow = need("pyarrow", "meds", "predict")
        fields = [("subject_id", arrow.int64()), ("time", arrow.timestamp("us"))]
        if self.config.has_causes:
            fields += [(f"hazard_{k + 1}", arrow.float32()) for k in range(self.n_causes)]
        elif self.config.has_hazard:
            fields.append(("hazard", arrow.float32()))
        if self.config.has_horizons:
            fields += [(f"risk_{days}d", arrow.float32()) for days in self.config.horizons_days]
        return arrow.schema(fields)

    def table(self, chunk: Chunk) -> Any:
        """The rows of a chunk of patients, in the store's order."""
        arrow = need("pyarrow", "meds", "predict")
        store = self.store
        hazard, risks = self.scores(chunk.items)
        starts = store.patient_offsets[chunk.items]
        lengths = store.patient_offsets[chunk.items + 1] - starts
        first = np.cumsum(lengths) - lengths
        visits = np.arange(chunk.n_visits) + np.repeat(starts - first, lengths)
        columns = [np.repeat(store.subject_ids[chunk.items], lengths), store.visit_times[visits]]
        for values in (hazard, risks):
            if values is not None:
                columns += list(np.ascontiguousarray(np.atleast_2d(values.T)))
        return arrow.table([arrow.array(column) for column in columns], schema=self.schema)


@dataclass(frozen=True)
class Scores:
    """What a model says of a task's rows, one after the other.

    Attributes:
        hazards: float32 ``[sum(n_visits)]``, of competing outcomes ``[sum(n_visits), K]``, or None.
        risks: float32 ``[sum(n_visits), J]``, or None.
        days_to_end: float64 ``[sum(n_visits)]``; see :meth:`Outcomes.days_to_end`.
    """

    hazards: Floats | None
    risks: Floats | None
    days_to_end: NDArray[np.float64]


def score_outcomes(
    run: Run,
    store: EventStore,
    outcomes: Outcomes,
    device: torch.device,
    *,
    progress: bool = False,
) -> Scores:
    """Score the visits that a task's rows see."""
    scorer = Scorer(run, store, device, outcomes)
    found = []
    with _bar(int(outcomes.n_visits.sum()), progress) as bar:
        for chunk in chunks_of(np.arange(len(outcomes)), outcomes.n_visits, VISITS_PER_CHUNK):
            found.append(scorer.scores(chunk.items))
            bar.update(chunk.n_visits)
    hazards, risks = (
        None if parts[0] is None else np.concatenate(parts) for parts in zip(*found, strict=True)
    )
    return Scores(hazards, risks, outcomes.days_to_end(store))


def rows_by_patient(batch: PackedVisits) -> Ints:
    """The row of each visit, one patient after the other: ``rows[order]`` is in the order in which
    the batch was made.

    Example:
        >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
        >>> rows_by_patient(batch).tolist()
        [1, 0, 2]
    """
    patient = batch.patient_of_row.numpy()
    return np.lexsort((batch.time_of_row.numpy(), patient))


def code_map_of(run: Run, store: EventStore) -> tuple[NDArray[np.int32], str]:
    """From the store's dictionary to the rows of the run's embedding, and what is unknown there."""
    rows = {code: row for row, code in enumerate(run.codes) if code}
    found = np.array([rows.get(code, 1) for code in store.codes_of], np.int32)
    if store.header["content_sha256"] == run.result["store_sha256"]:
        return found, ""
    unknown = int((found == 1).sum())
    said = f"{unknown:,} of {len(found):,} codes of {store.path} were not in training"
    return found, f"{said}; they count as the unknown code" if unknown else ""


def cautions(run: Run, store: EventStore) -> list[str]:
    """What to know before a run's scores of a store are trusted: codes that it does not know,
    visits of another kind, horizons that nobody was observed for."""
    trained_on = run.result.get("visit_rule", store.visit_rule)
    visits = (
        f"the visits of {store.path} are by {store.visit_rule!r}, the model was trained on visits "
        f"by {trained_on!r}: what it learnt of a visit, and of the next one, does not hold there"
    )
    notes = [
        code_map_of(run, store)[1],
        visits if trained_on != store.visit_rule else "",
        unobserved_horizons(run.config.model, run.result.get("observed_days")),
    ]
    return [note for note in notes if note]


def _bar(visits: int, shown: bool) -> Any:
    tqdm = need("tqdm", "train", "the progress bar").tqdm
    return tqdm(
        total=visits, unit=" visits", unit_scale=True, leave=False, disable=None if shown else True
    )


def _write(parquet: Any, path: Path, scorer: Scorer, chunks: list[Chunk], progress: bool) -> None:
    total = sum(chunk.n_visits for chunk in chunks)
    with parquet.ParquetWriter(path, scorer.schema) as writer, _bar(total, progress) as bar:
        for chunk in chunks:
            writer.write_table(scorer.table(chunk), row_group_size=max(1, chunk.n_visits))
            bar.update(chunk.n_visits)


def _merge(parquet: Any, out: Path, chunks: int, processes: Processes, scorer: Scorer) -> None:
    """One file from each process's row groups, which they wrote in turn."""
    with ExitStack() as stack:
        parts = [
            stack.enter_context(parquet.ParquetFile(f"{out}.{rank}.part.tmp"))
            for rank in range(processes.world_size)
        ]
        temporary = stack.enter_context(replacing(out))
        with parquet.ParquetWriter(temporary, scorer.schema) as writer:
            for chunk in range(chunks):
                part = parts[chunk % len(parts)]
                table = part.read_row_group(chunk // len(parts))
                writer.write_table(table, row_group_size=max(1, len(table)))
