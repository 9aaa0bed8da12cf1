"""Marks of tests that need optional packages."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

_PACKAGES = {
    "meds": ("pyarrow",),
    "omop": ("duckdb",),
    "train": ("jsonargparse", "matplotlib", "safetensors", "tqdm", "yaml"),
    "metrics": ("lifelines", "sklearn"),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
    "trainers": ("accelerate", "lightning"),
}


def needs(*extras: str) -> pytest.MarkDecorator:
    """Skip, saying why, where packages of these extras are not installed."""
    packages = [package for extra in extras for package in _PACKAGES[extra]]
    missing = [package for package in packages if find_spec(package) is None]
    command = f"pip install 'ehrseq_fast[{','.join(extras)}]'"
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}: {command}")
