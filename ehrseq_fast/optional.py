"""Packages that only parts of this one need: imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def need(module: str, extra: str, what: str) -> Any:
    """The module, imported.

    Args:
        module: its dotted name.
        extra: which of this package's extras brings it.
        what: what it is needed for, as the subject of "needs".

    Raises:
        ImportError: where its package is not installed, with the command that installs it.

    Example:
        >>> from ehrseq_fast.optional import need
        >>> need("no_such_package", "train", "training")
        Traceback (most recent call last):
        ...
        ImportError: training needs no_such_package: pip install 'ehrseq_fast[train]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(f"{what} needs {package}: pip install 'ehrseq_fast[{extra}]'") from error
