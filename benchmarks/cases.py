"""One comparison: several ways to compute the same thing, found equal first and then timed.

An operation's module makes :class:`Case` objects; :func:`measure` makes rows of them, one per
variant, which is all that results files hold of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from math import inf, isnan
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ehrseq_fast import backend, use_backend

from .ceilings import Ceilings, Work
from .devices import Cuda, Device, Timing
from .timing import Spread, alternating_blocks, plan, untimed_calls

Tensors = Sequence[Tensor]
Run = Callable[[], Tensors]

OURS = "ehrseq_fast"
SLOW_FIRST_RUN_S = 5.0
# The part of the budget that is kept for taking samples, whatever comparing has cost: so the quick
# variants are timed several times even where one run of the slow ones takes all there was.
LEAST_SHARE = 0.2
ENOUGH_SAMPLES = 3  # with fewer, the run that gave the estimate counts too
MOST_OF_FREE = 0.6
GIB = 2**30


@dataclass(frozen=True)
class Variant:
    """One way to compute it.

    Attributes:
        run: computes it and gives the results.
        in_common: brings the results to the form in which all variants' are compared.
        backend: this package's, asked for while it runs; None where none of its operations is in.
        ours: whether this is the package's way. One that fails is an error of the whole run.
        captured: replay it as a CUDA graph.
        reset: undoes what capturing it has changed.
        compiles: its first run takes longer than the others.
        compared: whether it computes what the others do; a floor does not.
        work: what it cannot do without, where that is less than the case's.
        after_others: its blocks alternate with those of its like alone, once the others are timed:
            it is another curve, on whose cost the rounds of the others must not depend.
    """

    run: Run
    in_common: Callable[[Tensors], Tensors] = lambda results: results
    backend: str | None = None
    ours: bool = False
    captured: bool = False
    reset: Callable[[], object] | None = None
    compiles: bool = False
    compared: bool = True
    work: Work | None = None
    after_others: bool = False


def run_of(forward: Callable[[], Tensor], leaves: Sequence[Tensor], incoming: Tensor | None) -> Run:
    """A variant's run: the result, and its gradients by ``leaves`` for a gradient of the result;
    where no leaf requires one, the result alone, without a graph."""

    def forward_backward() -> Tensors:
        result = forward()
        return result.detach(), *torch.autograd.grad(result, leaves, incoming)

    def forward_only() -> Tensors:
        with torch.no_grad():
            return (forward(),)

    return forward_backward if any(leaf.requires_grad for leaf in leaves) else forward_only


def dtype_name(dtype: torch.dtype) -> str:
    """As rows have it: without ``torch.``"""
    return str(dtype).split(".")[1]


@dataclass(frozen=True)
class Missing:
    """A way that cannot be measured here, and why."""

    reason: str


def fits(needed: int, device: Device) -> Missing | None:
    """Why a variant that takes ``needed`` bytes is left out; None where they are free."""
    free = device.free_memory()
    if needed <= MOST_OF_FREE * free:
        return None
    return Missing(f"would hold {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free")


@dataclass(frozen=True)
class Case:
    """What is computed, and the ways to.

    Attributes:
        operation, workload, patients, phase, dtype, cache: what the rows are found by.
        variants: by name. All must agree with ``expected``, or else with the first that runs.
        tolerance: greatest difference allowed of any entry, over the greatest entry of its tensor.
        work: what the operation cannot do without, for its floor.
        calls: how many of them are timed together, for those that a clock is too coarse for.
    """

    operation: str
    workload: str
    patients: int
    phase: str
    dtype: str
    variants: Mapping[str, Variant | Missing]
    tolerance: float
    cache: str = "warm"
    work: Work | None = None
    calls: int = 1
    expected: Callable[[], Tensors] | None = None

    @property
    def title(self) -> str:
        cold = ", cold caches" if self.cache == "cold" else ""
        return (
            f"{self.operation}, {self.phase}, workload {self.workload}, "
            f"{self.patients:,} patients, {self.dtype}{cold}"
        )

    def require_equal(self, difference: float) -> None:
        """Refuse results that differ by more than the tolerance.

        Raises:
            AssertionError: saying by how much.
        """
        if not difference <= self.tolerance:
            raise AssertionError(
                f"max. relative difference: expected at most {self.tolerance:.0e}, "
                f"got {difference:.1e}"
            )

    def rows(self) -> dict[str, Row]:
        """Rows by variant, with nothing measured."""
        return {
            name: Row(
                *(self.operation, self.workload, self.patients),
                *(self.phase, self.dtype, self.cache, name),
                backend=getattr(variant, "backend", None),
                ours=getattr(variant, "ours", False),
                missing=getattr(variant, "reason", None),
            )
            for name, variant in self.variants.items()
        }

    def without_time(self) -> dict[str, Row]:
        """The rows of a case that no time was left for."""
        return {
            name: replace(row, missing=row.missing or f"{NO_TIME} of the budget")
            for name, row in self.rows().items()
        }


@dataclass(frozen=True)
class Row:
    """What is known of one variant of one case; ``missing`` says why nothing is.

    Attributes:
        seconds: of one run; on a GPU the device's.
        host: until the call returned; on a GPU alone.
        floor_s: see :mod:`.ceilings`.
        difference: from the first variant's results, relative, before it was timed.
        peak_bytes: of one run.
    """

    operation: str
    workload: str
    patients: int
    phase: str
    dtype: str
    cache: str
    variant: str
    backend: str | None = None
    ours: bool = False
    seconds: Spread | None = None
    host: Spread | None = None
    floor_s: float | None = None
    difference: float | None = None
    peak_bytes: int | None = None
    missing: str | None = None

    @property
    def case(self) -> tuple[Any, ...]:
        """What is the same for all variants of a case."""
        return (
            *(self.operation, self.workload, self.patients),
            *(self.phase, self.dtype, self.cache),
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is found by."""
        return (*self.case, self.variant)

    @property
    def median(self) -> float:
        if self.seconds is None:
            raise ValueError(f"{self.variant} was not measured: {self.missing}")
        return self.seconds.median

    @property
    def failed(self) -> bool:
        """Whether this package's own way could not be measured."""
        return self.ours and self.missing is not None and not self.missing.startswith(NO_TIME)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        spreads = {name: Spread(**values[name]) for name in ("seconds", "host") if name in values}
        return cls(**{**values, **spreads})


