"""pycox's formulas, from its files: the package as a whole imports torchtuples, numba and more, and
is installed here without what it depends on, of which these files use next to nothing."""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest


def load(monkeypatch, name):
    """The module ``pycox.<name>``; skips the test where pycox is not installed."""
    spec = find_spec("pycox")
    if spec is None:
        pytest.skip("pycox is an oracle, and is not installed")
    if find_spec("numba") is None:  # then it runs as Python
        plain = types.SimpleNamespace(jit=lambda **_: lambda function: function, prange=range)
        monkeypatch.setitem(sys.modules, "numba", plain)
    if find_spec("torchtuples") is None:  # a type in annotations
        monkeypatch.setitem(sys.modules, "torchtuples", types.SimpleNamespace(TupleTree=tuple))
    folder = Path(spec.submodule_search_locations[0])
    if name == "models.loss":
        models = types.ModuleType("pycox.models")
        models.utils = _run(folder / "models" / "utils.py")
        monkeypatch.setitem(sys.modules, "pycox", types.ModuleType("pycox"))
        monkeypatch.setitem(sys.modules, "pycox.models", models)
    return _run(folder / Path(*name.split(".")).with_suffix(".py"))


def _run(path):
    spec = spec_from_file_location(f"of_pycox_{path.stem}", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
