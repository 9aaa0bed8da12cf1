"""Label files in Parquet: their columns as arrays, and back."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .search import NAT, as_times

VALUES = ("boolean_value", "integer_value", "float_value", "categorical_value")
TIMES_TO_EVENT = ("event_time_days", "event_indicator")
MOST_DAYS = 365_250  # a thousand years
EXACT_UP_TO = 2**53  # integers beyond may not be what they were as float64

Columns = tuple[NDArray[np.int64], NDArray[np.datetime64], dict[str, NDArray[Any]]]


def pyarrow() -> Any:
    """The module, with its Parquet part.

    Raises:
        ImportError: it is missing, naming the extra that brings it.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("label files need pyarrow: pip install 'ehrseq_fast[meds]'") from error
    return pyarrow


def read_columns(path: Path) -> Columns:
    """Subjects, prediction times and all value columns of all files.

    Raises:
        FileNotFoundError, ValueError, TypeError: see :func:`labels`.
    """
    pa = pyarrow()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_label_file(file.relative_to(path)))
    elif path.exists():
        files = [path]
    else:
        raise FileNotFoundError(f"{path}: expected a label file or a folder of them, found nothing")
    if not files:
        raise FileNotFoundError(f"{path}: expected Parquet files, found none")
    parts = [_read_file(pa, file) for file in files]
    names = [name for name in (*VALUES, *TIMES_TO_EVENT) if any(name in p[2] for p in parts)]
    values = {
        name: np.concatenate([_or_none(part[2], name, len(part[0])) for part in parts])
        for name in names
    }
    return (
        np.concatenate([part[0] for part in parts]),
        np.concatenate([part[1] for part in parts]),
        values,
    )


def _is_label_file(path: Path) -> bool:
    """As for the shards of a dataset: capitals too, and nothing hidden."""
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() == ".parquet" and not hidden


def _or_none(values: dict[str, NDArray[Any]], name: str, n: int) -> NDArray[Any]:
    if name in values:
        return values[name]
    return np.full(n, None, object) if name == "categorical_value" else np.full(n, np.nan)


def _read_file(pa: Any, path: Path) -> Columns:
    try:
        schema = pa.parquet.read_schema(path)
        wanted = ("subject_id", "prediction_time", *VALUES, *TIMES_TO_EVENT)
        missing = {"subject_id", "prediction_time"} - set(schema.names)
        if missing:
            raise ValueError(
                f"{path}: expected the columns subject_id and prediction_time, got "
                f"{', '.join(schema.names) or 'none'}"
            )
        table = pa.parquet.read_table(
            path, columns=[name for name in wanted if name in schema.names], partitioning=None
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    subject_ids = _whole(pa, path, table, "subject_id")
    times = _times(pa, path, table)
    values = {}
    for name in table.column_names[2:]:
        values[name] = _values(pa, path, name, table.column(name))
    return subject_ids, times, values


def _whole(pa: Any, path: Path, table: Any, name: str) -> NDArray[np.int64]:
    column = table.column(name)
    if not pa.types.is_integer(column.type):
        raise TypeError(f"{path}, column {name}: expected int64, got {column.type}")
    _refuse_null(path, name, column)
    try:
        return column.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}, column {name}: expected int64: {error}") from error


def _times(pa: Any, path: Path, table: Any) -> NDArray[np.datetime64]:
    name = "prediction_time"
    column = table.column(name)
    if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)):
        raise TypeError(f"{path}, column {name}: expected timestamp[us], got {column.type}")
    _refuse_null(path, name, column)
    try:
        # of a zone, Arrow stores UTC; nanoseconds are cut off
        stamps = column.cast(pa.timestamp("us"), safe=False)
        return as_times(stamps.cast(pa.int64()).to_numpy())
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}, column {name}: expected times: {error}") from error


def _refuse_null(path: Path, name: str, column: Any) -> None:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(
            f"{path}, column {name}: expected no nulls, got {column.null_count}, the first in row "
            f"{row}"
        )


def _values(pa: Any, path: Path, name: str, column: Any) -> NDArray[Any]:
    types = pa.types
    kind = column.type
    if types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if types.is_null(kind):
        return _or_none({}, name, len(column))
    if name == "categorical_value":
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise TypeError(f"{path}, column {name}: expected strings, got {kind}")
        return np.array(column.to_pylist(), object)
    expected = {"boolean_value": "booleans", "event_indicator": "booleans"}.get(name, "numbers")
    fits = types.is_boolean(kind) if expected == "booleans" else _is_number(types, kind)
    if not fits:
        raise TypeError(f"{path}, column {name}: expected {expected}, got {kind}")
    if types.is_boolean(kind):
        column = column.cast(pa.int8())
    numbers = column.cast(pa.float64(), safe=False).to_numpy()
    if types.is_integer(kind) and np.nanmax(np.abs(numbers), initial=0) > EXACT_UP_TO:
        raise ValueError(f"{path}, column {name}: expected integers within 2**53, got larger ones")
    if name == "event_time_days":
        _refuse_no_days(path, name, numbers)
    return numbers


def _refuse_no_days(path: Path, name: str, days: NDArray[np.float64]) -> None:
    """An event before its prediction would be one of that very moment, an infinite time unknown."""
    wrong = np.flatnonzero((days < 0) | (days > MOST_DAYS))
    if len(wrong):
        raise ValueError(
            f"{path}, column {name}, row {wrong[0]}: expected days from 0 to {MOST_DAYS}, from the "
            f"prediction to the event or the end of observation, or null, got "
            f"{days[wrong[0]]:g} ({len(wrong)} such rows)"
        )


def _is_number(types: Any, kind: Any) -> bool:
    return types.is_integer(kind) or types.is_floating(kind)


def write_columns(path: Path, chunks: Iterator[dict[str, NDArray[Any]]]) -> int:
    """Write chunks of rows one after the other; the file appears when it is complete."""
    pa = pyarrow()
    schema = pa.schema(
        [
            ("subject_id", pa.int64()),
            ("prediction_time", pa.timestamp("us")),
            ("boolean_value", pa.bool_()),
            ("event_time_days", pa.float64()),
            ("event_indicator", pa.bool_()),
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    n_rows = 0
    try:
        with temporary.open("xb") as file:
            with pa.parquet.ParquetWriter(file, schema) as writer:
                for chunk in chunks:
                    n_rows += len(chunk["subject_id"])
                    writer.write_table(pa.table(_arrow(pa, chunk), schema=schema))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return n_rows


def _arrow(pa: Any, chunk: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """NaN becomes null."""
    columns = {}
    for name, values in chunk.items():
        if values.dtype.kind == "f":
            kind = pa.bool_() if name == "boolean_value" else pa.float64()
            plain = values == 1 if name == "boolean_value" else values
            columns[name] = pa.array(plain, kind, mask=np.isnan(values))
        else:
            columns[name] = pa.array(values)
    return columns


__all__ = ["NAT", "VALUES", "read_columns", "write_columns"]
