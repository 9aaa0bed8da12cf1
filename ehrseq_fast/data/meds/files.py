"""The files of a MEDS dataset: its shards in order, and its metadata."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..store.format import read_json
from .arrow import parquet_errors, pyarrow
from .names import CODE, CODES, DATA, DATASET, METADATA, SETTINGS, SPLITS, SUBJECT

_DIGITS = re.compile(r"([0-9]+)")


class Files(NamedTuple):
    """Of a dataset, relative to its folder.

    Attributes:
        shards: every ``data/**/*.parquet``, whatever the case of its extension, by name; numbers in
            names count as numbers, so that 10 comes after 2.
        others: what else there is in ``data`` and ``metadata``. Hidden files, and those in hidden
            folders, are among them where they are Parquet files.
    """

    shards: list[Path]
    others: list[Path]


def files_of(folder: Path) -> Files:
    """The dataset's shards, and the files that are not read.

    Raises:
        FileNotFoundError: no such folder, or none in it.
        NotADirectoryError: a file.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: expected a MEDS dataset, there is no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected the folder of a MEDS dataset, got a file")
    data = folder / DATA
    if not data.is_dir():
        raise FileNotFoundError(f"{folder}: expected a MEDS dataset, it has no folder {DATA!r}")
    shards: list[Path] = []
    others: list[Path] = []
    for path in _walk(folder, data):
        is_parquet = path.suffix.lower() == ".parquet"
        is_hidden = any(part.startswith(".") for part in path.parts)
        if is_parquet and not is_hidden:
            shards.append(path)
        elif is_parquet or not is_hidden:
            others.append(path)
    if not shards:
        raise FileNotFoundError(f"{data}: expected .parquet files there or below, found none")
    known = [Path(name) for name in (CODES, SPLITS, DATASET)]
    for path in _walk(folder, folder / METADATA):
        if path not in known and not path.name.startswith("."):
            others.append(path)
    return Files(sorted(shards, key=_in_order), sorted(others, key=_in_order))


def _walk(folder: Path, start: Path) -> Iterator[Path]:
    """All files in or below ``start``, relative to ``folder``."""
    walked: set[str] = set()
    for place, folders, names in os.walk(start, followlinks=True):
        real = os.path.realpath(place)
        if real in walked:  # a link to a folder above
            folders.clear()
            continue
        walked.add(real)
        for name in names:
            yield (Path(place) / name).relative_to(folder)


def _in_order(path: Path) -> tuple[Any, ...]:
    parts = [
        [
            (0, int(piece), "") if _DIGITS.fullmatch(piece) else (1, 0, piece)
            for piece in _DIGITS.split(part)
        ]
        for part in path.parts
    ]
    return parts, str(path)


def dataset_metadata(folder: Path) -> dict[str, Any]:
    """``dataset.json``; empty where there is none."""
    path = folder / DATASET
    if not path.is_file():
        return {}
    content = read_json(path, "the dataset's metadata")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def settings_of(folder: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How the store was written that this dataset was exported from; empty for any other."""
    settings = metadata.get(SETTINGS, {})
    where = f"{folder / DATASET}, {SETTINGS}"
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: expected an object, got {settings!r:.50}")
    if not settings:
        return settings
    for name in ("visit_rule", "min_count", "split"):
        if name not in settings:
            raise ValueError(f"{where}: expected the entry {name!r}, it has none")
    split = settings["split"]
    needed = {"hash": {"names", "fractions", "seed"}, "subject_splits": {"names"}}
    rule = split.get("rule") if isinstance(split, dict) else None
    if rule not in needed or not needed[rule] <= split.keys():
        raise ValueError(f"{where}, split: expected a rule with its settings, got {split!r:.100}")
    return settings


def subject_splits(folder: Path) -> tuple[NDArray[np.int64], list[str]] | None:
    """The subjects' splits; None where the dataset has none."""
    path = folder / SPLITS
    if not path.is_file():
        return None
    pa = pyarrow()
    table = _table(path, {SUBJECT: pa.int64(), "split": pa.string()})
    for name in (SUBJECT, "split"):
        if table.column(name).null_count:
            nulls = table.column(name).is_null().to_numpy()
            raise ValueError(
                f"{path}, column {name}, row {int(np.flatnonzero(nulls)[0])}: expected a value, "
                "got null"
            )
    return table.column(SUBJECT).to_numpy(), table.column("split").to_pylist()


def descriptions(folder: Path) -> dict[str, str]:
    """Of the codes that have one."""
    path = folder / CODES
    if not path.is_file():
        return {}
    pa = pyarrow()
    found: dict[str, str] = {}
    with parquet_errors(str(path)):
        names = pa.parquet.read_schema(path).names
    if "description" not in names:
        return {}
    table = _table(path, {CODE: pa.string(), "description": pa.string()})
    codes, texts = table.column(CODE).to_pylist(), table.column("description").to_pylist()
    for code, text in zip(codes, texts, strict=True):
        if code and text:
            found.setdefault(code, text)
    return found


def _table(path: Path, columns: Mapping[str, Any]) -> Any:
    pa = pyarrow()
    with parquet_errors(str(path)):
        names = pa.parquet.read_schema(path).names
        missing = [name for name in columns if name not in names]
        if missing:
            raise ValueError(
                f"{path}: expected the column {missing[0]!r}, it has: {', '.join(names) or 'none'}"
            )
        table = pa.parquet.read_table(path, columns=list(columns), partitioning=None)
    for at, (name, kind) in enumerate(columns.items()):
        try:
            table = table.set_column(at, name, table.column(name).cast(kind))
        except pa.ArrowException as error:
            raise TypeError(
                f"{path}, column {name}: expected {kind}, got {table.column(name).type}: {error}"
            ) from error
    return table
