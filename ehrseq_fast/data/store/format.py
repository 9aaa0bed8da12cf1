"""The files of a store: their names, their dtypes, and how one array is written and opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array

FORMAT = "ehrseq_fast.EventStore"
VERSION = 1
HEADER = "store.json"
DICTIONARY = "dictionary.json"

INT64, INT32, INT8, FLOAT32 = "<i8", "<i4", "|i1", "<f4"
TIME = "<M8[us]"

ARRAYS: Mapping[str, str] = {
    "subject_ids": INT64,
    "patient_offsets": INT64,
    "visit_times": TIME,
    "visit_ends": TIME,
    "visit_offsets": INT64,
    "codes": INT32,
    "values": FLOAT32,
    "static_offsets": INT64,
    "static_codes": INT32,
    "static_values": FLOAT32,
    "birth_times": TIME,
    "death_times": TIME,
    "period_offsets": INT64,
    "period_starts": TIME,
    "period_ends": TIME,
    "splits": INT8,
    "vocabulary": INT32,
}
OPTIONAL = frozenset({"values", "static_values"})  # absent where the source has no numeric value

PADDING, UNKNOWN, FIRST_CODE = 0, 1, 2  # of the vocabulary

NAT = np.iinfo(np.int64).min  # how datetime64 stores "not a time"


class ArrayWriter:
    """Writes one ``.npy`` file of a known length piece by piece, and takes its SHA-256."""

    def __init__(self, folder: Path, name: str, length: int) -> None:
        self.name, self.length, self.written = name, length, 0
        self._dtype = np.dtype(ARRAYS[name])
        self._file = (folder / f"{name}.npy").open("xb")
        self._sha256 = hashlib.sha256()
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, array: Array) -> None:
        data = np.ascontiguousarray(array, self._dtype)
        self.written += len(data)
        raw = data.view(np.uint8).data
        self._sha256.update(raw)
        with naming(Path(self._file.name)):
            self._file.write(raw)

    def finish(self) -> dict[str, Any]:
        """Bring the file to the disk; its entry in the header."""
        if self.written != self.length:
            raise RuntimeError(
                f"{self.name}: expected {self.length} elements, {self.written} were written"
            )
        with naming(Path(self._file.name)):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return {
            "dtype": self._dtype.str,
            "shape": [self.length],
            "sha256": self._sha256.hexdigest(),
        }

    def close(self) -> None:
        """Give up a file that is not finished: what is still buffered need not reach it."""
        with suppress(OSError):
            self._file.close()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file to an error of the system (no space left, file too large)."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_array(folder: Path, name: str, entry: Mapping[str, Any]) -> Array:
    """The array as a read-only view of its file, which is checked against the header's entry.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: another dtype, shape or size than the header has.
    """
    path = folder / f"{name}.npy"
    expected = np.dtype(ARRAYS[name])
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"expected version 1.0 of the .npy format, got {version}")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing, but {HEADER} lists it") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a readable .npy file: {error}") from error
    if (
        dtype != expected
        or entry.get("dtype") != expected.str
        or list(shape) != entry.get("shape")
        or len(shape) != 1
        or fortran
    ):
        raise ValueError(
            f"{path}: expected {expected.str} {entry.get('shape')}, as {HEADER} has it, got "
            f"{dtype.str} {list(shape)}"
        )
    needed = start + expected.itemsize * shape[0]
    if size != needed:
        raise ValueError(
            f"{path}: expected {needed} bytes, got {size}: the file was cut off or changed"
        )
    if not shape[0]:
        array = np.empty(0, expected)
        array.flags.writeable = False
        return array
    return np.memmap(path, expected, "r", start, shape).view(np.ndarray)


def sha256_of(path: Path, *, skip_npy_header: bool) -> str:
    """The SHA-256 of a file, of an array without its ``.npy`` header."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if skip_npy_header:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def content_sha256(header: Mapping[str, Any]) -> str:
    """The identity of a store: equal exactly where all arrays, the dictionary, and what their
    numbers stand for (visit rule, names of the splits, size of the vocabulary) are equal."""
    arrays: Mapping[str, Mapping[str, Any]] = header["arrays"]
    listed = [
        [name, entry["dtype"], entry["shape"], entry["sha256"]]
        for name, entry in sorted(arrays.items())
    ]
    meaning = [header["visit_rule"], header["split"]["names"], header["vocabulary"]["size"]]
    text = json.dumps([listed, header[DICTIONARY]["sha256"], meaning], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any, *, indent: int | None = None) -> bytes:
    """Write and bring to the disk; the bytes written."""
    text = json.dumps(value, ensure_ascii=True, indent=indent, allow_nan=False)
    data = (text + "\n").encode()
    with naming(path), path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return data


def read_json(path: Path, what: str) -> Any:
    """``ValueError`` naming the file where it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected {what} as JSON, got: {error}") from error


def offsets_of(lengths: Array, base: int = 0) -> NDArray[np.int64]:
    """int64 ``[n + 1]``: where each of ``n`` rows begins, and where the last ends."""
    offsets = np.empty(len(lengths) + 1, np.int64)
    offsets[0] = base
    np.cumsum(lengths, out=offsets[1:])
    offsets[1:] += base
    return offsets
