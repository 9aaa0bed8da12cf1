"""Operators between rows of visits, numbers and tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from ..arrays import kind_of

if TYPE_CHECKING:
    from ..batch import PackedVisits

_Self = TypeVar("_Self", bound="Arithmetic")
Operation = Callable[[Any, Any], Any]


def _binary(operation: Operation) -> Any:
    def operate(self: Arithmetic, other: Any) -> Any:
        return self._with(operation, other)

    return operate


def _reflected(operation: Operation) -> Any:
    def operate(self: Arithmetic, other: Any) -> Any:
        return self._with(lambda mine, theirs: operation(theirs, mine), other)

    return operate


def _unary(operation: Callable[[Any], Any]) -> Any:
    def operate(self: Arithmetic) -> Any:
        return self.map(operation)

    return operate


class Arithmetic:
    """Element by element, with numbers, tensors of one row per visit, and rows of the same batch.

    ``==`` and ``!=`` compare objects, not elements.
    """

    values: Tensor
    batch: PackedVisits

    def _like(self: _Self, values: Tensor) -> _Self:
        """These rows with other values."""
        return type(self)(values, self.batch)  # type: ignore[call-arg]

    def map(self: _Self, function: Callable[[Tensor], Tensor]) -> _Self:
        """Rows of ``function(values)``: ``rows.map(torch.sigmoid)``.

        ``function`` sees all rows, ``[n_visits, ...]``; one that mixes them mixes patients.

        Raises:
            ValueError: if the result has not one row per visit.

        Example:
            >>> import torch
            >>> from ehrseq_fast import PackedRows, PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
            >>> PackedRows(torch.tensor([1.0, 4.0, 9.0]), batch).map(torch.sqrt).values
            tensor([1., 2., 3.])
        """
        self.batch._check_rows("values", self.values)
        found = function(self.values)
        self.batch._check_rows("the result of function", found)
        return self._like(found)

    def _with(self: _Self, operation: Operation, other: Any) -> _Self:
        self.batch._check_rows("values", self.values)
        theirs = self._operand(other)
        if theirs is NotImplemented:
            return NotImplemented
        mine = self.values
        if isinstance(theirs, Tensor) and theirs.dim():
            mine, theirs = _aligned(mine, theirs)
        return self._like(operation(mine, theirs))

    def _operand(self, other: Any) -> Any:
        if isinstance(other, Arithmetic):
            if not self.batch.same_visits(other.batch):
                raise ValueError(
                    "rows: expected rows of the same batch, got those of another "
                    f"({other.batch.n_patients} patients, {other.batch.n_visits} visits; here "
                    f"{self.batch.n_patients} and {self.batch.n_visits}); rows.values are tensors "
                    "without a batch"
                )
            self.batch._check_rows("values", other.values)
            return other.values
        if isinstance(other, np.generic):
            return other.item()
        if isinstance(other, Tensor):
            if other.dim():
                self.batch._check_rows("the tensor beside the rows", other)
            return other
        if isinstance(other, np.ndarray):  # which would take the values, without their gradient
            raise TypeError(
                f"rows: expected a number or a tensor, got {kind_of(other)} "
                "(torch.from_numpy(array) makes a tensor of it)"
            )
        return other if isinstance(other, (int, float, complex)) else NotImplemented

    __add__, __radd__ = _binary(operator.add), _reflected(operator.add)
    __sub__, __rsub__ = _binary(operator.sub), _reflected(operator.sub)
    __mul__, __rmul__ = _binary(operator.mul), _reflected(operator.mul)
    __truediv__, __rtruediv__ = _binary(operator.truediv), _reflected(operator.truediv)
    __floordiv__, __rfloordiv__ = _binary(operator.floordiv), _reflected(operator.floordiv)
    __mod__, __rmod__ = _binary(operator.mod), _reflected(operator.mod)
    __pow__, __rpow__ = _binary(operator.pow), _reflected(operator.pow)
    __and__, __rand__ = _binary(operator.and_), _reflected(operator.and_)
    __or__, __ror__ = _binary(operator.or_), _reflected(operator.or_)
    __xor__, __rxor__ = _binary(operator.xor), _reflected(operator.xor)
    __lt__, __le__ = _binary(operator.lt), _binary(operator.le)
    __gt__, __ge__ = _binary(operator.gt), _binary(operator.ge)
    __neg__, __pos__ = _unary(operator.neg), _unary(operator.pos)
    __abs__, __invert__ = _unary(operator.abs), _unary(operator.invert)

    # A NumPy scalar to the left leaves the operator to the rows, which keep their gradient.
    __array_priority__ = 1000

    def __bool__(self) -> NoReturn:
        raise ValueError(
            "rows: expected one truth value, got one per visit: ask rows.values.any() or .all()"
        )

    def numpy(self) -> np.ndarray[Any, Any]:
        """``values`` as an array on the host, without their gradient; bfloat16, which NumPy lacks,
        as float32. It may share memory with ``values``, as ``Tensor.numpy`` does."""
        values = self.values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.numpy()
        return np.array(array, dtype) if copy else np.asarray(array, dtype)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        # numpy.mean(rows) would otherwise call rows.mean, which is that of each patient
        def is_rows(value: Any) -> bool:
            return isinstance(value, Arithmetic)

        def plain(value: Any) -> Any:
            return value.numpy() if is_rows(value) else value

        arguments, options = _pytree.tree_map(plain, (arguments, options), is_leaf=is_rows)
        return function(*arguments, **options)


def _aligned(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same number of dimensions, the missing ones last: the first is that of visits,
    whatever the sizes of the others."""
    dims = max(mine.dim(), theirs.dim())
    mine, theirs = (x.reshape(*x.shape, *[1] * (dims - x.dim())) for x in (mine, theirs))
    for ours, other in zip(mine.shape[1:], theirs.shape[1:], strict=True):
        if ours != other and 1 not in (ours, other):
            raise ValueError(
                f"rows: expected shapes that broadcast from the first dimension on, got "
                f"{list(mine.shape)} and {list(theirs.shape)}"
            )
    return mine, theirs
