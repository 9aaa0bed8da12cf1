"""What each level of a migration gains: one epoch of training, and the building of its batches.

    python -m benchmarks.migration                  # generated outpatients, some minutes
    python -m benchmarks.migration C --batch-size 128
    python -m benchmarks.migration --quick          # a few short records, in seconds
    python -m benchmarks.migration --cpu-time       # beside other programs
    python -m benchmarks.migration --write          # the table of docs/from-ehrsequencing.md

It begins with the structure of the ``ehrsequencing`` models in plain PyTorch (a model of
``tests/plain_models.py``, a loss of clamped probabilities, batches that nested loops pad), and
replaces one part more at each level. Before anything is timed, all levels are trained for some
steps from the same weights in float64 and found to have the same losses and parameters; dropout is
off, as the random stream of masks differs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ehrseq_fast import PackedVisits, discrete_time_survival_nll, visit_mean_pool
from ehrseq_fast.data import EventRecords
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
from tests import plain_models

from .batching import as_lists, collate_loops
from .files import write_text
from .machine import cpu_model
from .report import ms, times
from .workloads import WORKLOADS

PAGE = Path(__file__).parent.parent / "docs" / "from-ehrsequencing.md"
MARKED = re.compile(r"(<!-- migration -->\n).*?(<!-- end migration -->)", re.DOTALL)
EPS = 1e-7  # of the loss, as in ehrsequencing
TOLERANCE = 1e-9
HEADER = ("level", "an epoch", "of it building batches", "gain")


# The parts ----------------------------------------------------------------------------------------


def plain_loss(hazards: Tensor, times: Tensor, indicators: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of clamped hazards ``[B, V]``; the censored visit left out."""
    hazards = hazards.clamp(EPS, 1 - EPS)
    before = (torch.arange(hazards.shape[1]) < times[:, None]) & mask
    survived = (torch.log(1 - hazards) * before).sum(1)
    at_event = torch.log(hazards.gather(1, times[:, None])[:, 0]) * indicators
    return -(survived + at_event).mean()


class WithVisitPool(plain_models.SurvivalLSTM):
    """The plain model with one line of its forward pass replaced."""

    def forward(self, codes: Tensor, visit_mask: Tensor, sequence_mask: Tensor) -> Tensor:
        vectors = visit_mean_pool(
            codes, self.embedding.weight, visit_mask, padding_idx=self.embedding.padding_idx
        )
        states, _ = self.lstm(vectors)
        return self.hazard_head(states)[..., 0] * sequence_mask.float()


def loss_of_padded(model: nn.Module, batch: Any, loss: Callable[..., Tensor]) -> Tensor:
    """Of what :func:`Data.padded` gives."""
    triple, times, indicators = batch
    return loss(model(*triple), times, indicators, triple[2])


