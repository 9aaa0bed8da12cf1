"""What a ``forward`` is made of beside its module: functions and values of its class, and those
that it reads by name outside of it. Any of them may be replaced after a module was compared.

They are found in the code of ``forward`` and of what it calls of the class and of its file, and
looked at again before each fused forward pass. What is inside of other modules, or is read of them
(``settings.scale``, where ``settings`` is a module), is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import dis
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, SimpleNamespace
from typing import Any

from torch import nn

from .attributes import ABSENT, PLAIN, MayChange, frozen

_MOST = 1000  # entries of a container that are looked at each time
_CONTAINERS = (dict, list, tuple, set, frozenset)


class Definitions:
    """The functions and values that ``forward`` of some classes is made of, as they are now.

    Args:
        kinds: the classes.
        names: of what is read of their instances, as far as that is known.

    Raises:
        MayChange: with the name of one that may change without a trace.

    Example:
        >>> from torch import nn
        >>> from ehrseq_fast.models.definitions import Definitions
        >>> class Model(nn.Module):
        ...     scale = 1.0
        ...     def forward(self, x):
        ...         return x * self.scale
        >>> found = Definitions([Model])
        >>> found.hold()
        True
        >>> Model.scale = 2.0
        >>> found.hold()
        False
    """

    def __init__(self, kinds: Iterable[type], names: Iterable[str] = ()) -> None:
        self._held: list[tuple[Callable[[], Any], Any]] = []
        self._digest = hashlib.sha256()
        self._functions: set[int] = set()
        self._seen: set[tuple[int, str]] = set()
        for kind in kinds:
            lineage = kind.__mro__
            end = lineage.index(nn.Module) if nn.Module in lineage else len(lineage) - 1
            self._lineage = lineage[:end]
            self._files = {each.__module__ for each in self._lineage}
            for name in ("forward", *names):
                self._add_attribute(name)

    @property
    def fingerprint(self) -> str:
        """What tells them from others, in another process too: a digest of the instructions of
        functions and of plain values."""
        return self._digest.hexdigest()

    def hold(self) -> bool:
        """Whether all are what they were."""
        try:
            return all(_told(now()) == before for now, before in self._held)
        except MayChange:
            return False

    def _add(self, name: str, now: Callable[[], Any]) -> None:
        value = now()
        try:
            self._held.append((now, _told(value)))
        except MayChange:
            raise MayChange(name) from None
        self._digest.update(f"{name}={_printed(value)};".encode())
        for function in _functions_of(value):
            self._add_function(function)

    def _add_attribute(self, name: str) -> None:
        """What the classes have of that name, and those before ``nn.Module`` do not have."""
        if name.startswith("__") and name.endswith("__"):
            return
        for kind in self._lineage:
            if (id(kind), name) not in self._seen:
                self._seen.add((id(kind), name))
                self._add(name, functools.partial(kind.__dict__.get, name, ABSENT))

    def _add_function(self, function: FunctionType) -> None:
        if id(function) in self._functions:
            return
        self._functions.add(id(function))
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self._add(name, functools.partial(_contents_of, cell))
        if function.__module__ not in self._files:
            return
        names = function.__globals__
        for opname, name in _names_in(function.__code__):
            if opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                if name in names and (id(names), name) not in self._seen:
                    self._seen.add((id(names), name))
                    self._add(name, functools.partial(names.get, name, ABSENT))
            elif any(name in kind.__dict__ for kind in self._lineage):
                self._add_attribute(name)


def asks_for_type(kind: type[nn.Module]) -> bool:
    """Whether ``kind.forward``, or what it calls of its class and its file, looks at exact classes
    and at recurrent layers: ``type(self.rnn) is nn.LSTM``, ``self.rnn.__class__.__name__``.

    Example:
        >>> from torch import nn
        >>> from ehrseq_fast.models.definitions import asks_for_type
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return self.rnn(x)[1][0 if type(self.rnn) is nn.LSTM else slice(None)]
        >>> asks_for_type(Model), asks_for_type(nn.Linear)
        (True, False)
    """
    lineage = kind.__mro__[: kind.__mro__.index(nn.Module)]
    files = {each.__module__ for each in lineage}
    ahead, seen = [getattr(each, "forward", None) for each in lineage], set()
    while ahead:
        for function in _functions_of(ahead.pop()):
            if function in seen or function.__module__ not in files:
                continue
            seen.add(function)
            found = list(_names_in(function.__code__))
            names = {name for _, name in found}
            values = [function.__globals__.get(n) for how, n in found if how == "LOAD_GLOBAL"]
            asks = ("LOAD_GLOBAL", "type") in found or ("LOAD_ATTR", "__class__") in found
            if asks and (names & _OF_LAYERS or any(_holds_layers(value) for value in values)):
                return True
            ahead += [v for v in values if isinstance(v, FunctionType)]
            ahead += [vars(each)[name] for each in lineage for name in names & vars(each).keys()]
    return False


_OF_LAYERS = {"LSTM", "GRU", "__name__", "__qualname__"}


def _holds_layers(value: Any) -> bool:
    inside = value if isinstance(value, _CONTAINERS) else [value]
    return any(entry is kind for entry in inside for kind in (nn.LSTM, nn.GRU))


def _contents_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of what is defined later
        return ABSENT


def _names_in(code: CodeType) -> Iterator[tuple[str, str]]:
    """The names that are read in a function, and of the functions inside, with how."""
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("LOAD_") and isinstance(instruction.argval, str):
            yield instruction.opname, instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _printed(value: Any) -> str:
    """A text that is the same in every process."""
    if type(value) in PLAIN:
        return repr(value)
    if isinstance(value, CodeType):
        parts = (value.co_code, value.co_names, value.co_varnames, value.co_freevars)
        return f"{parts}{_printed(value.co_consts)}"
    if isinstance(value, _CONTAINERS):
        entries = value.items() if isinstance(value, dict) else value
        printed = [_printed(entry) for entry in entries]
        return f"{sorted(printed) if isinstance(value, (set, frozenset)) else printed}"
    if functions := _functions_of(value):
        return "".join(_printed(f.__code__) + _printed(f.__defaults__) for f in functions)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _functions_of(value: Any) -> list[FunctionType]:
    if isinstance(value, property):
        inside: list[Any] = [value.fget]
    elif isinstance(value, (staticmethod, classmethod)):
        inside = [value.__func__]
    elif isinstance(value, (functools.partial, functools.partialmethod)):
        inside = [value.func]
    else:
        inside = [value]
    return [function for function in inside if isinstance(function, FunctionType)]


def _told(value: Any) -> Any:
    """What equals the same of a value that is the same: by contents those of plain containers and
    of objects that hold settings, itself for all others."""
    if isinstance(value, (SimpleNamespace, argparse.Namespace)) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return frozen(value)
    if isinstance(value, _CONTAINERS):
        if len(value) > _MOST:
            raise MayChange
        return frozen(value)
    return frozen(value, inside=False)
