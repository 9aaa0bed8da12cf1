"""The README's figure and tables, from the newest committed whole run, and a page with the rest.

The README has a row per claim; ``results/<device>.md`` has every other figure that a person may
look for, and the results file all of them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ehrseq_fast.cli import describe_gpu_runs

from . import calls, parts, registry, step, targets
from .cases import Row
from .files import write_text
from .growth import PADDING
from .plot import draw_all, image_path
from .recurrent import PRODUCTS
from .report import measured_on, mib, ms, ours_in, significant, times
from .results import RESULTS, Results, newest, runs_on_gpus, whole_runs
from .timing import FORMER_METHOD, METHOD

SUMMARY = "write the README's figure and tables, and their page, from the committed results"

README = Path(__file__).parent.parent / "README.md"
ROOT = README.parent
PACKING = ROOT / "docs" / "packing.md"
# Part of the package, so that `python -m ehrseq_fast info` can tell.
GPU_RUNS = ROOT / "ehrseq_fast" / "gpu_runs.json"
# As results are refused now, and as they were before.
UNEQUAL = (
    re.compile(r"AssertionError: max. relative difference: expected at most (\S+), got \S+"),
    re.compile(r"AssertionError: its results differ by \S+, and (\S+) is allowed"),
)
MARKED = "(<!-- {0} -->\n).*?(<!-- end {0} -->)"

MOST_LOSSES = 5  # in the README; the page has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="fail where the README differs")


def run(args: argparse.Namespace) -> None:
    if args.check:
        for path, text in texts().items():
            if not path.exists() or path.read_text() != text:
                raise SystemExit(
                    f"{path.name} differs from the results: python -m benchmarks readme"
                )
        return
    for results_path, results in _runs():
        list(draw_all(results, results_path))
    for path, text in texts().items():
        write_text(path, text)


def texts() -> dict[Path, str]:
    """All that is written from the results, as it should be."""
    on_gpus = json.dumps(runs_on_gpus(), indent=1) + "\n"
    packing = _filled(PACKING.read_text(), "packing", _by_fullness())
    return {README: filled_in(README.read_text()), PACKING: packing, GPU_RUNS: on_gpus, **pages()}


def pages() -> dict[Path, str]:
    """The text of each device's page."""
    return {page_path(results): _page(path, results) for path, results in _runs()}


def page_path(results: Results) -> Path:
    return RESULTS / f"{results.device}.md"


def filled_in(text: str) -> str:
    """The README's text with its figure and results as they should be."""
    for mark, content in (
        ("figure", figure()),
        ("results", section()),
        ("gpu runs", f"**{describe_gpu_runs(runs_on_gpus())}**\n"),
    ):
        text = _filled(text, mark, content)
    return text


def _filled(text: str, mark: str, content: str) -> str:
    pattern = re.compile(MARKED.format(mark), re.DOTALL)
    return pattern.sub(lambda marks: marks[1] + content + marks[2], text)


def figure() -> str:
    return "".join(
        f"![Time and peak memory of one training step on six workloads]"
        f"({image_path(path, results, 'step').relative_to(ROOT)})\n"
        for path, results in _runs()
    )


def section() -> str:
    """Markdown between the marks, a part per device that was measured on."""
    return "\n".join(_device(path, results) for path, results in _runs())


def _runs() -> list[tuple[Path, Results]]:
    found = [newest(device) for device in ("cpu", "cuda")]
    return [run for run in found if run is not None]


def _device(path: Path, results: Results) -> str:
    page = page_path(results).relative_to(ROOT)
    parts = [
        f"{_conditions(results)} Every operation, phase and dtype, cold caches, growth, and what "
        f"was not measured and why: [{page.name}]({page}). All rows, spreads and ceilings: "
        f"[{path.name}]({path.relative_to(ROOT)}).\n",
        _table(STEP_HEADER, _steps(_whole_steps(results), results)),
        _other_runs(path, results),
        _table(
            ["operation, forward+backward", "this package", "plain PyTorch", "the closest other"],
            _closest(results),
        ),
        _table(["target", "bound", "measured", "verdict"], _targets(results)),
        _notes(results),
        _losses(results, MOST_LOSSES),
    ]
    return "\n".join(part for part in parts if part)


