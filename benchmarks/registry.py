"""The benchmarks of this folder: every module with a ``BENCHMARK`` of its own, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from .cases import Row
from .jobs import Benchmark, Job, Settings, of_case
from .modes import Mode
from .modes import case as mode_case
from .targets import Target

EXPORTED = re.compile(r"^BENCHMARK\b", re.MULTILINE)
MODES_SECTION, MODE_WEIGHT = "ops", 0.2


@cache
def benchmarks() -> dict[str, Benchmark]:
    """By the module's name. Modules that export none are not imported."""
    return {
        path.stem: import_module(f"{__package__}.{path.stem}").BENCHMARK
        for path in sorted(Path(__file__).parent.glob("*.py"))
        if EXPORTED.search(path.read_text())
    }


def jobs(section: str, settings: Settings) -> Iterator[Job]:
    """All that a section measures: what each benchmark exports, and at last every mode."""
    for benchmark in benchmarks().values():
        if section in benchmark.jobs:
            yield from benchmark.jobs[section](settings)
    if section == MODES_SECTION:
        yield from (_of_mode(mode, settings) for mode in modes() if settings.serves(mode.dtype))


def _of_mode(mode: Mode, settings: Settings) -> Job:
    quick, backend = settings.quick, settings.backend
    return of_case(
        mode.title,
        MODE_WEIGHT,
        lambda session: mode_case(mode, session.device, quick=quick, backend=backend),
    )


def modes() -> list[Mode]:
    return [mode for benchmark in benchmarks().values() for mode in benchmark.modes]


def targets() -> list[Target]:
    return [target for benchmark in benchmarks().values() for target in benchmark.targets]


def readme_rows(device: str) -> list[Mapping[str, Any]]:
    """The rows of the README's table of operations, by the values that they are found by."""
    return [row for benchmark in benchmarks().values() for row in benchmark.readme.get(device, ())]


def on_page(row: Row) -> bool:
    """Whether the device's page lists the row's case among the operations."""
    for benchmark in benchmarks().values():
        if row.operation in benchmark.page:
            workloads = benchmark.page[row.operation]
            return workloads is None or row.workload in workloads
    return False
