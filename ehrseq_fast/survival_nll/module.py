"""The survival losses as modules, as a training loop holds them."""

from __future__ import annotations

from torch import Tensor, nn

from ..batch import PackedVisits
from ..rows import PackedRows
from .op import competing_risks_nll, discrete_time_survival_nll


class DiscreteTimeSurvivalLoss(nn.Module):
    """:func:`~ehrseq_fast.survival_nll.discrete_time_survival_nll` with its options held.

    Masking: the visit level alone matters here. ``sequence_mask`` says which slots are visits; the
    mask over codes belongs to the visit encoder. Without a mask every slot counts as a visit.

    Args:
        eps: hazards are clamped to ``[eps, 1 - eps]``.
        from_logits, link, censored_visit, reduction, validate: as for the function.

    Example:
        >>> import torch
        >>> from ehrseq_fast.survival_nll import DiscreteTimeSurvivalLoss
        >>> loss = DiscreteTimeSurvivalLoss()
        >>> hazards = torch.tensor([[0.1, 0.5], [0.1, 0.9]])
        >>> loss(hazards, torch.tensor([1, 0]), torch.tensor([1, 0]), torch.ones(2, 2))
        tensor(0.3993)
    """

    def __init__(
        self,
        eps: float = 1e-7,
        *,
        from_logits: bool = False,
        link: str = "sigmoid",
        censored_visit: str = "excluded",
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.from_logits = from_logits
        self.link = link
        self.censored_visit = censored_visit
        self.reduction = reduction
        self.validate = validate

    def forward(
        self,
        hazards: Tensor | PackedRows,
        event_times: Tensor | PackedVisits | None = None,
        event_indicators: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        *,
        entry_times: Tensor | None = None,
        sample_weight: Tensor | None = None,
        visit_weight: Tensor | PackedRows | None = None,
    ) -> Tensor:
        """Hazards ``[B, V]``, times and indicators ``[B]``, mask ``[B, V]`` to the loss. Or of
        :class:`~ehrseq_fast.PackedRows` alone, whose batch has the outcomes."""
        return discrete_time_survival_nll(
            hazards,
            event_times,
            event_indicators,
            sequence_mask,
            from_logits=self.from_logits,
            link=self.link,
            censored_visit=self.censored_visit,
            entry_times=entry_times,
            sample_weight=sample_weight,
            visit_weight=visit_weight,
            eps=self.eps,
            reduction=self.reduction,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return (
            f"eps={self.eps}, from_logits={self.from_logits}, link={self.link!r}, "
            f"censored_visit={self.censored_visit!r}, reduction={self.reduction!r}"
        )


class CompetingRisksSurvivalLoss(nn.Module):
    """:func:`~ehrseq_fast.survival_nll.competing_risks_nll` with its options held.

    Masking: as for :class:`DiscreteTimeSurvivalLoss`.

    Args:
        eps: hazards are clamped to ``[eps, 1 - eps]``.
        from_logits, link, censored_visit, reduction, validate: as for the function.

    Example:
        >>> import torch
        >>> from ehrseq_fast.survival_nll import CompetingRisksSurvivalLoss
        >>> loss = CompetingRisksSurvivalLoss(from_logits=True, link="softmax")
        >>> logits = torch.zeros(1, 2, 3)  # two causes
        >>> loss(logits, torch.tensor([1]), torch.tensor([2]), torch.ones(1, 2))
        tensor(2.1972)
    """

    def __init__(
        self,
        eps: float = 1e-7,
        *,
        from_logits: bool = False,
        link: str = "sigmoid",
        censored_visit: str = "excluded",
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.from_logits = from_logits
        self.link = link
        self.censored_visit = censored_visit
        self.reduction = reduction
        self.validate = validate

    def forward(
        self,
        hazards: Tensor | PackedRows,
        event_times: Tensor | PackedVisits | None = None,
        event_types: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        *,
        entry_times: Tensor | None = None,
        sample_weight: Tensor | None = None,
        visit_weight: Tensor | PackedRows | None = None,
    ) -> Tensor:
        """Hazards ``[B, V, K]``, times and types ``[B]``, mask ``[B, V]`` to the loss. Or of
        :class:`~ehrseq_fast.PackedRows` alone, whose batch has the outcomes."""
        return competing_risks_nll(
            hazards,
            event_times,
            event_types,
            sequence_mask,
            from_logits=self.from_logits,
            link=self.link,
            censored_visit=self.censored_visit,
            entry_times=entry_times,
            sample_weight=sample_weight,
            visit_weight=visit_weight,
            eps=self.eps,
            reduction=self.reduction,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return (
            f"eps={self.eps}, from_logits={self.from_logits}, link={self.link!r}, "
            f"censored_visit={self.censored_visit!r}, reduction={self.reduction!r}"
        )
