"""Padded visits that do not come first: padding before them, or in between."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arrays import Array
from ..checks import expect_option
from .checks import mask_states

SIDES = ("right", "left")
HOLES = ("refuse", "pack")


def real_slots_first(
    visit_codes: Tensor,
    sequence_mask: Tensor | None,
    lengths: Array | None,
    side: str,
    holes: str,
) -> Tensor | None:
    """int64 ``[B, V]``: of each patient the slots in the order in which the builder expects them,
    real visits first and padding after them; None where they are in that order as they are.

    Raises:
        ValueError: on the host, for a mask whose padding is not on the ``side`` that was named, and
            for values other than 0 and 1.
    """
    expect_option("side", side, SIDES)
    expect_option("holes", holes, HOLES)
    visits = visit_codes.shape[1]
    if not visits or (side == "right" and (holes == "refuse" or sequence_mask is None)):
        return None
    if sequence_mask is None and lengths is None:
        return None
    states = mask_states(sequence_mask)
    if states is not None and visit_codes.device.type == "cpu":
        _refuse_fractional(states)
    if states is not None and holes == "pack":
        return torch.sort((states == 0).to(torch.uint8), dim=1, stable=True).indices
    slots = torch.arange(visits, device=visit_codes.device)
    if states is None:
        counts = torch.from_numpy(lengths).to(visit_codes.device)  # type: ignore[arg-type]
    else:
        counts = (states != 0).sum(1)
        if visit_codes.device.type == "cpu":
            _refuse_holes(states != 0, counts)
    return (slots + (visits - counts)[:, None]) % visits


def _refuse_fractional(states: Tensor) -> None:
    wrong = (states > 1).nonzero()
    if len(wrong):
        patient, visit = wrong[0].tolist()
        raise ValueError(
            f"sequence_mask must be 0 or 1. Found {len(wrong)} other values. The first is at "
            f"patient {patient}, visit {visit}."
        )


def _refuse_holes(real: Tensor, counts: Tensor) -> None:
    visits = real.shape[1]
    expected = torch.arange(visits) >= (visits - counts)[:, None]
    holed = (real != expected).any(1)
    if bool(holed.any()):
        patient = int(holed.int().argmax())
        slot = int((real != expected)[patient].int().argmax())
        raise ValueError(
            f'sequence_mask: expected padding first and real visits after it, as side="left" says; '
            f"found {int(holed.sum())} patients whose mask is not so. The first is patient "
            f'{patient}, slot {slot}. holes="pack" takes real visits wherever they are.'
        )
