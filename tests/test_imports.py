"""No module imports itself by way of others."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules(package: Path) -> dict[str, Path]:
    """A package's modules by their dotted names; a package is its ``__init__``."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in package.rglob("*.py")
    }


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Those of the ``known`` modules that a module imports anywhere, functions and types too.

    ``from package import module`` imports that module; that Python runs the package's ``__init__``
    before is no import of what is in it.
    """
    folder = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for statement in ast.walk(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            above = folder[: len(folder) - statement.level + 1] if statement.level else []
            source = ".".join([*above, *filter(None, [statement.module])])
            for alias in statement.names:
                module = f"{source}.{alias.name}"
                found.add(module if module in known else source)
    return found & known.keys()


def circle(package: Path) -> list[str]:
    """Some circle of the package's imports; empty where there is none."""
    known = modules(package)
    graph = {name: imported(name, path, known) for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", ["benchmarks", "ehrseq_fast"])
def test_no_module_imports_itself_by_way_of_others(package):
    assert len(modules(ROOT / package)) > 20
    assert circle(ROOT / package) == []


@pytest.mark.parametrize("back", ["from .a import A", "from . import a", "import package.a"])
@pytest.mark.parametrize("where", ["{}", "if TYPE_CHECKING:\n    {}", "def lazily():\n    {}"])
def test_a_circle_is_found(tmp_path, back, where):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from .a import A\nfrom .inner import b")
    (package / "inner" / "__init__.py").write_text("")
    (package / "a.py").write_text("from .inner import b")
    (package / "inner" / "b.py").write_text("import ast")
    assert circle(package) == []
    (package / "c.py").write_text(where.format(back))
    (package / "a.py").write_text("from . import c")
    assert set(circle(package)) == {"package.a", "package.c"}
