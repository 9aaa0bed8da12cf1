"""What models return beside plain tensors: rows of visits, and states to go on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

if TYPE_CHECKING:
    from .batch import PackedVisits

_Self = TypeVar("_Self", bound="_Movable")


class _Movable:
    """Moves as a tensor does, each method giving a new object; ``_main`` is its leading tensor."""

    @property
    def _main(self) -> Tensor:
        raise NotImplementedError

    def _mapped(self: _Self, function: Callable[[Tensor], Tensor]) -> _Self:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self._main.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self._main.dtype

    def to(self: _Self, *args: Any, **kwargs: Any) -> _Self:
        """On another device, in another dtype or both; arguments as for ``Tensor.to``."""
        return self._mapped(lambda tensor: tensor.to(*args, **kwargs))

    def cpu(self: _Self) -> _Self:
        """On the host."""
        return self.to("cpu")

    def cuda(
        self: _Self, device: int | torch.device | None = None, non_blocking: bool = False
    ) -> _Self:
        """On a GPU, by default the current one."""
        place = torch.device("cuda", torch.cuda.current_device()) if device is None else device
        return self.to(torch.device(place), non_blocking=non_blocking)

    def detach(self: _Self) -> _Self:
        """The same values, cut off from their history."""
        return self._mapped(Tensor.detach)

    def pin_memory(self: _Self) -> _Self:
        """In page-locked memory."""
        return self._mapped(Tensor.pin_memory)


@dataclass(frozen=True, eq=False)
class PackedRows(_Movable):
    """One value per visit of a :class:`~ehrseq_fast.PackedVisits`, nothing padded.

    It moves with its batch as a tensor does (``to``, ``cpu``, ``cuda``, ``detach``,
    ``pin_memory``), gives its values to ``numpy.asarray``, can be loaded with
    ``torch.load(weights_only=True)``, and is a pytree node whose one leaf is ``values``: a
    ``tree_map`` over tensors acts on these, and leaves the batch as and where it is.

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
    """

    values: Tensor
    batch: PackedVisits

    def to_padded(self, fill: float = 0, total_length: int | None = None) -> Tensor:
        """``[B, V, ...]`` in the caller's order of patients, ``fill`` on padding."""
        return self.batch.pad(self.values, fill, total_length)

    def last(self) -> Tensor:
        """``[B, ...]``: the value at each patient's last visit, in the caller's order."""
        return self.values.index_select(0, self.batch.last_rows)

    def numpy(self) -> np.ndarray[Any, Any]:
        """``values`` as an array on the host, without their gradient; bfloat16, which NumPy lacks,
        as float32. It may share memory with ``values``, as ``Tensor.numpy`` does."""
        values = self.values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.numpy()
        return np.array(array, dtype) if copy else np.asarray(array, dtype)

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


@dataclass(frozen=True, eq=False)
class VisitState(_Movable):
    """The state of some patients after the visits seen so far; see ``model.start``.

    Moves, is saved and is a pytree node as :class:`PackedRows` is.

    Attributes:
        h: ``[layers, B, H]``, the recurrent layer's state.
        c: ``[layers, B, H]``, the LSTM's cells; None for a GRU.
        n_visits: how many visits went in.
    """

    h: Tensor
    c: Tensor | None
    n_visits: int

    @property
    def _main(self) -> Tensor:
        return self.h

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> VisitState:
        c = None if self.c is None else function(self.c)
        return VisitState(function(self.h), c, self.n_visits)


# As pytree nodes, the tensors in them are seen by whatever looks for a model's outputs:
# DistributedDataParallel with static_graph=True, FSDP, torch.func. A batch is part of the structure
# and not a node: what maps its tensors one by one (to a dtype, to another device) would break what
# holds between them, and a graph that was exported for one batch's sizes would serve no other.


def _as_node(kind: type, children: tuple[str, ...], rest: tuple[str, ...]) -> None:
    def flatten(value: Any) -> tuple[list[Any], Any]:
        return [getattr(value, name) for name in children], [getattr(value, name) for name in rest]

    def flatten_with_keys(value: Any) -> tuple[list[tuple[_pytree.KeyEntry, Any]], Any]:
        leaves, context = flatten(value)
        keys = map(_pytree.GetAttrKey, children)
        return list(zip(keys, leaves, strict=True)), context

    _pytree.register_pytree_node(
        kind,
        flatten,
        lambda leaves, context: kind(*leaves, *context),
        serialized_type_name=f"ehrseq_fast.{kind.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


_as_node(PackedRows, ("values",), ("batch",))
_as_node(VisitState, ("h", "c"), ("n_visits",))
torch.serialization.add_safe_globals([PackedRows, VisitState])
