"""What the losses whose terms are visits share in Triton: where their results are written, and the
two launches of a mean, of which the first sums the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..operators import REDUCTIONS, empty_nll_and_grad
from .arguments import column
from .sums import MOST_PROGRAMS
from .tiles import WARPS, accumulator_of, tile_of
from .workspace import workspace

MOST_CLASSES = 512  # of a tile: a visit with more is gone over in parts


class VisitInputs(NamedTuple):
    """What such a loss takes beside its targets; checked. ``rows`` are row_starts,
    unsorted_indices and last_rows of a packed batch, or None three times."""

    logits: Tensor
    sequence_mask: Tensor | None
    rows: tuple[Tensor | None, ...]
    visit_weight: Tensor | None
    sample_weight: Tensor | None
    patients: int
    slots: int
    classes: int


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def loss_of_visits(
    start: Callable[..., None],
    inputs: VisitInputs,
    reduction: int,
    needs_grad: bool,
    has_classes: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient.

    ``start(grid, *arguments, **options)`` launches the operation's kernel, which takes its targets
    after those arguments. With ``WEIGHS`` it sums the weights of the visits that count.
    """
    logits = inputs.logits.contiguous()
    of_visits = logits.shape[:-1] if has_classes else logits.shape
    loss, grad = empty_nll_and_grad(logits, of_visits, reduction, needs_grad)
    reduces = reduction != REDUCTIONS["none"]
    if inputs.patients == 0 and not reduces:
        return loss, grad
    tile = tile_of(inputs.slots, min(inputs.classes, MOST_CLASSES))
    programs = min(MOST_PROGRAMS.value, max(1, triton.cdiv(inputs.patients, tile["PATIENTS"])))
    mask = inputs.sequence_mask
    given = (
        logits,
        *(contiguous(tensor) for tensor in inputs.rows),
        mask,
        *(mask.stride() if mask is not None else (0, 0)),
        contiguous(inputs.visit_weight),
        *column(inputs.sample_weight),
    )
    is_packed = inputs.rows[0] is not None
    n_rows = logits.shape[0] if is_packed else inputs.patients * inputs.slots
    sizes = (inputs.patients, inputs.slots, n_rows)
    if not has_classes:
        del tile["BLOCK_CLASSES"]
    options = {"ACCUMULATOR": accumulator_of(logits.dtype), **tile, "num_warps": WARPS}

    def run(result: Tensor, gradient: Tensor | None, total: Tensor | None, **how: bool) -> None:
        shared: tuple[Any, ...] = workspace(logits.device) if how["REDUCES"] else (None, None)
        start((programs,), *given, result, gradient, total, *shared, *sizes, **how, **options)

    total = None
    if reduction == REDUCTIONS["mean"]:
        total = torch.empty((), dtype=torch.float64, device=logits.device)
        run(total, None, None, WEIGHS=True, REDUCES=True)
    run(loss, grad if needs_grad else None, total, WEIGHS=False, REDUCES=reduces)
    return loss, grad
