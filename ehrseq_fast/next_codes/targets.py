"""Whose codes are predicted: the rows of states that have targets, and the ragged codes of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arrays import expect_tensor, kind_of
from ..batch import PackedVisits
from ..checks import REAL, codes_outside, expect_device
from ..rows import PackedRows

Ragged = PackedVisits | tuple[Tensor, Tensor]


class Targets(NamedTuple):
    """The visits that count, in the order of their targets.

    Attributes:
        codes: int32 ``[n_codes]``.
        code_offsets: int32 ``[n_visits + 1]``: where each visit's codes begin.
        n_visits: how many visits count.
        rows: int64 ``[n_visits]``: their places among all, where not all count.
        shape: of the visits: ``[n_visits]`` or ``[B, V]``.
        batch: what the codes were taken from, and ``first`` the row of it that comes first.
    """

    codes: Tensor
    code_offsets: Tensor
    n_visits: int
    rows: Tensor | None
    shape: torch.Size
    batch: PackedVisits | None = None
    first: int = 0

    def take(self, values: Tensor) -> Tensor:
        """Of one value per visit those that count."""
        flat = values.flatten(0, len(self.shape) - 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def spread(self, losses: Tensor) -> Tensor:
        """The losses in the places of all visits, 0 where a visit does not count."""
        if self.rows is not None:
            losses = losses.new_zeros(self.shape.numel()).index_copy(0, self.rows, losses)
        return losses.view(self.shape)

    def refuse_codes_outside(self, classes: int) -> None:
        """``IndexError`` for codes outside the vocabulary, naming the first one's visit."""
        known = None if self.batch is None else self.batch.vocab_size
        if known is not None and known <= classes:
            return
        if not len(self.codes):
            return
        lowest, highest = self.codes.aminmax()
        if lowest >= 0 and highest < classes:
            return
        wrong = (self.codes < 0) | (self.codes >= classes)
        wrong[: int(self.code_offsets[0])] = False
        if not bool(wrong.any()):
            return
        at = int(wrong.to(torch.int8).argmax())
        row = int(torch.searchsorted(self.code_offsets, at, right=True)) - 1 + self.first
        where = f"visit {row}"
        if self.batch is not None:
            patient, time = self.batch.patient_of_row[row], self.batch.time_of_row[row]
            where = f"patient {int(patient)}, visit {int(time)}"
        raise codes_outside(int(wrong.sum()), classes, int(self.codes[at]), where)


def find(
    states: Tensor | PackedRows,
    targets: Ragged | None,
    mask: Tensor | None,
    next_visit: bool | None,
    reads_values: bool,
) -> tuple[Tensor, Targets]:
    """The states as a tensor, and what they are to predict."""
    batch = states.batch if isinstance(states, PackedRows) else None
    values = states.values if isinstance(states, PackedRows) else states
    if batch is not None and mask is not None:
        raise ValueError(
            "sequence_mask: expected None, as states are PackedRows, whose visits are all real, "
            "got a mask"
        )
    if targets is None:
        if batch is None:
            raise TypeError(
                "targets: expected a PackedVisits or a pair of codes and offsets, as states are no "
                "PackedRows, got None"
            )
        next_visit = True if next_visit is None else next_visit
        targets = batch
    if isinstance(targets, PackedVisits):
        targets.refuse_changes()
        rows = _rows_of_batch(values, targets, batch, mask, reads_values)
        return values, _of_batch(values, targets, rows, bool(next_visit))
    if not (isinstance(targets, (tuple, list)) and len(targets) == 2):
        raise TypeError(
            f"targets: expected a PackedVisits or a pair of codes and offsets, got "
            f"{kind_of(targets)}"
        )
    if next_visit:
        raise ValueError(
            "next_visit: expected False, as targets are codes and offsets, which do not say what "
            "visit follows on which, got True: pass a PackedVisits"
        )
    return values, _of_pair(values, *targets, mask, reads_values)


def _of_batch(
    values: Tensor, batch: PackedVisits, rows: Tensor | None, next_visit: bool
) -> Targets:
    shape = values.shape[:-1]
    expect_device("targets", batch.codes, values.device, "states")
    if not next_visit:
        return Targets(batch.codes, batch.code_offsets, batch.n_visits, rows, shape, batch)
    first = len(batch)  # every patient has a first visit, which follows on none
    before = batch.rows_with_next()
    rows = before if rows is None else rows.index_select(0, before)
    offsets = batch.code_offsets[first:]
    return Targets(batch.codes, offsets, len(before), rows, shape, batch, first)


