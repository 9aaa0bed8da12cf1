"""What the constructors of :class:`~ehrseq_fast.PackedVisits` do.

Shapes and dtypes are checked, the buffers built (by ``csrc/batching``, by its NumPy counterpart, or
on the device), and whatever else the batch holds is put into its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import backend
from ..arrays import Array, ArrayLike, any_integers, as_array
from . import reference
from .checks import (
    check_padded,
    code_limit,
    expect_all_rows,
    host_lengths,
    listed,
    mask_states,
    offsets,
    outcomes_of,
    patient_numbers,
    wide_codes,
)
from .device import pack_on_device
from .gather import (
    as_tensor,
    as_values,
    by_name,
    check_features,
    gather_all,
    gather_features,
    joined,
)
from .layout import Layout, layout_of
from .rows import Rows
from .slots import real_slots_first
from .weights import (
    checked_padded,
    gather_weights,
    listed_weights,
    padded_weights,
    weights_of_codes,
)

Outcomes = tuple["ArrayLike | None", "ArrayLike | None", "ArrayLike | None"]


def batch_builder() -> ModuleType:
    """What builds batches on the host: the compiled ``_batching``, or its NumPy counterpart
    ``batch.reference`` where nothing is compiled or ``reference`` is asked for.

    Raises:
        RuntimeError: if ``cpu`` was asked for and ``_batching`` did not load, with the reason.
    """
    asked = backend.requested()
    if asked == "cpu" and backend.batching is None:
        raise RuntimeError(
            f"backend 'cpu' was asked for, but cannot build batches: "
            f"{backend.compiled_batching.reason}"
        )
    if backend.batching is None or asked == "reference":
        return reference
    return backend.batching


class Contents(NamedTuple):
    """All that a batch holds, in the order in which its class takes it."""

    layout: Layout
    host: Tensor
    fields: Tensor
    vocab_size: int | None
    visit_features: Tensor | None
    targets: dict[str, Tensor]
    visit_targets: dict[str, Tensor]
    code_weights: Tensor | None = None


def from_lists(
    patients: Sequence[Sequence[Sequence[int]]],
    vocab_size: int | None,
    outcomes: Outcomes,
    visit_features: ArrayLike | Sequence[ArrayLike] | None,
    targets: Mapping[str, ArrayLike] | None,
    visit_targets: Mapping[str, ArrayLike | Sequence[ArrayLike]] | None,
    code_weights: Any = None,
) -> Contents:
    patients = listed(patients)
    longs = outcomes_of(*outcomes, len(patients))
    visit_targets = by_name("visit_targets", visit_targets)
    weighted = code_weights is not None
    per_visit = visit_features is not None or bool(visit_targets) or weighted
    sizes, host, fields, rows = batch_builder().pack_lists(
        patients, code_limit(vocab_size), *longs, per_visit
    )
    layout = layout_of(sizes, longs)
    total = layout.n_visits
    lengths = host[layout.max_visits :].tolist() if per_visit else []
    views = layout.views(torch.from_numpy(host), torch.from_numpy(fields)) if weighted else {}
    by_visit = {
        name: joined(f"visit_targets[{name!r}]", values, lengths)
        for name, values in by_name("visit_targets", visit_targets).items()
    }
    return Contents(
        layout,
        torch.from_numpy(host),
        torch.from_numpy(fields),
        vocab_size,
        gather_features(joined("visit_features", visit_features, lengths), rows, total),
        gather_all(targets, None, len(patients), "patients"),
        gather_all(by_visit, rows, total),
        listed_weights(code_weights, lengths, rows, views["code_offsets"]) if weighted else None,
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
    code_weights: ArrayLike | None = None,
) -> Contents:
    codes = any_integers("codes", codes)
    visit_offsets = offsets("visit_offsets", visit_offsets)
    patient_offsets = offsets("patient_offsets", patient_offsets)
    n_records = patient_offsets.shape[0] - 1
    n_rows = visit_offsets.shape[0] - 1
    chosen = None if patients is None else patient_numbers(patients, n_records)
    longs = outcomes_of(*outcomes, n_records, chosen)
    visit_targets = by_name("visit_targets", visit_targets)
    weighted = code_weights is not None
    per_visit = visit_features is not None or bool(visit_targets) or weighted
    sizes, host, fields, rows = batch_builder().pack_flat(
        codes,
        visit_offsets,
        patient_offsets,
        chosen,
        code_limit(vocab_size),
        *longs,
        per_visit,
    )
    expect_all_rows("visit_offsets", visit_offsets, codes.shape[0], "codes")
    expect_all_rows("patient_offsets", patient_offsets, n_rows, "visits")
    layout = layout_of(sizes, longs)
    weights = None
    if weighted:
        of_all = weights_of_codes(code_weights, (codes.shape[0],))
        views = layout.views(torch.from_numpy(host), torch.from_numpy(fields))
        weights = gather_weights(of_all, rows, visit_offsets, views["code_offsets"])
    return Contents(
        layout,
        torch.from_numpy(host),
        torch.from_numpy(fields),
        vocab_size,
        gather_features(visit_features, rows, n_rows),
        gather_all(targets, chosen, n_records, "patients"),
        gather_all(visit_targets, rows, n_rows),
        weights,
    )


def from_prefixes(
    codes: Array,
    visit_offsets: Array,
    patient_offsets: Array,
    patients: NDArray[np.int64],
    n_visits: NDArray[np.int64],
    code_map: NDArray[np.int32],
    vocab_size: int,
    event_times: NDArray[np.int64] | None,
    event_indicators: NDArray[np.int64] | None,
    event_types: NDArray[np.int64] | None = None,
) -> tuple[Contents, Array]:
    """The first ``n_visits`` visits of each of the patients of flat arrays, with their codes mapped
    by ``code_map``, and the row of each packed visit in those arrays. Outcomes are the batch's.

    What one visit holds after mapping comes out ascending and once each.
    """
    outcomes = (event_times, event_indicators, event_types)
    sizes, host, fields, rows = batch_builder().pack_mapped(
        as_array("codes", codes),
        as_array("visit_offsets", visit_offsets),
        as_array("patient_offsets", patient_offsets),
        patients,
        n_visits,
        code_map,
        vocab_size,
        *outcomes,
        True,
    )
    layout = layout_of(sizes, outcomes)
    contents = Contents(
        layout, torch.from_numpy(host), torch.from_numpy(fields), vocab_size, None, {}, {}
    )
    return contents, rows


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
    side: str = "right",
    holes: str = "refuse",
    code_weights: ArrayLike | None = None,
) -> Contents:
    check_padded(visit_codes, visit_mask, sequence_mask)
    visit_codes = wide_codes("visit_codes", visit_codes)
    shape = visit_codes.shape[:2]
    given = None if lengths is None else host_lengths(lengths, shape[0])
    slots = real_slots_first(visit_codes, sequence_mask, given, side, holes)
    triple = (visit_codes, visit_mask, sequence_mask)
    if slots is not None:
        triple = (
            _in_slots(visit_codes, slots),
            None if visit_mask is None else _in_slots(visit_mask, slots),
            None if sequence_mask is None else sequence_mask.gather(1, slots),
        )
    fractions = code_weights is None and visit_mask is not None and visit_mask.is_floating_point()
    packed, weighted = _pack_padded(*triple, given, vocab_size, outcomes, fractions)
    rows = Rows(*packed)

    def pack(values: Tensor) -> Tensor:
        return rows.pack(values if slots is None else _in_slots(values, slots))

    weights = None
    if weighted or code_weights is not None:
        of_slots = checked_padded(visit_mask if weighted else code_weights, visit_codes)
        weights = padded_weights(
            pack(of_slots), None if visit_mask is None else pack(visit_mask), rows
        )
        if weighted and bool((weights.detach() == 1).all()):
            weights = None  # padded visits alone had fractions
    features = None
    device = visit_codes.device
    gathered = gather_all(targets, None, shape[0], "patients", device)
    if visit_features is not None:
        values = as_tensor(as_values("visit_features", visit_features), device)
        check_features(values, values.shape[:2], shape)
        features = pack(values)
    by_visit = {}
    for key, target in by_name("visit_targets", visit_targets).items():
        name = f"visit_targets[{key!r}]"
        values = as_tensor(as_values(name, target), device)
        if values.shape[:2] != shape:
            raise ValueError(
                f"{name}: expected shape [{shape[0]}, {shape[1]}, ...], got {list(values.shape)}"
            )
        by_visit[key] = pack(values)
    return Contents(*packed, vocab_size, features, gathered, by_visit, weights)


def _in_slots(values: Tensor, slots: Tensor) -> Tensor:
    """Padded values ``[B, V, ...]`` with each patient's slots in another order."""
    patients, visits = slots.shape
    flat = slots + torch.arange(patients, device=slots.device)[:, None] * visits
    return values.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, (patients, visits))


