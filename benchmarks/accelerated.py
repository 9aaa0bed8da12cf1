"""What ``accelerate`` gains on models of one's own: forward and backward, before and after.

    python -m benchmarks.accelerated                # workload C, two threads
    python -m benchmarks.accelerated A --seconds 60

Outputs are found equal first; blocks of calls of each alternate (:mod:`.timing`); medians.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ehrseq_fast import accelerate
from tests import dropin_models, plain_models

from .machine import cpu_model
from .timing import alternating_blocks, plan
from .workloads import WORKLOADS, Batch

EMBEDDING, HIDDEN = 128, 256


def models(batch: Batch) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """By title: a model, and what it is called with."""
    padded = batch.padded
    given = (padded.visit_codes, padded.visit_mask, padded.sequence_mask)
    vectors = torch.randn(*padded.sequence_mask.shape, EMBEDDING)
    sizes = (batch.vocabulary, EMBEDDING, HIDDEN)
    pool = dropin_models.Pool("mean", batch.vocabulary)
    pool.codes = nn.Embedding(batch.vocabulary, EMBEDDING, padding_idx=0)
    gru = dropin_models.PooledRecurrent(nn.GRU, EMBEDDING, HIDDEN)
    return {
        "survival model, padded": (plain_models.SurvivalLSTM(*sizes, dropout=0.0), given),
        "survival model with packing": (
            plain_models.SurvivalLSTM(*sizes, dropout=0.0, packed=True),
            given,
        ),
        "GRU over visit vectors, packed within": (gru, (vectors, padded.sequence_mask)),
        "embedding, mask, mean": (pool, given[:2]),
    }


def step(model: nn.Module, given: tuple[Any, ...]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(*given).sum().backward()

    return run


def timed(name: str, run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", nargs="?", default="C", choices=sorted(WORKLOADS))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch = WORKLOADS[options.workload].batch()
    print(f"{cpu_model()}, {options.threads} threads, torch {torch.__version__}\n{batch}")
    rows = models(batch)
    for title, (model, given) in rows.items():
        plain = copy.deepcopy(model)
        accelerate(model)
        torch.testing.assert_close(model(*given), plain(*given), rtol=1e-4, atol=1e-5)
        variants = {"before": step(plain, given), "after": step(model, given)}
        estimates = {name: timed(name, run) for name, run in variants.items()}
        planned = plan(estimates, options.seconds / len(rows))
        samples = alternating_blocks(variants, planned, timed)
        before, after = (1e3 * median(samples[name]) for name in variants)
        print(f"{title}: {before:,.1f} ms -> {after:,.2f} ms, {before / after:,.1f}x")


if __name__ == "__main__":
    main()
