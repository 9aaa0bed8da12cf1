"""Run pytest, or any Python program, in memory that is never zero by luck.

``python -m tests.poisoned [pytest's arguments]`` runs the suite under an allocator that fills fresh
memory with 0xFF and freed memory with another pattern (``native/poisoning_allocator.c``), in
PyTorch, in NumPy and in the compiled libraries alike: what reads a value before it was written gets
a NaN or an index below 0, always and not one time in a hundred. Without arguments, the whole suite.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "native" / "poisoning_allocator.c"
CACHE = HERE.parent / "build" / "poisoned"


def why_not() -> str | None:
    """Why there is no such allocator here; None where there is one."""
    if sys.platform != "linux" or not hasattr(os, "confstr") or "glibc" not in _libc():
        return "the poisoning allocator stands in for glibc's, and this is another system"
    if shutil.which("gcc") is None:
        return "there is no gcc"
    return None


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return ""


def allocator() -> Path:
    """The compiled allocator, to be preloaded."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = CACHE / f"poisoning_allocator-{digest}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        # no builtins: the compiler may turn malloc and memset into a calloc, which calls malloc
        flags = ["-O2", "-fPIC", "-fno-builtin-malloc", "-Wall", "-Werror", "-shared"]
        subprocess.run(["gcc", *flags, str(SOURCE), "-o", str(unfinished)], check=True)
        unfinished.rename(library)
    return library


def environment() -> dict[str, str]:
    """What a child process has to be started with."""
    before = [path for path in os.environ.get("LD_PRELOAD", "").split() if path]
    preload = " ".join([str(allocator()), *before])
    return os.environ | {"LD_PRELOAD": preload, "EHRSEQ_FAST_POISONED": "1"}


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        sys.exit(f"python -m tests.poisoned: {reason}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=environment(), check=False).returncode)
