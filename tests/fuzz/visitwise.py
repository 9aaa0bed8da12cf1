"""Valid calls of the operators of losses whose terms are visits, and what they must give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ehrseq_fast import PackedVisits
from ehrseq_fast.fixed_horizon import reference as horizon_reference
from ehrseq_fast.visit_cross_entropy import reference as entropy_reference
from ehrseq_fast.visitwise import Visits

from .arguments import FLOATING, INTEGER, Call, Draw
from .operators import REDUCTIONS, gradient, makes


def _layout(draw: Draw, patients: int, slots: int) -> tuple[Visits, PackedVisits | None]:
    """Visits with a mask, or the same ones packed."""
    is_packed = draw.chance(0.5)
    lengths = draw.integers(1 if is_packed else 0, slots + 1, (patients,))
    lengths[0] = slots
    mask = torch.arange(slots) < lengths[:, None]
    if not is_packed:
        return Visits(mask), None
    batch = PackedVisits.from_lists([[[1]] * n for n in lengths.tolist()])
    return Visits(None, batch.row_starts, batch.unsorted_indices, batch.last_rows), batch


def _some(draw: Draw, shape: tuple[int, ...]) -> Tensor | None:
    return None if draw.chance(0.5) else draw.floats(shape).abs()


@makes("visit_cross_entropy")
def _cross_entropy(draw: Draw, ops: Any, name: str) -> Call:
    patients, slots, classes = draw.whole(1, 6), draw.whole(1, 40), draw.whole(1, 9)
    visits, batch = _layout(draw, patients, slots)
    pack = batch.pack if batch is not None else lambda values: values
    logits = pack(draw.floats((patients, slots, classes), draw.one_of(FLOATING)))
    signed = [dtype for dtype in INTEGER if dtype != torch.uint8]
    drawn = draw.integers(0, classes, (patients, slots), draw.one_of(signed))
    drawn[0, 0] = 0  # so that the mean is of something
    labels = pack(torch.where((drawn == 1) & draw.chance(0.5), -100, drawn).to(drawn.dtype))
    weights = {
        "class_weight": _some(draw, (classes,)),
        "visit_weight": _some(draw, (patients, slots)),
        "sample_weight": _some(draw, (patients,)),
    }
    if weights["visit_weight"] is not None:
        weights["visit_weight"] = pack(weights["visit_weight"])
    smoothing, reduction = draw.one_of((0.0, 0.0, 0.1)), draw.whole(0, 2)

    def forward(x: Tensor) -> Tensor:
        return entropy_reference.visit_cross_entropy(
            x,
            labels,
            visits,
            **weights,
            label_smoothing=smoothing,
            reduction=REDUCTIONS[reduction],
        )

    def expected() -> list[Tensor]:
        value = forward(logits.double())
        return [value, *gradient(forward, [logits], torch.ones_like(value))]

    options = [-100, smoothing, reduction, True]
    return Call(
        ops.visit_cross_entropy, [logits, labels, *visits, *weights.values(), *options], expected
    )


@makes("fixed_horizon_bce")
def _horizon(draw: Draw, ops: Any, name: str) -> Call:
    patients, slots = draw.whole(1, 6), draw.whole(1, 40)
    visits, batch = _layout(draw, patients, slots)
    pack = batch.pack if batch is not None else lambda values: values
    logits = pack(draw.floats((patients, slots), draw.one_of(FLOATING)))
    times = draw.integers(0, slots + 3, (patients,))
    days = None
    if draw.chance(0.6):
        steps = draw.integers(0, 4, (patients, slots))
        days = steps.cumsum(1) if draw.chance(0.7) else steps
        days = pack(days.to(draw.one_of((*INTEGER, torch.float32, torch.float64))))
        times = times.to(draw.one_of((torch.int32, torch.float32, torch.float64)))
    seen = draw.integers(0, 2, (patients,), draw.one_of((torch.int64, torch.bool, torch.float32)))
    horizon, pos_weight = float(draw.whole(1, 9)), draw.one_of((1.0, 1.0, 2.5))
    weights = {
        "visit_weight": _some(draw, (patients, slots)),
        "sample_weight": _some(draw, (patients,)),
    }
    if weights["visit_weight"] is not None:
        weights["visit_weight"] = pack(weights["visit_weight"])
    reduction = draw.whole(0, 2)

    def forward(x: Tensor) -> Tensor:
        return horizon_reference.fixed_horizon_bce(
            x,
            times,
            seen,
            visits,
            days,
            horizon,
            pos_weight=pos_weight,
            **weights,
            reduction=REDUCTIONS[reduction],
        )

    def expected() -> list[Tensor]:
        value = forward(logits.double())
        return [value, *gradient(forward, [logits], torch.ones_like(value))]

    given = [logits, times, seen, *visits, days, *weights.values()]
    return Call(ops.fixed_horizon_bce, [*given, horizon, pos_weight, reduction, True], expected)


@makes("masked_bce")
def _masked(draw: Draw, ops: Any, name: str) -> Call:
    shape = (draw.whole(1, 6), draw.whole(1, 40))
    logits = draw.floats(shape, draw.one_of(FLOATING))
    labels = draw.integers(0, 2, shape, draw.one_of((torch.int64, torch.float32, torch.bool)))
    weights = draw.integers(0, 3, shape, draw.one_of((torch.int32, torch.float32, torch.bool)))

    def forward(x: Tensor) -> Tensor:
        return horizon_reference.masked_bce(x, labels, weights)

    def expected() -> list[Tensor]:
        value = forward(logits.double())
        return [value, *gradient(forward, [logits], torch.ones_like(value))]

    return Call(ops.masked_bce, [logits, labels, weights, True], expected)
