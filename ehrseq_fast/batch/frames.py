"""Columns of a data frame as NumPy arrays: by the data frame interchange protocol
(https://data-apis.org/dataframe-protocol), which pandas, Polars and Arrow speak, or of a mapping of
names to arrays. Nulls are refused with their row."""

from __future__ import annotations

import ctypes
import datetime
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..arrays import Array, as_array, got, kind_of

# DtypeKind of the protocol
_INT, _UINT, _FLOAT, _BOOL, _STRING, _DATETIME, _CATEGORICAL = 0, 1, 2, 20, 21, 22, 23
_LETTERS = {_INT: "i", _UINT: "u", _FLOAT: "f"}
# ColumnNullType
_NAN, _SENTINEL, _BITS, _BYTES = 1, 2, 3, 4


def read_columns(frame: Any, names: Iterable[str]) -> dict[str, Array]:
    """The named columns: integers and floats in their dtype, texts as objects, times as int64 of
    the column's own unit.

    Raises:
        ValueError: a column that is missing, columns of different lengths, nulls and NaN (with the
            first row).
        TypeError: something that is no data frame, and columns of other kinds.
    """
    names = list(dict.fromkeys(names))
    if isinstance(frame, Mapping):
        found, read = list(frame), lambda name: _of_array(name, frame[name])
    else:
        table = _interchange(frame, names)
        found = list(table.column_names())

        def read(name: str) -> Array:
            try:
                column = table.get_column_by_name(name)
            except (NotImplementedError, ValueError) as error:
                raise _unreadable(f"column {name!r}", error) from error
            return _of_column(name, column)

    for name in names:
        if found.count(name) != 1:
            what = "several such columns" if name in found else "no such column"
            raise ValueError(f"frame: expected a column {name!r}, got {what} among {found}")
    columns = {name: read(name) for name in names}
    for name, column in columns.items():
        if len(column) != len(columns[names[0]]):
            raise ValueError(
                f"column {name!r}: expected {len(columns[names[0]])} rows as column "
                f"{names[0]!r}, got {len(column)}"
            )
    return columns


def _interchange(frame: Any, names: list[str]) -> Any:
    if hasattr(frame, "__arrow_c_stream__") and (
        not hasattr(frame, "__dataframe__") or type(frame).__module__.startswith("pyarrow")
    ):
        return _of_arrow(frame, names).__dataframe__()
    if hasattr(frame, "__dataframe__"):
        return frame.__dataframe__()
    raise TypeError(
        "frame: expected a data frame (pandas, Polars, Arrow, or whatever has __dataframe__) or a "
        f"mapping of names to arrays, got {kind_of(frame)}"
    )


