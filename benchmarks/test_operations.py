"""The operations for pytest-benchmark: ``pytest benchmarks --benchmark-only``.

The same cases as ``python -m benchmarks ops``, forward and backward in float32 on small batches; a
way whose results differ from the first one's fails before it is timed. pytest-benchmark compares
them with its own saved runs (``--benchmark-autosave``, ``--benchmark-compare``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from . import registry, workloads
from .cases import Case, Missing, Tensors, Variant, asked_for, difference_of

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

LETTERS = tuple(letter for letter in workloads.WORKLOADS if letter != "D")
MAKERS = {
    name: benchmark.small
    for name, benchmark in registry.benchmarks().items()
    if benchmark.small is not None
}


@cache
def batch(letter: str) -> workloads.Batch:
    return workloads.WORKLOADS[letter].batch("small")


def parameters() -> Iterator[Any]:
    """Every variant of every case, by name; the cases are made when they are run."""
    for name in MAKERS:
        for variant in case(name, "B").variants:
            for letter in LETTERS:
                yield pytest.param(name, letter, variant, id=f"{name}-{letter}-{variant}")


@cache
def case(name: str, letter: str) -> Case:
    return MAKERS[name](batch(letter))


@cache
def results(name: str, letter: str, variant: str) -> Tensors:
    """Of its first run: a training step's later ones begin with other weights."""
    way = case(name, letter).variants[variant]
    assert isinstance(way, Variant)
    with asked_for(way.backend):
        return way.in_common(way.run())


@pytest.mark.parametrize(("name", "letter", "variant"), list(parameters()))
def test_speed(benchmark, name, letter, variant):
    of = case(name, letter)
    way = of.variants[variant]
    if isinstance(way, Missing):
        pytest.skip(way.reason)
    benchmark.group = of.title
    first = next(v for v, other in of.variants.items() if isinstance(other, Variant))
    if way.compared:
        of.require_equal(difference_of(*(results(name, letter, v) for v in (variant, first))))
    with asked_for(way.backend):
        benchmark(way.run)
