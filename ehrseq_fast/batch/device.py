"""Packing padded tensors on their own device, which the host should not wait for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arrays import Array, ArrayLike
from .checks import code_limit
from .checks import outcome as host_outcome
from .layout import MOST_CODES, OUTCOMES, Layout
from .reference_checks import MOST


def _outcome_on(device: torch.device, name: str, values: ArrayLike, n_patients: int) -> Tensor:
    if isinstance(values, Tensor) and values.device == device:
        return values
    longs = host_outcome(name, values, n_patients, None)
    return torch.from_numpy(longs).to(device, non_blocking=True)


def pack_on_device(
    visit_codes: Tensor,
    code_states: Tensor | None,
    visit_states: Tensor | None,
    lengths: Array | None,
    vocab_size: int | None,
    outcomes: tuple[ArrayLike | None, ...],
) -> tuple[Layout, Tensor, Tensor] | None:
    """Pack padded tensors on their device, waiting for the device once; None if a value is wrong.

    Everything has a shape that is known beforehand, an upper bound where need be, until one copy to
    the host learns the true sizes; then the surplus is cut off.
    """
    device = visit_codes.device
    n_patients, n_visits, n_slots = visit_codes.shape

    def arange(n: int) -> Tensor:
        return torch.arange(n, device=device)

    errors = []
    if lengths is None:
        mask = visit_states
        if mask is None:
            mask = torch.ones(n_patients, n_visits, dtype=torch.uint8, device=device)
        device_lengths = (mask == 1).sum(1)
        expected = arange(n_visits) < device_lengths[:, None]
        errors.append((mask != expected).sum())  # holes, and values that are neither 0 nor 1
    else:
        if ((lengths < 1) | (lengths > n_visits)).any():
            return None
        device_lengths = torch.from_numpy(lengths).to(device, non_blocking=True)
    errors.append((device_lengths < 1).sum())

    # Candidate rows: every slot in time-major order of the sorted patients, of which the real ones
    # come out in packed order.
    order = torch.sort(device_lengths, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(0, order, arange(n_patients))
    sorted_lengths = device_lengths[order]
    steps = n_visits if lengths is None else int(lengths.max(initial=0))
    real_visit = (arange(steps)[:, None] < sorted_lengths).flatten()
    batch_sizes = real_visit.view(steps, n_patients).sum(1)
    row_starts = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
    slots = (order * n_visits + arange(steps)[:, None]).flatten()
    row_of_slot = real_visit.cumsum(0) - 1

    # Real codes move to the front, in row order; all others to one place past the end.
    candidates = visit_codes.flatten(0, 1)[slots]
    real = real_visit[:, None].expand(-1, n_slots)
    if code_states is not None:
        states = code_states.flatten(0, 1)[slots]
        errors.append((real & (states > 1)).sum())
        real = real & (states == 1)
    outside = (candidates < 0) | (candidates >= code_limit(vocab_size))
    errors.append((real & outside).sum())
    n_candidates = real.numel()
    place = torch.where(real.flatten(), real.flatten().cumsum(0) - 1, n_candidates)
    row_of_code = row_of_slot.repeat_interleave(n_slots, output_size=n_candidates)
    # After the real codes comes one that no visit has, so that sorting leaves it last.
    keys = torch.full((n_candidates + 1,), MOST_CODES, dtype=torch.int64, device=device)
    keys.scatter_(0, place, torch.where(real, candidates, MOST_CODES).flatten().long())
    rows = torch.empty_like(keys).scatter_(0, place, row_of_code)
    keys, rows = keys[:-1], rows[:-1]
    ends = real.sum(1).cumsum(0)
    code_offsets = ends.new_zeros(len(slots) + 2)
    code_offsets.scatter_(0, torch.where(real_visit, row_of_slot + 1, len(slots) + 1), ends)

    sorted_keys, by_code = torch.sort(keys, stable=True)
    starts = torch.ones_like(sorted_keys, dtype=torch.bool)
    starts[1:] = sorted_keys[1:] != sorted_keys[:-1]
    starts &= sorted_keys != MOST_CODES
    kind = torch.where(starts, starts.cumsum(0) - 1, n_candidates)
    index_codes = torch.empty_like(sorted_keys, dtype=torch.int64).resize_(n_candidates + 1)
    index_codes.scatter_(0, kind, sorted_keys)
    index_offsets = torch.empty_like(index_codes).scatter_(0, kind, arange(n_candidates))

    given = {}
    for name, wanted in zip(OUTCOMES, outcomes, strict=True):
        if wanted is None:
            continue
        outcome = _outcome_on(device, name, wanted, n_patients)
        integral = not (outcome.is_floating_point() or outcome.dtype == torch.bool)
        if outcome.shape != (n_patients,) or outcome.is_complex():
            return None
        if name == "event_times" and not integral:
            return None
        values = outcome.long()
        given[name] = values
        wrong = {
            "event_times": (values < 0) | (values >= device_lengths),
            "event_indicators": (values != 0) & (values != 1),
            "event_types": values < 0,
        }[name]
        errors.append((wrong | (values != outcome)).sum())

    n_codes = real.sum()
    sizes = torch.stack([torch.stack(errors).sum(), n_codes, starts.sum()])
    if lengths is None:
        sizes = torch.cat([sizes, device_lengths])
    n_errors, codes_there, distinct, *read = sizes.tolist()  # the one wait
    if n_errors or codes_there > MOST:
        return None

    host_lengths = (
        torch.tensor(read, dtype=torch.int64, device="cpu")
        if lengths is None
        else (torch.from_numpy(lengths.copy()))
    )
    max_visits = int(host_lengths.max()) if n_patients else 0
    layout = Layout(
        n_patients, max_visits, int(host_lengths.sum()), codes_there, distinct, tuple(given)
    )
    at_least = torch.bincount(host_lengths, minlength=1).flip(0).cumsum(0).flip(0)[1:]
    ints = torch.cat(
        [
            code_offsets[: layout.n_visits + 1],
            keys[:codes_there],
            rows[by_code[:codes_there]],
            index_codes[:distinct],
            index_offsets[:distinct],
            n_codes[None],
            n_codes.new_zeros(sum(layout.ints()) % 2),
        ]
    ).to(torch.int32)
    last_rows = row_starts[(device_lengths - 1)] + ranks
    fields = torch.cat(
        [
            order,
            ranks,
            last_rows,
            row_starts[: max_visits + 1],
            *given.values(),
            ints.view(torch.int64),
        ]
    )
    return layout, torch.cat([at_least, host_lengths]), fields
