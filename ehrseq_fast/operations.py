"""The operations of the package and their operators: a registry, filled by the operations' folders.

A folder of the package with an ``op.py`` holds an operation. Its ``operators.py`` says which
backends have kernels for it (:func:`register`) and defines its operators, each with the shapes of
its results (:func:`operator`). Nothing outside the folder lists it: :func:`import_all`, tests,
sanitizer runs and benchmarks read this registry.

Operators are defined here, in Python, and not in a compiled library, so that they exist wherever
the package does. They are defined once per kind of kernel: ``torch.ops.ehrseq_fast`` holds the
compiled ones (``csrc/``; CPU and CUDA), ``torch.ops.ehrseq_fast_triton`` those in Triton, so that
either can be called on the same tensor. ``backend.operators`` gives the ones that were chosen.
An output that a call has no use for is an empty tensor.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COMPILED = "ehrseq_fast"
TRITON = "ehrseq_fast_triton"

#: The operations' folders, by name.
FOLDERS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/op.py")))


@dataclass(frozen=True)
class Operation:
    """What a backend is chosen for: its name, its folder, the backends that have kernels, and those
    whose kernels the folder itself takes where they are asked for."""

    name: str
    folder: str
    backends: frozenset[str]
    on_request: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Operator:
    """A raw operator: its schema, its folder, and the function that gives its results' shapes."""

    schema: str
    folder: str
    shapes: Callable[..., Any]

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    def refuse_none(self, arguments: tuple[Any, ...]) -> None:
        """``ValueError`` for None in place of a tensor that the operator requires."""
        declared = self.schema.partition("(")[2].partition(")")[0].split(",")
        for value, argument in zip(arguments, declared, strict=False):
            kind, name = argument.split()
            if value is None and kind == "Tensor":
                raise ValueError(f"{self.name}: {name}: expected a tensor, got None")


_operations: dict[str, Operation] = {}
_operators: dict[str, Operator] = {}
_triton_functions: dict[str, Callable[..., Any]] = {}
_implemented: set[tuple[str, str]] = set()  # operators in Triton, and for which device's tensors
_libraries: dict[str, torch.library.Library] = {}
_schema_readers: list[Callable[[bytes], Any]] = []  # of libraries whose errors name arguments


def import_all() -> None:
    """Import every operation, so that the registry is complete."""
    for folder in FOLDERS:
        importlib.import_module(f"{__package__}.{folder}.op")


def register(
    name: str, *backends: str, package: str | None, on_request: tuple[str, ...] = ()
) -> None:
    """Say which backends have kernels for the operation ``name``; ``package`` is its folder's
    ``__package__``. Those ``on_request`` are never chosen: the folder takes them itself."""
    folder = (package or "").rpartition(".")[2]
    _operations[name] = Operation(name, folder, frozenset(backends), frozenset(on_request))


def registered() -> tuple[Operation, ...]:
    """All operations."""
    return tuple(_operations.values())


def named(name: str) -> Operation:
    """The operation of that name."""
    return _operations[name]


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator; decorates the function that gives the shapes and dtypes of its results
    (for ``torch.compile`` and ``torch.export``)."""

    def define_in_all(shapes: Callable[..., Any]) -> Callable[..., Any]:
        defined = Operator(schema, shapes.__module__.split(".")[-2], shapes)
        _operators[defined.name] = defined
        for namespace in _libraries:
            _define_in(namespace, defined)
        for read in _schema_readers:
            read(schema.encode())
        return shapes

    return define_in_all


def operators() -> tuple[Operator, ...]:
    """All operators."""
    return tuple(_operators.values())


def define(namespace: str) -> None:
    """Define every operator, those of later folders too, in ``torch.ops.<namespace>``."""
    _libraries[namespace] = torch.library.Library(namespace, "DEF")
    for defined in _operators.values():
        _define_in(namespace, defined)


def name_arguments_in(library: ctypes.CDLL) -> None:
    """Give a compiled library the schemas of all operators, those of later folders too: its errors
    name the arguments.

    Raises:
        AttributeError: for a library of an older build, which takes none.
    """
    read = library.ehrseq_fast_add_schema
    _schema_readers.append(read)
    for defined in _operators.values():
        read(defined.schema.encode())


def _define_in(namespace: str, defined: Operator) -> None:
    library = _libraries[namespace]
    library.define(defined.schema)

    @functools.wraps(defined.shapes)
    def shapes(*arguments: Any, **options: Any) -> Any:
        defined.refuse_none(arguments)
        return defined.shapes(*arguments, **options)

    torch.library.register_fake(f"{namespace}::{defined.name}", shapes, lib=library)


def implemented_in_triton(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the function that computes an operator with Triton kernels."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*arguments: Any, **options: Any) -> Any:
            try:
                return function(*arguments, **options)
            except Exception:  # looked into where it failed alone: a launch is to cost no more
                _operators[name].refuse_none(arguments)
                raise

        _triton_functions[name] = called
        return function

    return keep


def implement_in_triton(device: str) -> None:
    """Have the decorated functions serve tensors of that device."""
    for name, function in _triton_functions.items():
        if (name, device) not in _implemented:
            _libraries[TRITON].impl(name, function, device.upper())
            _implemented.add((name, device))


define(COMPILED)
define(TRITON)
