"""A packed recurrent layer alone, against every way that PyTorch has, and against its own products.

:class:`Layer` says which one; ``packed_lstm.py`` and its like make benchmarks of theirs with
:func:`benchmark`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ehrseq_fast import PackedVisits

from .cases import OURS, Case, Missing, Tensors, Variant, dtype_name, our_backends, ours
from .ceilings import Work
from .devices import Cpu, Device
from .jobs import Benchmark, Job, Session, Settings, of_case
from .machine import has_amx
from .modes import DTYPES, Mode, Size, Ways
from .report import times
from .results import Results
from .targets import Figure, Target, at_least, at_most, ratio
from .workloads import Batch

PRODUCTS = "its products alone"
READING = "reading the weights each step"
LOGNORMAL = "log-normal lengths"

INPUTS, HIDDEN = 128, 256
# cuDNN's persistent kernels take padded chunks of at most this many patients, in half precision.
CHUNK = 128
# oneDNN approximates the activations.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}

TRAINED = "forward+backward"
BUCKETS = (0.5, 0.3, 0.1)
ONE, BOTH = "one direction", "both directions"
PACKED_ROWS_NOTE = (
    "PyTorch's layer is given rows packed beforehand, its best case; packing and padding included "
    "it takes several times longer (cpu.md). The layer takes about as long as torch.mm takes for "
    "its products alone (the targets over its own products): there is little left to gain on this "
    "CPU"
)

Part = tuple[slice, slice]  # visits and patients of a padded batch


@dataclass(frozen=True)
class Layer:
    """A kind of recurrent layer.

    Attributes:
        name: of PyTorch's in ``torch.nn``.
        gates: rows of its weights per hidden unit.
        fast: this package's module.
        function: this package's function, ``(sequence, weights, bidirectional=...)``.
        reference: the definition of one direction, ``(rows, batch_sizes, *weights, reverse=...)``.
        share: of the time for its targets that a whole run gives it. Below 1, these are all that is
            measured: what else there is to say of the layers' common kernels, one of them says.
    """

    name: str
    gates: int
    fast: Callable[[int, int], nn.RNNBase]
    function: Callable[..., tuple[PackedSequence, Any]]
    reference: Callable[..., tuple[Tensor, ...]]
    share: float = 1.0

    @property
    def plain(self) -> Callable[[int, int], nn.RNNBase]:
        return getattr(nn, self.name)

    @property
    def operation(self) -> str:
        """As the registry of operations names it."""
        return self.function.__name__

    @property
    def title(self) -> str:
        """What its rows' operation is."""
        return f"packed {self.name}"

    @property
    def rows(self) -> str:
        """The variant that the targets are held against."""
        return f"nn.{self.name}, packed rows"


def lognormal_lengths(patients: int) -> Tensor:
    """Median 8, sigma 1.1, at most 200, as records of patients are; longest first."""
    draws = torch.randn(patients, generator=torch.Generator().manual_seed(0))
    lengths = torch.exp(torch.tensor(8.0).log() + 1.1 * draws).round().clamp(1, 200)
    return lengths.long().sort(descending=True).values


class Inputs:
    """One batch of records in every form that the variants take, and one layer's weights."""

    def __init__(
        self,
        layer: Layer,
        lengths: Tensor,
        inputs: int,
        hidden: int,
        dtype: torch.dtype,
        on: str,
    ) -> None:
        self.layer = layer
        self.lengths = lengths.sort(descending=True).values
        self.times, self.dtype = int(self.lengths[0]), dtype
        shape = (self.times, len(lengths))
        torch.manual_seed(0)
        self.plain = layer.plain(inputs, hidden).to(on, dtype)
        self.fast = layer.fast(inputs, hidden).to(on, dtype)
        self.fast.load_state_dict(self.plain.state_dict())
        alive = (torch.arange(self.times)[:, None] < self.lengths).unsqueeze(-1)
        self.padded = (torch.randn(*shape, inputs) * alive).to(on, dtype)
        self.gradient = (torch.randn(*shape, hidden) * alive).to(on, dtype)
        self.packed = self.pack(self.padded)

    def pack(self, padded: Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, self.lengths)

    def alike(self, within: float) -> Iterator[Part]:
        """Patients whose lengths lie within that share of the longest among them."""
        first = 0
        while first < len(self.lengths):
            times = int(self.lengths[first])
            end = int((self.lengths >= (1 - within) * times).sum())
            yield slice(0, times), slice(first, end)
            first = end

    def chunks(self) -> Iterator[Part]:
        for first in range(0, len(self.lengths), CHUNK):
            yield slice(0, int(self.lengths[first])), slice(first, first + CHUNK)


