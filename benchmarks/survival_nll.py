"""The survival loss against its own definition in plain PyTorch, and against pycox's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ehrseq_fast import (
    PackedVisits,
    competing_risks_nll,
    discrete_time_survival_nll,
    packed_competing_risks_nll,
    packed_survival_nll,
)
from ehrseq_fast.survival_nll import reference
from ehrseq_fast.survival_nll.options import Options

from .cases import (
    OURS,
    Case,
    Missing,
    Tensors,
    Variant,
    dtype_name,
    our_backends,
    ours,
    run_of,
)
from .ceilings import Work
from .devices import Cpu, Device
from .jobs import Benchmark, Job, Session, Settings, of_case
from .modes import DTYPES, NUMERIC_MASKS, Mode, Size, Ways
from .results import Results
from .targets import Figure, Target, at_most, ratio
from .workloads import Batch

OPERATION = "survival NLL"
FROM_LOGITS = "survival NLL from logits, censored visit counted"
REFERENCE = "plain PyTorch"
COMPILED = "torch.compile of it"
PYCOX = "pycox's nll_logistic_hazard"
OURS_PACKED = f"{OURS}, packed rows"
OURS_GRAPH = f"{OURS}, CUDA graph"

WIDE = "4096 x 200"
SHORT = "4096 x 128"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcomes:
    """Patients' visits and outcomes, padded and packed."""

    workload: str
    packed: PackedVisits
    mask: Tensor
    times: Tensor
    seen: Tensor

    @classmethod
    def of_batch(cls, batch: Batch) -> Outcomes:
        padded = batch.padded
        return cls(
            batch.workload,
            batch.packed,
            padded.sequence_mask,
            padded.event_times,
            padded.event_indicators,
        )

    @classmethod
    def drawn(cls, patients: int, slots: int, device: str) -> Outcomes:
        """Lengths uniform in 1..slots, event times uniform in each patient's visits, 30 % seen."""
        random = np.random.default_rng(0)
        lengths = random.integers(1, slots + 1, patients)
        lengths[0] = slots
        times = (random.random(patients) * lengths).astype(np.int64)
        seen = (random.random(patients) < 0.3).astype(np.int64)
        packed = PackedVisits.from_flat(
            np.zeros(0, np.int32),
            np.zeros(lengths.sum() + 1, np.int64),
            np.append(0, lengths.cumsum()),
            event_times=times,
            event_indicators=seen,
        )
        mask = torch.arange(slots) < torch.from_numpy(lengths)[:, None]
        tensors = (mask, torch.from_numpy(times), torch.from_numpy(seen))
        return cls(f"{patients} x {slots}", packed.to(device), *(t.to(device) for t in tensors))


def case(
    outcomes: Outcomes,
    device: Device,
    *,
    phase: str = "forward+backward",
    dtype: torch.dtype = torch.float32,
    cache: str = "warm",
    from_logits: bool = False,
    compiled: bool = False,
    backend: str | None = None,
) -> Case:
    """The ways to the mean loss, compared with the gradients of the hazards as packed rows.

    With ``from_logits`` the hazards are logits and the visit of a censoring counts, as in pycox.
    """
    generator = torch.Generator().manual_seed(0)
    hazards = torch.rand(outcomes.mask.shape, generator=generator)
    hazards = (hazards.logit(1e-4) if from_logits else hazards).to(device.name, dtype)
    hazards.requires_grad_(phase == "forward+backward")
    variants = _logits if from_logits else _probabilities
    return Case(
        FROM_LOGITS if from_logits else OPERATION,
        outcomes.workload,
        len(hazards),
        phase,
        dtype_name(dtype),
        dict(variants(outcomes, hazards, device, compiled, backend)),
        TOLERANCE[dtype],
        cache,
        work(outcomes, hazards),
    )


def work(outcomes: Outcomes, hazards: Tensor) -> Work:
    """A hazard and its mask read for every visit up to the event time, which are all that the loss
    depends on; the whole gradient written, of rows or of padded slots."""
    read = int((outcomes.times + 1).sum()) * (hazards.element_size() + 1)
    moved = read + (hazards.nbytes if hazards.requires_grad else 0)
    return Work(bytes=moved, working_set=moved)


def _variant(
    outcomes: Outcomes, hazards: Tensor, loss: Loss, *, rows: bool = False, **kind: bool
) -> Variant:
    given = outcomes.packed.pack(hazards.detach()) if rows else hazards
    given = given.detach().requires_grad_(hazards.requires_grad)

    def common(results: Tensors) -> Tensors:
        if rows or not hazards.requires_grad:
            return results
        return results[0], outcomes.packed.pack(results[1])

    run = run_of(lambda: loss(given), [given], None)
    return Variant(run, common, work=work(outcomes, given) if rows else None, **kind)


