"""The targets of the design, each held against what a run measured. Each module exports its own.

A target's note says why it may be missed; it is printed only where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .report import table, times
from .results import Results


@dataclass(frozen=True)
class Figure:
    """A measured value, its bound, and which side of it is good."""

    measured: float
    bound: float
    at_least: bool
    text: str

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


@dataclass(frozen=True)
class Target:
    """``measure`` gives the figure, or says in words why there is none.

    ``on`` is a device, or ``"all"``.
    """

    on: str
    what: str
    bound: str
    measure: Callable[[Results], Figure | str]
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    on: str
    what: str
    bound: str
    measured: str
    met: bool | None
    note: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(results: Results, targets: Sequence[Target]) -> list[Verdict]:
    """Every target of the device that was measured on, and those of all devices."""
    verdicts = []
    for target in targets:
        if target.on not in (results.device, "all"):
            continue
        try:
            found = target.measure(results)
        except KeyError:
            found = "not in this run"
        except ValueError as error:
            found = f"not measured: {error}"
        if isinstance(found, str):
            verdict = Verdict(target.on, target.what, target.bound, found, None, "")
        else:
            note = "" if found.met else target.note
            verdict = Verdict(target.on, target.what, target.bound, found.text, found.met, note)
        verdicts.append(verdict)
    return verdicts


def text(verdicts: Sequence[Verdict]) -> str:
    rows = [[v.what, v.bound, v.measured, _word(v.met)] for v in verdicts]
    notes = [f"  {v.what}: {v.note}" for v in verdicts if v.note]
    return "\n".join([table(["target", "bound", "measured", "verdict"], rows), *notes])


def _word(met: bool | None) -> str:
    return {True: "met", False: "MISSED", None: ""}[met]


# How figures are found ----------------------------------------------------------------------------


def at_least(measured: float, bound: float) -> Figure:
    return Figure(measured, bound, True, times(measured))


def at_most(measured: float, bound: float, text: str = "") -> Figure:
    return Figure(measured, bound, False, text or times(measured))


def ratio(bound: float, other: str, ours: str, **wanted: Any) -> Callable[[Results], Figure]:
    """How many times longer ``other`` takes than ``ours``; at least ``bound``."""

    def measure(results: Results) -> Figure:
        rows = results.of(**wanted)
        return at_least(rows[other].median / rows[ours].median, bound)

    return measure
