"""Results for people (aligned text) and for later comparison (JSON)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from math import floor, log10
from pathlib import Path
from typing import Any

from .memory import MIB
from .timing import Spread

RESULTS = Path(__file__).parent / "results"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names: the first to the left, all others to the right.

    >>> print(table(["path", "ms"], [["padded", "812.0"], ["fused", "9.5"]]))
    path       ms
    ------  -----
    padded  812.0
    fused     9.5
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def significant(value: float, digits: int = 3) -> str:
    """A number to about three digits, never in exponents.

    >>> significant(1234.4), significant(56.66), significant(0.0891), significant(0.0)
    ('1,234', '56.7', '0.0891', '0')
    """
    if value == 0:
        return "0"
    decimals = digits - 1 - floor(log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"


def ms(seconds: float) -> str:
    return significant(1e3 * seconds)


def quartiles(spread: Spread) -> str:
    return f"{ms(spread.lower)} .. {ms(spread.upper)}"


def mib(size: float) -> str:
    return significant(size / MIB)


def times(ratio: float) -> str:
    return f"{significant(ratio)}x"


def timing_table(samples: dict[str, list[float]]) -> str:
    """Variants with their medians and quartiles, and how many times longer than the last each.

    The last variant is this package's.
    """
    ours = list(samples)[-1]
    spreads = {name: Spread.of(taken) for name, taken in samples.items()}
    return table(
        ["variant", "median ms", "quartiles ms", "runs", f"{ours} is faster"],
        [
            [
                name,
                ms(spread.median),
                quartiles(spread),
                str(spread.count),
                times(spread.median / spreads[ours].median),
            ]
            for name, spread in spreads.items()
        ],
    )


def describe_run(machine: dict[str, Any]) -> str:
    """The lines that head every report."""
    backends = ", ".join(f"{op}: {name}" for op, name in machine["backends"].items())
    return (
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads "
        f"({machine['capability']}), load {machine['load_average']}; torch {machine['torch']}, "
        f"Python {machine['python']}; commit {machine['commit'] or 'unknown'}\n"
        f"backends: {backends or 'none registered'}"
    )


def results_path(machine: dict[str, Any], command: str) -> Path:
    """``benchmarks/results/<device>-<date>.json``, the command in it where it is not the main."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    suffix = "" if command == "main" else f"-{command}"
    return RESULTS / f"{device}-{date.today().isoformat()}{suffix}.json"


def write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def add_saving_arguments(parser: Any) -> None:
    """``--save`` and ``--out``: without either nothing is written, and a checkout stays clean."""
    parser.add_argument(
        "--save", action="store_true", help="keep the results as benchmarks/results/*.json"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results to FILE")


def save(results: dict[str, Any], args: Any) -> None:
    """Write where the arguments of :func:`add_saving_arguments` say, and tell where."""
    path = args.out
    if path is None and args.save:
        path = results_path(results["machine"], results["command"])
    if path is None:
        print("\nResults were not written to a file: --save keeps them, --out FILE names one.")
        return
    write(results, path)
    print(f"\nResults: {path}")
