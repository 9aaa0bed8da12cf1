"""Run pytest, or any Python program, in memory that is never zero by luck.

``python -m tests.poisoned [pytest's arguments]`` runs the suite under an allocator that fills fresh
memory with 0xFF and freed memory with another pattern (``native/poisoning_allocator.c``), in
PyTorch, in NumPy and in the compiled libraries alike: what reads a value before it was written gets
a NaN or an index below 0, always and not one time in a hundred. Without arguments, the whole suite.

``python -m tests.poisoned beside-sanitizers [pytest's arguments]``: those tests of operations,
batches, models and threads that ``python -m tests.sanitized address`` leaves out. What that runs is
in memory filled in the same way there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import marked, sanitized

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


def beside_sanitizers() -> list[str]:
    """pytest's arguments for what the sanitized run leaves out, and what it has no files of."""
    more = [*HERE.glob("test_*model*.py"), HERE / "test_threads.py"]
    files = {*marked.of_operations(), *sanitized.BATCHES}
    files |= {str(path.relative_to(HERE.parent)) for path in more}
    kept = " or ".join(("model", "threads", *sanitized.LEFT_OUT))
    others = " and ".join(f"not {word}" for word in sanitized.ELSEWHERE)
    return [*sorted(files), "-k", f"{others} and ({kept})"]


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        sys.exit(f"python -m tests.poisoned: {reason}")
    arguments = sys.argv[1:]
    if arguments[:1] == ["beside-sanitizers"]:
        arguments = [*beside_sanitizers(), *arguments[1:]]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    sys.exit(subprocess.run(command, env=environment(), check=False).returncode)
