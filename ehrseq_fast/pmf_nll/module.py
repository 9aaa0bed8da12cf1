"""The losses of a probability mass over time as modules."""

from __future__ import annotations

from torch import Tensor, nn

from ..batch import PackedVisits
from ..rows import PackedRows
from .op import pmf_competing_risks_nll, pmf_nll


class PMFLoss(nn.Module):
    """:func:`~ehrseq_fast.pmf_nll` with its options held.

    Args:
        censored_visit, reduction, validate: as for the function.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PMFLoss
        >>> PMFLoss()(torch.zeros(1, 3), torch.tensor([1]), torch.tensor([1]))
        tensor(1.3863)
    """

    def __init__(
        self,
        *,
        censored_visit: str = "included",
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__()
        self.censored_visit = censored_visit
        self.reduction = reduction
        self.validate = validate

    def forward(
        self,
        logits: Tensor | PackedRows,
        event_times: Tensor | PackedVisits | None = None,
        event_indicators: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        *,
        entry_times: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[B, V]``, times and indicators ``[B]``, mask ``[B, V]`` to the loss. Or of
        :class:`~ehrseq_fast.PackedRows` alone, whose batch has the outcomes."""
        return pmf_nll(
            logits,
            event_times,
            event_indicators,
            sequence_mask,
            censored_visit=self.censored_visit,
            entry_times=entry_times,
            sample_weight=sample_weight,
            reduction=self.reduction,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return f"censored_visit={self.censored_visit!r}, reduction={self.reduction!r}"


class PMFCompetingRisksLoss(nn.Module):
    """:func:`~ehrseq_fast.pmf_competing_risks_nll` with its options held.

    Args:
        censored_visit, reduction, validate: as for the function.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PMFCompetingRisksLoss
        >>> PMFCompetingRisksLoss()(torch.zeros(1, 2, 2), torch.tensor([1]), torch.tensor([1]))
        tensor(1.6094)
    """

    def __init__(
        self,
        *,
        censored_visit: str = "included",
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__()
        self.censored_visit = censored_visit
        self.reduction = reduction
        self.validate = validate

    def forward(
        self,
        logits: Tensor | PackedRows,
        event_times: Tensor | PackedVisits | None = None,
        event_types: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        *,
        entry_times: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[B, V, K]``, times and types ``[B]``, mask ``[B, V]`` to the loss. Or of
        :class:`~ehrseq_fast.PackedRows` alone, whose batch has the outcomes."""
        return pmf_competing_risks_nll(
            logits,
            event_times,
            event_types,
            sequence_mask,
            censored_visit=self.censored_visit,
            entry_times=entry_times,
            sample_weight=sample_weight,
            reduction=self.reduction,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return f"censored_visit={self.censored_visit!r}, reduction={self.reduction!r}"
