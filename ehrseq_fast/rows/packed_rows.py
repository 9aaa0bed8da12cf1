"""One value per visit of a packed batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arrays import integer
from ..checks import accumulator, expect_floating
from .arithmetic import Arithmetic
from .movable import Movable

if TYPE_CHECKING:
    from ..batch import PackedVisits


@dataclass(eq=False)
class PackedRows(Arithmetic, Movable):
    """One value per visit of a :class:`~ehrseq_fast.PackedVisits`, nothing padded.

    Losses and metrics take it in place of padded values and a mask. It moves with its batch as a
    tensor does (``to``, ``cpu``, ``cuda``, ``detach``, ``pin_memory``), gives its values to
    ``numpy.asarray``, can be loaded with ``torch.load(weights_only=True)``, and is a pytree node
    whose one leaf is ``values``: a ``tree_map`` over tensors acts on these, and leaves the batch as
    and where it is.

    The operators ``+ - * / // % ** & | ^ < <= > >=`` work element by element with numbers, tensors
    ``[n_visits]`` or ``[n_visits, ...]`` and rows of the same batch (or of its copies with other
    outcomes, codes or features); the first dimension is always that of visits. Rows of another
    batch and tensors with another number of rows are a ``ValueError``.

    Nothing of one patient, not even a NaN, reaches another patient's values or gradients.

    To be gathered from several processes, whose batches differ in their numbers of visits, rows
    need one shape: ``rows.to_padded(total_length=V)`` with a V that holds for all of them and the
    batch's ``lengths``, ``[B, V, ...]`` and ``[B]``: the first dimension is that of patients, as
    trainers that cut off a last batch's repetitions expect.

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
        >>> rows.to(torch.float64).dtype
        torch.float64
        >>> (1 - rows).sum()  # of each patient
        tensor([0.9000, 1.5000])
        >>> (rows - rows.shift(1)).to_padded()  # the difference to the visit before
        tensor([[0.1000, 0.0000],
                [0.2000, 0.1000]])
    """

    values: Tensor
    batch: PackedVisits

    # Of each patient

    def first(self) -> Tensor:
        """``[B, ...]``: the value at each patient's first visit, in the caller's order."""
        return self.values.index_select(0, self.batch.unsorted_indices)

    def last(self) -> Tensor:
        """``[B, ...]``: the value at each patient's last visit, in the caller's order."""
        return self.values.index_select(0, self.batch.last_rows)

    def sum(self) -> Tensor:
        """``[B, ...]``: the sum over each patient's visits, in the caller's order; of booleans and
        integers in int64. The visits are padded on the way, to ``[B, V, ...]``."""
        return self.to_padded().sum(1)

    def mean(self) -> Tensor:
        """``[B, ...]``: the mean over each patient's visits, in the caller's order; of booleans and
        integers in float32."""
        kept = self.values.is_floating_point() or self.values.is_complex()
        wide = accumulator(self.dtype) if self.values.is_floating_point() else torch.float64
        total = self.batch.pad(self.values if self.values.is_complex() else self.values.to(wide))
        lengths = self.batch.lengths.to(total.device, wide)
        means = total.sum(1) / lengths.reshape(-1, *[1] * (total.dim() - 2))
        return means.to(self.dtype if kept else torch.float32)

    def softmax(self) -> PackedRows:
        """``softmax`` over each patient's visits: attention weights that sum to 1 for every
        patient, each trailing element for itself.

        Raises:
            TypeError: for values that are not floating.

        Example:
            >>> import torch
            >>> from ehrseq_fast import PackedRows, PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
            >>> PackedRows(torch.zeros(3), batch).softmax().to_padded()
            tensor([[1.0000, 0.0000],
                    [0.5000, 0.5000]])
        """
        expect_floating("values", self.values)
        return self._like(self.batch.pack(self.to_padded(float("-inf")).softmax(1)))

    # From visit to visit

    def reversed(self) -> PackedRows:
        """Each patient's values in reverse order of the visits.

        Example:
            >>> import torch
            >>> from ehrseq_fast import PackedRows, PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
            >>> PackedRows(torch.tensor([2.0, 1.0, 3.0]), batch).reversed().to_padded()
            tensor([[1., 0.],
                    [3., 2.]])
        """
        return self._like(self.values.index_select(0, self.batch.reversed_rows()))

    def shift(self, n: int = 1, fill: float = 0) -> PackedRows:
        """At each visit the value of the visit n before it; with a negative n of the one after it.

        Args:
            n: how many visits later values come: 1 gives each visit the value of the one before,
                -1 that of the next, as ``pandas.Series.shift``.
            fill: where the patient has no such visit.

        Raises:
            TypeError: for an n that is no integer, and a fill that is no number.
            ValueError: for a fill that the dtype of the values does not hold.

        Example:
            >>> import torch
            >>> from ehrseq_fast import PackedRows, PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
            >>> rows = PackedRows(torch.tensor([2.0, 1.0, 3.0]), batch)
            >>> rows.shift(1, fill=-1).to_padded(), rows.shift(-1).to_padded()
            (tensor([[-1.,  0.],
                    [-1.,  2.]]), tensor([[0., 0.],
                    [3., 0.]]))
        """
        n = integer("n", n, -(2**31), 2**31)
        return self._like(self.batch.shift_rows(self.values, n, fill))

    # As tensors of another form

    def to_padded(self, fill: float = 0, total_length: int | None = None) -> Tensor:
        """``[B, V, ...]`` in the caller's order of patients, ``fill`` on padding."""
        return self.batch.pad(self.values, fill, total_length)

    def sequence_mask(self, total_length: int | None = None) -> Tensor:
        """bool ``[B, V]``: which slots of :meth:`to_padded` are visits."""
        return self.batch.sequence_mask(total_length).to(self.values.device)

    @property
    def _main(self) -> Tensor:
        return self.values

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> PackedRows:
        return PackedRows(function(self.values), self.batch)

    def to(self, *args: Any, **kwargs: Any) -> PackedRows:
        """On another device (with the batch), in another dtype or both; arguments as for
        ``Tensor.to``."""
        values = self.values.to(*args, **kwargs)
        batch = self.batch
        if values.device != batch.device:
            batch = batch.to(values.device, non_blocking=kwargs.get("non_blocking", False))
        return PackedRows(values, batch)

    def pin_memory(self) -> PackedRows:
        """In page-locked memory, the batch too."""
        return PackedRows(self.values.pin_memory(), self.batch.pin_memory())
