"""What keeping the gates of more visits gains in time and costs in memory: the packed LSTM, forward
and backward, by the share that it keeps (``keep_gates``).

    python -m benchmarks.keep_gates                           # two minutes, two threads
    python -m benchmarks.keep_gates --cpu-time                # beside other programs: one thread
    python -m benchmarks.keep_gates --cpu-time --write        # the table of docs/packing.md

Blocks of calls of each share alternate (:mod:`.timing`); medians. Results are found the same to the
bit first.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from ehrseq_fast import PackedLSTM

from .files import write_text
from .machine import cpu_model
from .memory import MIB
from .recurrent import INPUTS, lognormal_lengths
from .report import ms, significant
from .timing import alternating_blocks, plan

PAGE = Path(__file__).parent.parent / "docs" / "packing.md"
MARKED = re.compile(r"(<!-- keep gates -->\n).*?(<!-- end keep gates -->)", re.DOTALL)
SHARES = (0.0, 0.4, 1.0, None)  # the last is what the models take
PATIENTS, HIDDEN = (32, 128, 512, 1024), (64, 128, 256, 512)


def sequence(patients: int) -> PackedSequence:
    lengths = lognormal_lengths(patients)
    torch.manual_seed(0)
    rows = torch.randn(int(lengths[0]), patients, INPUTS)
    return pack_padded_sequence(rows, lengths)


def training(
    given: PackedSequence, hidden: int, share: float | None
) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward, and the gradients of the weights."""
    torch.manual_seed(0)
    layer = PackedLSTM(INPUTS, hidden)
    layer.keep_gates = share
    incoming = torch.randn(len(given.data), hidden)
    weights = list(layer.parameters())

    def run() -> list[torch.Tensor]:
        return list(torch.autograd.grad(layer(given)[0].data, weights, incoming))

    return run


def measured(
    patients: int, hidden: int, budget_s: float, clock: Callable[[], float]
) -> dict[float | None, float]:
    """The median seconds by share, once the gradients were found to be the same bits.

    Raises:
        AssertionError: where they are not.
    """
    given = sequence(patients)
    runs = {str(share): training(given, hidden, share) for share in SHARES}
    expected = runs[str(SHARES[0])]()
    for name, run in runs.items():
        if not all(map(torch.equal, run(), expected)):
            raise AssertionError(
                f"keep_gates {name}: expected gradients of the same bits, got others"
            )

    def timed(name: str, run: Callable[[], object]) -> float:
        start = clock()
        run()
        return clock() - start

    estimates = {name: timed(name, run) for name, run in runs.items()}
    samples = alternating_blocks(runs, plan(estimates, budget_s), timed)
    return {share: median(samples[str(share)]) for share in SHARES}


def rows(
    patients: Sequence[int], hidden: Sequence[int], budget_s: float, clock: Callable[[], float]
) -> Iterator[tuple[list[str], float]]:
    """The cells of each shape, and by how much the models' share is over the best."""
    each_s = budget_s / (len(patients) * len(hidden))
    for count, units in product(patients, hidden):
        found = measured(count, units, each_s, clock)
        over = found[None] / min(found.values()) - 1
        visits = int(lognormal_lengths(count).sum())
        all_gates = visits * 16 * units / MIB
        cells = [f"{count:,}, {units}", f"{significant(all_gates)} MiB"]
        yield [*cells, *(ms(found[share]) for share in SHARES), f"{over:+.0%}"], over


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--patients", type=int, nargs="+", default=PATIENTS)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the seconds of the CPU, on one thread: for a machine that others use too",
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/packing.md")
    options = parser.parse_args(arguments)
    threads = 1 if options.cpu_time else options.threads
    torch.set_num_threads(threads)
    clock = process_time if options.cpu_time else perf_counter
    header = [
        "patients, hidden units",
        "gates of all visits",
        *map(str, SHARES),
        "None over the best",
    ]
    found = []
    print(" | ".join(header))
    for cells, over in rows(options.patients, options.hidden, options.seconds, clock):
        print(" | ".join(cells), flush=True)
        found.append((cells, over))
    lines = [header, ["---"] * len(header), *(cells for cells, _ in found)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    said = (
        f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}; "
        f"E {INPUTS}, float32, log-normal lengths; {'CPU time, ' if options.cpu_time else ''}"
        "medians of alternating blocks of calls, milliseconds by share, gradients the same bits. "
        f"None, the models' choice, is at most {max(over for _, over in found):.0%} over the best."
    )
    print(f"\n{said}")
    if options.write:
        text, marks = MARKED.subn(
            lambda match: f"{match[1]}{said}\n\n{table}{match[2]}", PAGE.read_text()
        )
        if marks != 1:
            raise SystemExit(f"{PAGE}: expected one section marked keep gates, got {marks}")
        write_text(PAGE, text)


if __name__ == "__main__":
    main()
