"""What a ``forward`` reads of its module beside its parts: options, which may be changed later.

Which attributes these are is found out once, while ``forward`` runs on a copy. What they hold is
kept on the module and compared before each fused forward pass.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import math
import random
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# The attribute of an instance with a fused forward pass that holds what this depends on beside
# weights.
FOUND = "_ehrseq_fast_found"
ABSENT = "<no such attribute>"
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_OF_NUMBERS = (Tensor, nn.Module, np.ndarray, bytearray, array)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_DEEPEST = 6


class MayChange(Exception):
    """An attribute holds what may change without a trace: a tensor, a module, an array, a generator
    of random numbers."""


class _Same:
    """An object that equals itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = object.__hash__


@dataclass(frozen=True)
class Found:
    """What attributes held.

    Attributes:
        plain: names, and their numbers, strings and None.
        others: names, and what can be compared of containers and objects.
    """

    plain: tuple[tuple[str, Any], ...]
    others: tuple[tuple[str, Any], ...]


@contextlib.contextmanager
def reads_of(module: nn.Module) -> Iterator[set[str]]:
    """The names of the attributes that are read of ``module`` meanwhile."""
    kind: Any = type(module)
    names: set[str] = set()

    def get(self: Any, name: str) -> Any:
        names.add(name)
        return kind.__getattribute__(self, name)

    contents = {"__getattribute__": get, "__module__": kind.__module__}
    module.__class__ = type(kind)(kind.__name__, (kind,), contents)
    try:
        yield names
    finally:
        module.__class__ = kind


def options_among(names: Iterable[str], module: nn.Module) -> tuple[str, ...]:
    """The ``names`` that are neither parts of a module nor what every module has."""
    return tuple(
        sorted(
            name
            for name in names
            if name not in _OF_EVERY_MODULE
            and name not in module._modules
            and not name.startswith("__")
        )
    )


def foreign_to(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that its class does not know of: what was put on an instance."""
    kind: Any = type(module)
    known = {*module._modules, *module._parameters, *module._buffers, *_OF_EVERY_MODULE}
    known |= _stored_by(kind)
    return sorted(name for name in names if name not in known and not hasattr(kind, name))


@functools.cache
def _stored_by(kind: type) -> frozenset[str]:
    """The names of attributes that functions of a class set, of any object."""
    functions = [f for each in kind.__mro__ for f in vars(each).values()]
    return frozenset(
        instruction.argval
        for function in functions
        if isinstance(function, FunctionType)
        for instruction in dis.get_instructions(function)
        if instruction.opname == "STORE_ATTR"
    )


def attributes_of(module: nn.Module, names: Iterable[str]) -> Found:
    """What ``module`` itself, and not its class, holds by these names.

    Raises:
        MayChange: with the name of one that holds what may change without a trace.
    """
    plain, others = [], []
    for name in names:
        value = module.__dict__.get(name, ABSENT)
        is_nan = isinstance(value, float) and math.isnan(value)  # equals no other
        if type(value) in PLAIN and not is_nan:
            plain.append((name, value))
            continue
        try:
            others.append((name, frozen(value)))
        except MayChange:
            raise MayChange(name) from None
    return Found(tuple(plain), tuple(others))


def are_as_found(module: nn.Module, found: Found) -> bool:
    """Whether the attributes hold what they held; without those that are not plain while
    ``torch.compile`` traces, for which the answer is no where there are any."""
    own = module.__dict__
    for name, value in found.plain:
        now = own.get(name, ABSENT)
        if type(now) is not type(value) or now != value:
            return False
    if torch.compiler.is_compiling():
        return len(found.others) == 0
    try:
        return all(frozen(own.get(name, ABSENT)) == value for name, value in found.others)
    except MayChange:
        return False


def contents_of(module: nn.Module) -> dict[str, Any]:
    """By the name of each attribute what can be compared of it, to see what a call changes."""
    contents: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        inside = None
        if name not in _OF_EVERY_MODULE:
            with contextlib.suppress(MayChange):
                inside = frozen(value)
        contents[name] = (_Same(value), inside)
    return contents


def frozen(value: Any, depth: int = 0, *, inside: bool = True) -> Any:
    """Something that equals what the same makes of a value that holds the same; with ``inside``
    False, of an object that is the same.

    Raises:
        MayChange: for what may change without a trace, and where a container holds such.
    """
    kind = type(value)
    if isinstance(value, (*_OF_NUMBERS, *_GENERATORS)):
        raise MayChange
    if kind is float:
        return kind, repr(value)  # as NaN equals no other
    if kind in PLAIN:
        return kind, value
    contents = None if depth == _DEEPEST or not inside else _contents(value)
    if contents is None:
        return _Same(value)
    held = tuple(frozen(entry, depth + 1) for entry in contents)
    return kind if isinstance(value, _CONTAINERS) else _Same(value), held


def _contents(value: Any) -> list[Any] | None:
    """What a container or an object of a class holds; None for what cannot be looked into."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, deque)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, (type, FunctionType, ModuleType)):
        return None
    own = getattr(value, "__dict__", None)
    return [*own.keys(), *own.values()] if isinstance(own, dict) else None
