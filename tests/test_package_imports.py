"""No module of the package imports itself by way of others, in a function neither."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path, name: str, known: set[str]) -> set[str]:
    """The modules among ``known`` that a module imports anywhere, for types too.

    ``from package import module`` imports that module; that Python runs the package's ``__init__``
    first is no import of what that imports.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                module = f"{source}.{alias.name}"
                found.add(module if module in known else source)
    return found & known


def circle(package: Path) -> list[str]:
    """One of the package's import circles; empty where there is none."""
    paths = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    graph = {name: imported(path, name, {*paths}) for name, path in paths.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_the_package_has_no_import_circle():
    assert circle(ROOT / "ehrseq_fast") == []


@pytest.mark.parametrize("back", ["from .a import A", "from . import a", "import package.a"])
@pytest.mark.parametrize("where", ["{}", "if TYPE_CHECKING:\n    {}", "def f():\n    {}"])
def test_a_circle_is_found(tmp_path, back, where):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from .a import A")
    (package / "a.py").write_text("from .b import B")
    (package / "b.py").write_text("B = 1")
    assert circle(package) == []
    (package / "b.py").write_text(where.format(back))
    assert set(circle(package)) == {"package.a", "package.b"}
