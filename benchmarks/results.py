"""Results files: one JSON per run, ``benchmarks/results/<device>-<date>.json``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from .cases import Row
from .files import write_text
from .growth import Curve

RESULTS = Path(__file__).parent / "results"
WHOLE_RUN = "all"


@dataclass(frozen=True)
class Results:
    """One run: what it measured, on what, and the facts of its batches."""

    command: str
    device: str
    machine: dict[str, Any]
    ceilings: dict[str, Any]
    batches: list[dict[str, Any]]
    rows: list[Row]
    curves: list[Curve]
    seconds: dict[str, float]
    settings: dict[str, Any]
    findings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "rows": [row.as_dict() for row in self.rows],
            "curves": [curve.as_dict() for curve in self.curves],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Results:
        return cls(
            **{
                **values,
                "rows": [Row.from_dict(row) for row in values["rows"]],
                "curves": [Curve(**curve) for curve in values["curves"]],
            }
        )

    def of(self, **wanted: Any) -> dict[str, Row]:
        """The rows with these values, by variant.

        Raises:
            KeyError: if there is none.
        """
        found = {
            row.variant: row
            for row in self.rows
            if all(getattr(row, name) == value for name, value in wanted.items())
        }
        if not found:
            raise KeyError(f"no row has {wanted}")
        return found

    def cases(self) -> list[list[Row]]:
        """The rows, grouped by what they have in common."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.case, []).append(row)
        return list(groups.values())


def path_for(machine: dict[str, Any], command: str) -> Path:
    """``benchmarks/results/<device>-<date>.json``, the command in it where it is part of a run."""
    name = machine.get("gpu") or machine["device"]
    device = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    suffix = "" if command == WHOLE_RUN else f"-{command}"
    return RESULTS / f"{device}-{date.today().isoformat()}{suffix}.json"


def write(results: dict[str, Any], path: Path) -> None:
    """JSON with one row per line, so that two files can be told apart by eye."""
    parts = []
    for name, value in results.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n  ".join(json.dumps(entry) for entry in value)
            parts.append(f" {json.dumps(name)}: [\n  {lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def read(path: Path) -> Results:
    """A file that a run of this suite has written.

    Raises:
        ValueError: for any other JSON.
    """
    values = json.loads(path.read_text())
    if not isinstance(values, dict) or "rows" not in values:
        raise ValueError(f"{path} holds no results of python -m benchmarks")
    values.pop("targets", None)
    return Results.from_dict(values)


def newest(device: str = "cpu") -> tuple[Path, Results] | None:
    """The last whole run on that kind of device; None where there is none."""
    runs = []
    for path in RESULTS.glob("*.json"):
        values = json.loads(path.read_text())
        if values.get("command") == WHOLE_RUN and values.get("device") == device:
            runs.append((values["machine"]["measured_at"], path))
    if not runs:
        return None
    path = max(runs)[1]
    return path, read(path)
