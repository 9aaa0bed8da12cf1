"""What the Triton kernels take of a GPU, compiled ahead of time: none is needed.

The public operations are called forward and backward on host tensors with their launches held back,
so that the arguments, and with them what Triton specialises on, are those of a real call. Every
distinct launch is compiled for each target, and the machine code is asked for registers, shared
memory, spills and the widest load from global memory.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from typing import Any

import torch

from .machine_code import RESULTS, Kernel, kernels_of, page, tool

TABLE = RESULTS / "triton-resources.md"
TARGETS = (80, 90, 100)
HOPPER = (90,)
WIDE, ODD = 128, 50  # embedding widths: rows of whole 16-byte words, and rows that are not


Run = Callable[[torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A use of a public operation whose kernels are compiled."""

    name: str
    dtype: torch.dtype
    run: Run
    targets: tuple[int, ...] = TARGETS


def _padded_pool(
    mode: str, width: int = WIDE, mask: torch.dtype | None = torch.bool, sparse_grad: bool = False
) -> Run:
    from ehrseq_fast import visit_mean_pool

    def run(dtype: torch.dtype) -> torch.Tensor:
        codes = torch.arange(64 * 32 * 40).reshape(64, 32, 40) % 1000
        weight = torch.zeros(1000, width, dtype=dtype, requires_grad=True)
        kept = None if mask is None else torch.ones(codes.shape, dtype=mask)
        return visit_mean_pool(codes, weight, kept, mode=mode, sparse_grad=sparse_grad)

    return run


def _packed_pool(
    mode: str,
    width: int = WIDE,
    sparse_grad: bool = False,
    patients: int = 64,
    visits: int = 30,
    codes: int = 19,
    weighted: bool = False,
) -> Run:
    from ehrseq_fast import PackedVisits, packed_visit_pool

    def run(dtype: torch.dtype) -> torch.Tensor:
        batch = PackedVisits.from_lists([[list(range(1, codes + 1))] * visits] * patients)
        weight = torch.zeros(1000, width, dtype=dtype, requires_grad=True)
        scores = torch.zeros(1000, dtype=dtype, requires_grad=True) if mode == "attention" else None
        weights = torch.ones(batch.n_codes, requires_grad=True) if weighted else None
        options = {"mode": mode, "scores": scores, "code_weights": weights}
        return packed_visit_pool(batch, weight, sparse_grad=sparse_grad, **options)

    return run


def _masked_pool(mode: str, mask: torch.dtype | None = torch.bool) -> Run:
    from ehrseq_fast import masked_pool

    def run(dtype: torch.dtype) -> torch.Tensor:
        embeddings = torch.zeros(64, 40, WIDE, dtype=dtype, requires_grad=True)
        kept = None if mask is None else torch.ones(64, 40, dtype=mask)
        return masked_pool(embeddings, kept, mode=mode)

    return run