def _of_arrow(frame: Any, names: list[str]) -> Any:
    """An Arrow table of types that pyarrow's interchange has: timestamps in place of dates, texts
    in place of views of texts (as Polars gives them) and of categories."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(
            f"frame: {kind_of(frame)} is read by pyarrow, which is not installed: "
            "pip install ehrseq_fast[meds]"
        ) from error
    table = pa.table(frame)
    is_view = getattr(pa.types, "is_string_view", lambda kind: False)
    for i, field in enumerate(table.schema):
        kind, column = field.type, table.column(i)
        if field.name not in names:
            continue
        if pa.types.is_dictionary(kind) and is_view(kind.value_type):
            kind = pa.large_string()
            parts = [  # which pyarrow cannot cast
                pa.DictionaryArray.from_arrays(part.indices, part.dictionary.cast(kind))
                for part in column.chunks
            ]
            column = pa.chunked_array([part.dictionary_decode() for part in parts], type=kind)
        elif pa.types.is_date(kind):
            # the days of date64 are milliseconds
            kind = pa.timestamp("s" if pa.types.is_date32(kind) else "ms")
        elif is_view(kind):
            kind = pa.large_string()
        if kind != field.type:
            table = table.set_column(i, field.name, column.cast(kind))
    return table


def _of_array(name: str, values: Any) -> Array:
    where = f"column {name!r}"
    if isinstance(values, (list, tuple)) and any(value is None for value in values):
        raise _null(where, next(i for i, value in enumerate(values) if value is None))
    array = as_array(where, values)
    if array.dtype == object and array.size and isinstance(array.flat[0], datetime.date):
        array = _of_datetimes(where, array)
    if array.ndim != 1:
        raise ValueError(f"{where}: expected 1 dimension, got shape {list(array.shape)}")
    if array.dtype.kind in "mM":
        _refuse_nulls(where, np.isnat(array), 0)
        return array.view(np.int64)
    if array.dtype.kind in "OUS":
        texts = array.astype(object)
        for row, value in enumerate(texts):
            if not isinstance(value, str):
                raise TypeError(f"{where}, row {row}: expected text, got {kind_of(value)}")
        return texts
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{where}: expected numbers, times or text, got {got(array)}")
    if array.dtype.kind == "f":
        _refuse_nulls(where, np.isnan(array), 0)
    return array


def _of_datetimes(where: str, array: Array) -> Array:
    for row, value in enumerate(array.flat):
        if not isinstance(value, datetime.date):
            raise TypeError(f"{where}, row {row}: expected a date or a time, got {kind_of(value)}")
        if getattr(value, "tzinfo", None) is not None:
            raise TypeError(
                f"{where}, row {row}: expected a time without a time zone, got {value} (a data "
                "frame's column has one zone for all)"
            )
    return array.astype("M8[us]")


def _of_column(name: str, column: Any) -> Array:
    where = f"column {name!r}"
    parts, first = [], 0
    for chunk in column.get_chunks():
        if not _size(chunk):
            continue
        parts.append(_of_chunk(where, chunk, first))
        first += _size(chunk)
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _of_chunk(where: str, chunk: Any, first: int) -> Array:
    try:
        kind, bits, form, _ = chunk.dtype
        buffers = chunk.get_buffers()
    except (NotImplementedError, ValueError) as error:
        raise _unreadable(where, error) from error
    if kind == _CATEGORICAL:
        return _of_categories(where, chunk, buffers, first)
    if kind == _STRING:
        return _texts(where, chunk, buffers, first)
    if kind == _DATETIME:
        letter, size = "i", 32 if form == "tdD" else 64
    elif kind in _LETTERS:
        letter, size = _LETTERS[kind], bits
    else:
        what = "booleans" if kind == _BOOL else f"format {form!r}"
        raise TypeError(f"{where}: expected integers, floats, times or text, got {what}")
    values = _values(buffers["data"][0], f"{letter}{size // 8}", chunk)
    wrong = _nulls(chunk, buffers, values)
    if letter == "f":
        wrong = wrong | np.isnan(values)
    elif kind == _DATETIME and size == 64:  # NaT, where the column does not say so
        wrong = wrong | (values == np.iinfo(np.int64).min)
    _refuse_nulls(where, wrong, first)
    return values


def _unreadable(where: str, error: Exception) -> TypeError:
    return TypeError(f"{where}: expected integers, floats, times or text: {error}")


def _of_categories(where: str, chunk: Any, buffers: Any, first: int) -> Array:
    kind, bits, _, _ = buffers["data"][1]
    if kind not in (_INT, _UINT):
        raise TypeError(f"{where}: expected categories by number, got kind {int(kind)}")
    codes = _values(buffers["data"][0], f"{_LETTERS[kind]}{bits // 8}", chunk)
    wrong = _nulls(chunk, buffers, codes)
    described = chunk.describe_categorical
    categories = _of_column(where, described["categories"])
    wrong = wrong | (codes < 0) | (codes >= len(categories))
    _refuse_nulls(where, wrong, first)
    return categories[codes]


def _texts(where: str, chunk: Any, buffers: Any, first: int) -> Array:
    buffer, (_, bits, _, _) = buffers["offsets"]
    rows, offset = _size(chunk), chunk.offset
    offsets = _memory(buffer, f"i{bits // 8}")[offset : offset + rows + 1].tolist()
    _refuse_nulls(where, _nulls(chunk, buffers, None), first)
    data = _memory(buffers["data"][0]).tobytes()
    texts = np.empty(rows, object)
    for row in range(rows):
        texts[row] = data[offsets[row] : offsets[row + 1]].decode()
    return texts


def _nulls(chunk: Any, buffers: Any, values: Array | None) -> Array:
    kind, sentinel = chunk.describe_null
    rows, offset = _size(chunk), chunk.offset
    if kind == _NAN and values is not None:
        return np.isnan(values)
    if kind == _SENTINEL and values is not None:
        return values == sentinel
    if kind in (_BITS, _BYTES) and buffers["validity"] is not None:
        mask = _memory(buffers["validity"][0])
        if kind == _BITS:
            mask = np.unpackbits(mask, bitorder="little")
        return (mask[offset : offset + rows] != 0) == bool(sentinel)
    return np.zeros(rows, np.bool_)


def _values(buffer: Any, dtype: str, chunk: Any) -> Array:
    rows, offset = _size(chunk), chunk.offset
    return _memory(buffer, dtype)[offset : offset + rows].copy()


def _memory(buffer: Any, dtype: str = "u1") -> Array:
    """A buffer's memory, read where it is: what is kept of it has to be copied."""
    size = buffer.bufsize // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(0, dtype)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(buffer.ptr)).view(dtype)


def _size(chunk: Any) -> int:
    return chunk.size() if callable(chunk.size) else chunk.size


def _refuse_nulls(where: str, wrong: Array, first: int) -> None:
    if wrong.any():
        raise _null(where, first + int(wrong.argmax()), int(wrong.sum()))


def _null(where: str, row: int, count: int = 1) -> ValueError:
    return ValueError(
        f"{where}, row {row}: expected a value, got null ({count} in these rows); drop such rows, "
        "or fill them, before"
    )