NO_TIME = "no time was left"


def measure(
    case: Case,
    device: Device,
    budget_s: float,
    *,
    most_s: float = inf,
    ceilings: Ceilings | None = None,
    after_each: Callable[[str], object] | None = None,
) -> list[Row]:
    """Find the variants equal, then time them for about ``budget_s`` seconds, in alternating blocks
    (:mod:`.timing`).

    A variant that fails, or whose results differ, is not timed; its row says why. Two runs of each
    there are whatever the budget: one to compare, and one after it to see how long it takes (of the
    slowest one run serves for both). That is the only sample of a variant of which one untimed and
    one timed call take over half the budget. No variant is begun after ``most_s`` seconds.
    """
    if budget_s <= 0:
        return list(case.without_time().values())
    start = perf_counter()
    rows = case.rows()
    timer = _Timer(case, device)
    expected = None if case.expected is None else case.expected()
    for name, variant in case.variants.items():
        if isinstance(variant, Missing):
            continue
        if perf_counter() - start > most_s:
            rows[name] = case.without_time()[name]
            continue
        try:
            results = timer.first_run(name, variant)
            difference = None
            if variant.compared:
                expected = results if expected is None else expected
                difference = difference_of(results, expected)
                case.require_equal(difference)
            timer.second_run(name, variant, budget_s)
        except Exception as error:
            rows[name] = replace(rows[name], missing=_first_line(error))
            timer.drop(name)
            continue
        rows[name] = replace(rows[name], difference=difference)
        if after_each is not None:
            after_each(name)
    del expected
    left_s = budget_s - (perf_counter() - start)
    samples = timer.samples(max(LEAST_SHARE * budget_s, left_s), after_each)
    for name, taken in samples.items():
        hosts = [timing.host / case.calls for timing in taken if timing.host is not None]
        rows[name] = replace(
            rows[name],
            seconds=Spread.of([timing.seconds / case.calls for timing in taken]),
            host=Spread.of(hosts) if hosts else None,
            floor_s=_floor(case, name, ceilings),
        )
    return list(rows.values())


def _floor(case: Case, name: str, ceilings: Ceilings | None) -> float | None:
    work = getattr(case.variants[name], "work", None) or case.work
    if ceilings is None or work is None:
        return None
    return ceilings.floor(work, cold=case.cache == "cold")


