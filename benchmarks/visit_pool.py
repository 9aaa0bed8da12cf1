"""Pooling the codes of each visit: plain PyTorch, ``F.embedding_bag``, and this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ehrseq_fast import PackedVisits
from ehrseq_fast.visit_pool import masked_pool, packed_visit_pool, reference, visit_mean_pool

from .cases import (
    OURS,
    Case,
    Missing,
    Tensors,
    Variant,
    dtype_name,
    fits,
    our_backends,
    ours,
    run_of,
)
from .ceilings import Work
from .devices import Cpu, Device
from .jobs import Benchmark, Job, Session, Settings, of_case
from .modes import DTYPES, NUMERIC_MASKS, Mode, Size, Ways
from .results import Results
from .targets import Figure, Target, at_least, ratio
from .workloads import Batch

OPERATION = "visit pooling"
WEIGHTED = f"{OPERATION}, weights per code"
REFERENCE = "plain PyTorch, padded"
COMPILED = "torch.compile of it"
BAG_PADDED = "F.embedding_bag, padded codes"
BAG_FLATTENED = "F.embedding_bag, flattened on the way"
BAG_FLAT = "F.embedding_bag, flat codes"
BAG_SUM = "F.embedding_bag, flat codes, summed and divided"
OURS_PACKED = f"{OURS}, packed"
OURS_PADDED = f"{OURS}, padded"
OURS_WITHOUT = f"{OURS}, packed, without weights"
WEIGHTED_PLAIN = "plain PyTorch, rows times weights"
WEIGHTED_BAG = "F.embedding_bag, per_sample_weights"
OURS_GRAPH = f"{OURS}, packed, CUDA graph"

EMBEDDING_DIM = 128
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# [B, V, C, E] as embedded, as multiplied by the mask, and, backward, the gradients of both
PADDED_COPIES = {"forward": 2, "forward+backward": 4}


def case(
    batch: Batch,
    device: Device,
    *,
    phase: str = "forward+backward",
    dtype: torch.dtype = torch.float32,
    cache: str = "warm",
    embedding_dim: int = EMBEDDING_DIM,
    compiled: bool = False,
    backend: str | None = None,
) -> Case:
    """The ways to pool one batch, compared as packed rows ``[n_visits, E]`` and the table's
    gradient.

    ``F.embedding_bag`` is there four times: on the padded codes, whose padding it skips by its
    ``padding_idx``; on flat codes made of the padded ones on the way; and on flat codes and offsets
    that it is given ready made, as the packed batch is, by its mean, and by its sum with the
    counts' inverses ready made too, of which now one and now the other is quicker. int32 codes
    cost it less to read than int64.
    """
    torch.manual_seed(0)
    weight = torch.randn(batch.vocabulary, embedding_dim).to(device.name, dtype)
    weight.requires_grad_(phase == "forward+backward")
    return Case(
        OPERATION,
        batch.workload,
        batch.patients,
        phase,
        dtype_name(dtype),
        dict(_variants(batch, device, weight, compiled, backend)),
        TOLERANCE[dtype],
        cache,
        work(batch.packed, weight),
    )


def work(batch: PackedVisits, weight: Tensor) -> Work:
    """A row of the table read for every code, a row written for every visit; the gradient moves as
    much again, and writes every row of a dense gradient."""
    passes = 2 if weight.requires_grad else 1
    row = weight.shape[1] * weight.element_size()
    visits, table = batch.n_visits * row, weight.nbytes
    return Work(
        bytes=passes * (batch.n_codes * (4 + row) + visits) + (passes - 1) * table,
        working_set=passes * (table + visits + 4 * batch.n_codes),
    )


def _variants(
    batch: Batch, device: Device, weight: Tensor, compiled: bool, backend: str | None
) -> Iterator[tuple[str, Variant | Missing]]:
    codes, mask, visits = batch.padded[:3]
    packed = batch.packed
    incoming = torch.randn(*codes.shape[:2], weight.shape[1]).to(weight) * visits.unsqueeze(-1)
    packed_incoming = packed.pack(incoming)

    def variant(
        forward: Callable[[], Tensor],
        gradient: Tensor,
        in_common: Callable[[Tensor], Tensor],
        **kind: bool,
    ) -> Variant:
        def common(results: Tensors) -> Tensors:
            return in_common(results[0]), *results[1:]

        return Variant(run_of(forward, [weight], gradient), common, **kind)

    def rows_of_padded(pooled: Tensor) -> Tensor:
        return packed.pack(pooled.view_as(incoming))

    def rows(pooled: Tensor) -> Tensor:
        return pooled

    def padded(forward: Callable[[], Tensor], **kind: bool) -> Variant:
        return variant(forward, incoming, rows_of_padded, **kind)

    def plain() -> Tensor:
        return reference.visit_mean_pool(codes, weight, mask)

    phase = "forward+backward" if weight.requires_grad else "forward"
    needed = codes.numel() * weight.shape[1] * 4 * PADDED_COPIES[phase]
    yield REFERENCE, fits(needed, device) or padded(plain)
    if compiled:
        program = torch.compile(reference.visit_mean_pool, fullgraph=True, dynamic=False)
        yield (
            COMPILED,
            fits(needed, device) or padded(lambda: program(codes, weight, mask), compiles=True),
        )

    slots, slots_incoming = codes.flatten(0, 1), incoming.flatten(0, 1)

    def bag(flat: Tensor, offsets: Tensor) -> Tensor:
        return F.embedding_bag(flat, weight, offsets, mode="mean")

    yield (
        BAG_PADDED,
        variant(
            lambda: F.embedding_bag(slots, weight, mode="mean", padding_idx=0),
            slots_incoming,
            rows_of_padded,
        ),
    )
    yield (
        BAG_FLATTENED,
        variant(lambda: bag(codes[mask], bag_offsets(mask)), slots_incoming, rows_of_padded),
    )
    flat, offsets = packed.codes, packed.code_offsets
    starts = offsets[:-1].contiguous()
    shares = (1 / offsets.diff().clamp(min=1)).to(weight.dtype).unsqueeze(1)
    yield BAG_FLAT, variant(lambda: bag(flat, starts), packed_incoming, rows)
    yield (
        BAG_SUM,
        variant(
            lambda: F.embedding_bag(flat, weight, starts, mode="sum") * shares,
            packed_incoming,
            rows,
        ),
    )

    def ours_packed(**kind: bool) -> Variant:
        return variant(lambda: packed_visit_pool(packed, weight), packed_incoming, rows, **kind)

    on = our_backends("packed_visit_pool", device.name, weight.dtype, backend)
    yield from ours(OURS_PACKED, on, ours_packed)
    on_padded = our_backends("visit_pool", device.name, weight.dtype, backend)
    yield from ours(
        OURS_PADDED, on_padded, lambda: padded(lambda: visit_mean_pool(codes, weight, mask))
    )
    if device.name == "cuda":
        yield from ours(OURS_GRAPH, on, lambda: ours_packed(captured=True))


def weighted_case(
    batch: Batch,
    device: Device,
    *,
    embedding_dim: int = EMBEDDING_DIM,
    backend: str | None = None,
) -> Case:
    """The ways to pool one batch with a weight for each code. The weights are ones, so that pooling
    without weights gives the same results and can be beside them."""
    torch.manual_seed(0)
    weight = torch.randn(batch.vocabulary, embedding_dim).to(device.name).requires_grad_()
    packed = batch.packed
    incoming = torch.randn(packed.n_visits, embedding_dim).to(weight)
    of_codes = torch.ones(packed.n_codes).to(weight)
    weighted = packed.with_code_weights(of_codes)
    rows, codes, starts = packed.row_of_code, packed.codes, packed.code_offsets[:-1].contiguous()

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(packed.n_visits, *values.shape[1:]).index_add(0, rows, values)

    def gathered() -> Tensor:
        total = summed(F.embedding(codes, weight) * of_codes.unsqueeze(1))
        return total / summed(of_codes).clamp(min=1).unsqueeze(1)

    def bag() -> Tensor:
        total = F.embedding_bag(codes, weight, starts, mode="sum", per_sample_weights=of_codes)
        return total / summed(of_codes).clamp(min=1).unsqueeze(1)

    def variant(forward: Callable[[], Tensor]) -> Variant:
        return Variant(run_of(forward, [weight], incoming))

    on = our_backends("packed_weighted_pool", device.name, weight.dtype, backend)
    without = our_backends("packed_visit_pool", device.name, weight.dtype, backend)
    variants = {
        WEIGHTED_PLAIN: variant(gathered),
        WEIGHTED_BAG: variant(bag),
        **dict(ours(OURS_PACKED, on, lambda: variant(lambda: packed_visit_pool(weighted, weight)))),
        **dict(
            ours(OURS_WITHOUT, without, lambda: variant(lambda: packed_visit_pool(packed, weight)))
        ),
    }
    return Case(
        *(WEIGHTED, batch.workload, batch.patients, "forward+backward"),
        *(dtype_name(weight.dtype), variants, TOLERANCE[weight.dtype]),
    )


def bag_offsets(code_mask: Tensor) -> Tensor:
    """Where each visit's codes begin among the flat ones; int64, one per row of ``[..., C]``."""
    counts = code_mask.sum(-1).flatten()
    return counts.cumsum(0) - counts


