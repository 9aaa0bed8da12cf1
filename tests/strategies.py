"""What hypothesis draws for the property tests: the structure; values come from a seed, with odd
ones put in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
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
WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 64, 65)
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")

seeds = st.integers(0, 2**31 - 1)
floating = st.sampled_from(FLOATING)
layouts = st.sampled_from(LAYOUTS)
widths = st.sampled_from(WIDTHS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another layout; "expanded" repeats the first row."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and tensor.dim() > 0:
        wide = tensor.new_zeros((*tensor.shape, 2))
        wide[..., 0] = tensor
        return wide[..., 0]
    if layout == "offset":
        storage = tensor.new_zeros(tensor.numel() + 1)
        storage[1:] = tensor.reshape(-1)
        return storage[1:].view(tensor.shape)
    if layout == "expanded" and tensor.dim() > 0 and tensor.shape[0] > 0:
        return tensor[:1].expand(tensor.shape)
    return tensor


def odd_values(dtype: torch.dtype) -> tuple[float, ...]:
    """Values at a dtype's limits whose sums of a few stay inside them."""
    limits = torch.finfo(dtype)
    denormal = limits.smallest_normal * limits.eps
    return (0.0, -0.0, denormal, -denormal, limits.max / 64, -limits.max / 64)


@st.composite
def values(
    draw: Any, shape: tuple[int, ...], dtype: torch.dtype, not_finite: bool = True
) -> Tensor:
    """Normal numbers, and in a third of the draws some at the dtype's limits, or none at all."""
    seed = draw(seeds)
    tensor = torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)
    kind = draw(st.sampled_from(("normal", "normal", "limits", "not finite")))
    if kind == "normal" or tensor.numel() == 0 or (kind == "not finite" and not not_finite):
        return tensor
    odd = odd_values(dtype) if kind == "limits" else (float("nan"), float("inf"), -float("inf"))
    flat = tensor.reshape(-1)
    for at in draw(st.lists(st.integers(0, flat.numel() - 1), max_size=4)):
        flat[at] = draw(st.sampled_from(odd))
    return flat.view(shape)


@st.composite
def masks(draw: Any, shape: tuple[int, ...], *, weights: bool = False) -> Tensor | None:
    """A mask of any dtype, bools of odd bytes among them, or none."""
    dtype = draw(st.sampled_from((None, *MASKS, "odd bytes")))
    if dtype is None:
        return None
    random = generator(draw(seeds))
    share = draw(st.sampled_from((0.0, 0.3, 0.7, 1.0)))
    kept = torch.rand(shape, generator=random) < share
    if dtype == "odd bytes":  # any byte but 0 is True, to torch
        any_byte = torch.randint(1, 256, shape, generator=random).to(torch.uint8)
        return torch.where(kept, any_byte, torch.zeros_like(any_byte)).view(torch.bool)
    if weights and dtype.is_floating_point and draw(st.booleans()):
        return torch.where(kept, torch.rand(shape, generator=random) * 2, 0.0).to(dtype)
    return kept.to(dtype)


@dataclass
class Lists:
    """Patients' visits as lists of codes."""

    patients: list[list[list[int]]]
    vocabulary: int

    @property
    def lengths(self) -> list[int]:
        return [len(visits) for visits in self.patients]


@st.composite
def records(draw: Any, *, most_patients: int = 6) -> Lists:
    """Records with empty visits and with codes that a visit holds twice."""
    vocabulary = draw(st.integers(1, 9))
    visit = st.lists(st.integers(0, vocabulary - 1), max_size=5)
    patient = st.lists(visit, min_size=1, max_size=5)
    return Lists(draw(st.lists(patient, min_size=1, max_size=most_patients)), vocabulary)
