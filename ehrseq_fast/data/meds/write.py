"""A store as a MEDS dataset, from which :func:`read_meds` makes the same store again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import integer
from ..store import EventStore
from ..store.atomic import fsync_folder, new_folder
from ..store.format import NAT, read_json, write_json
from .arrow import pyarrow
from .names import (
    BIRTH,
    CODE,
    CODES,
    DATA,
    DATASET,
    DEATH,
    NO_EVENTS,
    PERIOD_END,
    PERIOD_START,
    RESERVED,
    SETTINGS,
    SPLITS,
    SUBJECT,
    TIME,
    VALUE,
    VISIT,
    VISIT_END,
    reserved,
)

Ints = NDArray[np.int64]

MEDS_VERSION = "0.4.1"
PIECE = 1 << 18  # events that are held in memory at a time
WHAT = "a MEDS dataset that ehrseq_fast wrote"


def to_meds(
    store: EventStore | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    events_per_file: int = 1 << 23,
    overwrite: bool = False,
) -> Path:
    """Write the store as a MEDS 0.4 dataset: ``data/N.parquet`` in the order of the store, and
    ``metadata/{codes.parquet,subject_splits.parquet,dataset.json}``.

    The events of a visit have its start as their time, and in the extension columns ``visit_id``
    and ``visit_end`` its index within the subject and its end (null for all other events). Births
    and deaths are ``MEDS_BIRTH`` and ``MEDS_DEATH``, observation periods events
    ``OBSERVATION_PERIOD_START`` and ``OBSERVATION_PERIOD_END`` (the first instant that is no longer
    observed); a subject of whom nothing is known has the static event ``EHRSEQ_FAST_NO_EVENTS``.
    ``dataset.json`` says under ``ehrseq_fast`` how the store was written, so that
    ``read_meds(folder, out)`` makes a store with the same ``content_sha256``.

    Args:
        store: a store, or its folder.
        folder: the dataset to make. It appears whole or not at all.
        events_per_file: a file is closed after the subject with which it has that many.
        overwrite: replace a dataset that this function wrote.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``folder`` exists.
        ValueError: a code of the store is one of those with a meaning of their own.
        ImportError: PyArrow is not installed.
    """
    pyarrow()
    if not isinstance(store, EventStore):
        store = EventStore(store)
    events_per_file = integer("events_per_file", events_per_file, 1, 2**62)
    for code in store.codes_of:
        if reserved(code) is not None:
            raise ValueError(
                f"{store.path}: expected codes without a meaning of their own in MEDS, got {code!r}"
            )
    with new_folder(folder, overwrite=overwrite, what=WHAT, is_one=_is_ours) as new:
        (new.new / DATA).mkdir()
        (new.new / DATASET).parent.mkdir()
        _write_data(store, new.new / DATA, events_per_file)
        _write_metadata(store, new.new)
        fsync_folder(new.new / DATA)
        fsync_folder((new.new / DATASET).parent)
        new.commit()
    return Path(folder)


def _is_ours(folder: Path) -> bool:
    try:
        return SETTINGS in read_json(folder / DATASET, "metadata")
    except (OSError, ValueError, TypeError):
        return False


def _schema() -> Any:
    pa = pyarrow()
    return pa.schema(
        [
            pa.field(SUBJECT, pa.int64(), nullable=False),
            (TIME, pa.timestamp("us")),
            pa.field(CODE, pa.string(), nullable=False),
            (VALUE, pa.float32()),
            (VISIT, pa.int64()),
            (VISIT_END, pa.timestamp("us")),
        ]
    )


def _write_data(store: EventStore, data: Path, events_per_file: int) -> None:
    pa = pyarrow()
    schema = _schema()
    names = pa.array([*store.codes_of, *RESERVED], pa.string())
    writer, written, files = None, 0, 0
    for low, high in _pieces(store, min(PIECE, events_per_file)):
        if writer is None:
            path = data / f"{files}.parquet"
            writer = pa.parquet.ParquetWriter(
                path, schema, compression="zstd", write_page_checksum=True
            )
        table = _events(store, low, high, names, schema)
        writer.write_table(table)
        written += len(table)
        if written >= events_per_file:
            _close(writer, path)
            writer, written, files = None, 0, files + 1
    if writer is not None:
        _close(writer, path)
    elif not files:
        path = data / "0.parquet"
        _close(pa.parquet.ParquetWriter(path, schema), path)


def _close(writer: Any, path: Path) -> None:
    writer.close()
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _pieces(store: EventStore, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of patients with at most so many events, or of one patient."""
    low = 0
    while low < store.n_patients:
        high = min(low + most, store.n_patients)
        ends = store.visit_offsets[store.patient_offsets[low : high + 1]]
        events = ends - ends[0]
        for offsets, each in ((store.static_offsets, 1), (store.period_offsets, 2)):
            events = events + each * (offsets[low : high + 1] - offsets[low])
        events = events + 2 * np.arange(len(events))  # births and deaths
        high = low + max(int(np.searchsorted(events, most, side="right")) - 1, 1)
        yield low, high
        low = high


