"""``python -m benchmarks ops|step|growth|memory|all``: a run of the sections' jobs.

Every job has a weight, the seconds it is worth on two CPU cores. A job gets that share of what is
left of the whole budget, so the budget holds whatever the machine; a job that none of it is left
for says so in its rows. Those that a target is read from come first, so that on a slow machine it
is the others that go without.
"""

from __future__ import annotations

import argparse
import traceback
from itertools import chain
from time import perf_counter
from typing import Any

import torch

from ehrseq_fast import backend as backends

from . import ceilings, devices, registry, targets
from .cases import Row
from .jobs import SECTIONS, Job, Session, Settings, say
from .machine import describe_machine
from .progress import bar
from .report import ceilings_text, describe_run
from .results import WHOLE_RUN, Results, add_saving_arguments, destination, save
from .timing import Budget
from .workloads import SIZES, WORKLOADS, MissingPackageError

SUMMARIES = {
    "ops": "each operation on every workload, against PyTorch's and other packages' ways",
    "step": "the whole training step on every workload: padded, packed and fused",
    "growth": "how the step grows with real codes, and with padding alone",
    "memory": "the peak memory of a training step on every workload",
    WHOLE_RUN: "all of these: about 15 minutes on two cores, under 10 on a GPU",
}

# Seconds of a whole run; starting up, the ceilings and the charts come on top.
BUDGET_S = {"cpu": 810.0, "cuda": 450.0}
QUICK_BUDGET_S = 12.0

FAILED_JOBS = "failed_jobs"
PROGRESS = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}"


def open_session(settings: Settings, budget_s: float) -> tuple[Session, dict[str, Any]]:
    """Describe the machine and measure its ceilings, and print both."""
    device = devices.device(settings.device)
    machine = {**describe_machine(settings.device), **devices.describe(device)}
    print(describe_run(machine), flush=True)
    found = ceilings.measure(device, quick=settings.quick)
    print(ceilings_text(found), flush=True)
    return Session(settings, device, found, Budget(budget_s)), machine


def results_of(
    command: str,
    session: Session,
    machine: dict[str, Any],
    rows: list[Row],
    seconds: dict[str, float],
    settings: dict[str, Any],
) -> Results:
    """What results files hold of a session."""
    return Results(
        command=command,
        device=session.settings.device,
        machine=machine,
        ceilings=session.ceilings.as_dict(),
        batches=[session.facts[key] for key in sorted(session.facts)],
        rows=rows,
        curves=session.curves,
        seconds=seconds,
        settings=settings,
        findings=session.findings,
    )


def measure_sections(sections: tuple[str, ...], settings: Settings, budget_s: float) -> Results:
    """Run the sections' jobs, each within its share of what is left of the budget."""
    start = perf_counter()
    session, machine = open_session(settings, budget_s)
    planned = [(section, job) for section in sections for job in registry.jobs(section, settings)]
    rows: list[list[Row]] = [[] for _ in planned]  # in the order of the sections
    weight_left = sum(job.weight for _, job in planned)
    seconds: dict[str, float] = dict.fromkeys(sections, 0.0)
    with bar(total=weight_left, unit="s", bar_format=PROGRESS) as progress:
        for i in measured_first(planned):
            section, job = planned[i]
            progress.set_description(f"{section}: {job.title}")
            before = perf_counter()
            share = session.budget.share(job.weight, weight_left)
            rows[i] = _rows(job, section, session, share.left)
            weight_left -= job.weight
            seconds[section] += perf_counter() - before
            progress.update(job.weight)
    return results_of(
        sections[0] if len(sections) == 1 else WHOLE_RUN,
        session,
        machine,
        [*chain.from_iterable(rows), *missing_workloads(settings)],
        {**seconds, WHOLE_RUN: perf_counter() - start},
        {**settings.__dict__, "budget_s": budget_s},
    )


def measured_first(planned: list[tuple[str, Job]]) -> list[int]:
    """The order of the jobs: those that a target is read from before the others."""
    return sorted(range(len(planned)), key=lambda i: not planned[i][1].for_target)


def _rows(job: Job, section: str, session: Session, budget_s: float) -> list[Row]:
    """What a job gives. One that fails is a finding, and the others go on."""
    try:
        return job.run(session, budget_s)
    except Exception as error:
        say(f"\nFAILED: {section}: {job.title}\n{traceback.format_exc()}")
        failed = f"{section}, {job.title}: {type(error).__name__}: {error}"
        session.findings.setdefault(FAILED_JOBS, []).append(failed)
        return []


