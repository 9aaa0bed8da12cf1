"""Charts of a whole run, small enough for the README."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import registry, step
from .cases import Row
from .files import replacing
from .growth import CODES, PADDING
from .memory import MIB
from .report import measured_on, mib, ms, ours_in, times
from .results import Results, newest, read
from .workloads import MissingPackageError

SUMMARY = "draw the charts of a results file (the newest whole run's) beside it"

COLOURS = {
    "padded": "#9aa5b1",
    "packed": "#5b7fa6",
    "fused from padded": "#e9a3ab",
    "fused": "#d1495b",
}
GREY, DPI = "#555555", 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="?", help="a JSON file of `all`")


def run(args: argparse.Namespace) -> None:
    found = (args.results, read(args.results)) if args.results else newest()
    if found is None:
        raise FileNotFoundError("there are no results yet: python -m benchmarks all")
    path, results = found
    for image in draw_all(results, path):
        print(image)


def image_path(results_path: Path, results: Results, name: str) -> Path:
    """Beside the results, by device: a newer run's charts take the place of the older."""
    return results_path.parent / f"{results.device}-{name}.png"


def digest(results_path: Path) -> str:
    """What a chart's metadata says of the file that it was drawn from."""
    return hashlib.sha256(results_path.read_bytes()).hexdigest()[:16]


def draw_all(results: Results, results_path: Path) -> Iterator[Path]:
    """Draw every chart that the results have rows for, and give their paths.

    Raises:
        MissingPackageError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("drawing needs matplotlib: pip install matplotlib") from error
    for name, size, draw in (
        ("step", (9, 3.6), _steps),
        ("operations", (9, 5.2), _operations),
        ("growth", (9, 3.4), _growth),
    ):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, results)
        machine = results.machine
        figure.supxlabel(
            f"{measured_on(machine)}, torch {machine['torch']}, commit {machine['commit']}",
            fontsize=8,
            color=GREY,
        )
        path = image_path(results_path, results, name)
        with replacing(path) as unfinished:
            figure.savefig(unfinished, dpi=DPI, metadata={"Source": digest(results_path)})
        yield path


def _steps(figure: Any, results: Results) -> None:
    """Two panels on log scales, a group of bars per workload: step time, and peak memory."""
    time_axes, memory_axes = figure.subplots(1, 2)
    wanted = {"phase": step.STEP, "dtype": "float32"}
    timed = _by_workload(results, operation=step.OPERATION, **wanted)
    _bars(time_axes, timed, _milliseconds, lambda value: ms(value / 1e3))
    time_axes.set_title("training step, milliseconds (lower is better)", fontsize=10)
    weighed = _by_workload(results, operation=step.PEAK_MEMORY, **wanted)
    _bars(memory_axes, weighed, _mebibytes, lambda value: mib(value * MIB))
    memory_axes.set_title("peak memory of the step, MiB", fontsize=10)
    if time_axes.containers:
        time_axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _milliseconds(row: Row) -> float | None:
    return 1e3 * row.median if row.seconds else None


def _mebibytes(row: Row) -> float | None:
    return row.peak_bytes / MIB if row.peak_bytes else None


def _by_workload(results: Results, **wanted: str) -> dict[str, dict[str, Row]]:
    """The paths of each workload's largest batch."""
    found = sorted(results.largest(**wanted).items())
    return {workload: {row.variant: row for row in rows} for workload, rows in found}


def _bars(
    axes: Any,
    workloads: dict[str, dict[str, Row]],
    value: Callable[[Row], float | None],
    label: Callable[[float], str],
) -> None:
    width = 0.8 / len(COLOURS)
    for i, (path, colour) in enumerate(COLOURS.items()):
        bars = [
            (group + (i - (len(COLOURS) - 1) / 2) * width, value(paths[path]))
            for group, paths in enumerate(workloads.values())
            if path in paths and value(paths[path])
        ]
        if not bars:
            continue
        places, heights = zip(*bars, strict=True)
        drawn = axes.bar(places, heights, width * 0.92, label=path, color=colour)
        if path in ("padded", "fused"):
            axes.bar_label(drawn, [label(height) for height in heights], fontsize=6, padding=1)
    if workloads:
        axes.set_yscale("log")
    labels = [
        f"{letter}\nB {next(iter(paths.values())).patients}" for letter, paths in workloads.items()
    ]
    axes.set_xticks(range(len(workloads)), labels, fontsize=8)
    axes.margins(y=0.25)
    _plain(axes, "y")


def _operations(figure: Any, results: Results) -> None:
    """How many times longer than this package's way the others take."""
    axes = figure.subplots()
    names, ratios, colours = [], [], []
    for rows in _shown_cases(results):
        ours = ours_in(rows)
        if ours is None:
            continue
        first = rows[0]
        for row in rows:
            if row.seconds and not row.ours and row.difference is not None:
                names.append(
                    f"{first.operation} {first.workload}, B {first.patients}: {row.variant}"
                )
                ratios.append(row.median / ours.median)
                colours.append("#5b7fa6" if ratios[-1] >= 1 else "#d1495b")
    places = range(len(names))
    drawn = axes.barh(places, ratios, color=colours)
    axes.bar_label(drawn, [times(ratio) for ratio in ratios], fontsize=6, padding=2)
    axes.set_yticks(places, names, fontsize=6)
    axes.invert_yaxis()
    if ratios:
        axes.set_xscale("log")
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_title("times this package's, forward and backward (higher is better)", fontsize=10)
    axes.margins(x=0.15, y=0.01)
    _plain(axes, "x")


def _shown_cases(results: Results) -> Sequence[list[Row]]:
    def shown(row: Row) -> bool:
        plain = row.dtype == "float32" and row.cache == "warm" and row.phase == "forward+backward"
        return plain and row.operation in in_readme and registry.on_page(row)

    in_readme = {wanted["operation"] for wanted in registry.readme_rows(results.device)}

    return [rows for rows in results.cases() if shown(rows[0])]


def _growth(figure: Any, results: Results) -> None:
    for axes, grows in zip(figure.subplots(1, 2), (CODES, PADDING), strict=True):
        for curve in results.curves:
            if curve.grows == grows:
                at = [x / 1e3 for x in curve.at]
                taken = [1e3 * seconds for seconds in curve.median_s]
                colour = COLOURS.get(curve.path)
                axes.plot(at, taken, "o-", markersize=4, label=curve.path, color=colour)
                axes.set_xlabel(f"thousand {curve.unit}", fontsize=8)
        axes.set_title(f"step, ms, against {grows}", fontsize=10)
        if axes.lines:
            axes.set_yscale("log")
            axes.legend(frameon=False, fontsize=8)
        _plain(axes, "y")


def _plain(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e5e5e5")
