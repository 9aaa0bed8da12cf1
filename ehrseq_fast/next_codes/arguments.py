"""Input validation of the operator, where it is not compiled: all that it indexes by."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FLOATING

_NAME = "next_codes_bce"


def check(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    code_offsets: Tensor,
    pos_weight: Tensor | None,
    class_weight: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    """``ValueError`` in the words of the compiled operator (``csrc/next_codes``)."""
    for name, tensor, text in (("states", states, "[n_visits, H]"), ("weight", weight, "[K, H]")):
        if tensor.dim() != 2:
            _refuse(name, f"shape {text}", list(tensor.shape))
    rows, classes = len(states), len(weight)
    expected = (
        ("weight", weight, (classes, states.shape[1]), "[K, H]"),
        ("bias", bias, (classes,), "[K]"),
        ("pos_weight", pos_weight, (classes,), "[K]"),
        ("class_weight", class_weight, (classes,), "[K]"),
        ("row_scale", row_scale, (rows,), "[n_visits]"),
        ("codes", codes, tuple(codes.shape[:1]) or (0,), "[n_codes]"),
        ("code_offsets", code_offsets, (rows + 1,), "[n_visits + 1]"),
    )
    for name, given, shape, text in expected:
        if given is None:
            continue
        if given.shape != shape:
            _refuse(name, f"shape {text} = {list(shape)}", list(given.shape))
        if name in ("codes", "code_offsets"):
            if given.dtype != torch.int32:
                _refuse(name, "int32", given.dtype)
        elif given.dtype not in FLOATING:
            _refuse(name, "float32, float64, bfloat16 or float16", given.dtype)
        if given.device != states.device:
            got = f"{states.device} and {given.device}"
            _refuse("tensors", "all tensors of a call on one device", got)
    if states.dtype not in FLOATING:
        _refuse("states", "float32, float64, bfloat16 or float16", states.dtype)
    if (states.dtype == torch.float64) != (weight.dtype == torch.float64):
        _refuse("weight", "float64 where states are, and only there", weight.dtype)


def _refuse(name: str, expected: str, got: object) -> None:
    raise ValueError(f"{_NAME}: {name}: expected {expected}, got {got}")
