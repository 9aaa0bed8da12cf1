"""Input validation of the operators in Triton, called directly: all that they index by, in
the words of the compiled ones (``csrc/survival_nll``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import FLOATING, INTEGER, REAL, accumulator


def check_hazards(operation: str, hazards: Tensor, dims: tuple[int, ...], shape: str) -> None:
    """Dimensions and dtype."""
    if hazards.dim() not in dims:
        raise ValueError(f"hazards: expected shape {shape}")
    if hazards.dtype not in FLOATING:
        raise ValueError(f"{operation}: expected float32, float64, bfloat16 or float16 hazards")


def check_options(
    operation: str, competing: bool, classes: int, link: int, eps: float, reduction: int
) -> None:
    """The numbers that encode options."""
    for name, value, last in (("link", link, 2 if competing else 1), ("reduction", reduction, 2)):
        if not 0 <= value <= last:
            raise ValueError(f"{operation}: {name} must be in 0..{last}, got {value}")
    if not 0 <= eps < 0.5:
        raise ValueError(f"{operation}: eps must be in [0, 0.5), got {eps}")
    if classes - (link == 2) < 1:
        raise ValueError("hazards: expected at least one cause")


def check_patients(
    hazards: Tensor,
    patients: int,
    competing: bool,
    event_times: Tensor,
    event_types: Tensor,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
) -> None:
    """One number per patient each, on the hazards' device."""
    types = ("event_types", INTEGER | {torch.bool}) if competing else ("event_indicators", REAL)
    for tensor, (name, dtypes) in (
        (event_times, ("event_times", INTEGER)),
        (event_types, types),
        (entry_times, ("entry_times", INTEGER)),
        (sample_weight, ("sample_weight", REAL)),
    ):
        if tensor is None:
            continue
        if tensor.shape != (patients,):
            raise ValueError(f"{name}: expected shape [B] with B = {patients}")
        if tensor.dtype not in dtypes:
            kind = {INTEGER: "an integer", REAL: "a bool, integer or float"}.get(
                dtypes, "an integer or bool"
            )
            raise ValueError(f"{name}: expected {kind} dtype")
        _check_device(hazards, tensor)


def check_mask(hazards: Tensor, sequence_mask: Tensor | None) -> None:
    """One value per slot."""
    if sequence_mask is None:
        return
    if sequence_mask.shape != hazards.shape[:2]:
        raise ValueError(f"sequence_mask: expected shape [B, V] = {list(hazards.shape[:2])}")
    if sequence_mask.dtype not in REAL:
        raise ValueError("sequence_mask: expected a bool, integer or float dtype")
    _check_device(hazards, sequence_mask)


def check_rows(hazards: Tensor, *rows: Tensor) -> None:
    """row_starts, unsorted_indices and last_rows; the kernel itself leaves out rows outside."""
    for tensor in rows:
        if tensor.dim() != 1 or tensor.dtype != torch.int64:
            raise ValueError(
                "row_starts, unsorted_indices, last_rows: expected one-dimensional int64"
            )
        _check_device(hazards, tensor)
    starts, ranks, last = rows
    if len(starts) < 1 or len(ranks) != len(last):
        raise ValueError("row_starts: expected a start for each time and the end")


def check_scale(
    grad: Tensor, grad_nll: Tensor, rows: tuple[Tensor | None, ...], dtype: torch.dtype
) -> None:
    """A saved gradient, and one number or one per patient to multiply it by."""
    name = "survival_nll_scale"
    saved = torch.float32 if dtype == torch.float16 else dtype
    if grad.dtype != saved or dtype not in FLOATING or not 1 <= grad.dim() <= 3:
        raise ValueError(f"{name}: not the saved gradient of hazards of this dtype")
    if grad_nll.dtype != accumulator(grad.dtype) or grad_nll.dim() > 1:
        raise ValueError(f"{name}: grad_nll is not that of this loss")
    _check_device(grad, grad_nll)
    given = [tensor for tensor in rows if tensor is not None]
    if len(given) not in (0, 3):
        raise ValueError(f"{name}: row_starts and unsorted_indices must be given together")
    if given:
        check_rows(grad, *given)
    patients = len(given[1]) if given else grad.shape[0]
    if grad_nll.dim() == 1 and len(grad_nll) != patients:
        raise ValueError(f"{name}: expected one gradient per patient")


def _check_device(like: Tensor, tensor: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError("expected all tensors of a call on one device")
