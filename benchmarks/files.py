"""Files that are written whole or not at all, and known to be writable before a long run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def refuse_unwritable(path: Path | None) -> None:
    """Find out at once whether a file can be written, before minutes are spent on what it holds.

    Raises:
        SystemExit: with one line that says why it cannot.
    """
    if path is None:
        return
    try:
        if _is_special(path):
            with path.open("a"):
                pass
        elif path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        elif path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is read-only")
        else:
            with replacing(path) as unfinished:
                unfinished.write_text("can be written")
                raise _NotKept
    except _NotKept:
        return
    except OSError as error:
        reason = error.strerror or str(error)
        raise SystemExit(f"python -m benchmarks: cannot write {path}: {reason}") from None


class _NotKept(Exception):
    """What was written was only to see whether it can be."""


def write_text(path: Path, text: str) -> None:
    """Write a text file so that at any moment the old one is there, whole, or the new one is."""
    if _is_special(path):
        path.write_text(text)
        return
    with replacing(path) as unfinished:
        unfinished.write_text(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to be written in the block. It takes the place of ``path`` once it is
    on the disk; if anything goes wrong before, it is removed and ``path`` is what it was."""
    path = Path(os.path.realpath(path))  # what a link points to, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())
        unfinished.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        unfinished.replace(path)
    except BaseException:  # an interruption too
        with suppress(OSError):
            unfinished.unlink()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_special(path: Path) -> bool:
    """A terminal, a pipe or a device, which nothing may take the place of."""
    return path.exists() and not path.is_file() and not path.is_dir()
