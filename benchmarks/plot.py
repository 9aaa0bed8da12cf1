"""A chart of the main job's results, for the README."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .memory import MIB
from .report import mib, ms
from .workloads import MissingPackageError

SUMMARY = "draw the step times and peak memory of saved main results as a PNG"

COLOURS = {
    "padded": "#9aa5b1",
    "packed": "#5b7fa6",
    "fused from padded": "#e9a3ab",
    "fused": "#d1495b",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="a JSON file that the main job has written")
    parser.add_argument("image", type=Path, help="the PNG (or SVG) to write")


def run(args: argparse.Namespace) -> None:
    draw(json.loads(args.results.read_text()), args.image)
    print(f"{args.image}")


def draw(results: dict[str, Any], image: Path) -> None:
    """Two panels on log scales, a group of bars per batch size: step time, and peak memory.

    Raises:
        MissingPackageError: without matplotlib.
        ValueError: if the results are not the main job's.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("drawing needs matplotlib: pip install matplotlib") from error
    if results.get("command") != "main":
        raise ValueError(
            f"only the main job's results can be drawn, not {results.get('command')!r}'s"
        )
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    _bars(time_axes, results["batches"], "median_s", 1e3, ms)
    time_axes.set_title("training step, milliseconds")
    _bars(memory_axes, results["batches"], "peak_bytes", 1 / MIB, mib)
    memory_axes.set_title("peak memory of the step, MiB")
    time_axes.legend(frameon=False)
    machine = results["machine"]
    figure.supxlabel(
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, float32; "
        "lower is better",
        fontsize=8,
        color="#555555",
    )
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=160)


def _bars(axes: Any, batches: list[dict[str, Any]], key: str, scale: float, label: Any) -> None:
    paths = list(batches[0]["paths"])
    width = 0.8 / len(paths)
    for i, path in enumerate(paths):
        values = [batch["paths"][path][key] for batch in batches]
        places = [group + (i - (len(paths) - 1) / 2) * width for group in range(len(batches))]
        bars = axes.bar(
            places, [scale * v for v in values], width * 0.92, label=path, color=COLOURS.get(path)
        )
        axes.bar_label(bars, [label(v) for v in values], fontsize=8, padding=2)
    axes.set_yscale("log")
    axes.set_xticks(range(len(batches)), [f"{batch['batch_size']} patients" for batch in batches])
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e5e5e5")
