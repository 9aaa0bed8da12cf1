"""What docs/trainers.md defines: its trainers are the ones that are tested."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


@cache
def definitions() -> Any:
    """The functions and classes of the page's Python, by name; its examples are left out."""
    names: dict[str, Any] = {"__name__": "trainers.md", "patients": None, "loader": None}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        tree = ast.parse(block)
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        tree.body = [node for node in tree.body if isinstance(node, kinds)]
        exec(compile(tree, str(PAGE), "exec"), names)
    return SimpleNamespace(**names)
