"""What a model says of each visit of a packed batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .batch import PackedVisits


@dataclass(frozen=True)
class PackedRows:
    """One value per visit of a :class:`~ehrseq_fast.PackedVisits`, nothing padded.

    Attributes:
        values: ``[n_visits, ...]``, rows in the order of ``batch``.
        batch: the batch that they belong to.

    Example:
        >>> import torch
        >>> from ehrseq_fast import PackedRows, PackedVisits
        >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
        >>> rows = PackedRows(torch.tensor([0.2, 0.1, 0.3]), batch)
        >>> rows.to_padded()
        tensor([[0.1000, 0.0000],
                [0.2000, 0.3000]])
        >>> rows.last()  # of each patient's last visit
        tensor([0.1000, 0.3000])
    """

    values: Tensor
    batch: PackedVisits

    def to_padded(self, fill: float = 0, total_length: int | None = None) -> Tensor:
        """``[B, V, ...]`` in the caller's order of patients, ``fill`` on padding."""
        return self.batch.pad(self.values, fill, total_length)

    def last(self) -> Tensor:
        """``[B, ...]``: the value at each patient's last visit, in the caller's order."""
        return self.values.index_select(0, self.batch.last_rows)
