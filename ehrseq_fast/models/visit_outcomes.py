"""Outcomes of a batch at each of its visits: which visits count, and what is refused."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..autograd import transformed
from ..backend import validate_on_device
from ..batch import PackedVisits


def visits_that_count(batch: PackedVisits, entry_times: Tensor | None) -> Tensor:
    """``[n_visits]`` bool: from the entry to the event time, where there are such."""
    counts = torch.ones(batch.n_visits, dtype=torch.bool, device=batch.device)
    if batch.event_times is not None:
        counts = batch.time_of_row <= batch.event_times[batch.patient_of_row]
    if entry_times is not None:
        if entry_times.shape != (len(batch),):
            raise ValueError(
                f"entry_times: expected [B] = [{len(batch)}], got {list(entry_times.shape)}"
            )
        counts = counts & (batch.time_of_row >= entry_times[batch.patient_of_row])
    return counts


def reads_values(days: Tensor, validate: bool) -> bool:
    """Whether values are checked: on the host, or where a GPU may be waited for."""
    if torch.compiler.is_compiling() or transformed(days):
        return False
    return days.device.type == "cpu" or validate or validate_on_device()


def check_outcomes(
    batch: PackedVisits,
    days: Tensor,
    counts: Tensor,
    entry_times: Tensor | None,
    sample_weight: Tensor | None,
) -> None:
    """``ValueError`` for impossible days, weights and entry times, with the first patient."""
    wrong = counts & ~((days >= 0) & (days < math.inf))
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise ValueError(
            f"visit_targets['days_to_end']: expected finite days from 0, got {float(days[row]):g} "
            f"(patient {int(batch.patient_of_row[row])}, visit {int(batch.time_of_row[row])}; "
            f"{int(wrong.sum())} in all)"
        )
    if sample_weight is not None:
        wrong = sample_weight < 0  # a NaN is to reach the result
        if bool(wrong.any()):
            patient = int(wrong.int().argmax())
            raise ValueError(
                f"sample_weight: expected weights from 0, got {float(sample_weight[patient]):g} "
                f"(patient {patient}; {int(wrong.sum())} in all)"
            )
    if entry_times is not None:
        last = batch.lengths.to(batch.device) - 1
        if batch.event_times is not None:
            last = batch.event_times
        outside = (entry_times < 0) | (entry_times > last)
        if bool(outside.any()):
            patient = int(outside.int().argmax())
            raise ValueError(
                "entry_times must lie between 0 and the event time: patient "
                f"{patient} has entry time {int(entry_times[patient])} and last visit "
                f"{int(last[patient])} (patients at fault: {int(outside.sum())})"
            )