def _pack_padded(
    visit_codes: Tensor,
    visit_mask: Tensor | None,
    sequence_mask: Tensor | None,
    given: Array | None,
    vocab_size: int | None,
    outcomes: Outcomes,
    fractions: bool,
) -> tuple[tuple[Layout, Tensor, Tensor], bool]:
    """Layout, buffers, and whether the mask of codes weighs them, which is refused without
    ``fractions``."""
    code_states, visit_states = mask_states(visit_mask), mask_states(sequence_mask)
    device = visit_codes.device
    if device.type != "cpu":
        packed = pack_on_device(visit_codes, code_states, visit_states, given, vocab_size, outcomes)
        if packed is not None:
            return packed, False
        # the mask weighs codes, or something is wrong: the builder on the host says what
        visit_codes = visit_codes.cpu()
        code_states = None if code_states is None else code_states.cpu()
        visit_states = None if visit_states is None else visit_states.cpu()
    weighted = False
    if fractions and code_states is not None and visit_mask is not None:
        numbers = (code_states > 1) & ~visit_mask.detach().to("cpu").isnan()
        weighted = bool(numbers.any())
        code_states = torch.where(numbers, 1, code_states) if weighted else code_states
    longs = outcomes_of(*outcomes, visit_codes.shape[0])
    sizes, host, fields, _ = batch_builder().pack_padded(
        visit_codes.detach().contiguous().numpy(),
        None if code_states is None else code_states.contiguous().numpy(),
        None if visit_states is None else visit_states.contiguous().numpy(),
        given,
        code_limit(vocab_size),
        *longs,
    )
    on_device = torch.from_numpy(fields).to(device)
    return (layout_of(sizes, longs), torch.from_numpy(host), on_device), weighted