def _rows_of_batch(
    values: Tensor,
    targets: PackedVisits,
    batch: PackedVisits | None,
    mask: Tensor | None,
    reads_values: bool,
) -> Tensor | None:
    """Which of the states are the visits of ``targets``; None where they are its rows."""
    if mask is not None:
        _check_mask(values, mask)
    if values.dim() == 2:
        if len(values) != targets.n_visits:
            raise ValueError(
                f"states: expected one row per visit of targets ({targets.n_visits}), got "
                f"{list(values.shape)}"
            )
        if batch is not None and batch is not targets and reads_values:
            _refuse_lengths(batch.lengths, targets.lengths)
        return None
    n_patients, n_slots = values.shape[:2]
    if n_patients != len(targets) or n_slots < targets.max_visits:
        raise ValueError(
            f"states: expected [B={len(targets)}, V>={targets.max_visits}, H] for targets, got "
            f"{list(values.shape)}"
        )
    slots = torch.arange(n_patients * n_slots, device=values.device).view(n_patients, n_slots)
    if mask is not None and reads_values:
        real = slots % max(1, n_slots) < targets.lengths.to(values.device)[:, None]
        wrong = (mask != real).any(1)
        if bool(wrong.any()):
            patient = int(wrong.to(torch.int8).argmax())
            raise ValueError(
                f"sequence_mask: expected 1 on the visits of targets and 0 after them, got "
                f"{mask[patient].tolist()} (patient {patient}, of "
                f"{int(targets.lengths[patient])} visits)"
            )
    return targets.pack(slots)


def _refuse_lengths(lengths: Tensor, of_targets: Tensor) -> None:
    if torch.equal(lengths, of_targets):
        return
    if len(lengths) != len(of_targets):
        raise ValueError(f"targets: expected {len(lengths)} patients, got {len(of_targets)}")
    patient = int((lengths != of_targets).to(torch.int8).argmax())
    raise ValueError(
        f"targets: expected the visits of states, got patients of other lengths (patient "
        f"{patient}: expected {int(lengths[patient])}, got {int(of_targets[patient])})"
    )


def _check_mask(values: Tensor, mask: Tensor) -> None:
    expect_tensor("sequence_mask", mask)
    if mask.dtype not in REAL:
        raise TypeError(f"sequence_mask: expected a bool or numeric dtype, got {mask.dtype}")
    if mask.shape != values.shape[:2] or values.dim() != 3:
        raise ValueError(
            f"sequence_mask: expected shape [B, V] of states [B, V, H], got {list(mask.shape)} for "
            f"states {list(values.shape)}"
        )
    expect_device("sequence_mask", mask, values.device, "states")


def _of_pair(
    values: Tensor, codes: Tensor, offsets: Tensor, mask: Tensor | None, reads_values: bool
) -> Targets:
    for name, tensor in (("codes", codes), ("offsets", offsets)):
        expect_tensor(f"targets, {name}", tensor)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"targets, {name}: expected int32 or int64, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"targets, {name}: expected one dimension, got {list(tensor.shape)}")
        expect_device(f"targets, {name}", tensor, values.device, "states")
    count = len(offsets) - 1
    shape = values.shape[:-1]
    rows = None
    if mask is not None:
        _check_mask(values, mask)
        real = (mask != 0).flatten()
        if reads_values:
            _check_real(mask, count)
        # the places of the real visits, of which there are `count`, without a wait for the device
        rows = torch.argsort((~real).to(torch.uint8), stable=True)[:count]
    elif shape.numel() != count:
        raise ValueError(
            f"targets, offsets: expected one more than the {shape.numel()} visits of states "
            f"{list(values.shape)}, got {len(offsets)}"
        )
    if reads_values:
        ends = (int(offsets[0]), int(offsets[-1])) if len(offsets) else None
        if ends != (0, len(codes)) or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"targets, offsets: expected to rise from 0 to the {len(codes)} codes, got "
                f"{offsets.tolist() if len(offsets) < 10 else ends}"
            )
    return Targets(_narrow(codes), _narrow(offsets), count, rows, shape)


def _narrow(numbers: Tensor) -> Tensor:
    if numbers.dtype == torch.int32:
        return numbers
    return numbers.clamp(-2, 2**31 - 1).to(torch.int32)  # what is outside stays outside


def _check_real(mask: Tensor, count: int) -> None:
    wrong = ((mask != 0) & (mask != 1)).any(1)
    if bool(wrong.any()):
        patient = int(wrong.to(torch.int8).argmax())
        raise ValueError(
            f"sequence_mask: expected 0 or 1, got {mask[patient].tolist()} (patient {patient})"
        )
    found = int((mask != 0).sum())
    if found != count:
        raise ValueError(
            f"targets, offsets: expected one more than the {found} visits of sequence_mask, got "
            f"{count + 1}"
        )
