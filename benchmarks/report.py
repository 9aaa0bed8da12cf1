"""Results as text with aligned columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor, log10
from typing import Any

from .cases import Row
from .ceilings import Ceilings
from .memory import MIB
from .results import Curve
from .timing import Spread


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


def ours_in(rows: Sequence[Row]) -> Row | None:
    """This package's first way among the rows of a case, which the others are set against; None
    where they do not compute the same."""
    compared = (row for row in rows if row.ours and row.difference is not None)
    return next(compared, None)


def case_table(title: str, rows: Sequence[Row]) -> str:
    """The variants of a case with all that was measured of them; then those that are missing."""
    ours = ours_in(rows)
    columns: dict[str, Callable[[Row], str]] = {
        "backend": lambda row: row.backend or "",
        "median ms": lambda row: ms(row.seconds.median) if row.seconds else "",
        "quartiles ms": lambda row: quartiles(row.seconds) if row.seconds else "",
        "runs": lambda row: str(row.seconds.count) if row.seconds else "",
        "host us": lambda row: significant(1e6 * row.host.median) if row.host else "",
        "of ceiling": lambda row: f"{row.floor_s / row.median:.0%}" if row.floor_s else "",
        "max rel. diff": lambda row: f"{row.difference:.0e}" if row.difference is not None else "",
        "peak MiB": lambda row: mib(row.peak_bytes) if row.peak_bytes is not None else "",
        "ours is faster": lambda row: _ratio(row, ours),
    }
    measured = [row for row in rows if not row.missing]
    kept = {name: of for name, of in columns.items() if any(of(row) for row in measured)}
    cells = [[row.variant, *(of(row) for of in kept.values())] for row in measured]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.missing:
            reasons.setdefault(row.missing, []).append(row.variant)
    missing = [f"  not measured: {'; '.join(which)}: {why}" for why, which in reasons.items()]
    lines = [table(["variant", *kept], cells)] if cells else []
    return "\n".join([title, *lines, *missing])


def _ratio(row: Row, ours: Row | None) -> str:
    if ours is None or row is ours or not row.seconds or not ours.seconds:
        return ""
    return times(row.median / ours.median)


def ceilings_text(found: Ceilings) -> str:
    products = ", ".join(f"{rate / 1e9:,.0f} Gflop/s in {d}" for d, rate in found.product.items())
    return (
        f"measured ceilings: copying {found.copy / 1e9:,.0f} GB/s; reading what lies in the "
        f"{mib(found.cache_bytes)} MiB cache {found.cached_read / 1e9:,.0f} GB/s; products "
        f"{products}; an empty call {significant(1e6 * found.empty_call_s)} us "
        f"(host {significant(1e6 * found.empty_call_host_s)} us)"
    )


def curve_text(grows: str, curves: Sequence[Curve]) -> str:
    """Each path's times along what grows, and the line through them."""
    if not curves:
        return f"Growth with {grows}: nothing was measured"
    lines = [f"The training step, median ms, against {grows}"]
    for curve in curves:
        points = ", ".join(
            f"{at:,.0f}: {ms(taken)}" for at, taken in zip(curve.at, curve.median_s, strict=True)
        )
        lines.append(
            f"  {curve.path}: {points} {curve.unit}; {ms(curve.start_s)} ms + "
            f"{significant(1e9 * curve.slope_s)} ns per {curve.unit.rstrip('s')}, "
            f"R^2 {curve.r_squared:.4f}"
        )
    return "\n".join(lines)


def measured_on(machine: dict[str, Any]) -> str:
    """The GPU, or the CPU with what the kernels make of it."""
    if "gpu" in machine:
        return f"{machine['gpu']}, on {machine['device']}"
    threads = machine["threads"]
    return f"{machine['device']}, {threads} thread{'s' * (threads > 1)} ({machine['capability']})"


def describe_run(machine: dict[str, Any]) -> str:
    """The lines that head every report."""
    backends = ", ".join(f"{op}: {name}" for op, name in machine["backends"].items())
    return (
        f"{measured_on(machine)}; {machine['cores']} cores, load {machine['load_average']}; torch "
        f"{machine['torch']}, Python {machine['python']}; commit {machine['commit'] or 'unknown'}\n"
        f"backends: {backends or 'none registered'}"
    )
