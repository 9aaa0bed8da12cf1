"""``python -m benchmarks ops|step|growth|memory|all``: the cases, their shares of the time, and a
run of them.

Every job has a weight, the seconds it is worth on two CPU cores. A job gets that share of what is
left of the whole budget, so the budget holds whatever the machine; a job that none of it is left
for says so in its rows. Those that a target is read from come first, so that on a slow machine it
is the others that go without.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ehrseq_fast import backend as backends

from . import (
    batching,
    calls,
    ceilings,
    devices,
    every,
    growth,
    packed_lstm,
    step,
    survival_nll,
    visit_pool,
)
from .cases import Case, Row, measure
from .files import refuse_unwritable
from .machine import describe_machine, has_amx
from .report import case_table, ceilings_text, curve_text, describe_run
from .results import WHOLE_RUN, Results, path_for, write
from .timing import Budget
from .workloads import SIZES, WORKLOADS, Batch, MissingPackageError, require

SUMMARIES = {
    "ops": "each operation on every workload, against PyTorch's and other packages' ways",
    "step": "the whole training step on every workload: padded, packed and fused",
    "growth": "how the step grows with real codes, and with padding alone",
    "memory": "the peak memory of a training step on every workload",
    WHOLE_RUN: "all of these: under 15 minutes on two cores, under 10 on a GPU",
}
SECTIONS = ("step", "memory", "growth", "ops")

# Seconds of a whole run; starting up, the ceilings and the charts come on top.
BUDGET_S = {"cpu": 720.0, "cuda": 450.0}
QUICK_BUDGET_S = 12.0

BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line; ``missing`` says which workloads' records are not
    here, and why."""

    device: str = "cpu"
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    missing: dict[str, str] = field(default_factory=dict)
    size: str = "default"
    batch_size: int | None = None
    backend: str | None = None
    quick: bool = False


@dataclass
class Bench:
    """Where things are measured, and what was found so far."""

    settings: Settings
    device: devices.Cpu | devices.Cuda
    ceilings: ceilings.Ceilings
    budget: Budget
    curves: list[growth.Curve] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    facts: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def batch(self, letter: str, size: str | int | None = None) -> Batch:
        """A workload's batch on the device, announced the first time that its size is met."""
        given = self.settings
        size = size or given.batch_size or given.size
        batch = WORKLOADS[letter].batch(size)
        if (letter, batch.patients) not in self.facts:
            self.facts[letter, batch.patients] = batch.facts()
            say(f"\n{batch}")
        return batch.to(given.device)

    def measure(self, case: Case, budget_s: float) -> list[Row]:
        """Rows of a case within its share of the time; none is begun after all of it."""
        return measure(case, self.device, budget_s, most_s=self.budget.left, ceilings=self.ceilings)

    def model(self, batch: Batch) -> step.ModelSize:
        small = (16, 32) if self.settings.quick else (128, 256)
        return step.ModelSize(batch.vocabulary, *small)


@dataclass(frozen=True)
class Job:
    """A part of a section: its weight, what it gives within so many seconds, and whether a target
    is read from that."""

    title: str
    weight: float
    run: Callable[[Bench, float], list[Row]]
    for_target: bool = False


def of_case(
    title: str, weight: float, make: Callable[[Bench], Case], *, for_target: bool = False
) -> Job:
    def run(bench: Bench, budget_s: float) -> list[Row]:
        case = make(bench)
        rows = bench.measure(case, budget_s)
        say(f"\n{case_table(case.title, rows)}")
        return rows

    return Job(title, weight, run, for_target)


# The sections -------------------------------------------------------------------------------------


def jobs(section: str, settings: Settings) -> list[Job]:
    return list({"ops": ops, "step": steps, "memory": memory, "growth": grows}[section](settings))


def main_workload(settings: Settings) -> str:
    """The one that the finer cases are measured on and the targets read from: real records, or on a
    GPU, whose machine may have none, outpatients."""
    wanted = "D" if settings.device == "cpu" else "A"
    return wanted if wanted in settings.workloads else settings.workloads[0]


def ops(settings: Settings) -> Iterator[Job]:
    yield from _pooling(settings)
    yield from _losses(settings)
    for phase in ("forward", "forward+backward"):
        yield of_case(
            f"eager calls, {phase}",
            2,
            lambda b, p=phase: calls.case(b.device, phase=p, backend=settings.backend),
        )
    if "D" in settings.workloads and settings.device == "cpu":
        size = 32 if settings.quick else batching.BATCH_SIZE
        yield of_case("building a batch", 6, lambda b: batching.case(size))
    yield from _lstms(settings)
    yield from _every(settings)


