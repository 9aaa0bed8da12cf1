"""What busy processes on the same cores cost: operations and the training step, in plain PyTorch
and by this package, with the cores free and beside one and two processes that compute all the time,
as a data loader's workers do.

    python -m benchmarks.neighbours                   # about two minutes
    python -m benchmarks.neighbours --write           # benchmarks/results/neighbours.md

All states and variants take turns; medians. Where two threads have two cores to themselves and two
busy processes join them, each gets half of a core: twice the time is what the machine takes, and
what is above it, waiting.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from ehrseq_fast import PackedLSTM, packed_survival_nll, packed_visit_pool, use_backend

from .files import write_text
from .machine import cpu_model
from .recurrent import lognormal_lengths
from .report import ms, significant
from .step import ModelSize, TrainingStep
from .workloads import WORKLOADS

PAGE = Path(__file__).parent / "results" / "neighbours.md"
NEIGHBOURS = (0, 1, 2)
PLAIN, OURS = "plain PyTorch", "this package"
# It ends with whoever started it, however that ends.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10_000))"

Run = Callable[[], object]


class Neighbours:
    """Busy processes, of which as many run as are asked for; the others are stopped."""

    def __init__(self, most: int) -> None:
        self._processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(most)]
        self.run(0)

    def run(self, count: int) -> None:
        for at, process in enumerate(self._processes):
            os.kill(process.pid, signal.SIGCONT if at < count else signal.SIGSTOP)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def neighbours(most: int) -> Iterator[Neighbours]:
    """So many busy processes, stopped; they end with the block."""
    started = Neighbours(most)
    try:
        yield started
    finally:
        started.end()


def operations() -> Iterator[tuple[str, Mapping[str, Run]]]:
    """What is measured: the plain way and this package's."""
    torch.manual_seed(0)
    for size in ("small", "default"):
        real = WORKLOADS["D"].batch(size)
        batch = real.packed
        table = torch.randn(real.vocabulary, 128, requires_grad=True)
        incoming = torch.randn(batch.n_visits, 128)
        starts = batch.code_offsets[:-1].contiguous()
        hazards = torch.rand(batch.n_visits).clamp(0.01, 0.5).requires_grad_()

        def bag(batch=batch, table=table, starts=starts, incoming=incoming) -> object:
            pooled = F.embedding_bag(batch.codes, table, starts, mode="mean")
            return torch.autograd.grad(pooled, table, incoming)

        def pool(batch=batch, table=table, incoming=incoming) -> object:
            return torch.autograd.grad(packed_visit_pool(batch, table), table, incoming)

        def loss(batch=batch, hazards=hazards) -> object:
            return torch.autograd.grad(packed_survival_nll(hazards, batch), hazards)

        def plain_loss(loss=loss) -> object:
            with use_backend("reference"):
                return loss()

        patients = f"D, B {len(batch)}"
        yield f"visit pooling ({patients})", {PLAIN: bag, OURS: pool}
        yield f"survival NLL ({patients})", {PLAIN: plain_loss, OURS: loss}
    for patients, hidden in ((32, 64), (256, 256)):
        lengths = lognormal_lengths(patients)
        rows = torch.randn(int(lengths[0]), patients, 128)
        yield (
            f"LSTM (B {patients}, H {hidden})",
            {
                name: _training(layer, pack_padded_sequence(rows, lengths))
                for name, layer in (
                    (PLAIN, torch.nn.LSTM(128, hidden)),
                    (OURS, PackedLSTM(128, hidden)),
                )
            },
        )
    real = WORKLOADS["D"].batch("small")
    steps = {
        name: TrainingStep(path, ModelSize(real.vocabulary))
        for name, path in ((PLAIN, "packed"), (OURS, "fused"))
    }
    yield (
        f"training step (D, B {real.patients})",
        {name: lambda step=step: step(real) for name, step in steps.items()},
    )


def _training(layer: torch.nn.LSTM, given: torch.nn.utils.rnn.PackedSequence) -> Run:
    incoming = torch.randn(len(given.data), layer.hidden_size)
    weights = list(layer.parameters())
    return lambda: torch.autograd.grad(layer(given)[0].data, weights, incoming)


def measured(
    runs: Mapping[str, Run], busy: Neighbours, seconds: float
) -> dict[tuple[str, int], float]:
    """The median seconds of each variant beside each number of neighbours."""
    samples: dict[tuple[str, int], list[float]] = {(n, c): [] for n in runs for c in NEIGHBOURS}
    block_s = seconds / len(samples) / 3
    for _ in range(3):
        for count in NEIGHBOURS:
            busy.run(count)
            for name, run in runs.items():
                start = perf_counter()
                run()  # after another variant's block
                while True:
                    before = perf_counter()
                    run()
                    samples[name, count].append(perf_counter() - before)
                    if perf_counter() - start > block_s:
                        break
    busy.run(0)
    return {key: median(taken) for key, taken in samples.items()}


def table(found: Mapping[str, Mapping[tuple[str, int], float]]) -> str:
    """Milliseconds with the cores free, and how many times as long it takes beside others."""
    head = ["forward and backward", *(f"{name}, ms" for name in (PLAIN, OURS))]
    for count in NEIGHBOURS[1:]:
        head += [f"{name}, beside {count}" for name in (PLAIN, OURS)]
    lines = [head, ["---"] * len(head)]
    for title, seconds in found.items():
        line = [title, *(ms(seconds[name, 0]) for name in (PLAIN, OURS))]
        for count in NEIGHBOURS[1:]:
            for name in (PLAIN, OURS):
                slower = seconds[name, count] / seconds[name, 0]
                line.append(f"{ms(seconds[name, count])} ms, {significant(slower)}x")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args(arguments)
    cases = dict(operations())
    load = os.getloadavg()[0]
    with neighbours(max(NEIGHBOURS)) as busy:
        found = {
            title: measured(runs, busy, args.seconds / len(cases)) for title, runs in cases.items()
        }
    text = (
        f"# Beside busy processes\n\n{cpu_model()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of alternating "
        "blocks, made by `python -m benchmarks.neighbours --write`. The machine had a load of "
        f"{load:.1f} of its own when it began: where that is not near 0, the cores were not free "
        "in the first columns either, and only the two ways in one column can be compared.\n\n"
        f"{table(found)}\n"
    )
    if args.write:
        write_text(PAGE, text)
    print(text)


if __name__ == "__main__":
    main()