def _events(store: EventStore, low: int, high: int, names: Any, schema: Any) -> Any:
    """All events of the patients ``low .. high``, by subject and time."""
    pa = pyarrow()
    p, special = high - low, {code: store.n_codes + i for i, code in enumerate(RESERVED)}
    patients = np.arange(p)
    visits = store.patient_offsets[low : high + 1]
    v0, v1 = int(visits[0]), int(visits[-1])
    entries = store.visit_offsets[v0 : v1 + 1]
    e0, e1 = int(entries[0]), int(entries[-1])
    of_visit = np.repeat(np.arange(v1 - v0), np.diff(entries))
    patient_of_visit = np.repeat(patients, np.diff(visits))
    index_of_visit = np.arange(v1 - v0) - (visits[:-1] - v0)[patient_of_visit]

    births, deaths = store.birth_times[low:high], store.death_times[low:high]
    born, dead = np.flatnonzero(~np.isnat(births)), np.flatnonzero(~np.isnat(deaths))
    statics, s0, s1 = _ragged(store.static_offsets, low, high)
    periods, o0, o1 = _ragged(store.period_offsets, low, high)
    something = np.zeros(p, bool)
    for found in (patient_of_visit, born, dead, statics, periods):
        something[found] = True
    nothing = np.flatnonzero(~something)

    def numeric(values: NDArray[np.float32] | None, begin: int, end: int) -> NDArray[np.float32]:
        return np.full(end - begin, np.nan, np.float32) if values is None else values[begin:end]

    groups: list[tuple[Any, ...]] = [  # in the order in which they come at one time
        (nothing, np.full(len(nothing), NAT), special[NO_EVENTS], None, None),
        (statics, np.full(s1 - s0, NAT), store.static_codes[s0:s1],
         numeric(store.static_values, s0, s1), None),
        (born, births[born], special[BIRTH], None, None),
        (periods, store.period_starts[o0:o1], special[PERIOD_START], None, None),
        (patient_of_visit[of_visit], store.visit_times[v0:v1][of_visit], store.codes[e0:e1],
         numeric(store.values, e0, e1), index_of_visit[of_visit]),
        (periods, store.period_ends[o0:o1], special[PERIOD_END], None, None),
        (dead, deaths[dead], special[DEATH], None, None),
    ]  # fmt: skip
    who = np.concatenate([g[0] for g in groups])
    when = np.concatenate([g[1].view(np.int64) for g in groups])
    what = np.concatenate([np.broadcast_to(np.asarray(g[2], np.int64), len(g[0])) for g in groups])
    value = np.concatenate(
        [np.full(len(g[0]), np.nan, np.float32) if g[3] is None else g[3] for g in groups]
    )
    visit = np.concatenate([np.full(len(g[0]), -1) if g[4] is None else g[4] for g in groups])
    of_store = np.where(visit < 0, v1 - v0, (visits[:-1] - v0)[who] + visit)
    end = np.append(store.visit_ends[v0:v1].view(np.int64), NAT)[of_store]
    order = np.lexsort((when, who))  # stable, and NAT is the least
    when, value, visit, end = when[order], value[order], visit[order], end[order]
    return pa.table(
        [
            pa.array(store.subject_ids[low:high][who[order]]),
            _instants(when),
            names.take(pa.array(what[order])),
            pa.array(value, pa.float32(), mask=np.isnan(value)),
            pa.array(visit, pa.int64(), mask=visit < 0),
            _instants(end),
        ],
        schema=schema,
    )


def _instants(micros: Ints) -> Any:
    pa = pyarrow()
    return pa.array(micros, pa.int64(), mask=micros == NAT).cast(pa.timestamp("us"))


def _ragged(offsets: Ints, low: int, high: int) -> tuple[Ints, int, int]:
    """The patient of each element, from 0, and where the elements begin and end."""
    of = offsets[low : high + 1]
    return np.repeat(np.arange(high - low), np.diff(of)), int(of[0]), int(of[-1])


def _write_metadata(store: EventStore, folder: Path) -> None:
    pa = pyarrow()
    codes = [*store.codes_of, *RESERVED]
    texts = [text or None for text in (*store.descriptions, *RESERVED.values())]
    parents = pa.nulls(len(codes), pa.list_(pa.string()))
    schema = pa.schema(
        [
            pa.field(CODE, pa.string(), nullable=False),
            ("description", pa.string()),
            ("parent_codes", pa.list_(pa.string())),
        ]
    )
    listed = pa.table([pa.array(codes), pa.array(texts, pa.string()), parents], schema=schema)
    pa.parquet.write_table(listed, folder / CODES)
    assigned = np.flatnonzero(store.splits >= 0)
    schema = pa.schema(
        [
            pa.field(SUBJECT, pa.int64(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
        ]
    )
    split = pa.array(store.split_names, pa.string()).take(pa.array(store.splits[assigned]))
    table = pa.table([pa.array(store.subject_ids[assigned]), split], schema=schema)
    pa.parquet.write_table(table, folder / SPLITS)
    for path in (CODES, SPLITS):
        _sync(folder / path)
    header = store.header
    settings = {
        "visit_rule": header["visit_rule"],
        "min_count": header["vocabulary"]["min_count"],
        "split": {k: v for k, v in header["split"].items() if k != "patients"},
        "source": header["source"],
        "left_out": header["left_out"],
        "content_sha256": header["content_sha256"],
    }
    metadata = {
        "dataset_name": store.path.name,
        "etl_name": "ehrseq_fast",
        "meds_version": MEDS_VERSION,
        "other_extension_columns": [VISIT, VISIT_END],
        SETTINGS: settings,
    }
    write_json(folder / DATASET, metadata, indent=1)
