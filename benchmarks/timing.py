"""Time variants of one computation in blocks of calls, within a budget.

Each variant is timed in its own steady state, as a training loop that calls nothing else finds it:
a block is some untimed calls of one variant and then timed ones. Were single calls of all variants
interleaved, each would pay for what the one before it has done to the memory and the caches: a step
that runs after gigabytes were given back to the system has its pages mapped and cleared again. A
machine's speed drifts while it is measured, so blocks of all variants alternate, and each round
begins with another variant. What is compared is the medians of the timed calls of all blocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import TypeVar

Variants = Mapping[str, Callable[[], object]]
Sample = TypeVar("Sample")

# How results were timed: files name it, and only those that were timed alike are compared.
METHOD = "alternating blocks"
FORMER_METHOD = "interleaved calls"  # of files that name none

MOST_ROUNDS, MOST_TIMED = 40, 10
# A block of the slowest variant has two timed calls, or one where that leaves no second round.
TIMED_OF_SLOWEST = (2, 1)
ENOUGH_ROUNDS = 2
# Untimed calls take about this long, and are at least one.
UNTIMED_S, MOST_UNTIMED = 0.1, 5


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the samples, in seconds."""

    lower: float
    median: float
    upper: float
    count: int

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(lower, median, upper, len(samples))


@dataclass(frozen=True)
class Block:
    """Calls of one variant, one after another."""

    untimed: int
    timed: int


@dataclass(frozen=True)
class Plan:
    """How many rounds, and what block each variant has in a round.

    Once ``budget_s`` seconds are spent no further round begins, but the first there is.
    """

    rounds: int
    blocks: Mapping[str, Block]
    budget_s: float = inf


class Budget:
    """Seconds that may be spent from now on, shared out among what is still to come.

    What one part leaves over goes to the later ones, and what it overdraws they lack; the end
    stays where it is.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - self._clock())

    def share(self, weight: float, of: float) -> Budget:
        """The part of what is left that falls to ``weight`` out of ``of``, itself included."""
        return Budget(self.left * weight / of, self._clock)


def untimed_calls(estimate_s: float) -> int:
    """How many calls of a variant that takes so long come before the timed ones of a block."""
    return max(1, min(MOST_UNTIMED, int(UNTIMED_S / max(estimate_s, 1e-9))))


def plan(estimates: Mapping[str, float], budget_s: float) -> Plan:
    """Fit the rounds into ``budget_s`` seconds, given roughly how long a call of each takes.

    Quick variants are timed several times a block, up to about a quarter of what the timed calls
    of the slowest take. One round there is, whatever the budget. The estimates may be off, or the
    machine grow busier: the budget holds all the same.
    """
    for timed in TIMED_OF_SLOWEST:
        share_s = timed * max(estimates.values()) / 4
        blocks = {
            name: Block(
                untimed_calls(estimate), max(timed, min(MOST_TIMED, int(share_s / estimate)))
            )
            for name, estimate in estimates.items()
        }
        round_s = sum((block.untimed + block.timed) * estimates[n] for n, block in blocks.items())
        rounds = int(budget_s / round_s)
        if rounds >= ENOUGH_ROUNDS:
            break
    return Plan(max(1, min(MOST_ROUNDS, rounds)), blocks, budget_s)


def call(name: str, run: Callable[[], object]) -> object:
    return run()


def alternating_blocks(
    variants: Variants,
    planned: Plan,
    time: Callable[[str, Callable[[], object]], Sample],
    *,
    untimed: Callable[[str, Callable[[], object]], object] = call,
    after_each: Callable[[str], object] | None = None,
) -> dict[str, list[Sample]]:
    """What ``time(name, variant)`` says of every timed call of every variant.

    ``untimed(name, variant)`` makes the calls before them. ``after_each`` hears the variant's name
    after each timed call, untimed.
    """
    names = list(variants)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    start = perf_counter()
    for round_ in range(planned.rounds):
        if round_ > 0 and perf_counter() - start > planned.budget_s:
            break
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            block = planned.blocks[name]
            for _ in range(block.untimed):
                untimed(name, variants[name])
            for _ in range(block.timed):
                samples[name].append(time(name, variants[name]))
                if after_each is not None:
                    after_each(name)
    return samples
