"""The parts of a fused training step: what each takes, and the least that it could take.

Times are those of the operators in PyTorch's profiler, the median over some steps; what is left of
a step is Python, autograd and PyTorch's small operators. A part's floor is its counted work at the
rates that the suite measures (:mod:`.ceilings`). Page faults and the CPU's time in the kernel are
counted over steps without a profiler.

    python -m benchmarks.parts D 32 --seconds 5
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ehrseq_fast import backend as backends

from . import step, survival_nll, visit_pool
from .cases import Row
from .ceilings import Ceilings, Work
from .jobs import Benchmark, Job, Session, Settings, say
from .report import ms, significant, table
from .step import ModelSize, TrainingStep, model_size
from .survival_nll import Outcomes
from .timing import Spread
from .workloads import Batch

OPERATION = "parts of a training step"
WHOLE, REST = "whole step", "Python, autograd and the rest"
UNWATCHED = "whole step, without the profiler"
OPERATORS = {
    "ehrseq_fast::packed_visit_pool": "pooling, forward",
    "ehrseq_fast::packed_lstm_layer": "LSTM, forward",
    "ehrseq_fast::hazard_head": "hazard head, forward",
    "ehrseq_fast::packed_survival_nll": "loss",
    "ehrseq_fast::survival_nll_scale": "loss",
    "ehrseq_fast::hazard_head_backward": "hazard head, backward",
    "ehrseq_fast::packed_lstm_layer_backward": "LSTM, backward",
    "ehrseq_fast::packed_visit_pool_backward": "pooling, backward",
    "aten::_fused_adam_": "optimizer",
}
# Findings of the results, and how they are shown.
COUNTS = "step_counts"
COUNTED: dict[str, Callable[[dict[str, float]], str]] = {
    "page faults of a step": lambda counts: significant(counts["page_faults"]),
    "CPU time in the kernel": lambda counts: f"{ms(counts['kernel_s'])} ms",
}
PARTS = (*dict.fromkeys(OPERATORS.values()), REST)
# By workload and patients, None for as many as usual: the seconds that they are worth.
WEIGHTS = {("D", None): 2.5, ("D", 32): 1.0, ("A", None): 2.0, ("E", None): 1.5}
LEAST_STEPS, MOST_STEPS = 3, 20


def works(batch: Batch, size: ModelSize) -> dict[str, Work]:
    """What each part cannot do without; as in :func:`.step.work`, which has the sum of them."""
    visits, width, hidden = batch.packed.n_visits, size.embedding_dim, size.hidden_dim
    lstm, head = 4 * hidden * (width + hidden), hidden * (hidden + 1)
    table_ = torch.empty(size.vocabulary, width, device="meta")
    pooled = visit_pool.work(batch.packed, table_)
    trained = visit_pool.work(batch.packed, table_.requires_grad_())
    weights = 4 * (table_.numel() + lstm + head)
    hazards = torch.empty(visits, device="meta", requires_grad=True)
    return {
        "pooling, forward": pooled,
        "LSTM, forward": Work(flops=2 * lstm * visits),
        "hazard head, forward": Work(flops=2 * head * visits),
        "loss": survival_nll.work(Outcomes.of_batch(batch), hazards),
        "hazard head, backward": Work(flops=4 * head * visits),
        "LSTM, backward": Work(flops=4 * lstm * visits),
        "pooling, backward": replace(trained, bytes=trained.bytes - pooled.bytes),
        "optimizer": Work(bytes=7 * weights, working_set=4 * weights),
        WHOLE: step.work(batch, size, step.STEP, "float32"),
    }


def times(run: Callable[[], object], steps: int) -> dict[str, list[float]]:
    """The seconds of each part in each of so many calls of ``run``, and of the whole."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            with record_function(WHOLE):
                run()
    events = profiler.events()
    whole = sorted((e.time_range.start, e.time_range.end) for e in events if e.name == WHOLE)
    found = {part: [0.0] * len(whole) for part in PARTS} | {WHOLE: []}
    for i, (start, end) in enumerate(whole):
        found[WHOLE].append((end - start) / 1e6)
        for event in events:
            if event.name in OPERATORS and start <= event.time_range.start < end:
                found[OPERATORS[event.name]][i] += event.time_range.elapsed_us() / 1e6
        found[REST][i] = found[WHOLE][i] - sum(found[part][i] for part in PARTS)
    return found


