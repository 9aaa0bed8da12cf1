"""Time variants of one computation side by side, within a budget.

A machine's speed drifts while it is measured, so the variants take turns, and each round begins
with another one; what is compared is their medians within one run.
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

MOST_ROUNDS, MOST_PER_ROUND = 40, 10


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
class Plan:
    """How many rounds, and how often each variant runs within a round.

    Once ``budget_s`` seconds are spent no further round begins, but the first there is.
    """

    rounds: int
    per_round: Mapping[str, int]
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


def plan(estimates: Mapping[str, float], budget_s: float) -> Plan:
    """Fit the rounds into ``budget_s`` seconds, given roughly how long each variant takes.

    Quick variants run several times a round, up to about a quarter of what the slowest takes. One
    round there is, whatever the budget. The estimates may be off, or the machine grow busier: the
    budget holds all the same.
    """
    slowest = max(estimates.values())
    per_round = {
        name: max(1, min(MOST_PER_ROUND, int(slowest / (4 * estimate))))
        for name, estimate in estimates.items()
    }
    round_s = sum(per_round[name] * estimate for name, estimate in estimates.items())
    return Plan(max(1, min(MOST_ROUNDS, int(budget_s / round_s))), per_round, budget_s)


def interleaved(
    variants: Variants,
    planned: Plan,
    time: Callable[[str, Callable[[], object]], Sample],
    *,
    after_each: Callable[[str], object] | None = None,
) -> dict[str, list[Sample]]:
    """What ``time(name, variant)`` says of every run of every variant.

    ``after_each`` hears the variant's name, untimed.
    """
    names = list(variants)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    start = perf_counter()
    for round_ in range(planned.rounds):
        if round_ > 0 and perf_counter() - start > planned.budget_s:
            break
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(planned.per_round[name]):
                samples[name].append(time(name, variants[name]))
                if after_each is not None:
                    after_each(name)
    return samples