def _pooling(settings: Settings) -> Iterator[Job]:
    width = 16 if settings.quick else visit_pool.EMBEDDING_DIM

    def job(letter: str, weight: float, for_target: bool = False, **options: Any) -> Job:
        def make(bench: Bench) -> Case:
            return visit_pool.case(
                bench.batch(letter),
                bench.device,
                embedding_dim=width,
                backend=settings.backend,
                **options,
            )

        return of_case(f"pooling {letter}", weight, make, for_target=for_target)

    main = main_workload(settings)
    for letter in settings.workloads:
        compiled = letter == main and not settings.quick
        weight = 28 if letter == main else {"E": 18}.get(letter, 8)
        yield job(letter, weight, for_target=letter == main, compiled=compiled)
    yield job(main, 6, phase="forward")
    yield job(main, 8, cache="cold")
    if _serves(settings, BF16):
        yield job(main, 10, dtype=BF16)


def _losses(settings: Settings) -> Iterator[Job]:
    def drawn(
        weight: float, patients: int, slots: int, for_target: bool = False, **options: Any
    ) -> Job:
        def make(bench: Bench) -> Case:
            outcomes = survival_nll.Outcomes.drawn(patients, slots, settings.device)
            return survival_nll.case(outcomes, bench.device, backend=settings.backend, **options)

        return of_case("survival NLL", weight, make, for_target=for_target)

    def of_batch(letter: str) -> Job:
        def make(bench: Bench) -> Case:
            outcomes = survival_nll.Outcomes.of_batch(bench.batch(letter))
            return survival_nll.case(outcomes, bench.device, backend=settings.backend)

        return of_case(f"survival NLL {letter}", 1.5, make)

    wide, short = ((32, 20), (32, 16)) if settings.quick else ((4096, 200), (4096, 128))
    on_gpu = settings.device == "cuda"
    yield drawn(16, *wide, for_target=not on_gpu, compiled=not settings.quick)
    yield drawn(3, *wide, phase="forward")
    yield drawn(5, *wide, cache="cold")
    yield drawn(4, *wide, from_logits=True)
    if _serves(settings, BF16):
        yield drawn(4, *wide, dtype=BF16)
    yield drawn(3, *short, for_target=on_gpu)
    for letter in settings.workloads:
        yield of_batch(letter)


def _lstms(settings: Settings) -> Iterator[Job]:
    sizes = (16, 32) if settings.quick else (packed_lstm.INPUTS, packed_lstm.HIDDEN)

    def job(weight: float, patients: int | str, for_target: bool = False, **options: Any) -> Job:
        """Of so many synthetic records, or of a workload's."""

        def make(bench: Bench) -> Case:
            if isinstance(patients, str):
                lengths, workload = bench.batch(patients).packed.lengths, patients
            else:
                lengths = packed_lstm.lognormal_lengths(patients)
                workload = packed_lstm.LOGNORMAL
            return packed_lstm.case(
                lengths,
                bench.device,
                workload=workload,
                inputs=sizes[0],
                hidden=sizes[1],
                backend=settings.backend,
                **options,
            )

        return of_case(f"packed LSTM {patients}", weight, make, for_target=for_target)

    few, many = (16, 32) if settings.quick else (256, 1024)
    on_cpu = settings.device == "cpu"
    yield job(30, few, for_target=on_cpu)
    yield job(100, many, for_target=on_cpu)
    yield job(12, few, phase="forward")
    yield job(22, many, phase="forward")
    yield job(25, main_workload(settings))
    if _serves(settings, BF16):
        yield job(25, few, for_target=on_cpu and has_amx(), dtype=BF16)
    if not on_cpu:
        yield job(10, few, dtype=F16)
        yield job(10, many, dtype=F16)


def _every(settings: Settings) -> Iterator[Job]:
    def job(entry: every.Entry) -> Job:
        def make(bench: Bench) -> Case:
            options: dict[str, Any] = {"quick": settings.quick, "backend": settings.backend}
            return every.case(entry, bench.device, **options)

        return of_case(entry.title, 0.2, make)

    for entry in every.entries():
        if _serves(settings, entry.dtype):
            yield job(entry)