def jobs(settings: Settings) -> Iterator[Job]:
    width = 16 if settings.quick else EMBEDDING_DIM

    def job(letter: str, weight: float, for_target: bool = False, **options: Any) -> Job:
        def make(session: Session) -> Case:
            return case(
                session.batch(letter),
                session.device,
                embedding_dim=width,
                backend=settings.backend,
                **options,
            )

        return of_case(f"pooling {letter}", weight, make, for_target=for_target)

    main = settings.main_workload
    for letter in settings.workloads:
        compiled = letter == main and not settings.quick
        weight = 22 if letter == main else {"E": 18}.get(letter, 8)
        yield job(letter, weight, for_target=letter == main, compiled=compiled)
    yield of_case(
        f"pooling {main}, weights per code",
        3,
        lambda session: weighted_case(
            session.batch(main), session.device, embedding_dim=width, backend=settings.backend
        ),
    )
    yield job(main, 6, phase="forward")
    yield job(main, 7, cache="cold")
    if settings.serves(torch.bfloat16):
        yield job(main, 10, dtype=torch.bfloat16)


# Every mode ---------------------------------------------------------------------------------------


def modes() -> Iterator[Mode]:
    for dtype in DTYPES:
        for mode in ("mean", "sum", "max"):
            yield Mode("visit_mean_pool", mode, dtype, "visit_pool", _of_padded, torch.bool)
            yield Mode("masked_pool", mode, dtype, "masked_pool", _of_embeddings, torch.bool)
            yield Mode("packed_visit_pool", mode, dtype, "packed_visit_pool", _of_packed)
        attention = ("packed_visit_pool", "attention", dtype, "packed_attention_pool")
        yield Mode(*attention, _of_packed)
        weighted = ("packed_visit_pool with code_weights", "mean", dtype, "packed_weighted_pool")
        yield Mode(*weighted, _of_packed)
    for mask in NUMERIC_MASKS:
        yield Mode("visit_mean_pool", "mean", torch.float32, "visit_pool", _of_padded, mask)
        yield Mode("masked_pool", "mean", torch.float32, "masked_pool", _of_embeddings, mask)


