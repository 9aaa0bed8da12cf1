"""PyArrow, which is optional, and its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def pyarrow() -> Any:
    """The module; ``ImportError`` naming the extra where it is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("MEDS files need pyarrow: pip install 'ehrseq_fast[meds]'") from error
    return pa


@contextmanager
def parquet_errors(where: str) -> Iterator[None]:
    """What PyArrow says of a file that it cannot read, with the file's name."""
    pa = pyarrow()
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{where}: expected a Parquet file, it cannot be read: {error}") from error
