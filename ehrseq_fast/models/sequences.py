"""Padded patients and their real visits: checks at the door, and the packed order of the rows.

A batch arrives padded at two levels: ``visit_codes`` ``[B, V, C]`` with ``visit_mask`` (codes of a
visit) and ``sequence_mask`` ``[B, V]`` (visits of a patient). The fused path keeps one row per real
visit, in the order of a :class:`~torch.nn.utils.rnn.PackedSequence`: first visits of all patients,
longest patient first, then second visits, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..backend import validate_on_device

CODE_DTYPES = (torch.int32, torch.int64)


def check_padded_batch(
    visit_codes: Tensor, visit_mask: Tensor | None, sequence_mask: Tensor | None
) -> None:
    """Refuse a padded triple whose shapes or dtypes do not fit together.

    Raises:
        TypeError: for codes that are not int32 or int64.
        ValueError: for shapes other than ``[B, V, C]``, ``[B, V, C]`` and ``[B, V]``, no patient or
            no visit.
    """
    if visit_codes.dtype not in CODE_DTYPES:
        raise TypeError(f"visit_codes must be int32 or int64, got {visit_codes.dtype}")
    if visit_codes.dim() != 3:
        raise ValueError(f"visit_codes must be [B, V, C], got shape {list(visit_codes.shape)}")
    if visit_codes.shape[0] == 0:
        raise ValueError(f"visit_codes [B, V, C] = {list(visit_codes.shape)} holds no patient")
    if visit_codes.shape[1] == 0:
        refuse_zero_lengths(torch.zeros(visit_codes.shape[0]))
    if visit_mask is not None and visit_mask.shape != visit_codes.shape:
        raise ValueError(
            f"visit_mask must be [B, V, C] = {list(visit_codes.shape)} as visit_codes, "
            f"got shape {list(visit_mask.shape)}"
        )
    if sequence_mask is not None and sequence_mask.shape != visit_codes.shape[:2]:
        raise ValueError(
            f"sequence_mask must be [B, V] = {list(visit_codes.shape[:2])} as visit_codes, "
            f"got shape {list(sequence_mask.shape)}"
        )


def refuse_zero_lengths(lengths: Tensor) -> None:
    """Raise for patients without a visit; ``lengths`` ``[B]`` lies on the host."""
    empty = lengths == 0
    count = int(empty.sum())
    if count:
        raise ValueError(
            f"Found {count} sequences with zero length. All sequences must have at least 1 visit. "
            f"The first is patient {int(empty.int().argmax())}."
        )


def refuse_holes(lengths: Tensor, reaches: Tensor) -> None:
    """Raise where a patient's last real visit (``reaches``, 1-based) is not visit number length."""
    holed = lengths != reaches
    count = int(holed.sum())
    if count:
        first = int(holed.int().argmax())
        raise ValueError(
            f"sequence_mask has holes in {count} patients: real visits must come first, padding "
            f"after them. The first is patient {first}: {int(lengths[first])} real visits, the "
            f"last of them in slot {int(reaches[first]) - 1}."
        )


def real_lengths(sequence_mask: Tensor) -> Tensor:
    """Number of real visits of each patient, ``[B]`` int64 on the host.

    Any value but zero marks a real visit. For a mask on a GPU this is one synchronisation; the
    lengths have to be on the host to build a ``PackedSequence``.

    Raises:
        ValueError: for patients without a visit, and for real visits behind padding.
    """
    lengths, reaches = _lengths_and_reaches(sequence_mask).cpu().unbind()
    refuse_zero_lengths(lengths)
    refuse_holes(lengths, reaches)
    return lengths


def _lengths_and_reaches(sequence_mask: Tensor) -> Tensor:
    real = sequence_mask != 0
    slot_number = torch.arange(1, real.shape[1] + 1, device=real.device)
    return torch.stack([real.sum(1), (real * slot_number).amax(1)])


