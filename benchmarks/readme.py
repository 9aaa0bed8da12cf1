"""The README's table of results, from the newest committed results files."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from . import batching, packed_lstm, visit_pool
from .report import RESULTS, mib, ms, significant, times

SUMMARY = "write the README's table from the newest results of main, ops, lstm and growth"

README = Path(__file__).parent.parent / "README.md"
MARKED = re.compile(r"(<!-- results -->\n).*?(<!-- end results -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="fail where the README differs")


def run(args: argparse.Namespace) -> None:
    text = README.read_text()
    wanted = MARKED.sub(lambda marks: marks[1] + section() + marks[2], text)
    if args.check and wanted != text:
        raise SystemExit("README.md differs from the results: python -m benchmarks readme")
    README.write_text(wanted)


def newest(command: str) -> dict[str, Any]:
    """The last results of that command, by the date in the file's name."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [results for results in found if results["command"] == command][-1]


def section() -> str:
    """Markdown between the marks."""
    main, ops, lstm, growth = map(newest, ("main", "ops", "lstm", "growth"))
    machine = main["machine"]
    rows = [*step_rows(main), *operation_rows(ops), *lstm_rows(lstm), *growth_rows(growth)]
    lines = ["| what | this package | others |", "| --- | --- | --- |"]
    lines += [f"| {what} | {ours} | {others} |" for what, ours, others in rows]
    return (
        f"{machine['device']}, {machine['threads']} threads ({machine['capability']}), torch "
        f"{machine['torch']}, float32; medians of interleaved repeats, outputs and gradients found "
        "equal first. E 128, H 256. The files are in `benchmarks/results/`; "
        "`python -m benchmarks` with `ops`, `lstm` and `growth` make them again.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def step_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for batch in results["batches"]:
        paths = batch["paths"]
        fused = paths["fused"]
        others = "; ".join(
            f"{name} {ms(paths[name]['median_s'])} ms "
            f"(**{times(paths[name]['median_s'] / fused['median_s'])}**), "
            f"{mib(paths[name]['peak_bytes'])} MiB"
            for name in ("padded", "packed")
        )
        rows.append(
            (
                f"training step, real OMOP batch of {batch['batch_size']}",
                f"{ms(fused['median_s'])} ms, {mib(fused['peak_bytes'])} MiB",
                others,
            )
        )
    return rows


OPERATIONS = {
    "visit pooling": ("visit_mean_pool", visit_pool.OURS),
    "survival NLL": ("discrete_time_survival_nll", "ehrseq_fast"),
    "a packed batch": ("building a batch", batching.OURS),
}


def operation_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for name, (start, ours) in OPERATIONS.items():
        title, samples = next(
            (title, taken)
            for title, taken in results["operations"].items()
            if title.startswith(start)
        )
        medians = {variant: median(taken) for variant, taken in samples.items()}
        others = "; ".join(
            f"{variant} **{times(medians[variant] / medians[ours])}**"
            for variant in medians
            if not variant.startswith(("ehrseq_fast", "packed"))
        )
        rows.append((f"{name} ({title.split(', ', 1)[-1]})", f"{ms(medians[ours])} ms", others))
    return rows


def lstm_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for cell in results["cells"]:
        if cell["hidden"] != 256 or cell["patients"] not in (256, 1024):
            continue
        medians = cell["median_s"]
        ours = medians[packed_lstm.OURS]
        others = "; ".join(
            f"{name} **{times(taken / ours)}**"
            for name, taken in medians.items()
            if name not in (packed_lstm.OURS, packed_lstm.READING)
        )
        passes = "forward and backward" if cell["backward"] else "forward alone"
        rows.append((f"packed LSTM, B {cell['patients']}, {passes}", f"{ms(ours)} ms", others))
    return rows


def growth_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    visits, padding = results["visits"], results["padding"]
    return [
        (
            "growth of the step",
            f"{significant(1e6 * visits['slope_s_per_visit'])} µs a visit, "
            f"R² {visits['r_squared']:.4f}",
            f"four times the padding: {padding['change']:+.1%}",
        )
    ]
