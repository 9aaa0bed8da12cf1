"""A store from an OMOP database: the plan of its parts, the reading of each, the header."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import integer
from ..store import EventStore, PartWriter, by_hash, new_store, write_store
from ..store.dictionary import united
from ..store.jobs import by_processes
from ..store.parts import Part
from ..store.visits import VisitRule, checked_rule
from .connection import is_path, opened, reading
from .duckdb_tables import find_places
from .extract import Options, extract
from .ranges import person_ranges
from .sources import Sources, Survey, count_rows, find_sources, survey
from .tables import EventTable, concept_names, event_tables

OF_DUCKDB = 128_000_000  # bytes: it keeps what it has read up to that; little of it is needed
SHARE = 0.4  # of a larger memory_limit: rows that are being read are in memory too
MOST_THREADS = 4  # of DuckDB, each with buffers of its own
NOTICED = "noticed.json"
OUTSIDE_PERIODS = ("leave_out", "keep")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", re.IGNORECASE)


def read_store(
    database: Any,
    out: str | os.PathLike[str],
    *,
    tables: Iterable[str] | None,
    schema: str | None,
    visits: str | float,
    outside_periods: str,
    workers: int,
    min_count: int,
    split: Mapping[str, float] | None,
    seed: int,
    overwrite: bool,
    memory_limit: str | None,
    rows_per_part: int,
) -> EventStore:
    """What :func:`read_omop` gives with ``out``."""
    workers = integer("workers", workers, 1, 4096)
    rows_per_part = integer("rows_per_part", rows_per_part, 1, 2**40)
    min_count = integer("min_count", min_count, 1, 2**62)
    split_rule = by_hash(split, seed=seed)
    rule = checked_rule(visits)
    if rule == "visit_id":
        raise ValueError(
            "visits: expected 'day', 'time', 'visit_occurrence' or a positive number of hours, "
            "got 'visit_id'"
        )
    if outside_periods not in OUTSIDE_PERIODS:
        names = " or ".join(map(repr, OUTSIDE_PERIODS))
        raise ValueError(f"outside_periods: expected {names}, got {outside_periods!r}")
    reader = Reader(
        database if is_path(database) else None,
        None if is_path(database) else database,
        None if tables is None else tuple(event_tables(tables)),
        schema,
        rule,
        Options(outside_periods == "keep", int(time.time() // 86_400)),
        _settings(database, workers, memory_limit),
    )
    plan = _Plan(reader, rows_per_part)

    def finish(folder: Any, parts: list[Path]) -> None:
        write_store(
            folder,
            parts,
            visit_rule=rule,
            source=plan.source(parts, outside_periods),
            min_count=min_count,
            split=split_rule,
            descriptions=plan.names(parts),
            left_out=plan.left_out,
        )

    try:
        return by_processes(
            lambda: new_store(out, overwrite=overwrite),
            plan.jobs,
            finish,
            lambda: EventStore(out),
            workers=workers,
        )
    finally:
        _close()


def _settings(database: Any, workers: int, memory_limit: str | None) -> dict[str, str | int]:
    of_duckdb = OF_DUCKDB if memory_limit is None else _of_duckdb(memory_limit)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if not is_path(database):
        if memory_limit is not None:
            raise ValueError(
                "memory_limit: expected none with a connection, which has its own settings "
                f"(SET memory_limit = '{memory_limit}'), or the path of the database"
            )
        if workers > 1 or ranks > 1:
            raise ValueError(
                "database: expected the path of a database file for several processes, got a "
                f"connection with workers={workers}"
                + (f" and {ranks} ranks" if ranks > 1 else "")
                + ": another process cannot use it"
            )
        return {}
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = min(max(1, cores // (workers * of_node)), MOST_THREADS)
    return {"memory_limit": f"{of_duckdb}B", "threads": threads}


def _of_duckdb(memory_limit: str) -> int:
    """How many bytes of it DuckDB gets."""
    size = _SIZE.fullmatch(memory_limit) if isinstance(memory_limit, str) else None
    if size is None:
        raise ValueError(f"memory_limit: expected a size as '512MB', got {memory_limit!r}")
    number, prefix, binary = size.groups()
    power = " KMGT".index(prefix.upper() or " ")
    total = int(float(number) * (1024 if binary else 1000) ** power)
    return max(min(total, OF_DUCKDB), int(SHARE * total))


@dataclass(frozen=True)
class Reader:
    """How to read the database: what every process needs to know."""

    path: Any
    given: Any  # the user's connection, or None
    tables: tuple[EventTable, ...] | None  # None: all that there are
    schema: str | None
    rule: VisitRule
    options: Options
    settings: Mapping[str, str | int]

    @contextmanager
    def connection(self) -> Iterator[Any]:
        with opened(self.path if self.given is None else self.given, self.settings) as connection:
            yield connection

    def sources(self, connection: Any) -> Sources:
        by_visit = self.rule == "visit_occurrence"
        with reading("list of tables"):
            return find_sources(connection, self.tables, self.schema, by_visit=by_visit)


class _Session:
    """The connection of this process, kept from one part to the next."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._context = reader.connection()
        self.connection = self._context.__enter__()
        try:
            self.sources = reader.sources(self.connection)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._context.__exit__(None, None, None)


