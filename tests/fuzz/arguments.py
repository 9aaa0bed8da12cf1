"""Arguments for the fuzzer: drawn from a seed, and changed for the worse.

A change either keeps what the values say (another layout: strided, expanded, at an odd place in
its storage), after which an operator has to give the same result or refuse; or it may break them,
after which it has to refuse or to compute something from what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32)
MASKS = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float32,
    torch.float64,
)
DTYPES = (*FLOATING, *INTEGER, torch.bool, torch.uint8, torch.int8, torch.int16, torch.complex64)


@dataclass
class Call:
    """One call: its arguments, and the result that valid ones have, where that is known."""

    run: Callable[..., Any]
    arguments: list[Any]
    expected: Callable[[], Any] | None = None
    changes: list[str] = field(default_factory=list)
    values_kept: bool = True

    def describe(self) -> str:
        shown = ", ".join(describe(argument) for argument in self.arguments)
        return f"({shown}); changed: {', '.join(self.changes) or 'nothing'}"


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.is_contiguous() else f" strides {list(value.stride())}"
        small = (
            f" = {value.tolist()}" if value.numel() <= 12 and not value.is_floating_point() else ""
        )
        return f"{str(value.dtype)[6:]}{list(value.shape)}{layout}{small}"
    if isinstance(value, np.ndarray):
        small = f" = {value.tolist()}" if value.size <= 12 else ""
        return f"np.{value.dtype}{list(value.shape)}{small}"
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."


class Draw:
    """Random choices that a seed decides."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def whole(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(self.random.integers(low, high + 1))

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[self.whole(0, len(choices) - 1)]

    def floats(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(self.random.standard_normal(tuple(shape))).to(dtype)

    def integers(
        self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        drawn = self.random.integers(low, max(high, low + 1), tuple(shape))
        return torch.from_numpy(np.asarray(drawn)).to(dtype)

    def mask(self, shape: Sequence[int]) -> Tensor | None:
        if self.chance(0.2):
            return None
        kept = torch.from_numpy(np.asarray(self.random.random(tuple(shape)) < 0.6))
        return kept.to(self.one_of(MASKS))


# Changes ------------------------------------------------------------------------------------------


def other_layout(draw: Draw, tensor: Tensor) -> tuple[Tensor, str]:
    """The same values in another layout."""
    kind = draw.whole(0, 4)
    if tensor.dim() == 0 or tensor.numel() == 0:
        kind = 0
    if kind == 0:  # somewhere in a larger storage, at an odd place
        storage = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
        storage[1 : 1 + tensor.numel()] = tensor.reshape(-1)
        return storage[1 : 1 + tensor.numel()].view(tensor.shape), "storage offset"
    if kind == 1:
        wide = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0], "stride 2"
    if kind == 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1), "transposed"
    if kind == 3:
        rows = tensor.flip(0).contiguous()
        return rows.index_select(0, torch.arange(len(rows) - 1, -1, -1)), "copied"
    wide = torch.zeros((tensor.shape[0] * 2, *tensor.shape[1:]), dtype=tensor.dtype)
    wide[::2] = tensor
    return wide[::2], "every second row"


def broken(draw: Draw, value: Any) -> tuple[Any, str]:  # noqa: PLR0911
    """Something else in an argument's place."""
    if isinstance(value, bool):
        return not value, "flipped"
    if isinstance(value, int):
        wrong = draw.one_of((-1, 0, 1, 2, 3, 7, -2, 100, 2**31 - 1, -(2**31), 2**40, -(2**62)))
        return wrong, f"{value} -> {wrong}"
    if isinstance(value, float):
        wrong_float = draw.one_of((-1.0, 0.0, 0.5, 2.0, float("nan"), float("inf")))
        return wrong_float, f"{value} -> {wrong_float}"
    if isinstance(value, torch.dtype):
        dtype = draw.one_of(DTYPES)
        return dtype, f"{value} -> {dtype}"
    if value is None:
        shape = [draw.whole(0, 4) for _ in range(draw.whole(0, 3))]
        dtype = draw.one_of(DTYPES)
        return torch.ones(shape, dtype=dtype), f"None -> {str(dtype)[6:]}{shape}"
    if isinstance(value, Tensor):
        return _broken_tensor(draw, value)
    return None, "None"


def _broken_tensor(draw: Draw, tensor: Tensor) -> tuple[Any, str]:  # noqa: PLR0911
    kind = draw.whole(0, 11)
    if kind == 0:
        dtype = draw.one_of(DTYPES)
        return tensor.to(dtype), f"as {str(dtype)[6:]}"
    if kind == 1:
        return tensor.new_zeros(()) if tensor.numel() == 0 else tensor.reshape(-1)[0], "0-dim"
    if kind == 2:
        return tensor[None], "one dimension more"
    if kind == 3:
        return tensor.reshape(-1), "flat"
    if kind == 4 and tensor.dim() > 0:
        dim = draw.whole(0, tensor.dim() - 1)
        size = draw.whole(0, tensor.shape[dim])
        return tensor.narrow(dim, 0, size).contiguous(), f"dimension {dim} cut to {size}"
    if kind == 5 and tensor.dim() > 0:
        dim = draw.whole(0, tensor.dim() - 1)
        return torch.cat([tensor, tensor], dim), f"dimension {dim} doubled"
    if kind == 6 and tensor.dim() > 0 and tensor.shape[0] > 0:
        return tensor[:1].expand(tensor.shape), "first row expanded"
    if kind == 7 and tensor.dim() > 0 and tensor.numel() > 1:
        storage = tensor.reshape(-1).clone()
        strides = [1] * tensor.dim()
        if sum(size - 1 for size in tensor.shape) < storage.numel():
            return storage.as_strided(tensor.shape, strides), "overlapping"
    if kind in (8, 9, 10) and tensor.numel() > 0 and not tensor.is_complex():
        return _other_value(draw, tensor)
    if kind == 11:
        return torch.zeros(0, dtype=tensor.dtype), "empty"
    return torch.zeros_like(tensor), "zeros"


def _other_value(draw: Draw, tensor: Tensor) -> tuple[Tensor, str]:
    changed = tensor.clone().contiguous()
    at = draw.whole(0, changed.numel() - 1)
    if tensor.dtype == torch.bool:
        changed.view(torch.uint8).view(-1)[at] = draw.whole(2, 255)  # True, to torch
        return changed, f"bool byte at {at}"
    if tensor.is_floating_point():
        value: float = draw.one_of((float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e30))
    else:
        limits = torch.iinfo(tensor.dtype)
        wanted = draw.one_of((-1, 0, 1, 1000, 2**31 - 1, -(2**31), 2**62, -(2**63), 255))
        value = min(max(wanted, limits.min), limits.max)
    changed.view(-1)[at] = value
    return changed, f"{value} at {at}"


def change(draw: Draw, call: Call) -> None:
    """Change up to three of the arguments, or none."""
    for _ in range(draw.one_of((0, 0, 1, 1, 1, 1, 2, 3))):
        at = draw.whole(0, len(call.arguments) - 1)
        value = call.arguments[at]
        if isinstance(value, Tensor) and draw.chance(0.35):
            call.arguments[at], what = other_layout(draw, value)
        else:
            call.arguments[at], what = broken(draw, value)
            call.values_kept = False
        call.changes.append(f"argument {at} {what}")
