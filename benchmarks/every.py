"""Every public operation in every mode, dtype and layout, and with masks of every dtype, each
against its definition in plain PyTorch: so that nothing is slow where nobody looks.

Small cases of one size: 50 patients, 40 visits, 20 codes for pooling; 4,096 patients of up to 200
visits for the losses; 64 patients for the LSTM. A test (``tests/test_benchmark_rows.py``) fails
when a public operation, a mode, a dtype or a mask has no row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ehrseq_fast import (
    PackedVisits,
    competing_risks_nll,
    discrete_time_survival_nll,
    masked_pool,
    packed_competing_risks_nll,
    packed_lstm,
    packed_survival_nll,
    packed_visit_pool,
    visit_mean_pool,
)
from ehrseq_fast.models.head import hazards_of, run_network
from ehrseq_fast.models.survival_lstm import hazard_head
from ehrseq_fast.packed_lstm import reference as lstm_reference
from ehrseq_fast.survival_nll import reference as nll_reference
from ehrseq_fast.visit_pool import reference as pool_reference

from .cases import OURS, Case, Missing, Tensors, Variant, our_backends, ours
from .devices import Device

WORKLOAD = "every"
REFERENCE = "plain PyTorch"
MODES = ("mean", "sum", "max")
LINKS = ("probabilities", "sigmoid", "softmax")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MASKS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float64: 1e-9,
    torch.bfloat16: 4e-2,
    torch.float16: 1e-2,
}
CAUSES = 3


@dataclass(frozen=True)
class Size:
    """Patients, visits and codes; the width of a table; patients and visits of the losses; patients
    and width of the LSTM."""

    patients: int = 50
    visits: int = 40
    codes: int = 20
    vocabulary: int = 2000
    width: int = 64
    loss_patients: int = 4096
    loss_visits: int = 200
    lstm_patients: int = 64
    hidden: int = 64


QUICK = Size(4, 5, 3, 20, 8, 16, 10, 4, 8)


@dataclass(frozen=True)
class Entry:
    """What one case is about.

    Attributes:
        function: the public operation, by its name in the package, or what the models call.
        mode: of pooling, the link of a loss, the direction of the LSTM, or the kind of network.
        dtype: of what is computed.
        mask: the mask's dtype; None where there is no mask.
        operations: as ``backend.operations()`` names them.
    """

    function: str
    mode: str
    dtype: torch.dtype
    mask: torch.dtype | None
    operation: str

    @property
    def title(self) -> str:
        mask = "" if self.mask in (None, torch.bool) else f", {_name(self.mask)} mask"
        return f"{self.function}, {self.mode}{mask}"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).split(".")[1]


def entries() -> Iterator[Entry]:
    """Every case that there is to be."""
    for dtype in DTYPES:
        for mode in MODES:
            yield Entry("visit_mean_pool", mode, dtype, torch.bool, "visit_pool")
            yield Entry("masked_pool", mode, dtype, torch.bool, "masked_pool")
            yield Entry("packed_visit_pool", mode, dtype, None, "packed_visit_pool")
        yield Entry("packed_visit_pool", "attention", dtype, None, "packed_attention_pool")
        for link in LINKS:
            if link != "softmax":
                yield Entry("discrete_time_survival_nll", link, dtype, torch.bool, "survival_nll")
                yield Entry("packed_survival_nll", link, dtype, None, "packed_survival_nll")
            yield Entry("competing_risks_nll", link, dtype, torch.bool, "survival_nll")
            yield Entry("packed_competing_risks_nll", link, dtype, None, "packed_survival_nll")
        yield Entry("packed_lstm", "one direction", dtype, None, "packed_lstm")
        yield Entry("packed_lstm", "both directions", dtype, None, "packed_lstm")
    for dtype in DTYPES[:2]:
        yield Entry("hazards_of", "head", dtype, None, "hazard_head")
        yield Entry("run_network", "tanh", dtype, None, "linear")
    for mask in MASKS[1:]:
        yield Entry("visit_mean_pool", "mean", torch.float32, mask, "visit_pool")
        yield Entry("masked_pool", "mean", torch.float32, mask, "masked_pool")
        yield Entry("discrete_time_survival_nll", "sigmoid", torch.float32, mask, "survival_nll")
        yield Entry("competing_risks_nll", "sigmoid", torch.float32, mask, "survival_nll")


def case(entry: Entry, device: Device, *, quick: bool = False, backend: str | None = None) -> Case:
    """Forward and backward of one entry, ours and the definition."""
    size = QUICK if quick else Size()
    special = {"packed_lstm": _lstm, "hazards_of": _network, "run_network": _network}
    make = special.get(entry.function, _nll if "nll" in entry.function else _pool)
    plain, ours_way, leaves = make(entry, size, device.name)
    on = our_backends(entry.operation, device.name, entry.dtype, backend)
    variants: dict[str, Variant | Missing] = {REFERENCE: _variant(plain, leaves)}
    variants.update(ours(OURS, on, lambda: _variant(ours_way, leaves)))
    patients = size.patients
    if make not in (_pool, _network):
        patients = size.loss_patients if make is _nll else size.lstm_patients
    return Case(
        *(entry.title, WORKLOAD, patients, "forward+backward", _name(entry.dtype)),
        variants,
        TOLERANCE[entry.dtype],
    )


Way = Callable[[], Tensor]


def _variant(way: Way, leaves: list[Tensor]) -> Variant:
    with torch.no_grad():
        incoming = torch.ones_like(way())
    generator = torch.Generator().manual_seed(1)
    if incoming.dim():
        drawn = torch.rand(incoming.shape, generator=generator) + 0.5
        incoming = drawn.to(incoming)

    def run() -> Tensors:
        result = way()
        return result.detach(), *torch.autograd.grad(result, leaves, incoming.to(result.dtype))

    return Variant(run)


@cache
def _batch(size: Size, device: str) -> PackedVisits:
    generator = torch.Generator().manual_seed(0)
    shape = (size.patients, size.visits, size.codes)
    codes = torch.randint(1, size.vocabulary, shape, generator=generator)
    return PackedVisits.from_padded(codes, vocab_size=size.vocabulary).to(device)


def _pool(entry: Entry, size: Size, device: str) -> tuple[Way, Way, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batch = _batch(size, device)
    drawn = torch.randn(size.vocabulary, size.width, generator=generator)
    table = drawn.to(device, entry.dtype).requires_grad_()
    if entry.function == "packed_visit_pool":
        options: dict[str, Any] = {"mode": entry.mode}
        leaves = [table]
        if entry.mode == "attention":
            scores = torch.randn(size.vocabulary, generator=generator).to(device, entry.dtype)
            options["scores"] = scores.requires_grad_()
            leaves.append(scores)

        def plain() -> Tensor:
            return pool_reference.packed_visit_pool(
                batch.codes, batch.code_offsets, table, **options
            )

        return plain, lambda: packed_visit_pool(batch, table, **options), leaves
    codes = batch.to_padded()[0]
    mask = (torch.rand(codes.shape, generator=generator) < 0.7).to(device, entry.mask)
    mode = entry.mode
    if entry.function == "masked_pool":
        embeddings = table.detach()[codes].requires_grad_()
        return (
            lambda: pool_reference.masked_pool(embeddings, mask, mode=mode),
            lambda: masked_pool(embeddings, mask, mode=mode),
            [embeddings],
        )
    return (
        lambda: pool_reference.visit_mean_pool(codes, table, mask, mode=mode),
        lambda: visit_mean_pool(codes, table, mask, mode=mode),
        [table],
    )


def _nll(entry: Entry, size: Size, device: str) -> tuple[Way, Way, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    patients, slots = size.loss_patients, size.loss_visits
    competing = "competing" in entry.function
    lengths = torch.randint(1, slots + 1, (patients,), generator=generator)
    lengths[0] = slots
    mask = torch.arange(slots) < lengths[:, None]
    times = (torch.rand(patients, generator=generator) * lengths).long().to(device)
    types = torch.randint(0, 1 + (CAUSES if competing else 1), (patients,), generator=generator)
    types = types.to(device)
    width = (CAUSES + (entry.mode == "softmax"),) if competing else ()
    drawn = torch.randn(patients, slots, *width, generator=generator)
    if entry.mode == "probabilities":
        drawn = drawn.sigmoid().clamp(0.01, 0.99)
    options: dict[str, Any] = {"from_logits": entry.mode != "probabilities"}
    if competing:
        options["link"] = "softmax" if entry.mode == "softmax" else "sigmoid"
    definition = (
        nll_reference.competing_risks_nll if competing else nll_reference.discrete_time_survival_nll
    )
    given = mask.to(device, entry.mask or torch.bool)
    if not entry.function.startswith("packed"):
        hazards = drawn.to(device, entry.dtype).requires_grad_()
        loss = competing_risks_nll if competing else discrete_time_survival_nll
        arguments = (hazards, times, types, given)
        return (
            lambda: definition(*arguments, **options),
            lambda: loss(*arguments, **options),
            [hazards],
        )
    batch = PackedVisits.from_lists([[[]] * int(n) for n in lengths]).to(device)
    rows = batch.pack(drawn.to(device, entry.dtype)).requires_grad_()
    packed_loss = packed_competing_risks_nll if competing else packed_survival_nll
    kinds = {"event_types" if competing else "event_indicators": types}
    return (
        lambda: definition(batch.pad(rows), times, types, given, **options),
        lambda: packed_loss(rows, batch, event_times=times, **kinds, **options),  # type: ignore[operator]
        [rows],
    )


def _lstm(entry: Entry, size: Size, device: str) -> tuple[Way, Way, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, size.visits // 2 + 2, (size.lstm_patients,), generator=generator)
    batch = PackedVisits.from_lists([[[]] * int(n) for n in lengths])
    directions = 2 if entry.mode == "both directions" else 1

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator) * 0.2
        return values.to(device, entry.dtype).requires_grad_()

    rows = drawn(batch.n_visits, size.hidden)
    gates = 4 * size.hidden
    weights = [
        [drawn(gates, size.hidden), drawn(gates, size.hidden), drawn(gates), drawn(gates)]
        for _ in range(directions)
    ]

    def plain() -> Tensor:
        outputs = [
            lstm_reference.packed_lstm_layer(
                _wide(rows), batch.batch_sizes, *map(_wide, layer), reverse=at > 0
            )[0]
            for at, layer in enumerate(weights)
        ]
        return torch.cat(outputs, 1).to(entry.dtype)

    def packed() -> Tensor:
        sequence = batch.to(device).as_packed_sequence(rows)
        return packed_lstm(sequence, weights, bidirectional=directions == 2)[0].data

    return plain, packed, [rows, *(weight for layer in weights for weight in layer)]


def _network(entry: Entry, size: Size, device: str) -> tuple[Way, Way, list[Tensor]]:
    """What the models run on rows of visits: their heads and small networks, called and read."""
    torch.manual_seed(0)
    width = size.width
    if entry.function == "hazards_of":
        network: nn.Module = hazard_head(width, width, 0.0)
    else:
        network = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    network = network.to(device, entry.dtype)
    rows = torch.randn(size.patients * size.visits, width).to(device, entry.dtype).requires_grad_()
    read = hazards_of if entry.function == "hazards_of" else run_network
    return (
        lambda: network(rows),
        lambda: read(network, rows),
        [rows, *network.parameters()],
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
