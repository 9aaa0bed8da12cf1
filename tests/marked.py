"""The test files of each operation, by their mark: ``python -m tests.marked [folder ...]`` prints
them, and ``python -m tests.marked --gpu`` those in which something runs on a GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
# the fixtures that place a test on a GPU, as arguments and by name; the mark itself
_PLACED = r"backend|kernels|unemulated"
_ON_GPU = re.compile(
    rf"def \w+\([^)]*\b(?:{_PLACED})\b|\"(?:{_PLACED})\"|pytest\.mark\.gpu\b|\bON_GPU\b"
)
_MARK = re.compile(r"pytest\.mark\.operation\(\"(\w+)\"\)")


def of_operations(*folders: str) -> tuple[str, ...]:
    """The files marked as tests of these operations, or of any operation, relative to the root."""
    marked = {path: set(_MARK.findall(path.read_text())) for path in sorted(HERE.glob("test_*.py"))}
    return tuple(
        str(path.relative_to(HERE.parent))
        for path, found in marked.items()
        if (found & set(folders) if folders else found)
    )


def on_gpu() -> tuple[str, ...]:
    """The files with tests for a GPU, relative to the root: what else there is has imports that a
    GPU's machine may lack."""
    files = sorted(HERE.glob("test_*.py"))
    return tuple(str(p.relative_to(HERE.parent)) for p in files if _ON_GPU.search(p.read_text()))


if __name__ == "__main__":
    asked = sys.argv[1:]
    print(*(on_gpu() if asked == ["--gpu"] else of_operations(*asked)), sep="\n")
