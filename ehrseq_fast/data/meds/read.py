"""MEDS datasets into a store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...arrays import integer
from ..store import (
    EventStore,
    SplitRule,
    by_hash,
    by_processes,
    by_subject,
    new_store,
    write_store,
)
from ..store.atomic import NewFolder
from ..store.parts import Part
from ..store.visits import VisitRule, checked_rule
from .arrow import pyarrow
from .files import dataset_metadata, descriptions, files_of, settings_of, subject_splits
from .names import SPLITS, VISIT, VISIT_END
from .shard import Shard, columns_not_read, write_part

NO_EVENTS_OF = f"subjects of {SPLITS} without a row in the data"


def read_meds(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    visits: VisitRule | None = None,
    visit_column: str = VISIT,
    workers: int = 1,
    min_count: int | None = None,
    split: Mapping[str, float] | None = None,
    seed: int | None = None,
    overwrite: bool = False,
) -> EventStore:
    """Read a MEDS dataset (https://medical-event-data-standard.github.io, version 0.3 or 0.4) into
    the store ``out``.

    Every file is read in batches; memory is bounded by a batch, the largest subject, and what there
    is one of per subject or distinct code. The files are parts: with ``workers`` above 1, or under
    ``torchrun``, they are read by several processes, and the store's bytes are the same.

    Events without a time are static. ``MEDS_BIRTH`` and ``MEDS_DEATH`` (``MEDS_DEATH//...``) are
    the subject's birth and death, ``OBSERVATION_PERIOD_START`` and ``OBSERVATION_PERIOD_END`` an
    observation period; they make no visit. Times are taken as UTC. Columns besides ``subject_id``,
    ``time``, ``code`` and ``numeric_value`` are not read; the header's source lists them, and the
    files in ``data`` and ``metadata`` that are not read. A visit ends with its latest event; in a
    dataset that :func:`to_meds` wrote, when its column ``visit_end`` says.

    Args:
        folder: with ``data/**/*.parquet`` (hidden ones are not read) and ``metadata``.
        out: the store to make.
        visits: which events make a visit: ``"day"`` (in UTC; the default), ``"time"``, a number of
            hours after the visit's first event, or ``"visit_id"``: those of one ``visit_column``.
            Of a dataset that :func:`to_meds` wrote the default is the exported store's own visits.
        visit_column: an integer column; null: the event belongs to the visit of its day.
        workers: processes to read with.
        min_count: how often a code must occur in the training split to be in the vocabulary; 1 by
            default.
        split: fractions by name, for a split by a hash of the subject's identifier. By default the
            dataset's ``subject_splits.parquet``, and where it has none 80 % train, 10 % tuning,
            10 % held out.
        seed: of the hash; 0 by default.
        overwrite: replace a store that is there.

    Raises:
        FileNotFoundError: no dataset there.
        FileExistsError: ``out`` exists.
        ValueError: a file that cannot be read, a column that is missing, a subject whose rows are
            not together, a time that falls, a value that does not fit; no event at all.
        TypeError: a column of another type.
        ImportError: PyArrow is not installed.

    Example:
        >>> import tempfile
        >>> import pyarrow as pa, pyarrow.parquet as pq
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "data").mkdir()
        ...     pq.write_table(pa.table({
        ...         "subject_id": [1, 1, 1],
        ...         "time": pa.array([None, "2020-01-01", "2020-01-05"]).cast(pa.timestamp("us")),
        ...         "code": ["SEX//F", "I10", "E11"]}), f"{folder}/data/0.parquet")
        ...     store = read_meds(folder, f"{folder}/store")
        ...     store.n_visits, store.codes_of, len(store.static_codes)
        (2, ('E11', 'I10', 'SEX//F'), 1)
    """
    pa = pyarrow()
    folder = Path(folder)
    names, others = files_of(folder)
    metadata = dataset_metadata(folder)
    settings = settings_of(folder, metadata)
    kept_rule, column = _visit_rule(visits, visit_column, settings)
    part_rule: VisitRule = "visit_id" if column is not None else kept_rule
    rule, without_events = _split_rule(folder, names, settings, split, seed)
    if min_count is None:
        min_count = settings.get("min_count", 1)
    workers = integer("workers", workers, 1, 4096)
    end_column = VISIT_END if settings else None
    shards = [
        Shard(folder / name, name.as_posix(), part_rule, column, end_column) for name in names
    ]
    source: dict[str, Any] = {
        "kind": "meds",
        "path": str(folder.resolve()),
        "files": len(shards),
        "files_not_read": [path.as_posix() for path in others],
        "versions": {
            "pyarrow": pa.__version__,
            **{k: metadata[k] for k in ("meds_version", "dataset_version") if k in metadata},
        },
    }
    if settings:
        source["exported"] = {k: settings[k] for k in ("source", "left_out") if k in settings}
    merge = partial(
        _merge,
        visit_rule=kept_rule,
        source=source,
        min_count=min_count,
        split=rule,
        without_events=without_events,
        descriptions=descriptions(folder),
        folder=folder,
    )
    return by_processes(
        partial(new_store, out, overwrite=overwrite),
        lambda: [partial(write_part, shard=shard) for shard in shards],
        merge,
        partial(EventStore, out),
        workers=workers,
    )


def _merge(
    new: NewFolder,
    parts: list[Path],
    *,
    folder: Path,
    source: dict[str, Any],
    split: SplitRule,
    without_events: np.ndarray | None,
    **options: Any,
) -> EventStore:
    ids = np.concatenate([Part(path).whole("subject_ids") for path in parts])
    if not len(ids):
        raise ValueError(f"{folder}: expected events, got no row in {len(parts)} files")
    left_out = {}
    if without_events is not None:
        left_out[NO_EVENTS_OF] = int(np.count_nonzero(~np.isin(without_events, ids)))
    columns = {name for path in parts for name in columns_not_read(path)}
    return write_store(
        new,
        parts,
        source={**source, "columns_not_read": sorted(columns)},
        split=split,
        left_out=left_out,
        **options,
    )


def _visit_rule(
    visits: VisitRule | None, visit_column: str, settings: Mapping[str, Any]
) -> tuple[VisitRule, str | None]:
    """The rule for the header, and the column that says which visit an event belongs to."""
    if visits is None:
        if "visit_rule" in settings:
            return checked_rule(settings["visit_rule"]), VISIT
        return "day", None
    rule = checked_rule(visits)
    if rule == "visit_occurrence":
        raise ValueError(
            "visits: expected 'day', 'time', 'visit_id' or a number of hours of a MEDS dataset, "
            f"got {visits!r}"
        )
    return rule, visit_column if rule == "visit_id" else None


def _split_rule(
    folder: Path,
    shards: list[Path],
    settings: Mapping[str, Any],
    split: Mapping[str, float] | None,
    seed: int | None,
) -> tuple[SplitRule, np.ndarray | None]:
    """The rule, and the subjects that the source has assigned."""
    own = settings.get("split", {})
    if split is not None:
        return by_hash(split, seed=seed or 0), None
    if own.get("rule") == "hash":
        return by_hash(own["fractions"], seed=own["seed"] if seed is None else seed), None
    assigned = subject_splits(folder)
    if assigned is None:
        if {"train", "held_out"} & {name.parts[1] for name in shards}:
            warnings.warn(
                f"{folder}: has no {SPLITS}; the subjects are split by hash, not by the names of "
                "the folders",
                stacklevel=3,
            )
        return by_hash(seed=seed or 0), None
    if seed is not None:
        warnings.warn(
            f"seed: not used, as {folder / SPLITS} assigns the subjects; pass split=... for a "
            "split by hash",
            stacklevel=3,
        )
    names = tuple(own["names"]) if own else None
    try:
        return by_subject(assigned, names=names), assigned[0]
    except ValueError as error:
        raise ValueError(f"{folder / SPLITS}: {error}") from error