def _probabilities(
    outcomes: Outcomes, hazards: Tensor, device: Device, compiled: bool, backend: str | None
) -> Iterator[tuple[str, Variant | Missing]]:
    given = (outcomes.times, outcomes.seen, outcomes.mask)

    def plain(h: Tensor) -> Tensor:
        return reference.discrete_time_survival_nll(h, *given)

    yield REFERENCE, _variant(outcomes, hazards, plain)
    if compiled:
        program = torch.compile(reference.discrete_time_survival_nll, fullgraph=True, dynamic=False)
        yield COMPILED, _variant(outcomes, hazards, lambda h: program(h, *given), compiles=True)
    yield from _ours(outcomes, hazards, device, backend, {})


def _logits(
    outcomes: Outcomes, hazards: Tensor, device: Device, compiled: bool, backend: str | None
) -> Iterator[tuple[str, Variant | Missing]]:
    given = (outcomes.times, outcomes.seen, outcomes.mask)
    options: dict[str, Any] = {"from_logits": True, "censored_visit": "included"}

    def plain(h: Tensor) -> Tensor:
        return reference.discrete_time_survival_nll(h, *given, Options.of(**options))

    yield REFERENCE, _variant(outcomes, hazards, plain)
    pycox = pycox_nll()
    if isinstance(pycox, Missing):
        yield PYCOX, pycox
    else:
        seen = outcomes.seen.to(hazards.dtype)
        yield PYCOX, _variant(outcomes, hazards, lambda h: pycox(h, outcomes.times, seen))
    yield from _ours(outcomes, hazards, device, backend, options)


def pycox_nll() -> Callable[[Tensor, Tensor, Tensor], Tensor] | Missing:
    """pycox's ``nll_logistic_hazard(logits, event times, events)``, where it is installed."""
    try:
        return import_module("pycox.models.loss").nll_logistic_hazard
    except Exception as error:  # its own dependencies are many and old
        return Missing(f"pycox is not usable here: {type(error).__name__}: {error}")


def _ours(
    outcomes: Outcomes,
    hazards: Tensor,
    device: Device,
    backend: str | None,
    options: dict[str, Any],
) -> Iterator[tuple[str, Variant]]:
    given = (outcomes.times, outcomes.seen, outcomes.mask)

    def fused(**kind: bool) -> Variant:
        return _variant(
            outcomes, hazards, lambda h: discrete_time_survival_nll(h, *given, **options), **kind
        )

    def packed() -> Variant:
        return _variant(
            outcomes,
            hazards,
            lambda h: packed_survival_nll(h, outcomes.packed, **options),
            rows=True,
        )

    on = our_backends("survival_nll", device.name, hazards.dtype, backend)
    yield from ours(OURS, on, fused)
    on_packed = our_backends("packed_survival_nll", device.name, hazards.dtype, backend)
    yield from ours(OURS_PACKED, on_packed, packed)
    if device.name == "cuda":
        yield from ours(OURS_GRAPH, on, lambda: fused(captured=True))


def jobs(settings: Settings) -> Iterator[Job]:
    def drawn(
        weight: float, patients: int, slots: int, for_target: bool = False, **options: Any
    ) -> Job:
        def make(session: Session) -> Case:
            outcomes = Outcomes.drawn(patients, slots, settings.device)
            return case(outcomes, session.device, backend=settings.backend, **options)

        return of_case("survival NLL", weight, make, for_target=for_target)

    def of_batch(letter: str) -> Job:
        def make(session: Session) -> Case:
            outcomes = Outcomes.of_batch(session.batch(letter))
            return case(outcomes, session.device, backend=settings.backend)

        return of_case(f"survival NLL {letter}", 1.5, make)

    wide, short = ((32, 20), (32, 16)) if settings.quick else ((4096, 200), (4096, 128))
    on_gpu = settings.device == "cuda"
    yield drawn(16, *wide, for_target=not on_gpu, compiled=not settings.quick)
    yield drawn(3, *wide, phase="forward")
    yield drawn(5, *wide, cache="cold")
    yield drawn(4, *wide, from_logits=True)
    if settings.serves(torch.bfloat16):
        yield drawn(4, *wide, dtype=torch.bfloat16)
    yield drawn(3, *short, for_target=on_gpu)
    for letter in settings.workloads:
        yield of_batch(letter)


# Every mode ---------------------------------------------------------------------------------------

CAUSES = 3
WEIGHTED = "visit_weighted_nll"  # what the losses call for visit_weight