def _of_visits(like: torch.Tensor, weighted: bool) -> dict[str, torch.Tensor]:
    """Weights of visits, of the loss's dtype, where they are wanted."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return {"visit_weight": torch.ones(like.shape, dtype=wide)} if weighted else {}


def _padded_loss(
    reduction: str, classes: int | None = None, weighted: bool = False, **options: Any
) -> Run:
    from ehrseq_fast import competing_risks_nll, discrete_time_survival_nll

    def run(dtype: torch.dtype) -> torch.Tensor:
        shape = (64, 100) if classes is None else (64, 100, classes)
        hazards = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
        times, mask = torch.zeros(64, dtype=torch.int64), torch.ones(64, 100, dtype=torch.bool)
        loss = discrete_time_survival_nll if classes is None else competing_risks_nll
        given = {"reduction": reduction, **_of_visits(hazards, weighted), **options}
        return loss(hazards, times, times, mask, **given)

    return run


def _packed_loss(
    reduction: str,
    causes: int | None,
    patients: int = 64,
    visits: int = 100,
    weighted: bool = False,
    **options: Any,
) -> Run:
    from ehrseq_fast import PackedVisits, packed_competing_risks_nll, packed_survival_nll

    def run(dtype: torch.dtype) -> torch.Tensor:
        batch = PackedVisits.from_lists([[[1]] * visits] * patients)
        shape = (patients * visits,) if causes is None else (patients * visits, causes)
        hazards = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
        times = torch.zeros(patients, dtype=torch.int64)
        of_visits = _of_visits(hazards if causes is None else hazards[:, 0], weighted)
        common = {"event_times": times, "reduction": reduction, **of_visits, **options}
        if causes is None:
            return packed_survival_nll(hazards, batch, event_indicators=times, **common)
        return packed_competing_risks_nll(hazards, batch, event_types=times, **common)

    return run


def _next_codes(visits: int = 40, vocabulary: int = 1000, **options: Any) -> Run:
    from ehrseq_fast import PackedRows, PackedVisits, next_codes_bce

    def run(dtype: torch.dtype) -> torch.Tensor:
        batch = PackedVisits.from_lists([[[1, 2, 3]] * visits] * 64)
        states = torch.zeros(batch.n_visits, 16, dtype=dtype)
        weight = torch.zeros(vocabulary, 16, dtype=dtype, requires_grad=True)
        return next_codes_bce(PackedRows(states, batch), weight, **options)

    return run


def _mass(
    causes: int | None, packed: bool, reduction: str = "mean", patients: int = 64, visits: int = 100
) -> Run:
    from ehrseq_fast import PackedRows, PackedVisits, pmf_competing_risks_nll, pmf_nll

    def run(dtype: torch.dtype) -> torch.Tensor:
        shape = (patients, visits) if causes is None else (patients, visits, causes)
        logits = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
        times = torch.zeros(patients, dtype=torch.int64)
        loss = pmf_nll if causes is None else pmf_competing_risks_nll
        if not packed:
            mask = torch.ones(patients, visits, dtype=torch.bool)
            return loss(logits, times, times, mask, reduction=reduction)
        batch = PackedVisits.from_lists([[[1]] * visits] * patients)
        rows = PackedRows(logits.flatten(0, 1), batch)
        return loss(rows, times, times, reduction=reduction)

    return run


def _rates(
    link: str,
    packed: bool,
    reduction: str = "mean",
    patients: int = 64,
    visits: int = 100,
    weighted: bool = False,
) -> Run:
    from ehrseq_fast import PackedRows, PackedVisits, piecewise_hazard_nll

    def run(dtype: torch.dtype) -> torch.Tensor:
        logits = torch.full((patients, visits), 0.5, dtype=dtype, requires_grad=True)
        outcomes = torch.zeros(patients, dtype=torch.int64), torch.zeros(patients)
        given = (*outcomes, torch.ones(patients))
        options: dict[str, Any] = {"link": link, "reduction": reduction}
        options.update(_of_visits(logits.flatten() if packed else logits, weighted))
        if not packed:
            mask = torch.ones(patients, visits, dtype=torch.bool)
            return piecewise_hazard_nll(logits, *given, mask, **options)
        batch = PackedVisits.from_lists([[[1]] * visits] * patients)
        return piecewise_hazard_nll(PackedRows(logits.flatten(), batch), *given, **options)

    return run


def _ranking(causes: int | None, packed: bool, patients: int = 64, visits: int = 100) -> Run:
    from ehrseq_fast import (
        PackedRows,
        PackedVisits,
        deephit_competing_ranking_loss,
        deephit_ranking_loss,
    )

    def run(dtype: torch.dtype) -> torch.Tensor:
        shape = (patients, visits) if causes is None else (patients, visits, causes)
        logits = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
        times = torch.zeros(patients, dtype=torch.int64)
        loss = deephit_ranking_loss if causes is None else deephit_competing_ranking_loss
        if not packed:
            mask = torch.ones(patients, visits, dtype=torch.bool)
            return loss(logits, times, times, mask)
        batch = PackedVisits.from_lists([[[1]] * visits] * patients)
        return loss(PackedRows(logits.flatten(0, 1), batch), times, times)

    return run


def _classes(
    packed: bool, patients: int = 64, visits: int = 100, weighted: bool = False, **options: Any
) -> Run:
    from ehrseq_fast import PackedRows, PackedVisits, visit_cross_entropy

    def run(dtype: torch.dtype) -> torch.Tensor:
        logits = torch.zeros(patients, visits, 6, dtype=dtype, requires_grad=True)
        labels = torch.zeros(patients, visits, dtype=torch.int64)
        given = {**options, **({"class_weight": torch.ones(6)} if weighted else {})}
        if not packed:
            mask = torch.ones(patients, visits, dtype=torch.bool)
            return visit_cross_entropy(logits, labels, mask, **given)
        batch = PackedVisits.from_lists([[[1]] * visits] * patients)
        rows = PackedRows(logits.flatten(0, 1), batch)
        return visit_cross_entropy(rows, labels.flatten(), **given)

    return run


def _horizon(
    packed: bool, patients: int = 64, visits: int = 100, days: bool = False, **options: Any
) -> Run:
    from ehrseq_fast import PackedRows, PackedVisits, fixed_horizon_bce

    def run(dtype: torch.dtype) -> torch.Tensor:
        logits = torch.zeros(patients, visits, dtype=dtype, requires_grad=True)
        times = torch.zeros(patients, dtype=torch.int64)
        of_visits = torch.zeros(patients, visits, dtype=torch.float32)
        if not packed:
            given = {"visit_times": of_visits, "visit_weight": of_visits} if days else {}
            mask = torch.ones(patients, visits, dtype=torch.bool)
            return fixed_horizon_bce(logits, times, times, 3, mask, **given, **options)
        batch = PackedVisits.from_lists([[[1]] * visits] * patients)
        rows = PackedRows(logits.flatten(), batch)
        return fixed_horizon_bce(rows, times, times, 3, **options)

    return run


def _given_labels(dtype: torch.dtype) -> torch.Tensor:
    from ehrseq_fast.losses import FixedHorizonProgressionLoss

    logits = torch.zeros(64, 100, dtype=dtype, requires_grad=True)
    labels, valid = torch.zeros(64, 100), torch.ones(64, 100, dtype=torch.bool)
    return FixedHorizonProgressionLoss()(logits, labels, valid)


def cases() -> Iterator[Case]:
    """Every kernel, in the dtypes and shapes in which it differs."""
    softmax = {"from_logits": True, "link": "softmax"}
    single = torch.float32
    for mode in ("mean", "max"):
        yield Case(f"padded pooling, {mode}, E {WIDE}", single, _padded_pool(mode))
        yield Case(f"packed pooling, {mode}, E {WIDE}", single, _packed_pool(mode))
        yield Case(f"masked_pool, {mode}, E {WIDE}", single, _masked_pool(mode))
    yield Case(f"packed pooling, attention, E {WIDE}", single, _packed_pool("attention"))
    sparse = _padded_pool("mean", sparse_grad=True)
    yield Case(f"padded pooling, sparse gradient, E {WIDE}", single, sparse)
    sparse = _packed_pool("mean", sparse_grad=True)
    yield Case(f"packed pooling, sparse gradient, E {WIDE}", single, sparse, HOPPER)
    for mode in ("mean", "max"):
        no_mask = _padded_pool(mode, mask=None)
        yield Case(f"padded pooling, {mode}, no mask, E {WIDE}", single, no_mask, HOPPER)
    for dtype in (single, torch.bfloat16):
        weighted = _padded_pool("mean", mask=torch.float32)
        yield Case(f"padded pooling, mean, weights, E {WIDE}", dtype, weighted, HOPPER)
        weighted = _masked_pool("mean", mask=torch.float32)
        yield Case(f"masked_pool, mean, weights, E {WIDE}", dtype, weighted, HOPPER)
        no_mask = _masked_pool("mean", mask=None)
        yield Case(f"masked_pool, mean, no mask, E {WIDE}", dtype, no_mask, HOPPER)
    yield Case(f"packed pooling, mean, E {ODD}", single, _packed_pool("mean", ODD))
    yield Case("padded loss", single, _padded_loss("mean"))
    yield Case("packed loss", single, _packed_loss("mean", None))
    yield Case("padded loss of logits", single, _padded_loss("mean", from_logits=True))
    yield Case("padded loss, competing", single, _padded_loss("mean", 4))
    yield Case("padded loss, softmax", single, _padded_loss("mean", 4, **softmax))
    yield Case("packed loss, softmax", single, _packed_loss("mean", 4, **softmax))
    yield Case("padded loss, one a patient", single, _padded_loss("none"))
    yield Case("packed loss, one a patient", single, _packed_loss("none", None))
    of_logits = _padded_loss("mean", weighted=True, from_logits=True)
    yield Case("padded loss of logits, weights", single, of_logits)
    of_classes = _packed_loss("mean", 4, weighted=True, **softmax)
    yield Case("packed loss, softmax, weights", single, of_classes, HOPPER)
    yield Case("padded loss of rates", single, _rates("softplus", packed=False))
    yield Case("packed loss of rates, exp", single, _rates("exp", packed=True), HOPPER)
    weighted = _rates("softplus", packed=False, weighted=True)
    yield Case("padded loss of rates, weights", single, weighted, HOPPER)
    weighted = _rates("exp", packed=True, weighted=True)
    yield Case("packed loss of rates, exp, weights", single, weighted, HOPPER)
    yield Case("padded loss of a mass", single, _mass(None, packed=False))
    yield Case("packed loss of a mass, competing", single, _mass(4, packed=True), HOPPER)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        pool = "max" if dtype == torch.float16 else "mean"
        yield Case(f"padded pooling, {pool}, E {WIDE}", dtype, _padded_pool(pool), HOPPER)
        yield Case(f"packed pooling, {pool}, E {WIDE}", dtype, _packed_pool(pool), HOPPER)
        yield Case(f"packed pooling, sum, E {WIDE}", dtype, _packed_pool("sum"), HOPPER)
        attention = _packed_pool("attention")
        yield Case(f"packed pooling, attention, E {WIDE}", dtype, attention, HOPPER)
        yield Case("padded loss", dtype, _padded_loss("mean"), HOPPER)
        yield Case("packed loss, weights", dtype, _packed_loss("mean", None, weighted=True), HOPPER)
        yield Case("packed loss of rates", dtype, _rates("softplus", packed=True), HOPPER)
        weighted = _rates("softplus", packed=True, weighted=True)
        yield Case("packed loss of rates, weights", dtype, weighted, HOPPER)
        yield Case("packed loss of a mass", dtype, _mass(None, packed=True), HOPPER)
        yield Case("packed loss, softmax", dtype, _packed_loss("mean", 4, **softmax), HOPPER)
    yield Case("next codes", single, _next_codes())
    yield Case("next codes", torch.float64, _next_codes(), HOPPER)
    yield Case("next codes, 40 of them", single, _next_codes(vocabulary=40), HOPPER)
    weights = {"pos_weight": torch.ones(1000), "class_weight": torch.ones(1000)}
    yield Case("next codes, weights", torch.bfloat16, _next_codes(**weights), HOPPER)
    yield Case("next codes, sampled", single, _next_codes(n_negatives=100), HOPPER)
    of_logits = _packed_loss("mean", None, from_logits=True)
    yield Case("packed loss of logits", torch.bfloat16, of_logits)
    yield Case("padded ranking", single, _ranking(None, packed=False))
    yield Case("packed ranking, competing", single, _ranking(4, packed=True), HOPPER)
    for dtype in (torch.bfloat16, torch.float64):
        yield Case("packed ranking", dtype, _ranking(None, packed=True), HOPPER)
    yield Case("padded classes", single, _classes(packed=False))
    smoothed = _classes(packed=True, weighted=True, label_smoothing=0.1)
    yield Case("packed classes, smoothed, weights", single, smoothed, HOPPER)
    yield Case("padded horizon", single, _horizon(packed=False))
    yield Case("padded horizon, days, weights", single, _horizon(packed=False, days=True), HOPPER)
    yield Case("given labels", single, _given_labels, HOPPER)
    for dtype in (torch.bfloat16, torch.float64):
        one_a_visit = _classes(packed=True, reduction="none")
        yield Case("packed classes, one a visit", dtype, one_a_visit, HOPPER)
        one_a_visit = _horizon(packed=True, reduction="none")
        yield Case("packed horizon, one a visit", dtype, one_a_visit, HOPPER)
    of_codes = _packed_pool("mean", weighted=True)
    yield Case(f"packed pooling, mean, weights, E {WIDE}", single, of_codes)
    for dtype in (torch.bfloat16, torch.float64):
        yield Case(f"packed pooling, mean, weights, E {WIDE}", dtype, of_codes, HOPPER)
    of_codes = _packed_pool("sum", weighted=True)
    yield Case(f"packed pooling, sum, weights, E {WIDE}", single, of_codes, HOPPER)


@contextlib.contextmanager
def _kernels_on_the_host() -> Iterator[None]:
    """Make Triton's kernels what the operations choose for host tensors; none will run."""
    from ehrseq_fast import backend, triton_support

    if triton_support.interpreted():
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    on_host = backend.Kernels("cpu", "ehrseq_fast_triton", None)
    with backend.emulating("triton", on_host):
        backend.load_triton_kernels()  # where they are registered for a GPU, now for the host too
        yield


