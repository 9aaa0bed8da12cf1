"""Results files: one JSON per run, ``benchmarks/results/<device>-<date>.json``."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from .cases import Row
from .files import refuse_unwritable, write_text
from .timing import FORMER_METHOD, METHOD

RESULTS = Path(__file__).parent / "results"
WHOLE_RUN = "all"
GPU_BACKENDS = ("cuda", "triton")


@dataclass(frozen=True)
class Curve:
    """Median times of one path against what grew, and the straight line through them."""

    workload: str
    grows: str
    path: str
    unit: str
    at: list[float]
    median_s: list[float]
    slope_s: float
    start_s: float
    r_squared: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def doubled(self) -> float:
        """The change of time from the first point to the second, as a share."""
        return self.median_s[1] / self.median_s[0] - 1


@dataclass(frozen=True)
class Results:
    """One run: what it measured, on what, and the facts of its batches.

    ``method`` says how calls were timed. Times and ratios of two runs can be compared where it is
    the same: see :mod:`.timing`.
    """

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
    method: str = METHOD

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
                "method": FORMER_METHOD,
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

    def largest(self, **wanted: Any) -> dict[str, list[Row]]:
        """Of each workload, the case with these values that has most patients."""
        found: dict[str, list[Row]] = {}
        for rows in self.cases():
            first = rows[0]
            known = found.get(first.workload)
            if all(getattr(first, name) == value for name, value in wanted.items()) and (
                known is None or known[0].patients < first.patients
            ):
                found[first.workload] = rows
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


def add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    """``--save`` and ``--out``: without either nothing is written, and a checkout stays clean."""
    parser.add_argument(
        "--save", action="store_true", help="keep the results as benchmarks/results/*.json"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results to FILE")


def destination(args: argparse.Namespace, machine: dict[str, Any], command: str) -> Path | None:
    """Where the arguments of :func:`add_saving_arguments` say that results go; None for nowhere.

    Raises:
        SystemExit: with one line that says why that file cannot be written.
    """
    path = args.out or (path_for(machine, command) if args.save else None)
    refuse_unwritable(path)
    return path


def save(results: Results, path: Path | None, **more: Any) -> None:
    """Write where :func:`destination` says, and tell where."""
    if path is None:
        print("\nResults were not written to a file: --save keeps them, --out FILE names one.")
        return
    write({**results.as_dict(), **more}, path)
    print(f"\nResults: {path}")


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
        raise ValueError(f"{path}: expected results of python -m benchmarks, got other JSON")
    values.pop("targets", None)
    return Results.from_dict(values)


def runs_on_gpus() -> list[dict[str, Any]]:
    """What the committed results show of this package's kernels on GPUs: for each run with one, the
    operations whose results were found equal to PyTorch's there, by backend."""
    runs = []
    for path in sorted(RESULTS.glob("*.json")):
        found = read(path)
        operations: dict[str, list[str]] = {}
        for row in found.rows:
            ran = row.ours and row.seconds is not None and row.difference is not None
            if ran and row.backend in GPU_BACKENDS:
                known = operations.setdefault(row.backend, [])
                if row.operation not in known:
                    known.append(row.operation)
        if operations and "gpu" in found.machine:
            of = {name: found.machine[name] for name in ("gpu", "measured_at", "commit")}
            runs.append({**of, "operations": operations})
    return runs


def newest(device: str = "cpu") -> tuple[Path, Results] | None:
    """The last whole run on that kind of device; None where there is none."""
    runs = whole_runs(device)
    return runs[0] if runs else None


def whole_runs(device: str = "cpu") -> list[tuple[Path, Results]]:
    """The committed whole runs on that kind of device that were timed as the last one was, which
    comes first."""
    runs = []
    for path in RESULTS.glob("*.json"):
        values = json.loads(path.read_text())
        if values.get("command") == WHOLE_RUN and values.get("device") == device:
            runs.append((values["machine"]["measured_at"], path))
    found = [(path, read(path)) for _, path in sorted(runs, reverse=True)]
    return [(path, run) for path, run in found if run.method == found[0][1].method]
