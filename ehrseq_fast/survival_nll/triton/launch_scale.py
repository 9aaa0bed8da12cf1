"""The operator that scales a saved gradient in Triton: one launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...operations import implemented_in_triton
from ...triton_support import interpreted, launch
from . import arguments, tiles
from .kernels_scale import scale_by_one_kernel, scale_by_patient_kernel
from .tiles import WARPS, accumulator_of

Rows = tuple[Tensor | None, Tensor | None, Tensor | None]


@implemented_in_triton("survival_nll_scale")
def survival_nll_scale(
    grad: Tensor,
    grad_nll: Tensor,
    row_starts: Tensor | None,
    unsorted_indices: Tensor | None,
    last_rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    arguments.check_scale(grad, grad_nll, (row_starts, unsorted_indices, last_rows), dtype)
    grad = grad.contiguous()
    scaled = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    if grad.numel() == 0:
        return scaled
    accumulator = accumulator_of(dtype)
    if grad_nll.dim() == 0:
        block = 16 * tiles.VALUES if interpreted() else 1024
        launch(
            scale_by_one_kernel,
            (triton.cdiv(grad.numel(), block),),
            grad,
            grad_nll,
            scaled,
            grad.numel(),
            ACCUMULATOR=accumulator,
            BLOCK=block,
        )
        return scaled
    patients = grad_nll.shape[0]
    rows: Rows = (None, None, None)
    if row_starts is None or unsorted_indices is None or last_rows is None:
        classes, slots = 1, grad.numel() // patients
    else:
        rows = (row_starts.contiguous(), unsorted_indices.contiguous(), last_rows.contiguous())
        classes, slots = grad[0].numel(), len(row_starts) - 1
    positions = 16 if slots * classes <= 16 else 128
    tile = {"PATIENTS": tiles.VALUES // positions, "POSITIONS": positions}
    launch(
        scale_by_patient_kernel,
        (triton.cdiv(patients, tile["PATIENTS"]),),
        grad,
        grad_nll,
        grad_nll.stride(0),
        scaled,
        *rows,
        patients,
        slots,
        grad.shape[0],
        ACCUMULATOR=accumulator,
        CLASSES=classes,
        **tile,
        num_warps=WARPS,
    )
    return scaled
