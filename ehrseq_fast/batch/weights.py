"""Weights per code: read in the shape of the codes, and put into the order of a batch's codes."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, kind_of
from .gather import HOST, as_tensor, as_values, gather
from .rows import Rows


def weights_of_codes(code_weights: Any, shape: tuple[int, ...]) -> Tensor | Array:
    """A tensor or an array, checked, not copied."""
    weights = as_values("code_weights", code_weights)
    if tuple(weights.shape) != shape:
        raise ValueError(
            f"code_weights: expected one weight per code, shape {list(shape)}, got "
            f"{list(weights.shape)}"
        )
    floating = (
        weights.is_floating_point() if isinstance(weights, Tensor) else weights.dtype.kind == "f"
    )
    if not floating:
        raise TypeError(f"code_weights: expected a floating dtype, got {weights.dtype}")
    return weights


def gather_weights(
    weights: Tensor | Array,
    rows: Array,
    offsets: Array,
    batch_offsets: Tensor,
    device: torch.device = HOST,
) -> Tensor:
    """A copy in the order of a batch's codes. Its row ``r`` is visit ``rows[r]``, whose weights
    begin at ``offsets[rows[r]]``; the batch's ``code_offsets`` lie on the host."""
    begins = batch_offsets.numpy().astype(np.int64)
    shift = np.asarray(offsets)[rows].astype(np.int64) - begins[:-1]
    places = np.repeat(shift, np.diff(begins)) + np.arange(begins[-1])
    return gather(weights, places, device)


def listed_weights(
    code_weights: Any, lengths: Sequence[int], rows: Array, batch_offsets: Tensor
) -> Tensor:
    """Weights of codes that came as lists, in the order of the batch's codes: nested like these, or
    flat, patient after patient. Python numbers have torch's default dtype."""
    counts = np.zeros(len(rows), np.int64)  # codes of each visit, patient after patient
    counts[rows] = np.diff(batch_offsets.numpy())
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if isinstance(code_weights, (list, tuple)) and not _is_flat(code_weights):
        code_weights = _flattened(code_weights, lengths, counts.tolist())
    elif isinstance(code_weights, (list, tuple)):
        code_weights = torch.tensor(code_weights, dtype=torch.get_default_dtype(), device=HOST)
    weights = weights_of_codes(code_weights, (int(offsets[-1]),))
    return gather_weights(weights, rows, offsets, batch_offsets)


def _is_flat(values: Sequence[Any]) -> bool:
    return len(values) > 0 and isinstance(values[0], numbers.Real)


def _flattened(nested: Sequence[Any], lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    if len(nested) != len(lengths):
        raise ValueError(
            f"code_weights: expected one sequence for each of {len(lengths)} patients, got "
            f"{len(nested)}"
        )
    parts: list[Any] = []
    visits = iter(counts)
    for patient, (weights, length) in enumerate(zip(nested, lengths, strict=True)):
        if not hasattr(weights, "__len__") or len(weights) != length:
            raise ValueError(
                f"code_weights: expected one sequence per visit (patient {patient}: expected "
                f"{length}, got {len(weights) if hasattr(weights, '__len__') else weights!r})"
            )
        for visit, (of_visit, count) in enumerate(zip(weights, visits, strict=False)):
            found = len(of_visit) if hasattr(of_visit, "__len__") else kind_of(of_visit)
            if found != count:
                raise ValueError(
                    f"code_weights: expected one weight per code (patient {patient}, visit "
                    f"{visit}: expected {count}, got {found})"
                )
            parts.append(of_visit)
    if all(isinstance(part, (list, tuple)) for part in parts):
        flat = [weight for part in parts for weight in part]
        for weight in flat:
            if not isinstance(weight, numbers.Real):
                raise TypeError(f"code_weights: expected numbers, got {kind_of(weight)}")
        return torch.tensor(flat, dtype=torch.get_default_dtype(), device=HOST)
    tensors = [
        torch.tensor(part, dtype=torch.get_default_dtype(), device=HOST)
        if isinstance(part, (list, tuple))
        else as_tensor(as_values("code_weights", part), HOST)
        for part in parts
    ]
    return torch.cat(tensors)


def checked_padded(code_weights: Any, visit_codes: Tensor) -> Tensor:
    """Weights ``[B, V, C]`` where ``visit_codes`` are."""
    checked = weights_of_codes(code_weights, tuple(visit_codes.shape))
    return as_tensor(checked, visit_codes.device)


def padded_weights(weights: Tensor, visit_mask: Tensor | None, batch: Rows) -> Tensor:
    """The weights of the batch's codes, from those of its rows' slots and their mask, ``[n_visits,
    C]``. Differentiable; no wait for the device."""
    if visit_mask is None:
        return weights.flatten()
    real = (visit_mask != 0).flatten()
    slots = torch.arange(len(real), device=real.device)
    # all slots but the real ones go to one place past the end
    place = torch.where(real, real.cumsum(0) - 1, batch.n_codes)
    slot_of_code = slots.new_zeros(batch.n_codes + 1).scatter_(0, place, slots)[:-1]
    return weights.flatten().index_select(0, slot_of_code)
