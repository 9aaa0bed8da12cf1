"""Input validation of padded patients, their lengths, and packing.

A batch may arrive padded at two levels: ``visit_codes`` ``[B, V, C]`` with ``visit_mask`` (codes of
a visit) and ``sequence_mask`` ``[B, V]`` (visits of a patient). The fused path packs it once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arrays import expect_tensor, kind_of
from ..autograd import outside_transforms, transformed
from ..backend import validate_on_device
from ..batch import PackedVisits
from ..checks import zero_lengths

CODE_DTYPES = (torch.int32, torch.int64)


def check_padded_batch(
    visit_codes: Tensor, visit_mask: Tensor | None, sequence_mask: Tensor | None
) -> None:
    """Refuse a padded triple whose shapes or dtypes do not fit together.

    Raises:
        TypeError: for anything but tensors, and codes that are not int32 or int64.
        ValueError: for shapes other than ``[B, V, C]``, ``[B, V, C]`` and ``[B, V]``, no patient or
            no visit.
    """
    expect_tensor(
        "visit_codes",
        visit_codes,
        "a tensor [B, V, C] or a PackedVisits",
        "PackedVisits.from_lists packs lists of visits" if isinstance(visit_codes, list) else "",
    )
    for name, mask in (("visit_mask", visit_mask), ("sequence_mask", sequence_mask)):
        if mask is not None:
            expect_tensor(name, mask, "a tensor or None")
    if visit_codes.dtype not in CODE_DTYPES:
        raise TypeError(f"visit_codes: expected int32 or int64, got {visit_codes.dtype}")
    if visit_codes.dim() != 3:
        raise ValueError(f"visit_codes: expected [B, V, C], got shape {list(visit_codes.shape)}")
    if visit_codes.shape[0] == 0:
        raise ValueError(
            f"visit_codes: expected at least one patient, got [B, V, C] = {list(visit_codes.shape)}"
        )
    if visit_codes.shape[1] == 0:
        refuse_zero_lengths(torch.zeros(visit_codes.shape[0], device="cpu"))
    if visit_mask is not None and visit_mask.shape != visit_codes.shape:
        raise ValueError(
            f"visit_mask: expected [B, V, C] = {list(visit_codes.shape)} as visit_codes, "
            f"got shape {list(visit_mask.shape)}"
        )
    if sequence_mask is not None and sequence_mask.shape != visit_codes.shape[:2]:
        raise ValueError(
            f"sequence_mask: expected [B, V] = {list(visit_codes.shape[:2])} as visit_codes, "
            f"got shape {list(sequence_mask.shape)}"
        )


def expect_batch(batch: object) -> None:
    """``TypeError`` for anything but a packed batch."""
    if not isinstance(batch, PackedVisits):
        raise TypeError(
            f"batch: expected a PackedVisits with its outcomes, got {kind_of(batch)} "
            "(PackedVisits.from_padded packs padded tensors; for these a loss takes the model's "
            "output)"
        )


def refuse_zero_lengths(lengths: Tensor) -> None:
    """Raise for patients without a visit; ``lengths`` ``[B]`` is on the host."""
    empty = lengths == 0
    count = int(empty.sum())
    if count:
        raise zero_lengths(count, f"patient {int(empty.int().argmax())}")


def refuse_holes(lengths: Tensor, reaches: Tensor) -> None:
    """Raise where a patient's last real visit (``reaches``, 1-based) is not visit number length."""
    holed = lengths != reaches
    count = int(holed.sum())
    if count:
        first = int(holed.int().argmax())
        raise ValueError(
            f"sequence_mask: expected real visits first and padding after them, got holes in "
            f"{count} patients (patient {first}: {int(lengths[first])} real visits, the last of "
            f"them in slot {int(reaches[first]) - 1})"
        )


def refuse_nan(name: str, mask: Tensor) -> None:
    """Raise where a mask says neither that a slot is real nor that it is not. Reads values."""
    if not mask.is_floating_point():
        return
    holds = mask.isnan().flatten(1).any(1)
    if holds.any():
        raise ValueError(
            f"{name}: expected numbers, got NaN (patient {int(holds.int().argmax())}; "
            f"{int(holds.sum())} in all)"
        )


def real_lengths(sequence_mask: Tensor) -> Tensor:
    """Number of real visits of each patient, ``[B]`` int64 on the host.

    Any value but zero marks a real visit. For a mask on a GPU this is one synchronisation; the
    lengths have to be on the host to build a ``PackedSequence``.

    Raises:
        ValueError: for patients without a visit, for real visits behind padding and, on the CPU,
            for NaN.
    """
    if sequence_mask.device.type == "cpu" and not torch.compiler.is_compiling():
        refuse_nan("sequence_mask", sequence_mask)
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


def is_fractional(visit_mask: Tensor | None) -> bool:
    """Whether a mask weighs codes instead of keeping or dropping them, or is differentiated by, as
    weights can be. Waits for a GPU, unless the mask is bool."""
    if visit_mask is None or visit_mask.dtype == torch.bool:
        return False
    if visit_mask.requires_grad or transformed(visit_mask):
        return True
    return bool(((visit_mask != 0) & (visit_mask != 1)).any())


def lists_the_same_rows(embedding: nn.Embedding, codes: Tensor, *masks: Tensor | None) -> bool:
    """Whether a sparse gradient of real codes alone has the rows that one of all slots has: some
    optimizers (``SparseAdam``) change each row that is listed, by its moments. Reads values."""
    if not embedding.sparse or not embedding.weight.requires_grad or not torch.is_grad_enabled():
        return True
    listed = torch.ones_like(codes, dtype=torch.bool)
    for mask in masks:
        if mask is not None:
            listed &= (mask != 0).view(*mask.shape, *(1,) * (codes.dim() - mask.dim()))
    if embedding.padding_idx is not None:
        listed |= codes == embedding.padding_idx
    return bool(listed.all())


@torch.compiler.disable
def pack_padded_batch(
    visit_codes: Tensor,
    visit_mask: Tensor | None,
    sequence_mask: Tensor | None,
    vocab_size: int | None,
) -> PackedVisits:
    """A checked padded triple, packed. Any value but zero marks a real visit.

    Raises:
        ValueError: on the CPU, for a mask that holds NaN.
    """
    with outside_transforms():
        return _pack_padded_batch(visit_codes, visit_mask, sequence_mask, vocab_size)


def _pack_padded_batch(
    visit_codes: Tensor,
    visit_mask: Tensor | None,
    sequence_mask: Tensor | None,
    vocab_size: int | None,
) -> PackedVisits:
    for name, mask in (("visit_mask", visit_mask), ("sequence_mask", sequence_mask)):
        if mask is not None and mask.device.type == "cpu":
            refuse_nan(name, mask)
    return PackedVisits.from_padded(
        visit_codes.detach(),
        visit_mask,
        None if sequence_mask is None else sequence_mask != 0,
        vocab_size=vocab_size,
    )