def case(
    layer: Layer,
    lengths: Tensor,
    device: Device,
    *,
    workload: str,
    phase: str = TRAINED,
    dtype: torch.dtype = torch.float32,
    inputs: int = INPUTS,
    hidden: int = HIDDEN,
    backend: str | None = None,
) -> Case:
    """The ways to run one layer, compared as packed rows and gradients of input and weights.

    PyTorch's layer gets the padded tensors, buckets or packed rows ready made, save in "pack, …,
    pad", where making them is part of the job. "Its products alone" are the products of the layer
    over all visits at once, by ``torch.mm`` into memory that is there: two forward, six with the
    backward pass. "Reading the weights each step" is one ``torch.mv`` with the recurrent weights
    per step (two with the backward pass): what a batch of few patients cannot go below.
    """
    given = Inputs(layer, lengths, inputs, hidden, dtype, device.name)
    flops = 2 * layer.gates * hidden * (inputs + hidden) * int(lengths.sum())
    products = Work(
        flops=flops * (3 if phase == TRAINED else 1),
        dtype="float32" if dtype == torch.float32 else "bfloat16",
    )
    return Case(
        layer.title,
        workload,
        len(lengths),
        phase,
        dtype_name(dtype),
        dict(_variants(given, device, phase == TRAINED, backend)),
        TOLERANCE[dtype],
        work=products,
    )


def _variants(
    given: Inputs, device: Device, backward: bool, backend: str | None
) -> Iterator[tuple[str, Variant | Missing]]:
    plain, fast, sizes = given.plain, given.fast, given.packed.batch_sizes
    theirs = f"nn.{given.layer.name}"

    def variant(
        module: nn.RNNBase,
        inputs: list[Tensor],
        gradients: list[Tensor],
        forward: Callable[[Tensor], Tensor],
        rows: Callable[[list[Tensor], Tensor], Tensor],
    ) -> Variant:
        """``rows(parts, like)`` makes packed rows of one result per input, shaped as ``like``."""
        count = len(inputs)

        def forward_only() -> Tensors:
            with torch.no_grad():
                return [forward(x) for x in inputs]

        def forward_backward() -> Tensors:
            outputs = [forward(x) for x in inputs]
            grads = torch.autograd.grad(outputs, [*inputs, *module.parameters()], gradients)
            return [*(out.detach() for out in outputs), *grads]

        def common(results: Tensors) -> Tensors:
            outputs = rows(list(results[:count]), given.gradient)
            if not backward:
                return [outputs]
            return [
                outputs,
                rows(list(results[count : 2 * count]), given.padded),
                *results[2 * count :],
            ]

        if backward:
            inputs = [x.detach().requires_grad_() for x in inputs]
        return Variant(forward_backward if backward else forward_only, common)

    def packed_between(x: Tensor) -> Tensor:
        return pad_packed_sequence(plain(pack_padded_sequence(x, given.lengths))[0])[0]

    def already(parts: list[Tensor], like: Tensor) -> Tensor:
        return parts[0]

    def from_padded(parts: list[Tensor], like: Tensor) -> Tensor:
        return given.pack(parts[0]).data

    def padded_parts(name: str, cuts: list[Part]) -> tuple[str, Variant]:
        def merged(parts: list[Tensor], like: Tensor) -> Tensor:
            whole = torch.zeros_like(like)
            for (visits, who), part in zip(cuts, parts, strict=True):
                whole[visits, who] = part
            return given.pack(whole).data

        inputs, gradients = (
            [tensor[visits, who].contiguous() for visits, who in cuts]
            for tensor in (given.padded, given.gradient)
        )
        return name, variant(plain, inputs, gradients, lambda x: plain(x)[0], merged)

    data, incoming = given.packed.data, given.pack(given.gradient).data
    whole, whole_incoming = [given.padded], [given.gradient]
    yield (
        given.layer.rows,
        variant(
            plain, [data], [incoming], lambda x: plain(PackedSequence(x, sizes))[0].data, already
        ),
    )

    def fused() -> Variant:
        return variant(
            fast, [data], [incoming], lambda x: fast(PackedSequence(x, sizes))[0].data, already
        )

    yield from ours(
        OURS, our_backends(given.layer.operation, device.name, given.dtype, backend), fused
    )
    for name, run in _floors(given, backward).items():
        yield name, Variant(run, compared=False)
    yield f"pack, {theirs}, pad", variant(plain, whole, whole_incoming, packed_between, from_padded)
    padded = variant(plain, whole, whole_incoming, lambda x: plain(x)[0], from_padded)
    yield f"{theirs}, padded", padded
    for within in BUCKETS:
        yield padded_parts(f"{theirs}, lengths within {within:.0%}", list(given.alike(within)))
    yield padded_parts(f"{theirs}, sorted chunks of {CHUNK}", list(given.chunks()))


