"""Moves between devices and dtypes, which give new objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Self = TypeVar("_Self", bound="Movable")


class Movable:
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
