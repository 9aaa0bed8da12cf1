"""From hazards to what is asked of them. See also ``models.survival_curve``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arrays import expect_tensor
from .autograd import values_are_hidden
from .backend import validate_on_device
from .checks import accumulator, expect_floating
from .rows import PackedRows

# How far above 1 rounding may take a sum of hazards.
_SLACK = 1e-5


def cumulative_incidence(hazards: Tensor | PackedRows, sequence_mask: Tensor | None = None) -> Any:
    """The probability of each of K competing events by each visit:
    ``F_k(t) = Σ_{u≤t} S(u−1) h_k(u)`` with ``S(u) = Π_{v≤u} (1 − Σ_k h_k(v))``.

    The K incidences and survival sum to 1 at every visit. Over padding they stay at the value of
    the last real visit. Source: Tutz and Schmid, Modeling Discrete Time-to-Event Data (2016),
    chapter 8.

    Args:
        hazards: ``[B, V, K]`` cause-specific hazards in [0, 1] that sum to at most 1 at a visit, as
            those of ``competing_risks_nll(link="softmax")``; independent sigmoids may not. Or
            :class:`~ehrseq_fast.PackedRows` ``[n_visits, K]``.
        sequence_mask: ``[B, V]``, non-zero at real visits. Without it padding must hold zeros.

    Returns:
        ``[B, V, K]``, in float32 for 16 bits; :class:`~ehrseq_fast.PackedRows` for packed rows.
        Differentiable.

    Raises:
        ValueError: for shapes that do not fit, and hazards outside [0, 1] or with a sum above 1,
            with the first patient (on a GPU with ``EHRSEQ_FAST_VALIDATE=1``).
        TypeError: for anything but floating-point tensors and packed rows.

    Example:
        >>> import torch
        >>> from ehrseq_fast.metrics import cumulative_incidence
        >>> cumulative_incidence(torch.tensor([[[0.1, 0.2], [0.5, 0.0]]]))
        tensor([[[0.1000, 0.2000],
                 [0.4500, 0.2000]]])
    """
    if isinstance(hazards, PackedRows):
        if sequence_mask is not None:
            raise ValueError("sequence_mask: expected None, as hazards are PackedRows, got a mask")
        if hazards.values.dim() != 2:
            raise ValueError(
                f"hazards: expected PackedRows [n_visits, K], got {list(hazards.values.shape)}"
            )
        batch = hazards.batch
        return PackedRows(batch.pack(cumulative_incidence(hazards.to_padded())), batch)
    expect_floating("hazards", hazards)
    if hazards.dim() != 3:
        raise ValueError(f"hazards: expected [B, V, K], got shape {list(hazards.shape)}")
    hazards = hazards.to(accumulator(hazards.dtype))
    if sequence_mask is not None:
        expect_tensor("sequence_mask", sequence_mask)
        if sequence_mask.shape != hazards.shape[:2]:
            raise ValueError(
                f"sequence_mask: expected [B, V] = {list(hazards.shape[:2])}, got "
                f"{list(sequence_mask.shape)}"
            )
        hazards = hazards.masked_fill((sequence_mask == 0).unsqueeze(2), 0.0)
    total = hazards.sum(2)
    _check(hazards, total)
    over = total >= 1
    # a hazard of 1 ends it: apart from the logarithms, where it would be infinite
    survival = torch.log1p(-torch.where(over, 0.0, total)).cumsum(1).exp()
    survival = torch.where(over.cumsum(1) > 0, 0.0, survival)
    before = torch.cat([torch.ones_like(survival[:, :1]), survival[:, :-1]], 1)[:, : total.shape[1]]
    return (before.unsqueeze(2) * hazards).cumsum(1)


def _check(hazards: Tensor, total: Tensor) -> None:
    if torch.compiler.is_compiling() or values_are_hidden(hazards):
        return
    if hazards.device.type != "cpu" and not validate_on_device():
        return
    wrong = ((hazards < 0) | (hazards > 1)).any(2) | (total > 1 + _SLACK)
    if bool(wrong.any()):
        patient, visit = wrong.nonzero()[0].tolist()
        raise ValueError(
            "hazards: expected K hazards in [0, 1] with a sum of at most 1 at each visit, got "
            f"{hazards[patient, visit].tolist()} (patient {patient}, visit {visit}; "
            f"{int(wrong.sum())} visits in all)"
        )


__all__ = ["cumulative_incidence"]
