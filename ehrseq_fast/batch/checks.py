"""Shapes and dtypes of what a batch is built from; values are the builder's to check."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .layout import MOST_CODES

Array = npt.NDArray[Any]
ArrayLike = Any  # a NumPy array, memory-mapped or not, a tensor, or nested lists of numbers


def listed(patients: Any) -> list[Any]:
    try:
        return list(patients)
    except TypeError:
        raise TypeError(
            f"patients: expected a sequence of patients, got {type(patients).__name__}."
        ) from None


def code_limit(vocab_size: int | None) -> int:
    if vocab_size is None:
        return MOST_CODES
    limit = operator.index(vocab_size)
    if not 1 <= limit <= MOST_CODES:
        raise ValueError(f"vocab_size: expected 1 to {MOST_CODES}, got {limit}")
    return limit


def as_array(values: ArrayLike) -> Array:
    """A view as a NumPy array wherever that is possible; memory-mapped arrays stay on disk. What
    lies on a GPU is copied to the host, where batches are built."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    return np.asarray(values)


def integers(name: str, values: ArrayLike) -> Array:
    array = as_array(values)
    if array.size == 0:
        array = array.astype(np.int64)  # an empty list has no dtype of its own
    if array.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {list(array.shape)}")
    if array.dtype not in (np.int64, np.int32):
        raise TypeError(f"{name}: expected int32 or int64, got {array.dtype}")
    return array


def offsets(name: str, values: ArrayLike) -> Array:
    array = integers(name, values)
    if array.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one offset (a 0), got an empty array")
    return array


def patient_numbers(patients: ArrayLike) -> Array:
    return np.ascontiguousarray(integers("patients", patients), np.int64)


def outcomes_of(
    times: ArrayLike | None,
    indicators: ArrayLike | None,
    types: ArrayLike | None,
    n_records: int,
    chosen: Array | None = None,
) -> tuple[Array | None, Array | None, Array | None]:
    """The outcomes of the chosen patients as int64, in the order of ``OUTCOMES``."""
    if times is None and indicators is None and types is None:
        return None, None, None
    return (
        outcome("event_times", times, n_records, chosen),
        outcome("event_indicators", indicators, n_records, chosen),
        outcome("event_types", types, n_records, chosen),
    )


def outcome(
    name: str, values: ArrayLike | None, n_records: int, chosen: Array | None
) -> Array | None:
    if values is None:
        return None
    array = as_array(values)
    if array.shape != (n_records,):
        raise ValueError(
            f"{name}: expected one per patient, shape [{n_records}], got {list(array.shape)}"
        )
    if chosen is not None:
        # A number outside the data set is the builder's to refuse, with its place.
        array = array.take(chosen, mode="clip") if n_records else np.zeros(len(chosen), np.int64)
    if array.dtype.kind in "biu" or array.size == 0:
        return np.ascontiguousarray(array, np.int64)
    if name == "event_times" or array.dtype.kind != "f":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    whole = array.astype(np.int64)
    if (whole != array).any():
        at = int(np.flatnonzero(whole != array)[0])
        raise ValueError(f"{name}: expected whole numbers; the first other is {array[at]}, at {at}")
    return whole


def resolve_index(index: Any, n_patients: int) -> Array:
    if isinstance(index, slice):
        return np.arange(*index.indices(n_patients))
    if isinstance(index, Tensor):
        index = index.detach().cpu().numpy()
    array = np.asarray(index)
    if array.size == 0 and not isinstance(index, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype == np.bool_ and array.shape == (n_patients,):
        return np.flatnonzero(array)
    if array.dtype.kind not in "iu" or array.ndim > 1:
        raise TypeError(
            "expected an integer, a slice, or a list, array or tensor of integers or of "
            f"{n_patients} booleans, got {array.dtype} of shape {list(array.shape)}"
        )
    numbers = np.atleast_1d(array).astype(np.int64)
    outside = np.flatnonzero((numbers < -n_patients) | (numbers >= n_patients))
    if len(outside):
        raise IndexError(
            f"Found {len(outside)} patient numbers outside a batch of {n_patients}. "
            f"The first is {numbers[outside[0]]}, at position {outside[0]}."
        )
    return np.where(numbers < 0, numbers + n_patients, numbers)


def check_padded(codes: Tensor, visit_mask: Tensor | None, sequence_mask: Tensor | None) -> None:
    if codes.dim() != 3:
        raise ValueError(f"visit_codes: expected shape [B, V, C], got {list(codes.shape)}")
    if codes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"visit_codes: expected int32 or int64, got {codes.dtype}")
    masks = {
        "visit_mask": (visit_mask, codes.shape),
        "sequence_mask": (sequence_mask, codes.shape[:2]),
    }
    for name, (mask, shape) in masks.items():
        if mask is None:
            continue
        if mask.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(mask.shape)}")
        if mask.is_complex():
            raise TypeError(f"{name}: expected bool or numeric 0/1, got {mask.dtype}")
        if mask.device != codes.device:
            raise ValueError(f"{name} is on {mask.device}, but visit_codes is on {codes.device}")


def host_lengths(lengths: ArrayLike, n_patients: int) -> Array:
    if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
        raise ValueError(
            f"lengths: expected on the host, got a tensor on {lengths.device}; leave them out, and "
            "they are read from sequence_mask"
        )
    array = integers("lengths", lengths)
    if array.shape[0] != n_patients:
        raise ValueError(f"lengths: expected shape [{n_patients}], got {list(array.shape)}")
    return np.ascontiguousarray(array, np.int64)


def mask_states(mask: Tensor | None) -> Tensor | None:
    """uint8: 0 padding, 1 real, 2 neither (NaN too), which is an error on a real visit."""
    if mask is None:
        return None
    mask = mask.detach()
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8)
    return (mask != 0).to(torch.uint8) + ((mask != 0) & (mask != 1)).to(torch.uint8)