def check_sequence_mask(sequence_mask: Tensor) -> None:
    """The value checks of :func:`real_lengths`, for a caller with no use for the lengths.

    They run on CPU tensors always, on a GPU only with ``EHRSEQ_FAST_VALIDATE=1``.
    """
    if torch.compiler.is_compiling():
        return
    if sequence_mask.device.type == "cpu" or validate_on_device():
        real_lengths(sequence_mask)


@dataclass(frozen=True)
class PackedOrder:
    """Where the real visits of a padded batch stand in a ``PackedSequence``.

    Attributes:
        slots: ``[n_visits]`` int64, for each packed row its slot in the flattened ``[B * V]``.
        batch_sizes: int64 on the host, how many patients have a t-th visit.
        sorted_indices, unsorted_indices: ``[B]``, patients by falling length, and back.
        shape: ``(B, V)`` of the padded batch.
    """

    slots: Tensor
    batch_sizes: Tensor
    sorted_indices: Tensor
    unsorted_indices: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, visit_codes: Tensor, sequence_mask: Tensor | None) -> PackedOrder:
        """The order for a checked padded batch, on the device of ``visit_codes``."""
        patients, visits = visit_codes.shape[:2]
        if sequence_mask is None:
            sequence_mask = torch.ones(patients, visits, dtype=torch.bool)
        return cls.from_lengths(real_lengths(sequence_mask), visits, visit_codes.device)

    @classmethod
    @torch.compiler.disable
    def from_lengths(cls, lengths: Tensor, visits: int, device: torch.device) -> PackedOrder:
        """The order for ``lengths`` ``[B]`` on the host, in a batch padded to ``visits``."""
        falling, by_length = torch.sort(lengths, descending=True, stable=True)
        has_visit = torch.arange(int(falling[0]))[:, None] < falling
        visit, rank = has_visit.nonzero(as_tuple=True)
        back = torch.empty_like(by_length)
        back[by_length] = torch.arange(len(lengths))
        return cls(
            slots=(by_length[rank] * visits + visit).to(device, non_blocking=True),
            batch_sizes=has_visit.sum(1),
            sorted_indices=by_length.to(device, non_blocking=True),
            unsorted_indices=back.to(device, non_blocking=True),
            shape=(len(lengths), visits),
        )

    def gather(self, padded: Tensor) -> Tensor:
        """``[B, V, ...]`` → one row per real visit, ``[n_visits, ...]``."""
        return padded.flatten(0, 1).index_select(0, self.slots)

    def scatter(self, rows: Tensor) -> Tensor:
        """``[n_visits, ...]`` → ``[B, V, ...]``, exact zeros on padding."""
        patients, visits = self.shape
        padded = rows.new_zeros(patients * visits, *rows.shape[1:])
        return padded.index_copy(0, self.slots, rows).unflatten(0, self.shape)

    def pack(self, rows: Tensor) -> PackedSequence:
        """Rows in this order as the ``PackedSequence`` that they already are."""
        return PackedSequence(rows, self.batch_sizes, self.sorted_indices, self.unsorted_indices)


def describe_code_outside_vocabulary(
    visit_codes: Tensor, looked_up: Tensor | None, vocab_size: int
) -> str | None:
    """Where the first code outside ``[0, vocab_size)`` stands, among the slots ``looked_up``."""
    outside = (visit_codes < 0) | (visit_codes >= vocab_size)
    if looked_up is not None:
        outside = outside & looked_up
    places = outside.nonzero()
    if len(places) == 0:
        return None
    patient, visit, slot = places[0].tolist()
    code = int(visit_codes[patient, visit, slot])
    return (
        f"Found {len(places)} codes outside the vocabulary of {vocab_size}. The first is code "
        f"{code} of patient {patient}, visit {visit}, slot {slot}."
    )


def real_code_slots(
    visit_codes: Tensor, visit_mask: Tensor | None, sequence_mask: Tensor | None
) -> Tensor:
    """``[B, V, C]`` bool: codes that both masks call real."""
    real = torch.ones_like(visit_codes, dtype=torch.bool) if visit_mask is None else visit_mask != 0
    if sequence_mask is None:
        return real
    return real & (sequence_mask != 0).unsqueeze(-1)
