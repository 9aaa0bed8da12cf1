"""A progress bar where tqdm is installed; a GPU's machine, which has no network, may lack it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any


class _NoBar:
    """What is called of a bar, without one."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_description(self, text: str) -> None:
        pass

    def update(self, done: float = 1) -> None:
        pass


def bar(**options: Any) -> Any:
    """tqdm's, with its options."""
    if find_spec("tqdm") is None:
        return _NoBar()
    from tqdm import tqdm

    return tqdm(**options)


def say(text: str) -> None:
    """Print above the bar."""
    if find_spec("tqdm") is None:
        print(text, flush=True)
        return
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
