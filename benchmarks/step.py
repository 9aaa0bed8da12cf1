"""One training step of the survival model, in plain PyTorch and by this package.

``padded`` and ``packed`` are plain PyTorch on padded tensors: masked-unpacked, and packed around
the LSTM. ``fused from padded`` is this package as a drop-in for them, which packs the tensors it is
given; ``fused`` takes the batch as this package's data loading makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ehrseq_fast import use_backend
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
from ehrseq_fast.survival_nll import DiscreteTimeSurvivalLoss
from tests import plain_models

from . import visit_pool
from .cases import (
    Case,
    Missing,
    Row,
    Tensors,
    Variant,
    asked_for,
    by_default,
    difference_of,
    fits,
    our_backends,
    ours,
)
from .ceilings import Work
from .devices import Cpu, Cuda, Device
from .jobs import Benchmark, Job, Session, Settings, of_case, say
from .report import case_table, significant
from .results import Results
from .targets import Figure, Target, at_most, ratio
from .workloads import Batch

OPERATION = "training step"
PEAK_MEMORY = "peak memory of a training step"
PATHS = ("padded", "packed", "fused from padded", "fused")
PLAIN_PATHS = PATHS[:2]
GRAPH = "fused, CUDA graph"
STEP = "forward+backward+Adam"
PHASES = ("inference", "forward", "forward+backward", STEP)

# The paths are compared with a plain one, in float64, where they must agree to rounding. In
# float32, which is what is timed, a hidden unit of the hazard head that one path finds just above
# zero another may find just below: the visit's whole share of that unit's gradient comes or goes
# (2e-4 of the largest entry was seen on batches of 256 patients). Under autocast to bfloat16 all
# are compared with float32, from which the plain paths' gradients are up to a third away.
EXPECTED = "packed"
TOLERANCE, EXACT_TOLERANCE, AUTOCAST_TOLERANCE = 1e-3, 1e-10, 0.5

# [B, V, C, E] as embedded, as masked, and the gradients of both.
PADDED_COPIES = 4


@dataclass(frozen=True)
class ModelSize:
    vocabulary: int
    embedding_dim: int = 128
    hidden_dim: int = 256


def model_size(vocabulary: int, settings: Settings) -> ModelSize:
    """The model that everything is measured on, or a small one where the settings are quick."""
    return ModelSize(vocabulary, 16, 32) if settings.quick else ModelSize(vocabulary)


class TrainingStep:
    """Forward, loss, backward and Adam on one path; call it with a batch.

    The plain paths are of models and a loss in plain PyTorch, as in code without this package.
    Dropout is off, so that the paths can be compared. ``autocast``: the forward pass in bfloat16.
    """

    def __init__(
        self,
        path: str,
        size: ModelSize,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        autocast: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.path = path
        self.fused = path.startswith("fused")
        self.device = device
        self.autocast = autocast
        sizes = (size.vocabulary, size.embedding_dim, size.hidden_dim)
        self.model = (
            DiscreteTimeSurvivalLSTM(*sizes, dropout=0.0)
            if self.fused
            else plain_models.SurvivalLSTM(*sizes, dropout=0.0, packed=path == "packed")
        )
        self.model.to(device, dtype)
        self.loss = DiscreteTimeSurvivalLoss()
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=1e-3, fused=True, capturable=device == "cuda"
        )

    def _backends(self) -> AbstractContextManager[None]:
        return nullcontext() if self.fused else use_backend("reference")

    def _precision(self) -> AbstractContextManager[Any]:
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def backward(self, batch: Batch) -> Tensor:
        """Forward and backward; the gradients are left on the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._backends():
            loss = self.forward(batch)
            loss.backward()
        return loss.detach()

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        if self.path == "fused":
            with self._precision():
                return self.model.loss(batch.packed)
        padded = batch.padded
        with self._precision():
            hazards = self.model(padded.visit_codes, padded.visit_mask, padded.sequence_mask)
        return self.loss(hazards, padded.event_times, padded.event_indicators, padded.sequence_mask)

    @torch.no_grad()
    def hazards(self, batch: Batch) -> Tensor:
        """What the model predicts, ``[n_visits]`` on the fused path and ``[B, V]`` on the others,
        without a graph."""
        with self._backends(), self._precision():
            if self.path == "fused":
                return self.model(batch.packed).values
            return self.model(*batch.padded[:3])

    def __call__(self, batch: Batch) -> None:
        self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resetter(self) -> Callable[[], None]:
        """What brings weights and optimizer back to where they are now, in the same memory."""
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]

        @torch.no_grad()
        def reset() -> None:
            for parameter, weight in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(weight)
            for averages in self.optimizer.state.values():
                for average in averages.values():
                    average.zero_()

        return reset

    def run(self, phase: str, batch: Batch) -> Tensors:
        """One of :data:`PHASES`, and what it computes."""
        if phase == "inference":
            return (self.hazards(batch),)
        if phase == "forward":
            with self._backends():
                return (self.forward(batch).detach(),)
        loss = self.backward(batch)
        gradients = [parameter.grad for parameter in self.model.parameters()]
        if phase == STEP:
            self.optimizer.step()
            # else a GPU's peak would begin with the last step's gradients held, and not count them
            self.optimizer.zero_grad(set_to_none=True)
        return loss, *(gradient for gradient in gradients if gradient is not None)


