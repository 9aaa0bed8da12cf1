"""Arrays, tensors, lists and columns of data frames, as users pass them.

Every function that takes numbers from outside reads them through this module, which refuses what
NumPy would convert with a loss: masks that are dropped, fractions that are cut off, text, missing
values, integers that wrap. The first argument is always the name that an error message begins with.
"""

from __future__ import annotations

import mmap
import operator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
ArrayLike = Any  # a NumPy array, memory-mapped or not, a tensor, or nested lists of numbers

LONGS = np.iinfo(np.int64)
_PLAIN = frozenset({int, float, bool, complex, str, bytes, type(None)})


def as_array(name: str, values: ArrayLike) -> Array:
    """A view as a NumPy array wherever that is possible; memory-mapped arrays stay on disk. What
    is on a GPU is copied to the host."""
    if isinstance(values, Tensor):
        return dense_on_host(name, values).numpy()
    if isinstance(values, np.ma.MaskedArray):
        _refuse_masked(name, values)
    elif isinstance(values, (list, tuple)):
        _look_into(name, values)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: expected lists of equal lengths: {error}") from error
    if array.dtype.kind in "fc" and isinstance(values, (list, tuple)):
        _refuse_merged(name, values, array.dtype)
    _refuse_truncated(name, array)
    return array


def labels_of(values: Any) -> list[Any] | None:
    """The labels of the rows of a pandas ``Series`` or ``DataFrame``; None for what has none, and
    where they are the numbers of the rows."""
    index = getattr(values, "index", None)
    if index is None or callable(index) or not hasattr(values, "items"):
        return None
    return None if type(index).__name__ == "RangeIndex" else index.tolist()


def kind_of(value: object) -> str:
    """How an error message calls what was given in place of a tensor or a batch."""
    if isinstance(value, np.ndarray):
        return f"a NumPy array of {value.dtype}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (list, tuple, int, float)):
        return f"{'an' if isinstance(value, int) else 'a'} {type(value).__name__}"
    return "None" if value is None else f"an object of type {type(value).__name__}"


_INSTEAD = {
    "ndarray": "torch.from_numpy(array) makes a tensor of it",
    "PackedRows": "its rows are rows.values, and padded rows.to_padded()",
    "list": "torch.tensor(list) makes a tensor of it",
}


def expect_tensor(name: str, value: object, expected: str = "a tensor", hint: str = "") -> None:
    """``TypeError`` for anything but a tensor."""
    if not isinstance(value, Tensor):
        instead = hint or _INSTEAD.get(type(value).__name__, "")
        raise TypeError(
            f"{name}: expected {expected}, got {kind_of(value)}{instead and f' ({instead})'}"
        )


def dense_on_host(name: str, tensor: Tensor) -> Tensor:
    """A tensor whose values NumPy can read; bfloat16, which it has not, as float32."""
    if isinstance(tensor, torch.masked.MaskedTensor):
        raise TypeError(f"{name}: expected an array without a mask, got a MaskedTensor")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "sparse"
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")
    if tensor.is_meta:
        raise ValueError(f"{name}: expected values, got a tensor on meta, which holds none")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _refuse_masked(name: str, values: np.ma.MaskedArray) -> None:
    masked = int(np.ma.getmaskarray(values).sum())
    if masked:
        raise ValueError(
            f"{name}: expected an array without masked values, got {masked} masked of "
            f"{values.size}; drop or fill them first"
        )


def _look_into(name: str, values: list[Any] | tuple[Any, ...]) -> None:
    """Refuse what ``np.asarray`` drops from a list: masks, and which values were booleans."""
    types = set(map(type, values))
    if len(types) > 1 and types & {bool, np.bool_}:
        others = sorted(t.__name__ for t in types - {bool, np.bool_})
        if others:
            raise TypeError(f"{name}: expected values of one kind, got bool beside {others[0]}")
    if types <= _PLAIN:
        return
    for value in values:
        if isinstance(value, np.ma.MaskedArray):
            _refuse_masked(name, value)
        elif isinstance(value, (list, tuple)):
            _look_into(name, value)


def _refuse_merged(name: str, values: list[Any] | tuple[Any, ...], dtype: np.dtype[Any]) -> None:
    """Refuse integers beside floats that floats do not represent, as 2**53 + 1."""
    if set(map(type, values)) <= {float, complex}:
        return
    for value in values:
        if isinstance(value, (list, tuple)):
            _refuse_merged(name, value, dtype)
        elif isinstance(value, (np.ndarray, Tensor)):
            refuse_inexact(name, as_array(name, value), dtype)
        elif isinstance(value, np.integer):
            refuse_inexact(name, np.asarray(value), dtype)
        elif isinstance(value, int) and int(float(value)) != value:
            raise inexact(name, value, dtype)


def refuse_inexact(name: str, array: Array, dtype: Any) -> None:
    """``ValueError`` where integers do not keep their values in the floating ``dtype``."""
    if array.dtype.kind not in "iu":
        return
    with np.errstate(invalid="ignore"):
        wrong = array.astype(dtype).real.astype(array.dtype) != array
    if array.dtype.itemsize == 8:  # the largest are rounded up to what the integers do not hold
        wrong = wrong | (array.astype(np.float64) >= float(np.iinfo(array.dtype).max))
    if wrong.any():
        raise inexact(name, array[wrong][0], dtype)


def inexact(name: str, value: Any, dtype: Any) -> ValueError:
    """The error of an integer that a floating ``dtype`` does not hold."""
    return ValueError(
        f"{name}: expected integers that {dtype} represents, as the others are floats, got {value}"
    )