def missing_workloads(settings: Settings) -> list[Row]:
    """A row for each workload that was asked for and has no records here."""
    return [
        Row(
            *("every operation", letter),
            settings.batch_size or WORKLOADS[letter].patients[settings.size],
            *("every phase", "float32", "warm", f"workload {letter}"),
            missing=reason,
        )
        for letter, reason in settings.missing.items()
    ]


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--backend", choices=backends.BACKENDS, help="this package's kernels, else its own choice"
    )
    parser.add_argument(
        "--workload", nargs="+", choices=tuple(WORKLOADS), default=list(WORKLOADS), metavar="A..F"
    )
    parser.add_argument("--size", choices=SIZES, default="default", help="of the batches")
    parser.add_argument("--batch-size", type=int, metavar="B", help="patients, in place of --size")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds, in place of the usual")
    parser.add_argument(
        "--quick", action="store_true", help="tiny batches and models, in seconds, for a look"
    )
    add_saving_arguments(parser)


def refuse_what_cannot_run(device: str, backend: str | None) -> None:
    """Say at once that the device or the backend that was asked for is not there.

    Raises:
        SystemExit: with one line that says why.
    """
    reason = None if backend is None else backends.why_not_loaded(backend)
    if reason is None and device == "cuda" and not torch.cuda.is_available():
        reason = devices.NO_GPU
    if reason is not None:
        raise SystemExit(f"python -m benchmarks: {reason}")


def refuse_failures(results: Results) -> None:
    """
    Raises:
        SystemExit: naming what failed of this package's own ways, or gave other results.
    """
    failed = results.findings.get(FAILED_JOBS, []) + [
        f"{', '.join(map(str, row.key))}: {row.missing}" for row in results.rows if row.failed
    ]
    if failed:
        raise SystemExit("FAILED:\n" + "\n".join(failed))


def settings_of(args: argparse.Namespace) -> Settings:
    """What was asked for, without the workloads whose records are not here.

    Raises:
        MissingPackageError: if that leaves none.
    """
    reasons = {letter: WORKLOADS[letter].why_not() for letter in args.workload}
    missing = {letter: why for letter, why in reasons.items() if why is not None}
    if len(missing) == len(reasons):
        raise MissingPackageError("; ".join(missing.values()))
    for letter, why in missing.items():
        print(f"workload {letter} is left out: {why}")
    return Settings(
        device=args.device,
        workloads=tuple(letter for letter in reasons if letter not in missing),
        missing=missing,
        size="small" if args.quick else args.size,
        batch_size=args.batch_size or (8 if args.quick else None),
        backend=args.backend,
        quick=args.quick,
    )


def usual_budget(command: str, settings: Settings) -> float:
    """The seconds of a whole run, or a section's share of them."""
    if settings.quick:
        return QUICK_BUDGET_S
    full = BUDGET_S[settings.device]
    if command == WHOLE_RUN:
        return full
    weights = {s: sum(job.weight for job in registry.jobs(s, settings)) for s in SECTIONS}
    return full * weights[command] / sum(weights.values())


def run(args: argparse.Namespace, command: str) -> Results:
    """Measure, print and write. A whole run that is not quick is kept, with its plots.

    Raises:
        SystemExit: if one of this package's own ways failed or gave other results.
    """
    refuse_what_cannot_run(args.device, args.backend)
    keep = command == WHOLE_RUN and not args.quick
    args.save = args.save or keep
    destination(args, describe_machine(args.device), command)  # refused before the run, not after
    settings = settings_of(args)
    sections = SECTIONS if command == WHOLE_RUN else (command,)
    results = measure_sections(sections, settings, args.budget or usual_budget(command, settings))

    judged = targets.judge(results, registry.targets())
    print(f"\n{targets.text(judged)}\n\nThe run took {results.seconds[WHOLE_RUN]:.0f} s.")
    path = destination(args, results.machine, command)
    save(results, path, targets=[verdict.as_dict() for verdict in judged])
    if path is not None and keep:
        from .plot import draw_all

        try:
            for image in draw_all(results, path):
                print(f"Plot: {image}")
        except MissingPackageError as error:
            print(f"No plots: {error}")
    refuse_failures(results)
    return results
