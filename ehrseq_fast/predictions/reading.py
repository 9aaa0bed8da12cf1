"""What predictions read: hazards, padded or packed, checked, widened and 0 on padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arrays import expect_tensor
from ..autograd import values_are_hidden
from ..backend import validate_on_device
from ..checks import accumulator, expect_floating
from ..rows import PackedRows

SLACK = 1e-5  # how far above 1 rounding may take a sum of hazards


def padded_hazards(hazards: Tensor | PackedRows, sequence_mask: Tensor | None) -> Tensor:
    if isinstance(hazards, PackedRows):
        refuse_mask(sequence_mask)
        if hazards.values.dim() != 1:
            raise ValueError(
                f"hazards: expected PackedRows [n_visits], got {list(hazards.values.shape)}"
            )
        hazards = hazards.to_padded()
    return read(hazards, sequence_mask, 2)


def of_rows(function: Any, rows: PackedRows, mask: Tensor | None, dims: int) -> PackedRows:
    expect_rows(rows, mask, dims)
    return PackedRows(rows.batch.pack(function(rows.to_padded())), rows.batch)


def expect_rows(rows: PackedRows, mask: Tensor | None, dims: int) -> None:
    refuse_mask(mask)
    if rows.values.dim() != dims:
        expected = "[n_visits]" if dims == 1 else "[n_visits, K]"
        raise ValueError(f"hazards: expected PackedRows {expected}, got {list(rows.values.shape)}")


def refuse_mask(sequence_mask: Tensor | None) -> None:
    if sequence_mask is not None:
        raise ValueError("sequence_mask: expected None, as hazards are PackedRows, got a mask")


def read(values: Tensor, sequence_mask: Tensor | None, dims: int, name: str = "hazards") -> Tensor:
    """Checked, widened, and 0 on padding."""
    expect_floating(name, values)
    if values.dim() != dims:
        expected = "[B, V]" if dims == 2 else "[B, V, K]"
        raise ValueError(f"{name}: expected {expected}, got shape {list(values.shape)}")
    values = values.to(accumulator(values.dtype))
    if sequence_mask is not None:
        padding = padding_of(sequence_mask, values)
        values = values.masked_fill(padding.unsqueeze(2) if dims == 3 else padding, 0.0)
    check(name, values)
    return values


def padding_of(sequence_mask: Tensor, values: Tensor) -> Tensor:
    expect_tensor("sequence_mask", sequence_mask)
    if sequence_mask.shape != values.shape[:2]:
        raise ValueError(
            f"sequence_mask: expected [B, V] = {list(values.shape[:2])}, got "
            f"{list(sequence_mask.shape)}"
        )
    return sequence_mask == 0


def readable(values: Tensor) -> bool:
    """Whether values are checked: on the host, or where a GPU may be waited for."""
    if torch.compiler.is_compiling() or values_are_hidden(values):
        return False
    return values.device.type == "cpu" or validate_on_device()


def check(name: str, values: Tensor) -> None:
    """``ValueError`` for what is no probability, with the first patient."""
    if not readable(values):
        return
    wrong = (values < 0) | (values > 1)
    expected = f"{name} in [0, 1]"
    if values.dim() == 3:
        wrong = wrong.any(2) | (values.sum(2) > 1 + SLACK)
        expected = f"K {name} in [0, 1] with a sum of at most 1 at each visit"
    if bool(wrong.any()):
        patient, visit = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected {expected}, got {values[patient, visit].tolist()} (patient "
            f"{patient}, visit {visit}; {int(wrong.sum())} visits in all)"
        )


def times_of(hazards: Tensor, times: Tensor | None) -> Tensor:
    slots = hazards.shape[1]
    if not slots:
        raise ValueError("hazards: expected at least one time, got none")
    if times is None:
        return torch.arange(slots, dtype=hazards.dtype, device=hazards.device)
    # float64 stays: float32 has days since 1970 to 3 minutes, and no 365.3
    times = torch.as_tensor(times, device=hazards.device)
    times = times.to(torch.promote_types(times.dtype, hazards.dtype))
    if times.shape != (slots,):
        raise ValueError(f"times: expected [V] = [{slots}], got {list(times.shape)}")
    if not bool((times[0] >= 0) & (times.diff() > 0).all()):
        raise ValueError(f"times: expected ascending from 0 or above, got {times.tolist()[:8]}")
    return times
