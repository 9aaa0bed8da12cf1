"""Every public operation in every mode, dtype and layout, and with masks of every dtype, each
against its definition in plain PyTorch, so that a slow one is seen.

Small cases of one size: 50 patients, 40 visits, 20 codes for pooling; 4,096 patients of up to 200
visits for the losses; 64 patients for recurrent layers. Each operation's module exports its own
modes. A test (``tests/test_benchmark_rows.py``) fails when a public operation, a mode, a dtype or a
mask has no row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import OURS, Case, Missing, Variant, dtype_name, our_backends, ours, run_of
from .devices import Device

WORKLOAD = "every"
REFERENCE = "plain PyTorch"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUMERIC_MASKS = (
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


@dataclass(frozen=True)
class Size:
    """Patients, visits and codes; the width of a table; patients and visits of the losses; patients
    and width of recurrent layers."""

    patients: int = 50
    visits: int = 40
    codes: int = 20
    vocabulary: int = 2000
    width: int = 64
    loss_patients: int = 4096
    loss_visits: int = 200
    layer_patients: int = 64
    hidden: int = 64


QUICK = Size(4, 5, 3, 20, 8, 16, 10, 4, 8)

Way = Callable[[], Tensor]


@dataclass(frozen=True)
class Ways:
    """The definition and this package's way to one result, and what gradients are taken of."""

    plain: Way
    fused: Way
    leaves: list[Tensor]
    patients: int


@dataclass(frozen=True)
class Mode:
    """What one case is about.

    Attributes:
        function: the public operation, by its name in the package, or what the models call.
        mode: of pooling, the link of a loss, the direction of a layer, or the kind of network.
        dtype: of what is computed.
        operation: as the registry of operations names it.
        make: the ways to compute it on a device.
        mask: the mask's dtype; None where there is no mask.
    """

    function: str
    mode: str
    dtype: torch.dtype
    operation: str
    make: Callable[[Mode, Size, str], Ways]
    mask: torch.dtype | None = None

    @property
    def title(self) -> str:
        numeric = self.mask is not None and self.mask != torch.bool
        mask = f", {dtype_name(self.mask)} mask" if numeric else ""
        return f"{self.function}, {self.mode}{mask}"


def case(mode: Mode, device: Device, *, quick: bool = False, backend: str | None = None) -> Case:
    """Forward and backward of one mode, ours and the definition."""
    ways = mode.make(mode, QUICK if quick else Size(), device.name)
    on = our_backends(mode.operation, device.name, mode.dtype, backend)
    variants: dict[str, Variant | Missing] = {REFERENCE: _variant(ways.plain, ways.leaves)}
    variants.update(ours(OURS, on, lambda: _variant(ways.fused, ways.leaves)))
    return Case(
        *(mode.title, WORKLOAD, ways.patients, "forward+backward", dtype_name(mode.dtype)),
        variants,
        TOLERANCE[mode.dtype],
    )


def _variant(way: Way, leaves: list[Tensor]) -> Variant:
    with torch.no_grad():
        incoming = torch.ones_like(way())
    generator = torch.Generator().manual_seed(1)
    if incoming.dim():
        drawn = torch.rand(incoming.shape, generator=generator) + 0.5
        incoming = drawn.to(incoming)
    return Variant(run_of(way, leaves, incoming))
