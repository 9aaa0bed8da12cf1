"""What several operations and models compute and refuse alike: dtypes, options, codes, lengths."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .arrays import expect_tensor

FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
INTEGER = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
REAL = INTEGER | FLOATING | {torch.bool}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float64 for float64, and in float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect_option(name: str, value: object, options: Collection[str]) -> None:
    """``ValueError`` for anything but one of the options."""
    if not isinstance(value, str) or value not in options:
        expected = ", ".join(map(repr, options))
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def expect_floating(name: str, tensor: Tensor) -> None:
    """``TypeError`` for anything but a tensor of the four floating dtypes."""
    expect_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}"
        )


def expect_device(name: str, tensor: Tensor, device: torch.device, like: str) -> None:
    """``ValueError`` for a tensor on another device than that of the argument ``like``."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected on {device}, where {like} is, got {tensor.device}")


def codes_outside(found: int, vocabulary: int, code: int | str, where: str) -> IndexError:
    """The error of codes outside the vocabulary: their number, the first of them and its place."""
    return IndexError(
        f"Found {found} codes outside the vocabulary: expected 0 <= code < {vocabulary}. "
        f"The first is {code}: {where}."
    )


def zero_lengths(found: int, first: str) -> ValueError:
    """The error of patients without a visit: their number and the first of them."""
    return ValueError(
        f"Found {found} sequences with zero length. All sequences must have at least 1 visit. "
        f"The first is {first}."
    )


def refuse_codes_outside(
    codes: Tensor, vocabulary: int, real: Tensor | None = None, place: str = "codes{0}"
) -> None:
    """``IndexError`` for codes outside the vocabulary, where ``real`` is not 0 (anywhere by
    default). ``place`` formats the indices of the first, a list. Reads values."""
    outside = (codes < 0) | (codes >= vocabulary)
    if real is not None:
        outside &= real != 0
    found = int(outside.sum())
    if found:
        first = outside.nonzero()[0].tolist()
        raise codes_outside(found, vocabulary, int(codes[tuple(first)]), place.format(first))