def launches_of(case: Case) -> list[Any]:
    """What forward and backward would launch. Nothing is written to the results; what they hold
    decides the size of a padded batch's sparse gradient, so it is made the same every time."""
    from ehrseq_fast import triton_support, use_backend

    with use_backend("triton"), triton_support.watching_launches(held_back=True) as launches:
        torch.use_deterministic_algorithms(True)  # fills what is left unwritten
        try:
            case.run(case.dtype).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    return launches


def compile_launch(launch: Any, arch: int) -> Any:
    """Compile a launch as Triton would on a GPU of that architecture: its own binder derives
    types, constants and divisibility from the arguments. Returns the kernel and a key that tells
    launches apart that need different machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    target = GPUTarget("cuda", arch, 32)
    compiler = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
    given = {**launch.options, "debug": False}
    bound, specialisation, options = bind(*launch.arguments, **given)
    options, signature, constants, attributes = kernel._pack_args(
        compiler, given, bound, specialisation, options
    )
    key = repr((launch.name, signature, constants, attributes, options))

    def compiled() -> Any:
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=options.__dict__)

    return key, compiled


def stores_over_loads(ttgir: str, threads: int) -> int:
    """Stores to where a tile of fewer values than threads was loaded from, with no barrier between.
    Several threads hold each of its values; one of them stores it, maybe before another one loads.

    Example:
        >>> load = "%x = tt.load %p, %m : tensor<64x!tt.ptr<f32>, #blocked>\\n"
        >>> store = "tt.store %p, %y, %m : tensor<64x!tt.ptr<f32>, #blocked>\\n"
        >>> [stores_over_loads(load + store, threads) for threads in (64, 128)]
        [0, 1]
        >>> stores_over_loads(load + "gpu.barrier\\n" + store, 128)
        0
    """
    loaded: set[str] = set()
    found = 0
    for line in ttgir.splitlines():
        access = re.search(r"tt\.(load|store) (%\w+).*: tensor<([\dx]+)x!tt\.ptr", line)
        if "barrier" in line:
            loaded.clear()
        elif access is not None and math.prod(map(int, access[3].split("x"))) < threads:
            if access[1] == "load":
                loaded.add(access[2])
            else:
                found += access[2] in loaded
    return found


def _kernel_of(case: Case, launch: Any, arch: int, compiled: Any) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (found,) = kernels_of(Path(file.name), f"sm_{arch}")
    return replace(
        found,
        kernel=launch.name,
        case=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        warps=compiled.metadata.num_warps,
        unordered=stores_over_loads(compiled.asm["ttgir"], 32 * compiled.metadata.num_warps),
    )


def measure() -> list[Kernel]:
    """Compile every case for every target; each kernel once, under the first case it came with."""
    rows = []
    seen = set()
    for case in cases():
        for launch in launches_of(case):
            for arch in case.targets:
                key, compiled = compile_launch(launch, arch)
                if (key, arch) not in seen:
                    seen.add((key, arch))
                    rows.append(_kernel_of(case, launch, arch, compiled()))
    return rows


def compiled_again() -> list[str]:
    """The kernels that Triton would compile anew as batches change their size: none should be. The
    tensors of a packed batch are parts of one buffer, and begin at other bytes in each."""
    sizes = [(16, 32), (17, 33), (18, 35), (21, 41), (32, 64), (33, 19)]
    again = set()
    for make in (
        lambda patients, visits: _packed_pool("mean", patients=patients, visits=visits),
        lambda patients, visits: _packed_pool("max", patients=patients, visits=visits),
        lambda patients, visits: _packed_pool("attention", patients=patients, visits=visits),
        lambda patients, visits: _packed_pool(
            "mean", patients=patients, visits=visits, weighted=True
        ),
        lambda patients, visits: _packed_loss("mean", 2, patients, visits),
        lambda patients, visits: _packed_loss("none", None, patients, visits),
        lambda patients, visits: _packed_loss("mean", 2, patients, visits, weighted=True),
        lambda patients, visits: _next_codes(visits),
        lambda patients, visits: _mass(2, True, patients=patients, visits=visits),
        lambda patients, visits: _ranking(2, True, patients=patients, visits=visits),
        lambda patients, visits: _rates("exp", True, "mean", patients, visits, weighted=True),
        lambda patients, visits: _classes(True, patients, visits),
        lambda patients, visits: _horizon(True, patients, visits),
    ):
        of_first = None
        for size in sizes:
            launches = launches_of(Case("", torch.float32, make(*size)))
            keys = {compile_launch(launch, HOPPER[0])[0]: launch.name for launch in launches}
            of_first = of_first or keys
            again |= {name for key, name in keys.items() if key not in of_first}
    return sorted(again)


def why_not() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if util.find_spec("triton") is None:
        return "triton is not installed"
    return None if tool("cuobjdump") else "there is no cuobjdump"


def compiler() -> str:
    import triton

    return f"Triton {triton.__version__}"


def table(rows: list[Kernel]) -> str:
    """The committed page."""
    return page(
        "What the Triton kernels take",
        compiler(),
        "triton",
        "From the arguments of real calls. Registers are per thread, shared memory is in bytes per "
        "block, spilled are bytes of local memory per thread, load is the widest from global "
        "memory in bits.",
        "kernel | first met in | dtype | target | warps | registers | shared | spilled | load",
        [
            (
                *(f"`{row.kernel}`", row.case, row.dtype, row.arch, row.warps),
                *(row.registers, row.shared, row.spilled, row.load_bits),
            )
            for row in rows
        ],
    )


def found() -> dict[str, Any]:
    """Every kernel, and besides what is compiled again as batches change their size."""
    with _kernels_on_the_host():
        again = compiled_again()
        rows = measure()
    return {"rows": rows, "table": table(rows), "compiled_again": again}