@cache
def _batch(size: Size, device: str) -> PackedVisits:
    generator = torch.Generator().manual_seed(0)
    shape = (size.patients, size.visits, size.codes)
    codes = torch.randint(1, size.vocabulary, shape, generator=generator)
    return PackedVisits.from_padded(codes, vocab_size=size.vocabulary).to(device)


def _table(mode: Mode, size: Size, device: str, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(size.vocabulary, size.width, generator=generator)
    return drawn.to(device, mode.dtype).requires_grad_()


def _of_packed(mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    batch, table = _batch(size, device), _table(mode, size, device, generator)
    options: dict[str, Any] = {"mode": mode.mode}
    leaves = [table]
    if mode.mode == "attention":
        scores = torch.randn(size.vocabulary, generator=generator).to(device, mode.dtype)
        options["scores"] = scores.requires_grad_()
        leaves.append(scores)
    if mode.operation == "packed_weighted_pool":
        weights = torch.rand(batch.n_codes, generator=generator) + 0.1
        options["code_weights"] = weights.to(device).requires_grad_()
        leaves.append(options["code_weights"])
    flat = (batch.codes, batch.code_offsets)
    return Ways(
        lambda: reference.packed_visit_pool(*flat, table, **options),
        lambda: packed_visit_pool(batch, table, **options),
        leaves,
        size.patients,
    )


def _padded(
    mode: Mode, size: Size, device: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    codes = _batch(size, device).to_padded()[0]
    kept = torch.rand(codes.shape, generator=generator) < 0.7
    return codes, kept.to(device, mode.mask)


def _of_padded(mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    table = _table(mode, size, device, generator)
    codes, mask = _padded(mode, size, device, generator)
    return Ways(
        lambda: reference.visit_mean_pool(codes, table, mask, mode=mode.mode),
        lambda: visit_mean_pool(codes, table, mask, mode=mode.mode),
        [table],
        size.patients,
    )


def _of_embeddings(mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    table = _table(mode, size, device, generator)
    codes, mask = _padded(mode, size, device, generator)
    embeddings = table.detach()[codes].requires_grad_()
    return Ways(
        lambda: reference.masked_pool(embeddings, mask, mode=mode.mode),
        lambda: masked_pool(embeddings, mask, mode=mode.mode),
        [embeddings],
        size.patients,
    )


# README and targets -------------------------------------------------------------------------------

WANTED = {
    "operation": OPERATION,
    "workload": "D",
    "patients": 256,
    "phase": "forward+backward",
    "dtype": "float32",
    "cache": "warm",
}
# A GPU machine may have no real records; a batch of outpatients is its reading of the same targets.
OUTPATIENT_WANTED = {**WANTED, "workload": "A", "patients": 128}
OMOP = "visit pooling, forward and backward, real OMOP batch of 256"
OUTPATIENT = "visit pooling, forward and backward, outpatient batch of 128"


def _against_flat_bags(results: Results) -> Figure:
    """Against the quicker of both ways on flat codes."""
    rows = results.of(**WANTED)
    bags = (rows[name].median for name in (BAG_FLAT, BAG_SUM))
    return at_least(min(bags) / rows[OURS_PACKED].median, 2.5)


def _share_of_ceiling(results: Results) -> Figure:
    row = results.of(**OUTPATIENT_WANTED)[OURS_PACKED]
    if row.floor_s is None:
        raise ValueError("no ceiling was measured")
    share = row.floor_s / row.median
    return Figure(share, 0.8, True, f"{share:.0%}")


def _against_best_peer(results: Results) -> Figure:
    rows = results.of(**OUTPATIENT_WANTED)
    best = min(row.median for row in rows.values() if not row.ours and row.seconds)
    return at_least(best / rows[OURS_PACKED].median, 2)


BENCHMARK = Benchmark(
    jobs={"ops": jobs},
    modes=tuple(modes()),
    small=lambda batch: case(batch, Cpu(), embedding_dim=64),
    readme={"cpu": [WANTED], "cuda": [OUTPATIENT_WANTED]},
    page={OPERATION: ("A", "D"), WEIGHTED: None},
    targets=(
        Target(
            "cpu",
            f"{OMOP}: against plain PyTorch",
            "≥ 150x",
            ratio(150, REFERENCE, OURS_PACKED, **WANTED),
        ),
        Target(
            "cpu",
            f"{OMOP}: against F.embedding_bag on flat codes",
            "≥ 2.5x",
            _against_flat_bags,
        ),
        Target("cuda", f"{OUTPATIENT}: share of the measured ceiling", "≥ 80 %", _share_of_ceiling),
        Target("cuda", f"{OUTPATIENT}: against the best other", "≥ 2x", _against_best_peer),
    ),
)
