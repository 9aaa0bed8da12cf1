"""What a ``forward`` does that its results do not show: random numbers that it draws, arguments
that it writes to, and where it drops what."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Calls = list[tuple[int, int]]  # rows and width of what a dropout is given


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Whatever is drawn inside, generators are as before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (drawn from by others)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def effect_of(forward: Any, twin: nn.Module, inputs: Sequence[Any]) -> str:
    """What ``forward(twin, *inputs)`` does besides, in ``eval()`` and in training; empty for
    nothing."""
    for training in (False, True):
        twin.train(training)
        given = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        before = _generators()
        with torch.no_grad():
            forward(twin, *given)
        if _generators() != before:
            return "its forward draws random numbers of its own"
        for value, kept in zip(given, inputs, strict=True):
            if isinstance(kept, Tensor) and not torch.equal(value, kept):
                return "its forward writes to its arguments"
    return ""


def _generators() -> tuple[Any, ...]:
    """The states of generators that functions without one draw from."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    numpy = numpy[1].tobytes(), *numpy[2:]
    return random.getstate(), numpy, torch.random.get_rng_state().tolist()


def dropouts_of(forward: Any, twin: nn.Module, inputs: Sequence[Any]) -> dict[str, Calls]:
    """What each ``nn.Dropout`` of ``twin`` is given in training, by its name."""
    calls: dict[str, Calls] = {}
    handles = []
    for name, part in twin.named_modules():
        if type(part) is nn.Dropout:
            found = calls.setdefault(name, [])

            def see(module: nn.Module, given: Any, found: Calls = found) -> None:
                rows = given[0]
                found.append((rows.numel() // max(rows.shape[-1], 1), rows.shape[-1]))

            handles.append(part.register_forward_pre_hook(see))
    try:
        with torch.no_grad():
            forward(twin.train(), *inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextlib.contextmanager
def all_dropped(part: nn.Module) -> Iterator[None]:
    """A dropout, or the dropout between layers of a recurrent module, that leaves nothing."""
    layer: Any = part
    name = "p" if isinstance(part, nn.Dropout) else "dropout"
    kept = getattr(layer, name)
    setattr(layer, name, 1.0)
    try:
        yield
    finally:
        setattr(layer, name, kept)