STEP_WEIGHTS = {"A": 20, "E": 28, "F": 20}
# what the plain paths of the real batch need for several samples each
MAIN_STEP_WEIGHT = 80


def steps(settings: Settings) -> Iterator[Job]:
    def job(
        letter: str,
        weight: float,
        size: str | None = None,
        for_target: bool = False,
        **options: Any,
    ) -> Job:
        def make(bench: Bench) -> Case:
            batch = bench.batch(letter, size)
            return step.case(
                batch,
                bench.device,
                size=bench.model(batch),
                backend=settings.backend,
                **options,
            )

        return of_case(f"step {letter}", weight, make, for_target=for_target)

    main = main_workload(settings)
    for letter in settings.workloads:
        weight = MAIN_STEP_WEIGHT if letter == main else STEP_WEIGHTS.get(letter, 8)
        yield job(letter, weight, for_target=letter == main)
    if settings.size == "default" and not settings.batch_size:
        yield job(main, 4, size="small")
    for phase in step.PHASES[:3]:
        yield job(main, 12, phase=phase)
    if _serves(settings, BF16):
        yield job(main, 25, autocast=True)
        yield job(main, 8, autocast=True, phase="inference")
    if settings.device == "cuda":
        yield Job("host waits", 2, partial(_host_waits, main), for_target=True)


def _host_waits(letter: str, bench: Bench, budget_s: float) -> list[Row]:
    assert isinstance(bench.device, devices.Cuda)
    waits = step.why_it_waits(bench.batch(letter), bench.device)
    bench.findings["host_waits"] = waits
    say(f"\nA fused step makes the host wait for the GPU: {waits or 'never'}")
    return []


def memory(settings: Settings) -> Iterator[Job]:
    def job(letter: str) -> Job:
        def run(bench: Bench, budget_s: float) -> list[Row]:
            batch = bench.batch(letter)
            rows = step.peak_rows(
                batch, bench.device, budget_s, size=bench.model(batch), backend=settings.backend
            )
            title = f"peak memory of a training step, workload {letter}, {batch.patients} patients"
            say(f"\n{case_table(title, rows)}")
            return rows

        weight = {"A": 12, "D": 12, "E": 15}.get(letter, 6)
        return Job(f"memory {letter}", weight, run, letter == main_workload(settings))

    for letter in settings.workloads:
        yield job(letter)


def grows(settings: Settings) -> Iterator[Job]:
    main = main_workload(settings)

    def job(grows: str, weight: float, make: Callable[[Bench], Case]) -> Job:
        def run(bench: Bench, budget_s: float) -> list[Row]:
            rows = bench.measure(make(bench), budget_s)
            curves = growth.fit(grows, rows)
            bench.curves += curves
            say(f"\n{curve_text(grows, curves)}")
            return rows

        return Job(f"growth with {grows}", weight, run, for_target=grows != growth.PATIENTS)

    def of_batch(make: Callable[..., Case], bench: Bench) -> Case:
        batch = bench.batch(main)
        return make(batch, bench.device, bench.model(batch), settings.backend)

    def of_sizes(bench: Bench) -> Case:
        sizes = (8, 16, 24) if settings.quick else growth.BATCH_SIZES
        model = bench.model(bench.batch(main, sizes[0]))
        return growth.patients(main, bench.device, model, sizes, settings.backend)

    yield job(growth.CODES, 45, partial(of_batch, growth.real_codes))
    yield job(growth.PADDING, 25, partial(of_batch, growth.padding))
    yield job(growth.PATIENTS, 15, of_sizes)


def _serves(settings: Settings, dtype: torch.dtype) -> bool:
    """False where the backend that was asked for cannot compute in that dtype."""
    asked = settings.backend
    return asked in (None, "reference") or dtype in backends.kernels(asked).dtypes


# A run --------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print above the progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)