def _page(path: Path, results: Results) -> str:
    on = "" if results.device == "cpu" else " --device cuda"
    made = f"Made by `python -m benchmarks readme` of [{path.name}]({path.name}), which "
    charts = (
        f"![{name}]({image_path(path, results, name).name})\n" for name in ("operations", "growth")
    )
    parts = [
        f"# What was measured on {measured_on(results.machine)}\n",
        f"{_conditions(results)} {made}`python -m benchmarks all{on}` measures again. The ceiling "
        "is the time that moving its bytes and doing its products takes at the rates measured in "
        "the same run; 100% cannot be beaten, save where a working set fits into a cache nearer "
        "than the last level, or kernels beat torch.mm.\n",
        "## Training step\n",
        _table(STEP_HEADER, _steps(_step_cases(results), results)),
        _parts(results),
        "## Operations\n",
        _table(["operation", "this package", "others take"], _operations(results)),
        next(charts),
        _calls(results),
        "## Growth of the step\n",
        _growth(results),
        next(charts),
        "## Losses\n",
        _losses(results),
        _missing(results),
    ]
    return "\n".join(part for part in parts if part)


METHODS = {
    METHOD: "medians of alternating blocks of calls, after untimed calls in each block",
    FORMER_METHOD: "medians of interleaved repeats",
}


def _conditions(results: Results) -> str:
    machine = results.machine
    return (
        f"{measured_on(machine)}, torch {machine['torch']}, commit {machine['commit']}; float32 "
        "and warm caches unless said otherwise, E 128, H 256, "
        f"{METHODS[results.method]}, results found equal first."
    )


def _table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


STEP_HEADER = ["training step", "real", "this package", "plain PyTorch, padded", "packed", "memory"]


def _step_cases(results: Results) -> list[list[Row]]:
    return [rows for rows in results.cases() if rows[0].operation == step.OPERATION]


def _whole_steps(results: Results) -> list[list[Row]]:
    wanted = {"operation": step.OPERATION, "phase": step.STEP, "dtype": "float32"}
    return list(results.largest(**wanted).values())


def _steps(cases: Sequence[list[Row]], results: Results) -> Iterator[Sequence[str]]:
    facts = {(batch["workload"], batch["patients"]): batch for batch in results.batches}
    for rows in cases:
        first = rows[0]
        paths = {row.variant: row for row in rows}
        batch = facts[first.workload, first.patients]
        plain = first.phase == step.STEP and first.dtype == "float32"
        kind = "" if first.phase == step.STEP else f", {first.phase}"
        kind += "" if first.dtype == "float32" else f", {first.dtype}"
        yield (
            f"{first.workload} {batch['title']}, B {first.patients}{kind}",
            f"{batch['real_visits']:.0%} of visits, {batch['real_codes']:.1%} of codes",
            _ms(paths["fused"]),
            *(_against(paths[path], paths["fused"]) for path in step.PLAIN_PATHS),
            _memory(results, first) if plain else "",
        )


def _other_runs(path: Path, results: Results) -> str:
    """The steps on the largest batches of each whole run on this kind of device that was timed as
    the newest was, so that those on other processors stand beside each other; empty where there is
    one run."""
    runs = whole_runs(results.device)
    if len(runs) < 2:
        return ""
    return "Whole runs so far, with the rate of `torch.mm` in each (float32):\n\n" + _table(
        ["run", "torch.mm", "step", "this package", "plain PyTorch, padded", "packed", "memory"],
        (
            [
                f"[{at.name}]({at.relative_to(ROOT)}), {measured_on(run.machine)}",
                f"{run.ceilings['product']['float32'] / 1e9:.0f} GFLOP/s",
                cells[0],
                *cells[2:],
            ]
            for at, run in runs
            for cells in _steps(_whole_steps(run), run)
            if cells[0].startswith("D ")
        ),
    )


def _by_fullness() -> str:
    """What packing gains in each whole run on a CPU that was timed as the newest was, the fullest
    batch first."""
    gains: dict[tuple[str, int], list[str]] = {}
    facts: dict[tuple[str, int], dict[str, Any]] = {}
    runs = whole_runs("cpu")
    for at, (_, run) in enumerate(runs):
        facts |= {(batch["workload"], batch["patients"]): batch for batch in run.batches}
        for rows in _step_cases(run):
            if (rows[0].phase, rows[0].dtype) == (step.STEP, "float32"):
                paths = {row.variant: row for row in rows}
                ratios = (
                    times(paths[path].median / paths["fused"].median) for path in step.PLAIN_PATHS
                )
                cells = gains.setdefault((rows[0].workload, rows[0].patients), [""] * len(runs))
                cells[at] = ", ".join(ratios)
    header = ["batch", "real codes", "real visits"]
    header += [f"[{at.stem}](../{at.relative_to(ROOT)}): over padded, packed" for at, _ in runs]
    fullest = sorted(gains, key=lambda key: facts[key]["real_codes"], reverse=True)
    return _table(
        header,
        (
            [
                f"{key[0]} {facts[key]['title']}, B {key[1]}",
                f"{facts[key]['real_codes']:.1%}",
                f"{facts[key]['real_visits']:.0%}",
                *gains[key],
            ]
            for key in fullest
        ),
    )