def _floors(given: Inputs, backward: bool) -> dict[str, Callable[[], Tensors]]:
    """The products of a layer over all visits at once, and reading its weights at each step."""
    weight_ih, weight_hh = (w.detach() for w in given.plain.all_weights[0][:2])
    x = given.packed.data
    h = torch.randn(len(x), weight_hh.shape[1]).to(x)
    gates = torch.randn(len(x), len(weight_hh)).to(x)
    out_gates, out_x, out_h = (torch.empty_like(t) for t in (gates, x, h))
    out_ih, out_hh = torch.empty_like(weight_ih), torch.empty_like(weight_hh)

    def products() -> Tensors:
        torch.mm(x, weight_ih.t(), out=out_gates)
        torch.mm(h, weight_hh.t(), out=out_gates)
        if backward:
            torch.mm(gates, weight_hh, out=out_h)
            torch.mm(gates, weight_ih, out=out_x)
            torch.mm(gates.t(), x, out=out_ih)
            torch.mm(gates.t(), h, out=out_hh)
        return []

    state, gate = h[0].clone(), gates[0].clone()

    def reading() -> Tensors:
        for _ in range(given.times):
            torch.mv(weight_hh, state, out=gate)
            if backward:
                torch.mv(weight_hh.t(), gate, out=state)
        return []

    return {PRODUCTS: products, READING: reading}


def jobs(layer: Layer, settings: Settings) -> Iterator[Job]:
    sizes = (16, 32) if settings.quick else (INPUTS, HIDDEN)

    def job(weight: float, patients: int | str, for_target: bool = False, **options: Any) -> Job:
        """Of so many synthetic records, or of a workload's."""

        def make(session: Session) -> Case:
            if isinstance(patients, str):
                lengths, workload = session.batch(patients).packed.lengths, patients
            else:
                lengths, workload = lognormal_lengths(patients), LOGNORMAL
            return case(
                layer,
                lengths,
                session.device,
                workload=workload,
                inputs=sizes[0],
                hidden=sizes[1],
                backend=settings.backend,
                **options,
            )

        return of_case(f"{layer.title} {patients}", weight, make, for_target=for_target)

    few, many = (16, 32) if settings.quick else (256, 1024)
    on_cpu = settings.device == "cpu"
    yield job(30 * layer.share, few, for_target=on_cpu)
    yield job(100 * layer.share, many, for_target=on_cpu)
    if layer.share < 1:
        return
    yield job(12, few, phase="forward")
    yield job(22, many, phase="forward")
    yield job(25, settings.main_workload)
    if settings.serves(torch.bfloat16):
        yield job(25, few, for_target=on_cpu and has_amx(), dtype=torch.bfloat16)
    if not on_cpu:
        yield job(10, few, dtype=torch.float16)
        yield job(10, many, dtype=torch.float16)


