"""Connections to DuckDB, and its errors as those of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any


def is_path(database: Any) -> bool:
    """Whether ``database`` is the path of a file, and not a connection.

    Raises:
        TypeError: neither of the two.
    """
    if isinstance(database, str | PathLike):
        return True
    if not hasattr(database, "execute"):
        raise TypeError(
            f"database: expected a DuckDB connection or a path, got {type(database).__name__}"
        )
    return False


@contextmanager
def opened(database: Any, settings: Mapping[str, str | int] | None = None) -> Iterator[Any]:
    """The connection, or one to the file of that path, read-only, with DuckDB's ``settings``.

    Raises:
        TypeError: neither a connection nor a path.
        FileNotFoundError: no such file.
        ValueError: a file that DuckDB cannot open.
        ImportError: a path, where duckdb is not installed.
    """
    if not is_path(database):
        yield database
        return
    try:
        import duckdb
    except ImportError as error:
        raise ImportError(
            "reading a database file needs duckdb: pip install 'ehrseq_fast[omop]'"
        ) from error
    # Of a file of SQLite and others DuckDB would fetch an extension from the internet.
    config: dict[str, Any] = {"autoinstall_known_extensions": "false", **(settings or {})}
    path = Path(fspath(database))
    if not path.exists():
        raise FileNotFoundError(f"database: expected a DuckDB file, got {path}: no such file")
    try:
        connection = duckdb.connect(str(path), read_only=True, config=config)
    except duckdb.Error as error:
        why = "it is one of SQLite" if _is_sqlite(path) else error
        raise ValueError(
            f"database: expected a DuckDB file that can be opened read-only, got {path}: {why}"
        ) from error
    with connection:
        yield connection


def _is_sqlite(path: Path) -> bool:
    begin = b"SQLite format 3\0"
    try:
        with path.open("rb") as file:
            return file.read(len(begin)) == begin
    except OSError:
        return False


@contextmanager
def reading(what: str) -> Iterator[None]:
    """DuckDB's errors with what was being read.

    Raises:
        MemoryError: more than ``memory_limit`` is needed.
        OSError: the file is truncated or corrupt.
        ValueError: any other error, as of a view that cannot be computed.
    """
    import duckdb

    broken = (duckdb.IOException, duckdb.SerializationException, duckdb.InternalException)
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise MemoryError(f"{what}: memory_limit is too small for DuckDB: {error}") from error
    except (*broken, duckdb.FatalException) as error:
        raise OSError(f"{what}: the database cannot be read: {error}") from error
    except duckdb.Error as error:
        raise ValueError(f"{what}: DuckDB cannot read it: {error}") from error