def _ms(row: Row) -> str:
    return f"{ms(row.median)} ms" if row.seconds else "not measured"


def _against(row: Row, ours: Row) -> str:
    if not row.seconds or not ours.seconds:
        return "not measured"
    return f"{ms(row.median)} ms, **{times(row.median / ours.median)}**"


def _memory(results: Results, of: Row) -> str:
    try:
        rows = results.of(
            operation=step.PEAK_MEMORY, workload=of.workload, patients=of.patients, phase=of.phase
        )
    except KeyError:
        return ""
    peaks = {name: row.peak_bytes for name, row in rows.items() if row.peak_bytes}
    if not {"fused", "padded"} <= peaks.keys():
        return ""
    return f"{mib(peaks['fused'])} against {mib(peaks['padded'])} MiB"


def _parts(results: Results) -> str:
    """A column per batch whose step was taken apart: milliseconds, share of the step, share of the
    ceiling; empty where none was."""
    cases = [rows for rows in results.cases() if rows[0].operation == parts.OPERATION]
    if not cases:
        return ""
    names = list(dict.fromkeys(row.variant for rows in cases for row in rows))
    counts = results.findings.get(parts.COUNTS, {})

    def cells() -> Iterator[Sequence[str]]:
        for name in names:
            yield name, *(_part(rows, name) for rows in cases)
        for title, shown in parts.COUNTED.items():
            keys = (f"{rows[0].workload} {rows[0].patients}" for rows in cases)
            yield title, *(shown(counts[key]) if key in counts else "" for key in keys)

    header = ["part", *(f"{rows[0].workload}, B {rows[0].patients}" for rows in cases)]
    return (
        "## Parts of the step\n\nOf this package's step: milliseconds under PyTorch's profiler, "
        "the share of the step, and the share of the ceiling that counted work allows (the step "
        "computes some gates twice to hold less, which is not counted). Page faults and the "
        f"kernel's time are of a step without the profiler.\n\n{_table(header, cells())}"
    )


def _part(rows: Sequence[Row], name: str) -> str:
    of = {row.variant: row for row in rows}
    if name not in of:
        return ""
    row = of[name]
    whole = (parts.WHOLE, parts.UNWATCHED)
    share = "" if name in whole else f", {row.median / of[parts.WHOLE].median:.1%}"
    ceiling = f", {row.floor_s / row.median:.0%} of the ceiling" if row.floor_s else ""
    return f"{ms(row.median)}{share}{ceiling}"


def _operations(results: Results) -> Iterator[Sequence[str]]:
    for rows in results.cases():
        first, ours = rows[0], ours_in(rows)
        if not registry.on_page(first) or ours is None or not ours.seconds:
            continue
        others = "; ".join(
            f"{row.variant} **{times(row.median / ours.median)}**"
            for row in rows
            if row.seconds and not row.ours and row.difference is not None
        )
        conditions = [
            f"{first.workload}, B {first.patients}",
            first.phase,
            *([first.dtype] if first.dtype in ("bfloat16", "float16") else []),
            *(["cold caches"] if first.cache == "cold" else []),
        ]
        reached = f", {ours.floor_s / ours.median:.0%} of the ceiling" if ours.floor_s else ""
        products = next((row for row in rows if row.variant == PRODUCTS), None)
        if products is not None and products.seconds:
            reached = f", {times(ours.median / products.median)} its products alone"
        yield (
            f"{first.operation} ({', '.join(conditions)})",
            f"{ms(ours.median)} ms{reached}",
            others,
        )


def _closest(results: Results) -> Iterator[Sequence[str]]:
    """Of the cases that targets are read from: the first way that PyTorch has, and the quickest."""
    for wanted in registry.readme_rows(results.device):
        rows = [
            row
            for row in results.rows
            if all(getattr(row, name) == value for name, value in wanted.items())
        ]
        ours = ours_in(rows)
        others = [
            row for row in rows if row.seconds and not row.ours and row.difference is not None
        ]
        if ours is None or not ours.seconds or not others:
            continue
        closest = min(others, key=lambda row: row.median)
        yield (
            f"{ours.operation} ({ours.workload}, B {ours.patients})",
            _ms(ours),
            _against(others[0], ours) + f" ({others[0].variant})",
            _against(closest, ours) + f" ({closest.variant})",
        )


