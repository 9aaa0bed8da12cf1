"""What a run is made of: the benchmarks that modules export, their jobs, and the session that
measures them.

A module of this folder that measures something exports one :class:`Benchmark` under the name
``BENCHMARK``; :mod:`.registry` finds it, and suite, targets, README and tests read it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ehrseq_fast import backend as backends

from .cases import Case, Row, measure
from .ceilings import Ceilings
from .devices import Cpu, Cuda
from .modes import Mode
from .progress import say
from .report import case_table
from .results import Curve
from .targets import Target
from .timing import Budget
from .workloads import WORKLOADS, Batch

# In the order in which a whole run reports them.
SECTIONS = ("step", "memory", "growth", "ops")


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line; ``missing`` says which workloads' records are not
    here, and why."""

    device: str = "cpu"
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    missing: dict[str, str] = field(default_factory=dict)
    size: str = "default"
    batch_size: int | None = None
    backend: str | None = None
    quick: bool = False

    @property
    def main_workload(self) -> str:
        """The one that the finer cases are measured on and the targets read from: real records, or
        on a GPU, whose machine may have none, outpatients."""
        wanted = "D" if self.device == "cpu" else "A"
        return wanted if wanted in self.workloads else self.workloads[0]

    def serves(self, dtype: torch.dtype) -> bool:
        """False where the backend that was asked for cannot compute in that dtype."""
        asked = self.backend
        return asked in (None, "reference") or dtype in backends.kernels(asked).dtypes


@dataclass
class Session:
    """Where things are measured, and what was found so far."""

    settings: Settings
    device: Cpu | Cuda
    ceilings: Ceilings
    budget: Budget
    curves: list[Curve] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    facts: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def batch(self, letter: str, size: str | int | None = None) -> Batch:
        """A workload's batch on the device, announced the first time that its size is met."""
        given = self.settings
        return self.announced(WORKLOADS[letter].batch(size or given.batch_size or given.size))

    def announced(self, batch: Batch) -> Batch:
        """The batch on the device, its facts printed and kept for the results."""
        if (batch.workload, batch.patients) not in self.facts:
            self.facts[batch.workload, batch.patients] = batch.facts()
            say(f"\n{batch}")
        return batch.to(self.settings.device)

    def measure(
        self, case: Case, budget_s: float, *, after_each: Callable[[str], object] | None = None
    ) -> list[Row]:
        """Rows of a case within its share of the time; none is begun after all of it."""
        return measure(
            case,
            self.device,
            budget_s,
            most_s=self.budget.left,
            ceilings=self.ceilings,
            after_each=after_each,
        )


@dataclass(frozen=True)
class Job:
    """A part of a section.

    Attributes:
        weight: the seconds that it is worth on two CPU cores.
        run: gives its rows within so many seconds.
        for_target: whether a target is read from them.
    """

    title: str
    weight: float
    run: Callable[[Session, float], list[Row]]
    for_target: bool = False


def of_case(
    title: str, weight: float, make: Callable[[Session], Case], *, for_target: bool = False
) -> Job:
    """The job of measuring one case and printing its table."""

    def run(session: Session, budget_s: float) -> list[Row]:
        case = make(session)
        rows = session.measure(case, budget_s)
        say(f"\n{case_table(case.title, rows)}")
        return rows

    return Job(title, weight, run, for_target)


@dataclass(frozen=True)
class Benchmark:
    """What a module measures, and what is said of it.

    Attributes:
        jobs: by section, those to measure with these settings.
        modes: a row for every mode, dtype and mask of each of its public functions.
        small: its case on one small batch, for pytest-benchmark.
        readme: by device, what the README's table of operations shows, as values of rows.
        page: the operations that the device's page lists, each with the workloads that it lists
            them for; None for all.
        targets: read from its rows.
    """

    jobs: Mapping[str, Callable[[Settings], Iterable[Job]]] = field(default_factory=dict)
    modes: tuple[Mode, ...] = ()
    small: Callable[[Batch], Case] | None = None
    readme: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    page: Mapping[str, Collection[str] | None] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
