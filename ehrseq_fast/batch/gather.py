"""Features and targets: joined, checked, and put into a batch's order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import Array


def joined(values: Any) -> Any:
    """Per-visit values of all patients end to end, from one array per patient."""
    if not isinstance(values, (list, tuple)):
        return values
    if values and all(isinstance(part, Tensor) for part in values):
        return torch.cat(tuple(values))
    return np.concatenate([np.asarray(part) for part in values]) if values else np.empty((0, 0))


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


def gather_features(features: Any, rows: Array | None, n_rows: int) -> Tensor | None:
    if features is None:
        return None
    if not isinstance(features, Tensor):
        features = np.asarray(features)
    check_features(features, features.shape[:1], (n_rows,))
    return gather(features, rows)


def gather_all(
    values: Mapping[str, Any] | None, rows: Array | None, n_rows: int, of: str = "visits"
) -> dict[str, Tensor]:
    gathered = {}
    for name, value in (values or {}).items():
        array = value if isinstance(value, Tensor) else np.asarray(value)
        if array.ndim == 0 or array.shape[0] != n_rows:
            raise ValueError(
                f"{'targets' if of == 'patients' else 'visit_targets'}[{name!r}]: expected one row "
                f"for each of {n_rows} {of}, got shape {list(array.shape)}"
            )
        gathered[name] = gather(array, rows)
    return gathered


def gather(values: Tensor | Array, rows: Array | None) -> Tensor:
    if isinstance(values, Tensor):
        if rows is None:
            return values
        return values.index_select(0, torch.from_numpy(rows).to(values.device))
    # A copy either way: what the caller does to its array later must not reach into the batch.
    return torch.from_numpy(np.array(values) if rows is None else values.take(rows, axis=0))
