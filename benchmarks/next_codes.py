"""The loss of a visit's codes over a vocabulary, against PyTorch's loss of dense targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ehrseq_fast import next_codes_bce
from ehrseq_fast.next_codes import reference

from .cases import OURS, Case, Missing, Row, Variant, asked_for, fits, our_backends, ours, run_of
from .devices import Device
from .jobs import Benchmark, Job, Session, Settings, say
from .modes import DTYPES, NUMERIC_MASKS, Mode, Size, Ways
from .report import case_table
from .results import Results
from .targets import Figure, Target, at_most, ratio

OPERATION = "next codes"
DENSE = "PyTorch, dense targets"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Problem:
    """Visits of a few codes each, and a layer over the vocabulary."""

    visits: int = 10_000
    vocabulary: int = 10_000
    width: int = 128
    codes: int = 12

    @property
    def name(self) -> str:
        return f"{self.visits} x {self.vocabulary}"


WIDE = Problem()
QUICK = Problem(20, 50, 8, 3)


def case(problem: Problem, device: Device, backend: str | None = None) -> Case:
    """Forward and backward: the mean loss, and gradients of states, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 2 * problem.codes + 1, (problem.visits,), generator=generator)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    codes = torch.randint(problem.vocabulary, (int(offsets[-1]),), generator=generator)
    rows = torch.arange(problem.visits).repeat_interleave(counts)
    shapes = [(problem.visits, problem.width), (problem.vocabulary, problem.width)]
    leaves = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
    leaves.append(torch.full((problem.vocabulary,), -5.0))
    leaves = [leaf.to(device.name).requires_grad_() for leaf in leaves]
    states, weight, bias = leaves
    codes, offsets, rows = (x.to(device.name) for x in (codes, offsets, rows))

    def dense() -> Tensor:
        logits = F.linear(states, weight, bias)
        targets = torch.zeros_like(logits)
        targets[rows, codes] = 1
        mean = F.binary_cross_entropy_with_logits(logits, targets)
        return mean * problem.vocabulary

    def ragged() -> Tensor:
        return next_codes_bce(states, weight, bias, (codes, offsets))

    incoming = torch.ones((), device=device.name)
    needed = 6 * 4 * problem.visits * problem.vocabulary
    plain = fits(needed, device) or Variant(run_of(dense, leaves, incoming))
    variants: dict[str, Variant | Missing] = {DENSE: plain}
    on = our_backends("next_codes", device.name, torch.float32, backend)
    variants.update(ours(OURS, on, lambda: Variant(run_of(ragged, leaves, incoming))))
    phase = "forward+backward"
    return Case(OPERATION, problem.name, problem.visits, phase, "float32", variants, TOLERANCE)


def jobs(settings: Settings) -> Iterator[Job]:
    def run(session: Session, budget_s: float) -> list[Row]:
        problem = QUICK if settings.quick else WIDE
        made = case(problem, session.device, settings.backend)
        rows = session.measure(made, budget_s)
        for at, row in enumerate(rows):
            variant = made.variants[row.variant]
            if isinstance(variant, Variant) and row.seconds is not None:
                with asked_for(variant.backend):
                    peak = session.device.peak_memory(variant.run)
                rows[at] = replace(row, peak_bytes=peak)
        say(f"\n{case_table(made.title, rows)}")
        return rows

    yield Job(f"{OPERATION}, {WIDE.name}", 10, run, for_target=True)


WANTED = {"operation": OPERATION, "workload": WIDE.name}


def _lighter(results: Results) -> Figure:
    rows = results.of(**WANTED)
    dense, own = rows[DENSE], rows[OURS]
    if dense.peak_bytes is None or own.peak_bytes is None:
        raise ValueError("peak memory was not measured")
    share = own.peak_bytes / dense.peak_bytes
    return at_most(share, 1 / 10, f"1/{1 / share:.0f}")


def _of_mode(mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    patients, slots, width = size.patients, size.visits, size.width
    lengths = torch.randint(1, slots + 1, (patients,), generator=generator)
    mask = (torch.arange(slots) < lengths[:, None]).to(device, mode.mask)
    counts = torch.randint(0, size.codes, (int(lengths.sum()),), generator=generator)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    codes = torch.randint(size.vocabulary, (int(offsets[-1]),), generator=generator).int()
    codes, offsets = codes.to(device), offsets.to(device)
    shapes = [(patients, slots, width), (size.vocabulary, width), (size.vocabulary,)]
    leaves = [
        (torch.randn(shape, generator=generator) * 0.1).to(device, mode.dtype).requires_grad_()
        for shape in shapes
    ]
    states, weight, bias = leaves
    real = mask != 0

    def plain() -> Tensor:
        return reference.next_codes(states[real], weight, bias, codes, offsets).mean()

    return Ways(plain, lambda: next_codes_bce(*leaves, (codes, offsets), mask), leaves, patients)


def modes() -> Iterator[Mode]:
    for dtype in DTYPES:
        yield Mode("next_codes_bce", "default", dtype, "next_codes", _of_mode, torch.bool)
    for mask in NUMERIC_MASKS:
        yield Mode("next_codes_bce", "default", torch.float32, "next_codes", _of_mode, mask)


BENCHMARK = Benchmark(
    jobs={"ops": jobs},
    modes=tuple(modes()),
    page={OPERATION: None},
    targets=(
        Target(
            "cpu",
            "next codes, forward and backward, 10,000 visits x 10,000 codes: against dense targets",
            "≥ 1x",
            ratio(1, DENSE, OURS, **WANTED),
        ),
        Target(
            "cpu",
            "next codes, 10,000 visits x 10,000 codes: peak memory against dense targets",
            "≤ 1/10",
            _lighter,
        ),
    ),
)