def _of_mode(layer: Layer, mode: Mode, size: Size, device: str) -> Ways:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, size.visits // 2 + 2, (size.layer_patients,), generator=generator)
    batch = PackedVisits.from_lists([[[]] * int(n) for n in lengths])
    directions = 2 if mode.mode == BOTH else 1

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator) * 0.2
        return values.to(device, mode.dtype).requires_grad_()

    rows = drawn(batch.n_visits, size.hidden)
    gates = layer.gates * size.hidden
    weights = [
        [drawn(gates, size.hidden), drawn(gates, size.hidden), drawn(gates), drawn(gates)]
        for _ in range(directions)
    ]

    def plain() -> Tensor:
        outputs = [
            layer.reference(_wide(rows), batch.batch_sizes, *map(_wide, direction), reverse=at > 0)[
                0
            ]
            for at, direction in enumerate(weights)
        ]
        return torch.cat(outputs, 1).to(mode.dtype)

    def packed() -> Tensor:
        sequence = batch.to(device).as_packed_sequence(rows)
        return layer.function(sequence, weights, bidirectional=directions == 2)[0].data

    leaves = [rows, *(weight for direction in weights for weight in direction)]
    return Ways(plain, packed, leaves, size.layer_patients)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def wanted(layer: Layer, patients: int, dtype: str = "float32") -> dict[str, Any]:
    """The row that the targets are read from."""
    return {
        "operation": layer.title,
        "workload": LOGNORMAL,
        "phase": TRAINED,
        "dtype": dtype,
        "patients": patients,
    }


def _over_products(layer: Layer, patients: int) -> Callable[[Results], Figure]:
    def measure(results: Results) -> Figure:
        rows = results.of(**wanted(layer, patients))
        return at_most(rows[OURS].median / rows[PRODUCTS].median, 1.4)

    return measure


def _bfloat16(layer: Layer, results: Results) -> Figure | str:
    rows = results.of(**wanted(layer, 256, "bfloat16"))
    faster = results.of(**wanted(layer, 256))[OURS].median / rows[OURS].median
    if not results.machine.get("amx"):
        return f"{times(faster)}, on a CPU without AMX, where no bound holds"
    return at_least(faster, 3)


def _targets(layer: Layer) -> Iterator[Target]:
    name = f"{layer.title}, forward and backward, H {HIDDEN}"
    for patients, least in ((256, 10), (1024, 30)):
        yield Target(
            "cpu",
            f"{name}, B {patients}: against {layer.rows.replace(', ', ' on ')}",
            f"≥ {least}x",
            ratio(least, layer.rows, OURS, **wanted(layer, patients)),
            PACKED_ROWS_NOTE,
        )
    for patients in (256, 1024):
        what = f"{name}, B {patients}: over its own products"
        yield Target("cpu", what, "≤ 1.4x", _over_products(layer, patients))
    what = f"{name}, B 256: bfloat16 against float32"
    yield Target("cpu", what, "≥ 3x with AMX", partial(_bfloat16, layer))


def small(layer: Layer, batch: Batch) -> Case:
    lengths = batch.packed.lengths
    return case(layer, lengths, Cpu(), workload=batch.workload, inputs=64, hidden=64)


def benchmark(layer: Layer) -> Benchmark:
    """All that is measured and said of a layer."""
    modes: Sequence[Mode] = [
        Mode(layer.operation, mode, dtype, layer.operation, partial(_of_mode, layer))
        for dtype in DTYPES
        for mode in (ONE, BOTH)
    ]
    return Benchmark(
        jobs={"ops": partial(jobs, layer)},
        modes=tuple(modes),
        small=partial(small, layer),
        readme={"cpu": [wanted(layer, patients) for patients in (256, 1024)]},
        page={layer.title: None},
        targets=tuple(_targets(layer)),
    )
