"""The loss of a visit's codes as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..rows import PackedRows
from .op import next_codes_bce
from .targets import Ragged


class NextCodesLoss(nn.Module):
    """:func:`~ehrseq_fast.next_codes_bce` with its options held.

    The layer that gives the logits stays the model's: it is passed to each call, and its parameters
    are read.

    Args:
        next_visit, n_negatives, generator, reduction, validate: as for the function.
        pos_weight, class_weight: ``[K]``, kept as buffers, which move with the module.

    Example:
        >>> import torch
        >>> from ehrseq_fast import NextCodesLoss, PackedRows, PackedVisits
        >>> batch = PackedVisits.from_lists([[[1], [0, 2]], [[2]]])
        >>> head = torch.nn.Linear(4, 3)
        >>> NextCodesLoss()(PackedRows(torch.ones(3, 4), batch), head).backward()
        >>> head.weight.grad.shape
        torch.Size([3, 4])
    """

    pos_weight: Tensor | None
    class_weight: Tensor | None

    def __init__(
        self,
        *,
        next_visit: bool | None = None,
        pos_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        n_negatives: int | None = None,
        generator: torch.Generator | None = None,
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__()
        self.next_visit = next_visit
        self.n_negatives = n_negatives
        self.generator = generator
        self.reduction = reduction
        self.validate = validate
        self.register_buffer("pos_weight", pos_weight)
        self.register_buffer("class_weight", class_weight)

    def forward(
        self,
        states: Tensor | PackedRows,
        layer: nn.Linear,
        targets: Ragged | None = None,
        sequence_mask: Tensor | None = None,
        *,
        visit_weight: Tensor | None = None,
    ) -> Tensor:
        """States, and the layer whose logits they are to have, to the loss.

        Raises:
            TypeError: for a layer that is no ``nn.Linear``, or has hooks or a ``forward`` of its
                own: its parameters would not say what it computes.
        """
        _expect_linear(layer)
        return next_codes_bce(
            states,
            layer.weight,
            layer.bias,
            targets,
            sequence_mask,
            next_visit=self.next_visit,
            pos_weight=self.pos_weight,
            class_weight=self.class_weight,
            visit_weight=visit_weight,
            n_negatives=self.n_negatives,
            generator=self.generator,
            reduction=self.reduction,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return (
            f"next_visit={self.next_visit}, n_negatives={self.n_negatives}, "
            f"reduction={self.reduction!r}"
        )


def _expect_linear(layer: object) -> None:
    from ..models.reading import is_plain  # the models import the losses

    if not is_plain(layer, nn.Linear):
        raise TypeError(
            "layer: expected an nn.Linear that nothing watches or changes (a hook, a "
            "parametrization, a subclass), as its parameters are read, got "
            f"{type(layer).__name__}: pass weight and bias to next_codes_bce"
        )
