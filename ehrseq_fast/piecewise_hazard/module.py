"""The loss of rates that are constant within intervals, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..batch import PackedVisits
from ..rows import PackedRows
from .op import piecewise_hazard_nll


class PiecewiseHazardLoss(nn.Module):
    """:func:`~ehrseq_fast.piecewise_hazard_nll` with its options held.

    Args:
        link, reduction, validate: as for the function.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PiecewiseHazardLoss
        >>> loss = PiecewiseHazardLoss(link="exp")
        >>> loss(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([1]), torch.tensor([0.5]))
        tensor(1.5000)
    """

    def __init__(
        self, *, link: str = "softplus", reduction: str = "mean", validate: bool = False
    ) -> None:
        super().__init__()
        self.link = link
        self.reduction = reduction
        self.validate = validate

    def forward(
        self,
        logits: Tensor | PackedRows,
        event_times: Tensor | PackedVisits | None = None,
        event_indicators: Tensor | None = None,
        fraction: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        *,
        entry_times: Tensor | None = None,
        sample_weight: Tensor | None = None,
        visit_weight: Tensor | PackedRows | None = None,
    ) -> Tensor:
        """Logits ``[B, V]``, times, indicators and fractions ``[B]``, mask ``[B, V]`` to the loss.
        Or of :class:`~ehrseq_fast.PackedRows`, whose batch has the outcomes."""
        return piecewise_hazard_nll(
            logits,
            event_times,
            event_indicators,
            fraction,
            sequence_mask,
            link=self.link,
            entry_times=entry_times,
            sample_weight=sample_weight,
            visit_weight=visit_weight,
            reduction=self.reduction,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return f"link={self.link!r}, reduction={self.reduction!r}"