def _calls(results: Results) -> str:
    """What an eager call costs on the host."""
    taken: dict[str, dict[str, str]] = {}
    for row in results.rows:
        spread = row.host or row.seconds
        if row.operation == calls.OPERATION and spread:
            taken.setdefault(row.variant, {})[row.phase] = significant(1e6 * spread.median)
    if not taken:
        return ""
    phases = list(dict.fromkeys(phase for of in taken.values() for phase in of))
    rows = ([name, *(of.get(phase, "") for phase in phases)] for name, of in taken.items())
    return _table(["one eager call from Python, tiny inputs, µs", *phases], rows)


def _growth(results: Results) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for curve in results.curves:
            unit = curve.unit.rstrip("s")
            yield (
                curve.grows,
                curve.path,
                f"{curve.at[0]:,.0f} to {curve.at[-1]:,.0f} {curve.unit}",
                f"{ms(curve.median_s[0])} to {ms(curve.median_s[-1])} ms",
                f"{significant(1e9 * curve.slope_s)} ns per {unit}",
                # a line goes through any two points
                f"{curve.r_squared:.4f}" if len(curve.at) > 2 else "",
                f"{curve.doubled:+.1%}" if curve.grows == PADDING else "",
            )

    header = ["what grows", "path", "from, to", "step", "slope", "R²", "first doubling"]
    return _table(header, rows()) if results.curves else ""


def _losses(results: Results, most: int | None = None) -> str:
    """Where another way to compute the same, with equal results, is faster or lighter; the
    ``most`` that are most so."""
    found = sorted([*_slower(results), *_heavier(results)], reverse=True)
    if not found:
        return "In no case of this run was another way faster or lighter.\n"
    head = f"In {len(found)} comparisons another way was faster or lighter"
    head += ", most of all:" if most is not None and len(found) > most else ":"
    return f"{head}\n\n" + "\n".join(f"* {text}" for _, text in found[:most]) + "\n"


def _slower(results: Results) -> Iterator[tuple[float, str]]:
    """By how much, and in words, for each form of input that this package takes."""
    for rows in results.cases():
        compared = [row for row in rows if row.seconds and row.difference is not None]
        others = [row for row in compared if not row.ours]
        for ours in compared:
            # a further backend of the same form has its name in brackets
            if not ours.ours or ours.variant.endswith("]") or not others:
                continue
            best = min(others, key=lambda row: row.median)
            if best.median < ours.median:
                conditions = (ours.workload, f"B {ours.patients}", ours.phase, ours.dtype)
                yield (
                    ours.median / best.median,
                    f"{ours.operation} ({', '.join(conditions)}, {ours.cache} caches): "
                    f"{best.variant} {ms(best.median)} ms, {ours.variant} {ms(ours.median)} ms",
                )


def _heavier(results: Results) -> Iterator[tuple[float, str]]:
    """Where a plain path's training step holds less than the fused one."""
    for rows in results.cases():
        peaks = {row.variant: row.peak_bytes for row in rows if row.peak_bytes is not None}
        for path in step.PLAIN_PATHS:
            if "fused" in peaks and peaks.get(path, peaks["fused"]) < peaks["fused"]:
                yield (
                    peaks["fused"] / peaks[path],
                    f"{rows[0].operation} ({rows[0].workload}, B {rows[0].patients}): {path} "
                    f"{mib(peaks[path])} MiB, this package {mib(peaks['fused'])} MiB",
                )


def _missing(results: Results) -> str:
    """What was not measured, by reason."""
    reasons: dict[str, Counter[str]] = {}
    for row in results.rows:
        if row.missing:
            reason = row.missing
            for unequal in UNEQUAL:
                reason = unequal.sub(r"its results differ by more than \1", reason)
            reasons.setdefault(reason, Counter())[row.variant] += 1
    if not reasons:
        return ""
    lines = []
    for reason, variants in reasons.items():
        names = [f"{name} ({count} x)" if count > 1 else name for name, count in variants.items()]
        lines.append(f"* {reason}: {'; '.join(names)}")
    return "Not measured:\n\n" + "\n".join(lines) + "\n"


def _targets(results: Results) -> Iterator[Sequence[str]]:
    for verdict in targets.judge(results, registry.targets()):
        word = {True: "met", False: "**missed**", None: ""}[verdict.met]
        yield verdict.what, verdict.bound, verdict.measured, word


def _notes(results: Results) -> str:
    """Why targets were missed."""
    missed = [verdict for verdict in targets.judge(results, registry.targets()) if verdict.note]
    return "".join(f"* Missed, {verdict.what}: {verdict.note}.\n" for verdict in missed)
