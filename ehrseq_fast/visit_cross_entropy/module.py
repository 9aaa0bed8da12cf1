"""The cross-entropy of one class per visit as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..rows import PackedRows
from .op import visit_cross_entropy


class VisitCrossEntropyLoss(nn.Module):
    """:func:`~ehrseq_fast.visit_cross_entropy` with its options held.

    Args:
        class_weight: ``[K]``, a buffer of the module, which moves with it.
        ignore_index, label_smoothing, reduction, validate: as for the function.

    Example:
        >>> import torch
        >>> from ehrseq_fast import VisitCrossEntropyLoss
        >>> VisitCrossEntropyLoss()(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor(1.3863)
    """

    class_weight: Tensor | None

    def __init__(
        self,
        class_weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.validate = validate

    def forward(
        self,
        logits: Tensor | PackedRows,
        labels: Tensor | PackedRows,
        sequence_mask: Tensor | None = None,
        *,
        visit_weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[B, V, K]``, labels and mask ``[B, V]`` to the loss; or
        :class:`~ehrseq_fast.PackedRows` ``[n_visits, K]`` and labels ``[n_visits]``."""
        return visit_cross_entropy(
            logits,
            labels,
            sequence_mask,
            class_weight=self.class_weight,
            visit_weight=visit_weight,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"reduction={self.reduction!r}"
        )