def counted(run: Callable[[], object], steps: int) -> tuple[list[float], dict[str, float]]:
    """The seconds of each of so many calls of ``run``, and medians over them: page faults, and
    seconds of all threads, in the program and in the kernel."""
    found: list[tuple[float, float, float]] = []
    taken = []
    for _ in range(steps):
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = perf_counter()
        run()
        taken.append(perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_SELF)
        found.append(
            (
                after.ru_minflt - before.ru_minflt,
                after.ru_utime - before.ru_utime,
                after.ru_stime - before.ru_stime,
            )
        )
    faults, user_s, kernel_s = (median(values) for values in zip(*found, strict=True))
    return taken, {"page_faults": faults, "user_s": user_s, "kernel_s": kernel_s}


def measure(
    batch: Batch, size: ModelSize, ceilings: Ceilings | None, budget_s: float
) -> tuple[list[Row], dict[str, float]]:
    """A row per part, one of the whole and one of the whole without the profiler, which takes
    time of its own; and what was counted of a step."""
    training = TrainingStep("fused", size)

    def run() -> None:
        training(batch)

    run()
    start = perf_counter()
    run()
    once_s = perf_counter() - start
    steps = min(MOST_STEPS, max(LEAST_STEPS, int(budget_s / once_s / 2)))
    unwatched, counts = counted(run, steps)
    floors = works(batch, size)
    floors[UNWATCHED] = floors[WHOLE]

    def row(part: str, seconds: Sequence[float]) -> Row:
        floor_s = None if ceilings is None or part == REST else ceilings.floor(floors[part])
        return Row(
            *(OPERATION, batch.workload, batch.patients, step.STEP, "float32", "warm", part),
            backend=backends.choose("packed_lstm", "cpu", torch.float32),
            ours=True,
            seconds=Spread.of(list(seconds)),
            floor_s=floor_s,
        )

    found = times(run, steps) | {UNWATCHED: unwatched}
    return [row(part, seconds) for part, seconds in found.items()], counts


def text(rows: Sequence[Row], counts: dict[str, float]) -> str:
    """The table of one batch's parts, and what was counted."""
    whole = next(row for row in rows if row.variant == WHOLE)
    cells = [
        [
            row.variant,
            ms(row.median),
            "" if row.variant == UNWATCHED else f"{row.median / whole.median:.1%}",
            f"{ms(row.floor_s)}" if row.floor_s else "",
            f"{row.floor_s / row.median:.0%}" if row.floor_s else "",
        ]
        for row in rows
    ]
    title = f"{OPERATION}, workload {whole.workload}, {whole.patients:,} patients, float32"
    without = "; ".join(f"{name}: {shown(counts)}" for name, shown in COUNTED.items())
    header = ["part", "median ms", "share", "floor ms", "of ceiling"]
    return f"{title}\n{table(header, cells)}\nwithout the profiler: {without}"


def jobs(settings: Settings) -> Iterator[Job]:
    """Of the packed CPU kernels alone: other backends have other operators."""
    if settings.device != "cpu" or settings.backend not in (None, "cpu"):
        return
    if backends.choose("packed_lstm", "cpu", torch.float32) != "cpu":
        return

    def run(letter: str, patients: int | None, session: Session, budget_s: float) -> list[Row]:
        if budget_s <= 0:
            return []
        batch = session.batch(letter, patients)
        size = model_size(batch.vocabulary, settings)
        rows, counts = measure(batch, size, session.ceilings, budget_s)
        key = f"{batch.workload} {batch.patients}"
        session.findings.setdefault(COUNTS, {})[key] = counts
        say(f"\n{text(rows, counts)}")
        return rows

    for (letter, patients), weight in WEIGHTS.items():
        usual = settings.size == "default" and not settings.batch_size
        if letter in settings.workloads and (patients is None or usual):
            yield Job(f"parts {letter} {patients or ''}", weight, partial(run, letter, patients))


BENCHMARK = Benchmark(jobs={"step": jobs})


def main() -> None:
    from . import ceilings, devices
    from .workloads import WORKLOADS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workload", nargs="?", default="D", choices=sorted(WORKLOADS))
    parser.add_argument("patients", nargs="?", type=int)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    batch = WORKLOADS[options.workload].batch(options.patients or "default")
    print(batch)
    found = ceilings.measure(devices.Cpu())
    rows, counts = measure(batch, ModelSize(batch.vocabulary), found, options.seconds)
    print(text(rows, counts))


if __name__ == "__main__":
    main()
