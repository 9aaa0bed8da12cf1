"""Features and targets: joined, checked, and put into a batch's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, as_array, inexact, kind_of, refuse_inexact

HOST = torch.device("cpu")


def as_values(name: str, values: Any) -> Tensor | Array:
    """A tensor as it is, with its gradient; all else as an array that a tensor can be made of."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_nested or values.is_quantized:
            raise TypeError(
                f"{name}: expected a dense tensor, got a sparse, nested or quantized one"
            )
        if values.is_meta:
            raise ValueError(f"{name}: expected values, got a tensor on meta, which holds none")
        return values
    array = as_array(name, values)
    numbers = array.dtype.kind in "biu" or array.dtype.char in "efdFD"
    if not numbers or not array.dtype.isnative:
        raise TypeError(f"{name}: expected numbers that a tensor can hold, got {array.dtype}")
    return array


def as_tensor(values: Tensor | Array, device: torch.device) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(device)
    return torch.from_numpy(np.array(values)).to(device)  # torch warns of read-only memory


def joined(name: str, values: Any, lengths: Sequence[int]) -> Any:
    """Per-visit values of all patients end to end, from one array per patient."""
    if not isinstance(values, (list, tuple)):
        return values
    parts = [as_values(f"{name}, patient {p}", part) for p, part in enumerate(values)]
    if len(parts) != len(lengths):
        raise ValueError(
            f"{name}: expected one array for each of {len(lengths)} patients, got {len(parts)}"
        )
    total = sum(lengths)
    for patient, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        if part.ndim == 0 or part.shape[0] != length:
            found = "a number" if part.ndim == 0 else part.shape[0]
            raise ValueError(
                f"{name}: expected one row per visit, {total} in all; patient {patient}: expected "
                f"{length}, got {found}"
            )
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{name}: expected rows of one shape; patient 0: {list(parts[0].shape[1:])}, "
                f"patient {patient}: {list(part.shape[1:])}"
            )
    if not parts:
        return np.empty((0, 0))
    if any(isinstance(part, Tensor) for part in parts):
        return _joined_tensors(name, [as_tensor(part, HOST) for part in parts])
    whole = np.concatenate(parts)
    if whole.dtype.kind in "fc":
        for patient, part in enumerate(parts):
            refuse_inexact(f"{name}, patient {patient}", as_array(name, part), whole.dtype)
    return whole


def _joined_tensors(name: str, parts: list[Tensor]) -> Tensor:
    whole = torch.cat(parts)
    if not (whole.is_floating_point() or whole.is_complex()):
        return whole
    for patient, part in enumerate(parts):
        if part.is_floating_point() or part.is_complex():
            continue
        kept = part.to(whole.dtype)
        kept = (kept.real if kept.is_complex() else kept).double()
        wrong = (kept.long() != part.long()) | (kept >= 2.0**63)
        if bool(wrong.any()):
            raise inexact(f"{name}, patient {patient}", part[wrong][0].item(), whole.dtype)
    return whole


def by_name(name: str, values: Any) -> Mapping[str, Any]:
    """Targets as given, none where there are none."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{name}: expected a mapping of names to arrays ({{'label': values}}), got "
            f"{kind_of(values)}"
        )
    return values


def check_features(features: Any, leading: Any, expected: tuple[int, ...]) -> None:
    shape = ", ".join(map(str, expected))
    if tuple(leading) != expected or features.ndim != len(expected) + 1:
        raise ValueError(f"visit_features: expected shape [{shape}, F], got {list(features.shape)}")
    floating = (
        features.dtype.is_floating_point
        if isinstance(features, Tensor)
        else (features.dtype.kind == "f")
    )
    if not floating:
        raise TypeError(f"visit_features: expected a floating dtype, got {features.dtype}")


def gather_features(
    features: Any, rows: Array | None, n_rows: int, device: torch.device = HOST
) -> Tensor | None:
    if features is None:
        return None
    features = as_values("visit_features", features)
    check_features(features, features.shape[:1], (n_rows,))
    return gather(features, rows, device)


def gather_all(
    values: Mapping[str, Any] | None,
    rows: Array | None,
    n_rows: int,
    of: str = "visits",
    device: torch.device = HOST,
) -> dict[str, Tensor]:
    gathered = {}
    group = "targets" if of == "patients" else "visit_targets"
    for key, value in by_name(group, values).items():
        name = f"{group}[{key!r}]"
        array = as_values(name, value)
        if array.ndim == 0 or array.shape[0] != n_rows:
            raise ValueError(
                f"{name}: expected one row for each of {n_rows} {of}, got shape {list(array.shape)}"
            )
        gathered[key] = gather(array, rows, device)
    return gathered


def gather(values: Tensor | Array, rows: Array | None, device: torch.device = HOST) -> Tensor:
    """The chosen rows, or all, on ``device``. A copy either way: what the caller does to its array
    later must not reach into the batch."""
    if isinstance(values, Tensor):
        if rows is None:
            return values.to(device, copy=True)
        return values.index_select(0, torch.from_numpy(rows).to(values.device)).to(device)
    array = np.array(values) if rows is None else values.take(rows, axis=0)
    return torch.from_numpy(array).to(device)