@dataclass(frozen=True)
class Data:
    """Patients, as nested lists and in flat arrays."""

    records: EventRecords
    lists: list[list[list[int]]]

    @classmethod
    def of(cls, records: EventRecords) -> Data:
        return cls(records, as_lists(records, np.arange(records.n_patients)))

    def _outcomes(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        records = self.records
        return records.event_times[chosen], records.event_indicators[chosen].astype(np.int64)

    def padded(self, chosen: np.ndarray) -> Any:
        triple = collate_loops([self.lists[p] for p in chosen])
        return triple, *(torch.from_numpy(values) for values in self._outcomes(chosen))

    def from_lists(self, chosen: np.ndarray) -> PackedVisits:
        times, indicators = self._outcomes(chosen)
        return PackedVisits.from_lists(
            [self.lists[p] for p in chosen], event_times=times, event_indicators=indicators
        )

    def from_flat(self, chosen: np.ndarray) -> PackedVisits:
        r = self.records
        return PackedVisits.from_flat(
            r.codes,
            r.visit_offsets,
            r.patient_offsets,
            chosen,
            event_times=r.event_times,
            event_indicators=r.event_indicators,
        )


# The levels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """One row of the table: how batches are made, and the model and the loss that they go to."""

    title: str
    collate: Callable[[np.ndarray], Any]
    model: Callable[..., nn.Module]
    loss: Callable[[Any, Any], Tensor]


def levels(data: Data) -> list[Level]:
    """Each replaces one part more than the one before."""

    def plainly(model: nn.Module, batch: Any) -> Tensor:
        return loss_of_padded(model, batch, plain_loss)

    def ours(model: nn.Module, batch: Any) -> Tensor:
        return loss_of_padded(model, batch, discrete_time_survival_nll)

    def whole(model: Any, batch: PackedVisits) -> Tensor:
        return model.loss(batch)

    plain, fast = plain_models.SurvivalLSTM, DiscreteTimeSurvivalLSTM
    return [
        Level("plain PyTorch, padded by loops", data.padded, plain, plainly),
        Level("1. the loss", data.padded, plain, ours),
        Level("2. and the pooling", data.padded, WithVisitPool, ours),
        Level("3. the model", data.padded, fast, ours),
        Level("4. the data path, `from_lists`", data.from_lists, fast, whole),
        Level("4. the data path, `from_flat`", data.from_flat, fast, whole),
    ]


@dataclass(frozen=True)
class Size:
    """Of the model."""

    vocabulary: int
    embedding_dim: int = 128
    hidden_dim: int = 256

    def made(self, level: Level, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)  # the models draw the same weights in the same order
        return level.model(self.vocabulary, self.embedding_dim, self.hidden_dim, dropout=0.0)


def batches(n_patients: int, batch_size: int, seed: int = 0) -> list[np.ndarray]:
    """An epoch's patients, shuffled."""
    order = np.random.default_rng(seed).permutation(n_patients)
    return [order[i : i + batch_size] for i in range(0, n_patients, batch_size)]


def refuse_differences(found: list[Level], size: Size, of: list[np.ndarray]) -> float:
    """Train every level on these batches in float64; by how much losses and parameters differ from
    those of the first level, at most.

    Raises:
        AssertionError: for more than rounding.
    """

    def trained(level: Level) -> list[Tensor]:
        model = size.made(level).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for chosen in of:
            optimizer.zero_grad()
            loss = level.loss(model, level.collate(chosen))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [torch.stack(losses), *(p.detach() for p in model.parameters())]

    expected, largest = trained(found[0]), 0.0
    for level in found[1:]:
        for ours, theirs in zip(trained(level), expected, strict=True):
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            if not difference <= TOLERANCE:
                raise AssertionError(
                    f"{level.title}: max. relative difference: expected at most {TOLERANCE:.0e}, "
                    f"got {difference:.1e}"
                )
            largest = max(largest, difference)
    return largest


# Measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch:
    """Seconds."""

    building: float
    steps: float

    @property
    def whole(self) -> float:
        return self.building + self.steps


class Training:
    """One level's model and optimizer, through any number of epochs."""

    def __init__(self, level: Level, size: Size) -> None:
        self.level = level
        self.model = size.made(level)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def epoch(self, of: list[np.ndarray], clock: Callable[[], float]) -> Epoch:
        building = steps = 0.0
        for chosen in of:
            start = clock()
            batch = self.level.collate(chosen)
            built = clock()
            self.optimizer.zero_grad(set_to_none=True)
            self.level.loss(self.model, batch).backward()
            self.optimizer.step()
            steps += clock() - built
            building += built - start
        return Epoch(building, steps)


def measured(
    found: list[Level],
    size: Size,
    of: list[np.ndarray],
    rounds: int,
    clock: Callable[[], float] = perf_counter,
) -> list[Epoch]:
    """The median epoch of each level; the levels alternate, and a batch that is not counted comes
    before each epoch, so that none pays for the memory that the level before has given back."""
    trainings = [Training(level, size) for level in found]
    samples: list[list[Epoch]] = [[] for _ in found]
    for round_ in range(rounds):
        for i in np.roll(np.arange(len(found)), round_):
            trainings[i].epoch(of[:1], clock)
            samples[i].append(trainings[i].epoch(of, clock))
    return [
        Epoch(median(e.building for e in epochs), median(e.steps for e in epochs))
        for epochs in samples
    ]


def rows(found: list[Level], epochs: list[Epoch]) -> Iterator[tuple[str, ...]]:
    """Of the table; a gain is that over the first level."""
    for level, epoch in zip(found, epochs, strict=True):
        gain = "" if level is found[0] else f"**{times(epochs[0].whole / epoch.whole)}**"
        yield level.title, f"{ms(epoch.whole)} ms", f"{ms(epoch.building)} ms", gain


def markdown(lines: list[tuple[str, ...]]) -> str:
    return "".join(
        f"| {' | '.join(cells)} |\n" for cells in [HEADER, ("---",) * len(HEADER), *lines]
    )


def main(arguments: list[str] | None = None) -> None:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("workload", nargs="?", default="A", choices=sorted(WORKLOADS))
    parser.add_argument("--patients", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the seconds of the CPU, on one thread: for a machine that others use too",
    )
    parser.add_argument("--quick", action="store_true", help="a few patients and a small model")
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/from-ehrsequencing.md"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.workload, options.patients, options.batch_size, options.rounds = "B", 24, 8, 1
    threads = 1 if options.cpu_time else options.threads
    torch.set_num_threads(threads)
    workload = WORKLOADS[options.workload]
    data = Data.of(workload.draw(options.patients, 0))
    vocabulary = len(data.records.vocabulary)
    size = Size(vocabulary, 8, 16) if options.quick else Size(vocabulary)
    of = batches(min(options.patients, data.records.n_patients), options.batch_size)
    found = levels(data)
    largest = refuse_differences(found, size, [chosen[:16] for chosen in of[:3]])
    clock = process_time if options.cpu_time else perf_counter
    epochs = measured(found, size, of, options.rounds, clock)
    table = markdown(list(rows(found, epochs)))
    said = (
        f"Workload {workload.letter} ({workload.title}, drawn at random), "
        f"{sum(len(chosen) for chosen in of):,} patients in batches of {options.batch_size}, "
        f"E {size.embedding_dim}, H {size.hidden_dim}, float32, Adam; "
        f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}; "
        f"{'CPU time, ' if options.cpu_time else ''}medians of {options.rounds} epochs, the levels "
        "alternating, a batch before each epoch not counted. Losses and parameters after "
        f"{len(of[:3])} steps in float64 were found equal within {largest:.0e}."
    )
    print(f"{said}\n\n{table}")
    if options.write:
        text, found_marks = MARKED.subn(
            lambda marks: f"{marks[1]}{said}\n\n{table}{marks[2]}", PAGE.read_text()
        )
        if found_marks != 1:
            raise SystemExit(f"{PAGE}: expected one section marked migration, got {found_marks}")
        write_text(PAGE, text)


if __name__ == "__main__":
    main()
