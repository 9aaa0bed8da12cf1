"""What the constructors of :class:`~ehrseq_fast.PackedVisits` do.

Shapes and dtypes are checked, the buffers built (by ``csrc/batching``, by its NumPy twin, or on the
device), and whatever else the batch holds is put into its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend
from . import reference
from .checks import (
    ArrayLike,
    check_padded,
    code_limit,
    host_lengths,
    integers,
    listed,
    mask_states,
    offsets,
    outcomes_of,
    patient_numbers,
)
from .device import on_host, pack_on_device
from .gather import check_features, gather_all, gather_features, joined
from .layout import Layout, layout_of
from .rows import Rows

backend.register_batch_builder(reference)

Outcomes = tuple["ArrayLike | None", "ArrayLike | None", "ArrayLike | None"]


class Contents(NamedTuple):
    """All that a batch holds, in the order in which its class takes it."""

    layout: Layout
    host: Tensor
    fields: Tensor
    vocab_size: int | None
    visit_features: Tensor | None
    targets: dict[str, Tensor]
    visit_targets: dict[str, Tensor]


def from_lists(
    patients: Sequence[Sequence[Sequence[int]]],
    vocab_size: int | None,
    outcomes: Outcomes,
    visit_features: ArrayLike | Sequence[ArrayLike] | None,
    targets: Mapping[str, ArrayLike] | None,
    visit_targets: Mapping[str, ArrayLike | Sequence[ArrayLike]] | None,
) -> Contents:
    if not isinstance(patients, (list, tuple)):
        patients = listed(patients)
    longs = outcomes_of(*outcomes, len(patients))
    per_visit = visit_features is not None or bool(visit_targets)
    sizes, host, fields, rows = backend.batch_builder().pack_lists(
        patients, code_limit(vocab_size), *longs, per_visit
    )
    layout = layout_of(sizes, longs)
    total = layout.n_visits
    return Contents(
        layout,
        torch.from_numpy(host),
        torch.from_numpy(fields),
        vocab_size,
        gather_features(joined(visit_features), rows, total),
        gather_all(targets, None, len(patients), "patients"),
        gather_all({k: joined(v) for k, v in (visit_targets or {}).items()}, rows, total),
    )


def from_flat(
    codes: ArrayLike,
    visit_offsets: ArrayLike,
    patient_offsets: ArrayLike,
    patients: ArrayLike | None,
    vocab_size: int | None,
    outcomes: Outcomes,
    visit_features: ArrayLike | None,
    targets: Mapping[str, ArrayLike] | None,
    visit_targets: Mapping[str, ArrayLike] | None,
) -> Contents:
    codes = integers("codes", codes)
    visit_offsets = offsets("visit_offsets", visit_offsets)
    patient_offsets = offsets("patient_offsets", patient_offsets)
    n_records = patient_offsets.shape[0] - 1
    n_rows = visit_offsets.shape[0] - 1
    chosen = None if patients is None else patient_numbers(patients)
    longs = outcomes_of(*outcomes, n_records, chosen)
    per_visit = visit_features is not None or bool(visit_targets)
    sizes, host, fields, rows = backend.batch_builder().pack_flat(
        codes,
        visit_offsets,
        patient_offsets,
        chosen,
        code_limit(vocab_size),
        *longs,
        per_visit,
    )
    return Contents(
        layout_of(sizes, longs),
        torch.from_numpy(host),
        torch.from_numpy(fields),
        vocab_size,
        gather_features(visit_features, rows, n_rows),
        gather_all(targets, chosen, n_records, "patients"),
        gather_all(visit_targets, rows, n_rows),
    )


def from_padded(
    visit_codes: Tensor,
    visit_mask: Tensor | None,
    sequence_mask: Tensor | None,
    lengths: ArrayLike | None,
    vocab_size: int | None,
    outcomes: Outcomes,
    visit_features: Tensor | None,
    targets: Mapping[str, ArrayLike] | None,
    visit_targets: Mapping[str, Tensor] | None,
) -> Contents:
    check_padded(visit_codes, visit_mask, sequence_mask)
    shape = visit_codes.shape[:2]
    packed = _pack_padded(visit_codes, visit_mask, sequence_mask, lengths, vocab_size, outcomes)
    rows = Rows(*packed)
    features = None
    gathered = gather_all(targets, None, shape[0], "patients")
    if visit_features is not None:
        check_features(visit_features, visit_features.shape[:2], shape)
        features = rows.pack(visit_features)
    by_visit = {}
    for name, target in (visit_targets or {}).items():
        if target.shape[:2] != shape:
            raise ValueError(
                f"visit_targets[{name!r}]: expected shape [{shape[0]}, {shape[1]}, ...], "
                f"got {list(target.shape)}"
            )
        by_visit[name] = rows.pack(target)
    return Contents(*packed, vocab_size, features, gathered, by_visit)


def _pack_padded(
    visit_codes: Tensor,
    visit_mask: Tensor | None,
    sequence_mask: Tensor | None,
    lengths: ArrayLike | None,
    vocab_size: int | None,
    outcomes: Outcomes,
) -> tuple[Layout, Tensor, Tensor]:
    given = None if lengths is None else host_lengths(lengths, visit_codes.shape[0])
    code_states, visit_states = mask_states(visit_mask), mask_states(sequence_mask)
    if visit_codes.device.type != "cpu":
        packed = pack_on_device(visit_codes, code_states, visit_states, given, vocab_size, outcomes)
        if packed is not None:
            return packed
        # something is wrong: the builder on the host says what
        visit_codes = visit_codes.cpu()
        code_states = None if code_states is None else code_states.cpu()
        visit_states = None if visit_states is None else visit_states.cpu()
    times, indicators, types = map(on_host, outcomes)
    longs = outcomes_of(times, indicators, types, visit_codes.shape[0])
    sizes, host, fields, _ = backend.batch_builder().pack_padded(
        visit_codes.detach().contiguous().numpy(),
        None if code_states is None else code_states.contiguous().numpy(),
        None if visit_states is None else visit_states.contiguous().numpy(),
        given,
        code_limit(vocab_size),
        *longs,
    )
    return layout_of(sizes, longs), torch.from_numpy(host), torch.from_numpy(fields)
