"""Folders that appear whole or not at all.

A folder ``out`` is written as ``.out.writing-…/new`` beside it and renamed at the end. Where one is
replaced, Linux exchanges the two in one step; elsewhere the old one is first renamed to
``.out.replaced-…``, and whoever finds that folder without ``out`` (a crash between two renames)
renames it back. A lock beside them says whether a writer is alive: what is found under the lock is
left over from a crash.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class NewFolder:
    """The temporary folder of a writer: ``new`` becomes ``out`` on :meth:`commit`; ``parts`` is
    for what is needed until then."""

    def __init__(self, out: Path, temporary: Path) -> None:
        self.out, self.temporary = out, temporary
        self.new, self.parts = temporary / "new", temporary / "parts"
        self.new.mkdir(parents=True)
        self.parts.mkdir()

    def commit(self) -> None:
        """Make ``new`` the folder ``out``. Its files must have been brought to the disk."""
        fsync_folder(self.new)
        if _is_empty_folder(self.out) or not _exists(self.out):
            os.rename(self.new, self.out)
        elif not _exchange(self.new, self.out):
            replaced = _beside(self.out, "replaced")
            os.rename(self.out, replaced)
            os.rename(self.new, self.out)
            fsync_folder(self.out.parent)
            remove_folder(replaced)
        fsync_folder(self.out.parent)


@contextmanager
def new_folder(
    out: str | os.PathLike[str],
    *,
    overwrite: bool,
    what: str,
    is_one: Callable[[Path], bool],
) -> Iterator[NewFolder]:
    """A folder to fill, under a lock that keeps other writers of ``out`` away. It is removed at
    the end, whether or not it was committed.

    Args:
        out: the folder to make; it may be empty.
        overwrite: replace what ``is_one`` says to be of the same kind.
        what: what is written, for messages.

    Raises:
        FileExistsError: ``out`` exists and may not be replaced.
        RuntimeError: another process writes it.
    """
    path = Path(os.path.realpath(out))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path, what, wait=False):
        _recover_locked(path)
        _remove_stale(path)
        _refuse_existing(path, overwrite, what, is_one)
        folder = NewFolder(path, _beside(path, "writing"))
        try:
            yield folder
        finally:
            remove_folder(folder.temporary)


def _refuse_existing(
    path: Path, overwrite: bool, what: str, is_one: Callable[[Path], bool]
) -> None:
    if not _exists(path) or _is_empty_folder(path):
        return
    if not is_one(path):
        raise FileExistsError(f"{path}: exists and is not {what}, so it is not replaced")
    if not overwrite:
        raise FileExistsError(f"{path}: exists; overwrite=True (--overwrite) replaces it")


def recovered(path: Path) -> Path:
    """``path``, or where the folder is that a crash between two renames has left nameless."""
    if _exists(path) or not _siblings(path, "replaced"):
        return path
    try:
        with _lock(path, "", wait=True):
            _recover_locked(path)
    except OSError:  # a read-only medium: read it where it is
        left = _siblings(path, "replaced")
        return left[0] if left and not _exists(path) else path
    return path


def _recover_locked(path: Path) -> None:
    for replaced in _siblings(path, "replaced"):
        if _exists(path):
            remove_folder(replaced)
        else:
            os.rename(replaced, path)
            fsync_folder(path.parent)


def _remove_stale(path: Path) -> None:
    for stale in _siblings(path, "writing") + _siblings(path, "removing"):
        remove_folder(stale)


def remove_folder(folder: Path) -> None:
    """Remove a temporary folder. It is renamed first, so that a process which outlived its writer
    finds no folder to make files in."""
    removing = folder.with_name(folder.name.rsplit(".", 1)[0] + _unique("removing"))
    try:
        os.rename(folder, removing)
    except FileNotFoundError:
        return
    except OSError:
        removing = folder
    shutil.rmtree(removing, ignore_errors=True)


def fsync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _lock(path: Path, what: str, *, wait: bool) -> Iterator[None]:
    import fcntl  # of POSIX systems: stores are read without it

    name = path.with_name(f".{path.name}.lock")
    while True:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise RuntimeError(
                f"{path}: another process is writing {what} there (it holds {name})"
            ) from None
        except OSError:  # a file system without locks
            break
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(name), os.fstat(descriptor)):
                break  # else its last holder has removed the file since it was opened
        os.close(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(name)
        os.close(descriptor)


def _unique(kind: str) -> str:
    return f".{kind}-{uuid.uuid4().hex[:12]}"


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}{_unique(kind)}")


def _siblings(path: Path, kind: str) -> list[Path]:
    start = f".{path.name}.{kind}-"
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    return sorted(path.parent / name for name in names if name.startswith(start))


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where this system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    renameat2.argtypes = [
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    ]
    if not renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
