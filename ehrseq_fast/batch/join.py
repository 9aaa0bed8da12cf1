"""From batches to a batch: slices and concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array
from .builder import Contents, batch_builder
from .checks import code_limit
from .layout import OUTCOMES, layout_of
from .rows import Rows
from .weights import gather_weights


class _Flat(NamedTuple):
    """Some patients of a batch, flat, in the order in which they were chosen."""

    codes: Array
    codes_per_visit: Array
    visits_per_patient: Array
    rows: Array  # which row of the batch each visit was
    chosen: Array  # which patient of the batch each patient was
    places: Array  # which code of the batch each code was


def _flatten(
    batch: Rows, chosen: Array, first: Array | None = None, kept: Array | None = None
) -> _Flat:
    """All visits of the chosen patients, or of each ``kept`` visits from ``first`` on."""
    lengths = batch.lengths.numpy()[chosen] if kept is None else kept
    time = np.arange(lengths.sum()) - np.repeat(_starts(lengths), lengths)
    if first is not None:
        time = time + np.repeat(first, lengths)
    ranks = batch.unsorted_indices.numpy()[chosen]
    rows = batch.row_starts.numpy()[time] + np.repeat(ranks, lengths)
    batch._codes_per_row()  # refuses offsets that fall
    offsets = batch.code_offsets.numpy().astype(np.int64)
    counts = offsets[rows + 1] - offsets[rows]
    places = np.repeat(offsets[rows] - _starts(counts), counts) + np.arange(counts.sum())
    return _Flat(batch.codes.numpy()[places], counts, lengths, rows, chosen, places)


def _starts(counts: Array) -> Array:
    return np.cumsum(counts) - counts


def join(batches: Sequence[Rows], chosen: Sequence[Array]) -> Contents:
    """One batch of the chosen patients of each of ``batches``, with all that these hold, on the
    device of the first."""
    first = batches[0]
    parts = [_flatten(b.to("cpu"), some) for b, some in zip(batches, chosen, strict=True)]

    def gather(values: list[Any], rows: list[Array]) -> Tensor:
        picked = [
            value.index_select(0, torch.from_numpy(row).to(value.device))
            for value, row in zip(values, rows, strict=True)
        ]
        return torch.cat([part.to(first.device) for part in picked])

    def of_patients(values: list[Any]) -> Tensor:
        return gather(values, [part.chosen for part in parts])

    def of_visits(values: list[Any]) -> Tensor:
        return gather(values, [part.rows for part in parts])[order]

    outcomes = [
        of_patients([getattr(b, name) for b in batches]).cpu().numpy()
        if name in first._layout.outcomes
        else None
        for name in OUTCOMES
    ]
    code_offsets = _offsets([part.codes_per_visit for part in parts])
    sizes, host, fields, rows = batch_builder().pack_flat(
        np.concatenate([part.codes for part in parts]),
        code_offsets,
        _offsets([part.visits_per_patient for part in parts]),
        None,
        code_limit(first.vocab_size),
        *outcomes,
        True,
    )
    order = torch.from_numpy(rows).to(first.device)
    features = [b.visit_features for b in batches]
    layout = layout_of(sizes, outcomes)
    weights = None
    if first.code_weights is not None:
        views = layout.views(torch.from_numpy(host), torch.from_numpy(fields))
        in_order = gather([b.code_weights for b in batches], [part.places for part in parts])
        weights = gather_weights(in_order, rows, code_offsets, views["code_offsets"], first.device)
    return Contents(
        layout,
        torch.from_numpy(host),
        torch.from_numpy(fields).to(first.device),
        first.vocab_size,
        None if first.visit_features is None else of_visits(features),
        {name: of_patients([b.targets[name] for b in batches]) for name in first.targets},
        {name: of_visits([b.visit_targets[name] for b in batches]) for name in first.visit_targets},
        weights,
    )


def cut(
    batch: Rows,
    first: Array,
    kept: Array,
    outcomes: tuple[Array | None, Array | None, Array | None],
) -> Contents:
    """A batch of ``kept`` visits of each patient from visit ``first`` on, with these outcomes."""
    flat = _flatten(batch.to("cpu"), np.arange(len(batch)), first, kept)
    code_offsets = _offsets([flat.codes_per_visit])
    sizes, host, fields, order = batch_builder().pack_flat(
        flat.codes,
        code_offsets,
        _offsets([flat.visits_per_patient]),
        None,
        code_limit(batch.vocab_size),
        *outcomes,
        True,
    )
    source = torch.from_numpy(flat.rows[order])

    def gather(values: Tensor) -> Tensor:
        return values.index_select(0, source.to(values.device))

    features = batch.visit_features
    layout = layout_of(sizes, outcomes)
    weights = batch.code_weights
    if weights is not None:
        views = layout.views(torch.from_numpy(host), torch.from_numpy(fields))
        in_order = weights.index_select(0, torch.from_numpy(flat.places).to(weights.device))
        offsets = views["code_offsets"]
        weights = gather_weights(in_order, order, code_offsets, offsets, batch.device)
    return Contents(
        layout,
        torch.from_numpy(host),
        torch.from_numpy(fields).to(batch.device),
        batch.vocab_size,
        None if features is None else gather(features),
        dict(batch.targets),
        {name: gather(values) for name, values in batch.visit_targets.items()},
        weights,
    )


def _offsets(counts: list[Array]) -> Array:
    return np.concatenate([[0], np.cumsum(np.concatenate(counts))])


def check_alike(batches: Sequence[Rows]) -> None:
    def holds(batch: Rows) -> tuple[Any, ...]:
        names = sorted(batch.targets), sorted(batch.visit_targets)
        weighted = batch.code_weights is not None
        features = batch.visit_features is not None
        return batch._layout.outcomes, features, *names, batch.vocab_size, weighted

    for at, batch in enumerate(batches):
        if holds(batch) != holds(batches[0]):
            raise ValueError(
                "PackedVisits.cat expects batches that hold the same (outcomes, features, targets, "
                f"visit targets, vocab_size, code weights): batch 0 holds {holds(batches[0])}, "
                f"batch {at} {holds(batch)}"
            )
