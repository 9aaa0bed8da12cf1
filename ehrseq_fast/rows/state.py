"""The state of patients whose records grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .movable import Movable


@dataclass(eq=False)
class VisitState(Movable):
    """The state of some patients after the visits seen so far; see ``model.start``.

    Moves, is saved and is a pytree node as :class:`~ehrseq_fast.PackedRows` is.

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