def _refuse_truncated(name: str, array: Array) -> None:
    """Reading past the end of a file that has become shorter would kill the process."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap):
        return
    try:
        on_disk = base.size()
    except (OSError, ValueError):  # anonymous memory, which has no file
        return
    if on_disk < len(base):
        raise ValueError(
            f"{name}: the memory-mapped file was truncated: expected {len(base)} bytes, "
            f"got {on_disk}"
        )


def got(array: Array) -> str:
    """How an error message calls an array's dtype; of objects, the first that is no number."""
    if array.dtype.kind != "O":
        return str(array.dtype)
    for at, value in enumerate(array.flat):
        if type(value) not in (int, float):
            return f"object, with {value!r:.50} of type {type(value).__name__} at {at}"
    return "object"


def truth(array: Array) -> npt.NDArray[np.bool_]:
    """A copy of booleans whose bytes are 0 and 1; of another tool's, any byte but 0 is true."""
    return np.ascontiguousarray(array).view(np.uint8) != 0


def integers(name: str, values: ArrayLike) -> Array:
    """int32 or int64 ``[n]``, not copied."""
    array = _column(name, values)
    if array.dtype not in (np.int64, np.int32):
        raise TypeError(f"{name}: expected int32 or int64, got {got(array)}")
    return array


def any_integers(name: str, values: ArrayLike) -> Array:
    """Integers ``[n]`` of any width, with a sign or without, not copied."""
    array = _column(name, values)
    if array.dtype.kind not in "iu" or not array.dtype.isnative:
        raise TypeError(f"{name}: expected integers, got {got(array)}")
    return array


def clamped_longs(array: Array) -> Array:
    """Integers as int64, not copied where they are; the largest int64 for what it does not hold."""
    if array.dtype == np.uint64:
        array = np.minimum(array, np.uint64(LONGS.max))
    return array.astype(np.int64, copy=False)


def _column(name: str, values: ArrayLike) -> Array:
    array = _typed(as_array(name, values))
    if array.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {list(array.shape)}")
    _refuse_huge(name, values, array)
    return array


def longs(name: str, values: ArrayLike) -> Array:
    """A contiguous int64 copy of integers of any width; booleans are none."""
    array = as_array(name, values)
    array = _typed(array)
    _refuse_huge(name, values, array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {got(array)}")
    if array.dtype.kind == "u" and array.dtype.itemsize == 8:
        _refuse_first(name, array, array > LONGS.max, "values that fit int64")
    return np.array(array, np.int64, order="C")


def _typed(array: Array) -> Array:
    """Take an empty list, which NumPy reads as floats, as integers."""
    return array.astype(np.int64) if array.size == 0 and array.dtype.kind == "f" else array


def _refuse_huge(name: str, values: ArrayLike, array: Array) -> None:
    """A list of ints that int64 does not hold becomes one of floats or objects."""
    if array.dtype.kind not in "fOu" or not isinstance(values, (list, tuple)):
        return
    if set(map(type, values)) == {int}:
        at = next((i for i, v in enumerate(values) if not LONGS.min <= v <= LONGS.max), None)
        if at is not None:
            raise ValueError(
                f"{name}: expected values that fit int64; the first other is {values[at]}, at {at}"
            )


def _refuse_first(name: str, array: Array, wrong: Array, expected: str) -> None:
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"{name}: expected {expected}; the first other is {array[at]}, at {at}")


def whole(name: str, values: ArrayLike) -> Array:
    """As :func:`longs`, of ``[n]`` booleans and whole floats too."""
    array = as_array(name, values)
    if array.dtype == np.bool_:
        return truth(array).astype(np.int64)
    if array.dtype.kind != "f" or _all_ints(values) or not array.size:
        return longs(name, values)
    array = array.astype(np.result_type(array, np.float64), copy=False)
    # 2**53: beyond it floats are whole, but not the numbers that were meant
    with np.errstate(invalid="ignore"):
        wrong = ~(np.isfinite(array) & (array == np.trunc(array)) & (np.abs(array) <= 2.0**53))
    _refuse_first(name, array, wrong, "whole numbers")
    return array.astype(np.int64, order="C")


def _all_ints(values: ArrayLike) -> bool:
    return isinstance(values, (list, tuple)) and set(map(type, values)) == {int}


def selection(name: str, values: ArrayLike, n: int, of: str) -> Array:
    """Which of ``n`` rows: their numbers ``[k]``, or ``[n]`` booleans; as int64 numbers, a copy.

    Raises:
        ValueError: a wrong shape.
        IndexError: a number below 0 or not below ``n``.
        TypeError: neither integers nor booleans.
    """
    array = as_array(name, values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {list(array.shape)}")
    if array.dtype == np.bool_:
        if array.shape != (n,):
            raise ValueError(
                f"{name}: expected one boolean for each of {n} {of}, got {array.shape[0]}"
            )
        return np.flatnonzero(truth(array))
    numbers = longs(name, values)
    outside = np.flatnonzero((numbers < 0) | (numbers >= n))
    if len(outside):
        raise IndexError(
            f"{name}: expected numbers in [0, {n}), one for each of the {n} {of}; found "
            f"{len(outside)} others, the first is {numbers[outside[0]]}, at {outside[0]}"
        )
    return numbers


def integer(name: str, value: Any, least: int, most: int) -> int:
    """One integer in ``[least, most]``; a boolean is none."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected an integer, got bool")
    if not least <= number <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {number}")
    return number
