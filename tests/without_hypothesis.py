"""In place of hypothesis where it is not installed, as on a machine without a network: modules of
tests are imported all the same, and their property tests skip themselves."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


class _Anything:
    """What may be called, indexed and asked for any attribute; strategies are made of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return self

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __or__(self, other: object) -> _Anything:
        return self

    def __iter__(self) -> Any:
        return iter(())


class _Settings(_Anything):
    """``settings``: as a decorator it leaves a test as it is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


def given(*args: Any, **kwargs: Any) -> Any:
    """A property test is skipped."""
    return pytest.mark.skip(reason="hypothesis is not installed")


def stand_in() -> None:
    """Make ``import hypothesis`` give this."""
    module: Any = ModuleType("hypothesis")
    module.__spec__ = ModuleSpec("hypothesis", None)  # torch.compile asks for it
    module.given = given
    module.settings = _Settings()
    module.example = lambda *args, **kwargs: lambda function: function
    module.strategies = _Anything()
    module.__getattr__ = _Anything().__getattr__
    sys.modules["hypothesis"] = module
    sys.modules["hypothesis.strategies"] = module.strategies