def measure_sections(sections: tuple[str, ...], settings: Settings, budget_s: float) -> Results:
    """Run the sections' jobs, each within its share of what is left of the budget."""
    from tqdm import tqdm

    start = perf_counter()
    device = devices.device(settings.device)
    machine = {**describe_machine(settings.device), **devices.describe(device)}
    say(describe_run(machine))
    budget = Budget(budget_s)
    bench = Bench(settings, device, ceilings.measure(device, quick=settings.quick), budget)
    say(ceilings_text(bench.ceilings))
    planned = [(section, job) for section in sections for job in jobs(section, settings)]
    rows: list[list[Row]] = [[] for _ in planned]  # in the order of the sections
    weight_left = sum(job.weight for _, job in planned)
    seconds: dict[str, float] = dict.fromkeys(sections, 0.0)
    with tqdm(total=weight_left, unit="s", bar_format=PROGRESS) as progress:
        for i in sorted(range(len(planned)), key=lambda i: not planned[i][1].for_target):
            section, job = planned[i]
            progress.set_description(f"{section}: {job.title}")
            before = perf_counter()
            share = budget.share(job.weight, weight_left)
            rows[i] = _rows(job, section, bench, share.left)
            weight_left -= job.weight
            seconds[section] += perf_counter() - before
            progress.update(job.weight)
    return Results(
        command=sections[0] if len(sections) == 1 else WHOLE_RUN,
        device=settings.device,
        machine=machine,
        ceilings=bench.ceilings.as_dict(),
        batches=[bench.facts[key] for key in sorted(bench.facts)],
        rows=[*chain.from_iterable(rows), *missing_workloads(settings)],
        curves=bench.curves,
        seconds={**seconds, WHOLE_RUN: perf_counter() - start},
        settings={**settings.__dict__, "budget_s": budget_s},
        findings=bench.findings,
    )


def _rows(job: Job, section: str, bench: Bench, budget_s: float) -> list[Row]:
    """What a job gives. One that fails is a finding, and the others go on."""
    try:
        return job.run(bench, budget_s)
    except Exception as error:
        say(f"\nFAILED: {section}: {job.title}\n{traceback.format_exc()}")
        failed = f"{section}, {job.title}: {type(error).__name__}: {error}"
        bench.findings.setdefault(FAILED_JOBS, []).append(failed)
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


FAILED_JOBS = "failed_jobs"
PROGRESS = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}"


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
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results to FILE")
    if command != WHOLE_RUN:
        parser.add_argument(
            "--save", action="store_true", help="keep the results as benchmarks/results/*.json"
        )


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


def run(args: argparse.Namespace, command: str) -> Results:
    """Measure, print and write. A whole run that is not quick is kept, with its plots.

    Raises:
        SystemExit: if one of this package's own ways failed or gave other results.
    """
    from . import targets

    require("tqdm")
    refuse_what_cannot_run(args.device, args.backend)
    refuse_unwritable(args.out)
    keep = command == WHOLE_RUN and not args.quick
    if args.out is None and (keep or getattr(args, "save", False)):
        refuse_unwritable(path_for(describe_machine(args.device), command))
    reasons = {letter: WORKLOADS[letter].why_not() for letter in args.workload}
    missing = {letter: why for letter, why in reasons.items() if why is not None}
    if len(missing) == len(reasons):
        raise MissingPackageError("; ".join(missing.values()))
    for letter, why in missing.items():
        print(f"workload {letter} is left out: {why}")
    settings = Settings(
        device=args.device,
        workloads=tuple(letter for letter in reasons if letter not in missing),
        missing=missing,
        size="small" if args.quick else args.size,
        batch_size=args.batch_size or (8 if args.quick else None),
        backend=args.backend,
        quick=args.quick,
    )
    sections = SECTIONS if command == WHOLE_RUN else (command,)
    full = BUDGET_S[args.device]
    if command != WHOLE_RUN:
        weights = {s: sum(job.weight for job in jobs(s, settings)) for s in SECTIONS}
        full *= weights[command] / sum(weights.values())
    budget_s = args.budget or (QUICK_BUDGET_S if args.quick else full)
    results = measure_sections(sections, settings, budget_s)

    judged = targets.judge(results)
    print(f"\n{targets.text(judged)}\n\nThe run took {results.seconds[WHOLE_RUN]:.0f} s.")
    path = args.out
    if path is None and (keep or getattr(args, "save", False)):
        path = path_for(results.machine, command)
    if path is None:
        print("Results were not written to a file: --out FILE names one.")
    else:
        write({**results.as_dict(), "targets": [verdict.as_dict() for verdict in judged]}, path)
        print(f"Results: {path}")
        if keep:
            from .plot import draw_all

            try:
                for image in draw_all(results, path):
                    print(f"Plot: {image}")
            except MissingPackageError as error:
                print(f"No plots: {error}")
    failed = results.findings.get(FAILED_JOBS, []) + [
        f"{', '.join(map(str, row.key))}: {row.missing}" for row in results.rows if row.failed
    ]
    if failed:
        raise SystemExit("FAILED:\n" + "\n".join(failed))
    return results