_sessions: list[_Session] = []


def _session(reader: Reader) -> _Session:
    if not (_sessions and _sessions[0].reader == reader):
        _close()
        _sessions.append(_Session(reader))
    return _sessions[0]


def _close() -> None:
    while _sessions:
        _sessions.pop().close()


@dataclass(frozen=True)
class RangeJob:
    """Reads the persons ``low`` to ``high`` into a part."""

    reader: Reader
    low: int
    high: int

    def __call__(self, folder: Path) -> None:
        session = _session(self.reader)
        found = extract(
            session.connection, session.sources, self.low, self.high, self.reader.options
        )
        part = PartWriter(
            folder,
            visit_rule=self.reader.rule,
            with_values=found.chunk.event_values is not None,
            name=f"persons {self.low} to {self.high}",
        )
        part.add(found.chunk)
        (folder / NOTICED).write_text(json.dumps(found.noticed))
        part.finish(found.left_out)


@dataclass
class _Plan:
    """What is found before the parts are read, and said about them afterwards."""

    reader: Reader
    rows_per_part: int
    left_out: dict[str, int] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    not_read: dict[str, int | None] = field(default_factory=dict)

    def jobs(self) -> list[RangeJob]:
        with self.reader.connection() as connection:
            sources = self.reader.sources(connection)
            self.tables, self.missing = list(sources.events), sources.missing
            self.not_read = {
                name: count_rows(connection, table) for name, table in sources.not_read.items()
            }
            self._names(connection, np.empty(0, np.int64))  # where they cannot be read, say so now
            found = {source.name: survey(connection, source) for source in sources.all()}
            self._count_persons(sources, found)
            low = min(one.least for one in found.values() if one.least is not None)
            high = max(one.greatest for one in found.values() if one.greatest is not None)
            with_rows = [source for source in sources.all() if found[source.name].least is not None]
            ranges = person_ranges(connection, with_rows, low, high, self.rows_per_part)
        return [RangeJob(self.reader, one.low, one.high) for one in ranges]

    def _count_persons(self, sources: Sources, found: Mapping[str, Survey]) -> None:
        events = {name: found[name] for name in sources.events}
        if all(one.least is None for one in events.values()):
            rows = ", ".join(f"{name} ({one.rows} rows)" for name, one in events.items())
            raise ValueError(f"tables: expected rows that have a person_id, got none in {rows}")
        self.left_out["rows without a person"] = sum(one.no_person for one in events.values())
        for name, one in found.items():
            if name not in events:
                self.left_out[f"{name} rows without a person_id"] = one.no_person

    def source(self, parts: Iterable[Path], outside_periods: str) -> dict[str, Any]:
        noticed: Counter[str] = Counter()
        for part in parts:
            noticed.update(json.loads((part / NOTICED).read_text()))
        reader = self.reader
        return {
            "kind": "omop",
            "path": "a connection" if reader.given is not None else os.path.abspath(reader.path),
            "schema": reader.schema,
            "tables": self.tables,
            "outside_periods": outside_periods,
            "missing": self.missing,
            "not_read": self.not_read,
            "noticed": dict(noticed),
            "versions": {"duckdb": metadata.version("duckdb")},
        }

    def names(self, parts: Iterable[Path]) -> dict[str, str]:
        """The concepts' names by their codes."""
        codes = united(Part(part).codes() for part in parts)
        concepts = np.array(sorted(map(int, codes)), np.int64)
        with self.reader.connection() as connection:
            return self._names(connection, concepts)

    def _names(self, connection: Any, concepts: NDArray[np.int64]) -> dict[str, str]:
        places = find_places(connection, self.reader.schema)
        with reading("table concept"):
            found = concept_names(connection, places, concepts)
        return {str(concept): name for concept, name in found.items()}
