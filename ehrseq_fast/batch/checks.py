"""Shapes and dtypes of what a batch is built from; values are the builder's to check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, ArrayLike, as_array, integer, integers, longs, selection, truth, whole
from ..checks import INTEGER
from .layout import MOST_CODES

CODES = INTEGER | {torch.uint16, torch.uint32, torch.uint64}


def listed(patients: Any) -> tuple[Any, ...]:
    """A copy: what a patient's ``__iter__`` does to the list changes nothing."""
    if not isinstance(patients, (str, bytes, bytearray, Mapping)):
        try:
            return tuple(patients)
        except TypeError as error:
            cause: Exception | None = error
    else:
        cause = None
    raise TypeError(
        f"patients: expected a sequence of patients, got {type(patients).__name__}."
    ) from cause


def code_limit(vocab_size: int | None) -> int:
    if vocab_size is None:
        return MOST_CODES
    return integer("vocab_size", vocab_size, 1, MOST_CODES)


def offsets(name: str, values: ArrayLike) -> Array:
    array = integers(name, values)
    if array.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one offset (a 0), got an empty array")
    return array


def expect_all_rows(name: str, offsets: Array, rows: int, of: str) -> None:
    """Offsets without their leading 0 would give every patient, or visit, the rows of the next."""
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) != (0, rows):
        raise ValueError(
            f"{name}: expected to begin with 0 and to end with {rows}, the number of {of}, "
            f"got {first} and {last}"
        )


def patient_numbers(patients: ArrayLike, n_records: int) -> Array:
    """A copy, as int64; whether the numbers are those of records is the builder's to check."""
    array = as_array("patients", patients)
    if array.dtype == np.bool_:
        return selection("patients", patients, n_records, "records")
    return np.array(integers("patients", patients), np.int64, order="C")


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
    """A copy as int64; indicators and types may be whole floats or booleans, times may not."""
    if values is None:
        return None
    array = as_array(name, values)
    if array.shape != (n_records,):
        raise ValueError(
            f"{name}: expected one per patient, shape [{n_records}], got {list(array.shape)}"
        )
    as_longs = longs if name == "event_times" else whole
    if chosen is None:
        return as_longs(name, values)
    if n_records == 0:
        return np.zeros(len(chosen), np.int64)
    # Of a large data set no more is read than the batch needs. A number outside the data set is the
    # builder's to refuse, with its place.
    return as_longs(
        name, (as_longs(name, values) if _is_list(values) else array).take(chosen, mode="clip")
    )


def _is_list(values: ArrayLike) -> bool:
    return isinstance(values, (list, tuple))


def resolve_index(index: Any, n_patients: int) -> Array:
    if isinstance(index, slice):
        return np.arange(*index.indices(n_patients))
    array = as_array("index", index)
    if array.size == 0 and not isinstance(index, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype == np.bool_ and array.shape == (n_patients,):
        return np.flatnonzero(truth(array))
    if array.dtype.kind not in "iu" or array.ndim > 1:
        raise TypeError(
            "expected an integer, a slice, or a list, array or tensor of integers or of "
            f"{n_patients} booleans, got {array.dtype} of shape {list(array.shape)}"
        )
    numbers = np.atleast_1d(longs("index", array))
    outside = np.flatnonzero((numbers < -n_patients) | (numbers >= n_patients))
    if len(outside):
        raise IndexError(
            f"Found {len(outside)} patient numbers outside a batch of {n_patients}. "
            f"The first is {numbers[outside[0]]}, at position {outside[0]}."
        )
    return np.where(numbers < 0, numbers + n_patients, numbers)


def wide_codes(name: str, codes: Tensor) -> Tensor:
    """Codes of any integer dtype in int32 or int64; the largest int64 for what it does not hold."""
    if codes.dtype in (torch.int32, torch.int64):
        return codes
    if codes.dtype not in CODES:
        raise TypeError(f"{name}: expected integers, got {codes.dtype}")
    if codes.dtype == torch.uint64:
        longs = codes.view(torch.int64)
        return torch.where(longs < 0, torch.iinfo(torch.int64).max, longs)
    return codes.to(torch.int64 if codes.dtype == torch.uint32 else torch.int32)


def check_padded(codes: Tensor, visit_mask: Tensor | None, sequence_mask: Tensor | None) -> None:
    _check_dense("visit_codes", codes)
    if codes.is_meta:
        raise ValueError("visit_codes: expected values, got a tensor on meta, which holds none")
    if codes.dim() != 3:
        raise ValueError(f"visit_codes: expected shape [B, V, C], got {list(codes.shape)}")
    if codes.dtype not in CODES:
        raise TypeError(f"visit_codes: expected integers, got {codes.dtype}")
    masks = {
        "visit_mask": (visit_mask, codes.shape),
        "sequence_mask": (sequence_mask, codes.shape[:2]),
    }
    for name, (mask, shape) in masks.items():
        if mask is None:
            continue
        _check_dense(name, mask)
        if mask.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(mask.shape)}")
        if mask.is_complex():
            raise TypeError(f"{name}: expected bool or numeric 0/1, got {mask.dtype}")
        if mask.device != codes.device:
            raise ValueError(
                f"{name}: expected on {codes.device}, where visit_codes is, got {mask.device}"
            )


def _check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        raise TypeError(f"{name}: expected a dense tensor, got a sparse, nested or quantized one")


def host_lengths(lengths: ArrayLike, n_patients: int) -> Array:
    if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
        raise ValueError(
            f"lengths: expected on the host, got a tensor on {lengths.device}; leave them out, and "
            "they are read from sequence_mask"
        )
    array = integers("lengths", lengths)
    if array.shape[0] != n_patients:
        raise ValueError(f"lengths: expected shape [{n_patients}], got {list(array.shape)}")
    return np.array(array, np.int64, order="C")


def mask_states(mask: Tensor | None) -> Tensor | None:
    """A new uint8 tensor: 0 padding, 1 real, 2 neither (NaN too), an error on a real visit."""
    if mask is None:
        return None
    mask = mask.detach()
    if mask.dtype == torch.bool:
        # a boolean's byte need not be 0 or 1: bit flags viewed as booleans, say
        return mask.view(torch.uint8).clamp(max=1)
    return (mask != 0).to(torch.uint8) + ((mask != 0) & (mask != 1)).to(torch.uint8)