def case(
    batch: Batch,
    device: Device,
    *,
    phase: str = STEP,
    autocast: bool = False,
    size: ModelSize | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> Case:
    """The paths on one batch, compared by loss and gradients (or hazards) from the same weights."""
    size = size or ModelSize(batch.vocabulary)

    def step_of(path: str, in_autocast: bool) -> TrainingStep:
        return TrainingStep(path, size, seed=seed, device=device.name, autocast=in_autocast)

    def in_float32() -> Tensors:
        return step_of("fused", False).run(phase, batch)

    return Case(
        OPERATION,
        batch.workload,
        batch.patients,
        phase,
        "bfloat16 autocast" if autocast else "float32",
        dict(
            _variants(batch, device, phase, partial(step_of, in_autocast=autocast), size, backend)
        ),
        AUTOCAST_TOLERANCE if autocast else TOLERANCE,
        work=work(batch, size, phase, "bfloat16" if autocast else "float32"),
        expected=in_float32 if autocast else None,
    )


def work(batch: Batch, size: ModelSize, phase: str, dtype: str) -> Work:
    """The products of the LSTM and the head on real visits, what pooling moves, and what Adam does:
    weights, gradients and both averages read, all but the gradients written."""
    width, hidden = size.embedding_dim, size.hidden_dim
    lstm, head = 4 * hidden * (width + hidden), hidden * (hidden + 1)
    backward = phase in (STEP, "forward+backward")
    table = torch.empty(size.vocabulary, width, device="meta", requires_grad=backward)
    pooled = visit_pool.work(batch.packed, table)
    weights = 4 * (table.numel() + lstm + head)
    updated = phase == STEP
    return Work(
        bytes=pooled.bytes + (7 * weights if updated else 0),
        working_set=pooled.working_set + (4 * weights if updated else 0),
        flops=2 * (lstm + head) * batch.packed.n_visits * (3 if backward else 1),
        dtype=dtype,
    )


def padded_bytes(batch: Batch, size: ModelSize) -> int:
    """What a plain path holds of embedded slots at its peak, roughly."""
    return batch.padded.visit_codes.numel() * size.embedding_dim * 4 * PADDED_COPIES


def _variants(
    batch: Batch,
    device: Device,
    phase: str,
    step_of: Callable[[str], TrainingStep],
    size: ModelSize,
    backend: str | None,
) -> Iterator[tuple[str, Variant | Missing]]:
    def variant(path: str, *, captured: bool = False) -> Variant:
        step = step_of(path)

        def rows(results: Tensors) -> Tensors:
            if phase != "inference" or path == "fused":
                return results
            return (batch.packed.pack(results[0]),)

        # capturing runs some steps, after which Adam has left the weights that all began with
        reset = step.resetter() if captured else None
        return Variant(lambda: step.run(phase, batch), rows, captured=captured, reset=reset)

    for path in PLAIN_PATHS:
        yield path, fits(padded_bytes(batch, size), device) or variant(path)
    on = our_backends("packed_visit_pool", device.name, torch.float32, backend)
    yield from _ours("fused", on, lambda: variant("fused"), device, backend)
    from_padded = replace(variant("fused from padded"), backend=on[0], ours=True)
    own = device.name == "cuda" and backend is None
    yield "fused from padded", by_default(from_padded) if own else from_padded
    if device.name == "cuda":
        yield from _ours(GRAPH, on, lambda: variant("fused", captured=True), device, backend)


def _ours(
    name: str, on: Sequence[str], make: Callable[[], Variant], device: Device, backend: str | None
) -> Iterator[tuple[str, Variant]]:
    """As :func:`.cases.ours`; on a GPU the first is what the package takes by itself."""
    own = device.name == "cuda" and backend is None
    for i, (label, variant) in enumerate(ours(name, on, make)):
        yield label, by_default(variant) if own and i == 0 else variant


def peak_rows(
    batch: Batch,
    device: Device,
    budget_s: float,
    *,
    size: ModelSize | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> list[Row]:
    """The peak memory of one step on each path, Adam's state made before; if time is left."""
    of = case(batch, device, size=size, seed=seed, backend=backend)
    rows = {
        name: replace(row, operation=PEAK_MEMORY)
        for name, row in (of.rows() if budget_s > 0 else of.without_time()).items()
    }
    for name, variant in of.variants.items():
        if isinstance(variant, Variant) and variant.captured:
            del rows[name]  # a graph's memory is taken once, when it is captured
        elif isinstance(variant, Variant) and not rows[name].missing:
            with asked_for(variant.backend):
                variant.run()
                rows[name] = replace(rows[name], peak_bytes=device.peak_memory(variant.run))
    return list(rows.values())


def why_it_waits(batch: Batch, device: Cuda) -> str | None:
    """What in a fused step makes the host wait for the GPU; None where nothing does."""
    step = TrainingStep("fused", ModelSize(batch.vocabulary), device="cuda")
    step(batch)
    return device.why_it_waits(lambda: step(batch))


def exact_differences(batch: Batch, size: ModelSize, *, seed: int = 0) -> dict[str, float]:
    """By how much each path's loss and gradients differ from those of ``"packed"`` in float64,
    where only rounding may tell them apart.

    Raises:
        AssertionError: where they differ by more than ``EXACT_TOLERANCE``.
    """

    def computed(path: str) -> Tensors:
        step = TrainingStep(path, size, seed=seed, dtype=torch.float64)
        return step.run("forward+backward", batch)

    expected = computed(EXPECTED)
    differences = {
        path: difference_of(computed(path), expected) for path in PATHS if path != EXPECTED
    }
    for path, difference in differences.items():
        if not difference <= EXACT_TOLERANCE:
            raise AssertionError(
                f"the {path} path in float64: max. relative difference from {EXPECTED}: expected "
                f"at most {EXACT_TOLERANCE:.0e}, got {difference:.1e}"
            )
    return differences


# Jobs ---------------------------------------------------------------------------------------------

WEIGHTS = {"A": 20, "E": 28, "F": 20}
# what the plain paths of the real batch need for several samples each
MAIN_WEIGHT = 60
# two runs of every path, whatever the budget
MEMORY_WEIGHTS = {"A": 8, "B": 2, "C": 2, "D": 14, "E": 10, "F": 8}


def step_jobs(settings: Settings) -> Iterator[Job]:
    def job(
        letter: str,
        weight: float,
        size: str | None = None,
        for_target: bool = False,
        **options: Any,
    ) -> Job:
        def make(session: Session) -> Case:
            batch = session.batch(letter, size)
            return case(
                batch,
                session.device,
                size=model_size(batch.vocabulary, settings),
                backend=settings.backend,
                **options,
            )

        return of_case(f"step {letter}", weight, make, for_target=for_target)

    main = settings.main_workload
    for letter in settings.workloads:
        weight = MAIN_WEIGHT if letter == main else WEIGHTS.get(letter, 8)
        yield job(letter, weight, for_target=letter == main)
    if settings.size == "default" and not settings.batch_size:
        yield job(main, 4, size="small")
    for phase in PHASES[:3]:
        yield job(main, 12, phase=phase)
    if settings.serves(torch.bfloat16):
        yield job(main, 22, autocast=True)
        yield job(main, 8, autocast=True, phase="inference")
    if settings.device == "cuda":
        yield Job("host waits", 2, partial(_find_host_waits, main), for_target=True)


def _find_host_waits(letter: str, session: Session, budget_s: float) -> list[Row]:
    assert isinstance(session.device, Cuda)
    waits = why_it_waits(session.batch(letter), session.device)
    session.findings["host_waits"] = waits
    say(f"\nA fused step makes the host wait for the GPU: {waits or 'never'}")
    return []


def memory_jobs(settings: Settings) -> Iterator[Job]:
    def job(letter: str) -> Job:
        def run(session: Session, budget_s: float) -> list[Row]:
            batch = session.batch(letter)
            size = model_size(batch.vocabulary, settings)
            rows = peak_rows(batch, session.device, budget_s, size=size, backend=settings.backend)
            title = f"peak memory of a training step, workload {letter}, {batch.patients} patients"
            say(f"\n{case_table(title, rows)}")
            return rows

        weight = MEMORY_WEIGHTS[letter]
        return Job(f"memory {letter}", weight, run, letter == settings.main_workload)

    for letter in settings.workloads:
        yield job(letter)


def small(batch: Batch) -> Case:
    return case(batch, Cpu(), size=ModelSize(batch.vocabulary, 64, 64))


# Targets ------------------------------------------------------------------------------------------

WANTED = {
    "operation": OPERATION,
    "workload": "D",
    "patients": 256,
    "phase": STEP,
    "dtype": "float32",
}
OUTPATIENT_WANTED = {**WANTED, "workload": "A", "patients": 128}
OMOP = "training step, real OMOP batch of 256"
SMALL_OMOP = "training step, real OMOP batch of 32"
OUTPATIENT = "training step, outpatient batch of 128"
PADDED_NOTE = (
    "to hold less memory the models' LSTM computes most gates of a large batch again in the "
    "backward pass; model.lstm.keep_gates = 1.0 trades memory for that time (docs/packing.md)"
)


def _peak(results: Results) -> Figure:
    rows = results.of(operation=PEAK_MEMORY, workload="D", patients=256)
    plain = min(_peak_bytes(rows[path]) for path in PLAIN_PATHS)
    share = _peak_bytes(rows["fused"]) / plain
    return at_most(share, 1 / 20, f"1/{significant(1 / share)}")


def _peak_bytes(row: Row) -> int:
    if row.peak_bytes is None:
        raise ValueError(f"{row.variant}: {row.missing}")
    return row.peak_bytes


def _host_waits(results: Results) -> Figure | str:
    if "host_waits" not in results.findings:
        raise KeyError("host waits")
    waits = results.findings["host_waits"]
    return Figure(float(waits is not None), 0, False, waits or "never")


def _captured(results: Results) -> Figure:
    row = results.of(**OUTPATIENT_WANTED)[GRAPH]
    return Figure(float(row.missing is not None), 0, False, row.missing or "captured")


def _of_ceiling(patients: int, bound: float) -> Callable[[Results], Figure]:
    """The share of the ceiling that the step of so many patients reaches; at least ``bound``."""

    def measure(results: Results) -> Figure:
        row = results.of(**WANTED | {"patients": patients})["fused"]
        if row.floor_s is None:
            raise ValueError("the run has no ceilings")
        share = row.floor_s / row.median
        return Figure(share, bound, True, f"{share:.0%}")

    return measure


def _faster(on: str, title: str, wanted: dict[str, Any], bound: int) -> Iterator[Target]:
    for path, note in (("packed", ""), ("padded", PADDED_NOTE if on == "cpu" else "")):
        measure = ratio(bound, path, "fused", **wanted)
        yield Target(on, f"{title}: against {path}", f"≥ {bound}x", measure, note)


BENCHMARK = Benchmark(
    jobs={"step": step_jobs, "memory": memory_jobs},
    small=small,
    targets=(
        *_faster("cpu", OMOP, WANTED, 15),
        Target(
            "cpu",
            f"{OMOP}: peak memory against the lighter of both",
            "≤ 1/20",
            _peak,
            "what is left is held by the LSTM and the head for the backward pass, of real visits "
            "alone; a batch whose widest visit is narrower has less padding to save",
        ),
        Target("cpu", f"{OMOP}: share of the ceiling", "≥ 85%", _of_ceiling(256, 0.85)),
        Target("cpu", f"{SMALL_OMOP}: share of the ceiling", "≥ 75%", _of_ceiling(32, 0.75)),
        *_faster("cuda", OUTPATIENT, OUTPATIENT_WANTED, 10),
        Target("cuda", f"{OUTPATIENT}: the host waits for the GPU", "never", _host_waits),
        Target("cuda", f"{OUTPATIENT}: as a CUDA graph", "captured", _captured),
    ),
)