@dataclass
class _Timer:
    """The variants of a case that run, how long each takes, and what it costs to find that out."""

    case: Case
    device: Device
    runs: dict[str, Callable[[], object]] = field(default_factory=dict)
    estimates: dict[str, Timing] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)  # with the caches emptied, where cold
    _first: dict[str, float] = field(default_factory=dict)

    def first_run(self, name: str, variant: Variant) -> Tensors:
        """Its results in the common form."""
        run: Callable[[], Any] = variant.run
        with asked_for(variant.backend):
            if variant.captured:
                assert isinstance(self.device, Cuda)
                run = self.device.captured(run)
                if variant.reset is not None:
                    variant.reset()
            start = perf_counter()
            results = run()
            self.device.synchronize()
            self._first[name] = perf_counter() - start
            self.runs[name] = repeated(run, self.case.calls)
            return [tensor.detach() for tensor in variant.in_common(results)]

    def second_run(self, name: str, variant: Variant, budget_s: float) -> None:
        """How long it takes; of a slow one the first run says that well enough."""
        first_s = self._first[name]
        if first_s > min(SLOW_FIRST_RUN_S, budget_s / 2) and not variant.compiles:
            self.estimates[name] = Timing(first_s)
            self.costs[name] = first_s
            return
        if untimed_calls(self.case.calls * first_s) > 1:  # else the first run was the untimed one
            self._untimed(name, self.runs[name])
        self._estimate(name)
        if self.estimates[name].seconds > 2 * self.case.calls * first_s:
            # something else had the machine: one such moment must not pass for a slow variant
            self._estimate(name)

    def _estimate(self, name: str) -> None:
        start = perf_counter()
        self.estimates[name] = self._time(name, self.runs[name])
        self.costs[name] = perf_counter() - start

    def drop(self, name: str) -> None:
        for known in (self.runs, self.estimates, self.costs):
            known.pop(name, None)

    def samples(
        self, budget_s: float, after_each: Callable[[str], object] | None
    ) -> dict[str, list[Timing]]:
        if not self.runs:
            return {}
        slow = [name for name in self.runs if 2 * self.costs[name] > budget_s / 2]
        samples = {name: [self.estimates[name]] for name in slow}
        quick = {name: run for name, run in self.runs.items() if name not in slow}
        together = [name for name in quick if not self._variant(name).after_others]
        groups = [names for names in (together, [n for n in quick if n not in together]) if names]
        for names in groups:
            estimates = {name: self.costs[name] for name in names}
            samples |= alternating_blocks(
                {name: quick[name] for name in names},
                plan(estimates, budget_s / len(groups)),
                self._time,
                untimed=self._untimed,
                after_each=after_each,
            )
        for name in quick:
            if len(samples[name]) < ENOUGH_SAMPLES:
                samples[name].append(self.estimates[name])
        return {name: samples[name] for name in self.runs}

    def _variant(self, name: str) -> Variant:
        variant = self.case.variants[name]
        assert isinstance(variant, Variant)
        return variant

    def _time(self, name: str, run: Callable[[], object]) -> Timing:
        with asked_for(self._variant(name).backend):
            return self.device.time(run, cold=self.case.cache == "cold")

    def _untimed(self, name: str, run: Callable[[], object]) -> None:
        with asked_for(self._variant(name).backend):
            run()
        self.device.synchronize()


def repeated(run: Callable[[], object], calls: int) -> Callable[[], object]:
    if calls == 1:
        return run

    def several() -> None:
        for _ in range(calls):
            run()

    return several


def asked_for(name: str | None) -> AbstractContextManager[None]:
    return nullcontext() if name is None else use_backend(name)


def our_backends(operation: str, device: str, dtype: Any, wanted: str | None = None) -> list[str]:
    """The backends to measure an operation on: that which was asked for, or the one that the
    package takes by itself and, on a GPU, the others with kernels."""
    if wanted is not None:
        with use_backend(wanted):
            return [backend.choose(operation, device, dtype)]
    taken = backend.choose(operation, device, dtype)
    if device == "cpu":
        return [taken]
    others = [
        name
        for name in backend.BACKENDS
        if name not in (taken, "reference")
        and backend.why_not(operation, name, device, dtype) is None
    ]
    return [taken, *others]


def ours(
    name: str, backends: Sequence[str], make: Callable[[], Variant]
) -> Iterator[tuple[str, Variant]]:
    """This package's way on each backend; the first has the plain name."""
    for i, chosen in enumerate(backends):
        label = name if i == 0 else f"{name} [{chosen}]"
        yield label, replace(make(), backend=chosen, ours=True)


def by_default(variant: Variant) -> Variant:
    """The variant as nobody asks for a backend: asking for ``cuda`` takes the packed LSTM's kernels
    too, which a GPU's committed results decide about."""

    def run() -> Tensors:
        with use_backend(None):
            return variant.run()

    return replace(variant, run=run)


def difference_of(actual: Tensors, expected: Tensors) -> float:
    """The greatest difference of an entry, over the greatest entry of its tensor."""
    if len(actual) != len(expected):
        raise AssertionError(f"results: expected {len(expected)}, got {len(actual)}")
    greatest = 0.0
    for mine, theirs in zip(actual, expected, strict=True):
        if mine.shape != theirs.shape:
            raise AssertionError(
                f"shape of a result: expected {list(theirs.shape)}, got {list(mine.shape)}"
            )
        scale = float(theirs.double().abs().max()) or 1.0
        difference = float((mine.double() - theirs.double()).abs().max()) / scale
        greatest = max(greatest, inf if isnan(difference) else difference)
    return greatest


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"
