"""A call of each operator of the survival losses, as :mod:`.operators` has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ehrseq_fast import PackedVisits
from ehrseq_fast.deephit_ranking import reference as ranking_reference
from ehrseq_fast.piecewise_hazard import reference as piecewise_reference
from ehrseq_fast.pmf_nll import reference as pmf_reference

from ..survival_cases import definition
from .arguments import FLOATING, Call, Draw
from .operators import REDUCTIONS, gradient, makes

# as the operators number them; not of logits is number 0
LINKS_OF_LOGITS = ("probabilities", "sigmoid", "softmax", "cloglog")


@makes("survival_nll", "competing_risks_nll", "packed_survival_nll")
def _nll(draw: Draw, ops: Any, name: str) -> Call:
    patients, slots, causes = draw.whole(1, 6), draw.whole(1, 7), draw.whole(1, 3)
    competing = name == "competing_risks_nll" or (name[0] == "p" and draw.chance(0.5))
    link = draw.one_of((0, 1, 2, 3) if competing else (0, 1, 3))
    lengths = draw.integers(1, slots + 1, (patients,))
    lengths[0] = slots
    times = (torch.from_numpy(draw.random.random(patients)) * lengths).long()
    types = draw.integers(0, (causes if competing else 1) + 1, (patients,))
    shape = (patients, slots, causes + (link == 2)) if competing else (patients, slots)
    hazards = draw.floats(shape, torch.float64)
    hazards = (hazards if link else hazards.sigmoid().clamp(0.01, 0.9)).to(draw.one_of(FLOATING))
    mask = torch.arange(slots) < lengths[:, None]
    entries = None if draw.chance(0.5) else (times * draw.random.random()).long()
    weights = None if draw.chance(0.5) else draw.floats((patients,)).abs()
    included, reduction = draw.chance(0.5), draw.whole(0, 2)
    options: dict[str, Any] = {
        "from_logits": link > 0,
        "censored_visit": "included" if included else "excluded",
        "entry_times": entries,
        "sample_weight": None if weights is None else weights.double(),
        "reduction": REDUCTIONS[reduction],
    }
    if link:
        options["link"] = LINKS_OF_LOGITS[link]
    last = [link, included, 1e-7, reduction, True]

    def forward(padded: Tensor) -> Tensor:
        return definition(padded, times, types, mask, **options)

    def expected() -> list[Tensor]:
        value = forward(hazards.double())
        grad = gradient(forward, [hazards], torch.ones_like(value))[0]
        return [value, grad if name[0] != "p" else grad.flatten(0, 1)[rows]]

    companions = [entries, weights, *last]
    if name[0] != "p":
        given = draw.one_of((mask, mask.to(torch.float32), mask.to(torch.int64)))
        return Call(getattr(ops, name), [hazards, times, types, given, *companions], expected)
    order = torch.sort(lengths, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(0, order, torch.arange(patients))
    sizes = mask.sum(0)[mask.sum(0) > 0]
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    rows = torch.cat([order[:size] * slots + t for t, size in enumerate(sizes.tolist())])
    last_rows = starts[lengths - 1] + ranks
    packed = hazards.flatten(0, 1)[rows].contiguous()
    return Call(
        ops.packed_survival_nll,
        [packed, starts, ranks, last_rows, times, types, *companions],
        expected,
    )


@makes("pmf_nll", "deephit_ranking")
def _pmf(draw: Draw, ops: Any, name: str) -> Call:
    """Padded or packed, of one event or of several."""
    patients, slots, causes = draw.whole(1, 6), draw.whole(1, 20), draw.whole(1, 3)
    competing, is_packed = draw.chance(0.5), draw.chance(0.5)
    lengths = draw.integers(1, slots + 1, (patients,))
    lengths[0] = slots
    times = (torch.from_numpy(draw.random.random(patients)) * lengths).long()
    types = draw.integers(0, (causes if competing else 1) + 1, (patients,))
    shape = (patients, slots, causes) if competing else (patients, slots)
    logits = draw.floats(shape, draw.one_of(FLOATING))
    mask = torch.arange(slots) < lengths[:, None]
    entries = None if draw.chance(0.5) else (times * draw.random.random()).long()
    weights = None if draw.chance(0.5) else draw.floats((patients,)).abs()
    included, option = draw.chance(0.5), draw.whole(0, 2)
    batch = PackedVisits.from_lists([[[1]] * n for n in lengths.tolist()])
    definition_of, option_name, meaning = {
        "pmf_nll": (pmf_reference.pmf_nll, "reduction", REDUCTIONS[option]),
        "deephit_ranking": (ranking_reference.deephit_ranking, "sigma", (0.5, 1.0, 3.0)[option]),
    }[name]

    def forward(padded: Tensor) -> Tensor:
        return definition_of(
            padded,
            times,
            types,
            mask,
            censored_visit="included" if included else "excluded",
            entry_times=entries,
            sample_weight=None if weights is None else weights.double(),
            **{option_name: meaning},
        )

    def expected() -> list[Tensor]:
        value = forward(logits.double())
        grad = gradient(forward, [logits], torch.ones_like(value))[0]
        return [value, batch.pack(grad) if is_packed else grad]

    rows = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
    layout = [None, *rows] if is_packed else [mask, None, None, None]
    values = batch.pack(logits) if is_packed else logits
    last = [competing, included, option if name == "pmf_nll" else meaning, True]
    operator = getattr(ops, name)
    return Call(operator, [values, times, types, *layout, entries, weights, *last], expected)


@makes("piecewise_hazard_nll")
def _piecewise(draw: Draw, ops: Any, name: str) -> Call:
    """Padded or packed."""
    patients, slots, is_packed = draw.whole(1, 6), draw.whole(1, 40), draw.chance(0.5)
    lengths = draw.integers(1, slots + 1, (patients,))
    lengths[0] = slots
    times = (torch.from_numpy(draw.random.random(patients)) * lengths).long()
    seen = draw.integers(0, 2, (patients,))
    logits = draw.floats((patients, slots), draw.one_of(FLOATING))
    mask = torch.arange(slots) < lengths[:, None]
    entries = None if draw.chance(0.5) else (times * draw.random.random()).long()
    weights = None if draw.chance(0.5) else draw.floats((patients,)).abs()
    fraction = None if draw.chance(0.3) else draw.floats((patients,)).abs().clamp(max=1)
    accumulates = torch.float64 if logits.dtype == torch.float64 else torch.float32
    of_visits = None if draw.chance(0.5) else draw.floats((patients, slots), accumulates).abs()
    link, option = draw.whole(0, 1), draw.whole(0, 2)
    batch = PackedVisits.from_lists([[[1]] * n for n in lengths.tolist()])

    def forward(padded: Tensor) -> Tensor:
        return piecewise_reference.piecewise_hazard_nll(
            padded,
            times,
            seen,
            fraction,
            mask,
            link=("softplus", "exp")[link],
            reduction=REDUCTIONS[option],
            entry_times=entries,
            sample_weight=None if weights is None else weights.double(),
            visit_weight=of_visits,
        )

    def expected() -> list[Tensor]:
        value = forward(logits.double())
        grad = gradient(forward, [logits], torch.ones_like(value))[0]
        return [value, batch.pack(grad) if is_packed else grad]

    rows = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
    layout = [None, *rows] if is_packed else [mask, None, None, None]
    values = batch.pack(logits) if is_packed else logits
    beside = batch.pack(of_visits) if is_packed and of_visits is not None else of_visits
    last = [entries, weights, fraction, beside, link, option, True]
    return Call(getattr(ops, name), [values, times, seen, *layout, *last], expected)


@makes("visit_weighted_nll")
def _visit_weighted(draw: Draw, ops: Any, name: str) -> Call:
    """Padded or packed, of one event or of several."""
    patients, slots, causes = draw.whole(1, 6), draw.whole(1, 40), draw.whole(1, 3)
    competing, is_packed = draw.chance(0.5), draw.chance(0.5)
    link = draw.one_of((0, 1, 2, 3) if competing else (0, 1, 3))
    lengths = draw.integers(1, slots + 1, (patients,))
    lengths[0] = slots
    times = (torch.from_numpy(draw.random.random(patients)) * lengths).long()
    types = draw.integers(0, (causes if competing else 1) + 1, (patients,))
    shape = (patients, slots, causes + (link == 2)) if competing else (patients, slots)
    hazards = draw.floats(shape, torch.float64)
    hazards = (hazards if link else hazards.sigmoid().clamp(0.01, 0.9)).to(draw.one_of(FLOATING))
    mask = torch.arange(slots) < lengths[:, None]
    entries = None if draw.chance(0.5) else (times * draw.random.random()).long()
    weights = None if draw.chance(0.5) else draw.floats((patients,)).abs()
    accumulates = torch.float64 if hazards.dtype == torch.float64 else torch.float32
    of_visits = draw.floats((patients, slots), accumulates).abs()
    included, reduction = draw.chance(0.5), draw.whole(0, 2)
    batch = PackedVisits.from_lists([[[1]] * n for n in lengths.tolist()])
    options: dict[str, Any] = {"link": LINKS_OF_LOGITS[link]} if link else {}

    def forward(padded: Tensor) -> Tensor:
        return definition(
            padded,
            times,
            types,
            mask,
            from_logits=link > 0,
            censored_visit="included" if included else "excluded",
            entry_times=entries,
            sample_weight=None if weights is None else weights.double(),
            visit_weight=of_visits.double(),
            reduction=REDUCTIONS[reduction],
            **options,
        )

    def expected() -> list[Tensor]:
        value = forward(hazards.double())
        grad = gradient(forward, [hazards], torch.ones_like(value))[0]
        return [value, batch.pack(grad) if is_packed else grad]

    rows = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
    layout = [None, *rows] if is_packed else [mask, None, None, None]
    values, beside = (batch.pack(x) if is_packed else x for x in (hazards, of_visits))
    last = [entries, weights, beside, competing, link, included, 1e-7, reduction, True]
    return Call(getattr(ops, name), [values, times, types, *layout, *last], expected)


@makes("survival_nll_scale")
def _scale(draw: Draw, ops: Any, name: str) -> Call:
    patients, slots = draw.whole(1, 5), draw.whole(1, 6)
    dtype = draw.one_of(FLOATING)
    saved = torch.float32 if dtype == torch.float16 else dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad = draw.floats((patients, slots), saved)
    loss = draw.floats((patients,) if draw.chance(0.5) else (), wide)
    return Call(
        ops.survival_nll_scale,
        [grad, loss, None, None, None, dtype],
        lambda: [grad.double() * (loss.double()[:, None] if loss.dim() else loss.double())],
    )