def modes() -> Iterator[Mode]:
    for dtype in DTYPES:
        for link in ("probabilities", "sigmoid", "softmax", "cloglog"):
            if link != "softmax":
                yield _padded_mode("discrete_time_survival_nll", link, dtype)
                yield _packed_mode("packed_survival_nll", link, dtype)
            yield _padded_mode("competing_risks_nll", link, dtype)
            yield _packed_mode("packed_competing_risks_nll", link, dtype)
    for mask in NUMERIC_MASKS:
        for function in ("discrete_time_survival_nll", "competing_risks_nll"):
            yield _padded_mode(function, "sigmoid", torch.float32, mask)
    for link in ("probabilities", "sigmoid"):
        yield Mode(WEIGHTED, link, torch.float32, WEIGHTED, _of_mode)


def _padded_mode(
    function: str, link: str, dtype: torch.dtype, mask: torch.dtype = torch.bool
) -> Mode:
    return Mode(function, link, dtype, "survival_nll", _of_mode, mask)


def _packed_mode(function: str, link: str, dtype: torch.dtype) -> Mode:
    return Mode(function, link, dtype, "packed_survival_nll", _of_mode)


def _of_mode(mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    patients, slots = size.loss_patients, size.loss_visits
    competing = "competing" in mode.function
    lengths = torch.randint(1, slots + 1, (patients,), generator=generator)
    lengths[0] = slots
    mask = torch.arange(slots) < lengths[:, None]
    times = (torch.rand(patients, generator=generator) * lengths).long().to(device)
    types = torch.randint(0, 1 + (CAUSES if competing else 1), (patients,), generator=generator)
    types = types.to(device)
    width = (CAUSES + (mode.mode == "softmax"),) if competing else ()
    drawn = torch.randn(patients, slots, *width, generator=generator)
    if mode.mode == "probabilities":
        drawn = drawn.sigmoid().clamp(0.01, 0.99)
    options: dict[str, Any] = {"from_logits": mode.mode != "probabilities"}
    if mode.mode != "probabilities":
        options["link"] = mode.mode
    definition = (
        reference.competing_risks_nll if competing else reference.discrete_time_survival_nll
    )
    given = mask.to(device, mode.mask or torch.bool)
    weights: dict[str, Any] = {}
    if mode.function == WEIGHTED:
        weights["visit_weight"] = torch.rand(patients, slots, generator=generator).to(device)
    if mode.mask is not None or weights:
        hazards = drawn.to(device, mode.dtype).requires_grad_()
        loss = competing_risks_nll if competing else discrete_time_survival_nll
        arguments = (hazards, times, types, given)
        return Ways(
            lambda: definition(*arguments, Options.of(**options), **weights),
            lambda: loss(*arguments, **options, **weights),
            [hazards],
            patients,
        )
    batch = PackedVisits.from_lists([[[]] * int(n) for n in lengths]).to(device)
    rows = batch.pack(drawn.to(device, mode.dtype)).requires_grad_()
    packed_loss = packed_competing_risks_nll if competing else packed_survival_nll
    kinds = {"event_types" if competing else "event_indicators": types}
    return Ways(
        lambda: definition(batch.pad(rows), times, types, given, Options.of(**options)),
        lambda: packed_loss(rows, batch, event_times=times, **kinds, **options),  # type: ignore[operator]
        [rows],
        patients,
    )


# README and targets -------------------------------------------------------------------------------

WANTED = {
    "operation": OPERATION,
    "workload": WIDE,
    "phase": "forward+backward",
    "dtype": "float32",
    "cache": "warm",
}
SHORT_WANTED = {**WANTED, "workload": SHORT}
TITLE = "survival NLL, forward and backward, 4096 x 200"
PLAIN_NOTE = (
    "of so short a call much goes to reading the outcomes of 4,096 patients, to autograd, and to "
    "zeroing the gradient of the padding"
)


def _over_a_launch(results: Results) -> Figure:
    row = results.of(**SHORT_WANTED)[OURS]
    return at_most(row.median / results.ceilings["empty_call_s"], 1.5)


BENCHMARK = Benchmark(
    jobs={"ops": jobs},
    modes=tuple(modes()),
    small=lambda batch: case(Outcomes.of_batch(batch), Cpu()),
    readme={"cpu": [WANTED], "cuda": [SHORT_WANTED]},
    page={OPERATION: (WIDE,), FROM_LOGITS: None},
    targets=(
        Target(
            "cpu",
            f"{TITLE}: against plain PyTorch",
            "≥ 60x",
            ratio(60, REFERENCE, OURS, **WANTED),
            PLAIN_NOTE,
        ),
        Target(
            "cpu",
            f"{TITLE}: against torch.compile of it",
            "≥ 10x",
            ratio(10, COMPILED, OURS, **WANTED),
        ),
        Target(
            "cuda",
            "survival NLL, forward and backward, 4096 x 128: over an empty launch",
            "≤ 1.5x",
            _over_a_launch,
        ),
    ),
)
