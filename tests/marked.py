"""The test files of each operation, by their mark: ``python -m tests.marked [folder ...]`` prints
them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
_MARK = re.compile(r"pytest\.mark\.operation\(\"(\w+)\"\)")


def of_operations(*folders: str) -> tuple[str, ...]:
    """The files marked as tests of these operations, or of any operation, relative to the root."""
    marked = {path: set(_MARK.findall(path.read_text())) for path in sorted(HERE.glob("test_*.py"))}
    return tuple(
        str(path.relative_to(HERE.parent))
        for path, found in marked.items()
        if (found & set(folders) if folders else found)
    )


if __name__ == "__main__":
    print(*of_operations(*sys.argv[1:]), sep="\n")
