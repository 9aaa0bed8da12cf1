"""The layout of the two buffers that hold a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_CODES = 2**31 - 1  # code ids stay below this, with or without a vocabulary
OUTCOMES = ("event_times", "event_indicators", "event_types")
LONGS = ("sorted_indices", "unsorted_indices", "last_rows", "row_starts")
INTS = ("code_offsets", "codes", "index_visits", "index_codes", "index_offsets")


class Layout(NamedTuple):
    """The layout of a batch's buffers."""

    n_patients: int
    max_visits: int
    n_visits: int
    n_codes: int
    n_distinct: int
    outcomes: tuple[str, ...]

    def longs(self) -> list[int]:
        """Sizes of the int64 fields, then of all int32 fields together (in int64)."""
        b = self.n_patients
        return [
            b,
            b,
            b,
            self.max_visits + 1,
            *[b] * len(self.outcomes),
            (sum(self.ints()) + 1) // 2,
        ]

    def ints(self) -> list[int]:
        """Sizes of the int32 fields, without the one that may pad them to a whole int64."""
        return [
            self.n_visits + 1,
            self.n_codes,
            self.n_codes,
            self.n_distinct,
            self.n_distinct + 1,
        ]

    def views(self, host: Tensor, fields: Tensor) -> dict[str, Tensor]:
        """The tensors in the two buffers, by name.

        Raises:
            ValueError: buffers of another size or dtype.
        """
        long_sizes, int_sizes = self.longs(), self.ints()
        if sum(int_sizes) % 2:
            int_sizes.append(1)
        for name, buffer, expected in (
            ("host", host, self.max_visits + self.n_patients),
            ("fields", fields, sum(long_sizes)),
        ):
            if buffer.dtype != torch.int64 or buffer.dim() != 1 or buffer.numel() != expected:
                raise ValueError(
                    f"{name}: expected int64 of shape [{expected}] for {self}, got {buffer.dtype} "
                    f"of shape {list(buffer.shape)}"
                )
        batch_sizes, lengths = host.split_with_sizes([self.max_visits, self.n_patients])
        *longs, ints = fields.split_with_sizes(long_sizes)
        views = dict(zip((*LONGS, *self.outcomes), longs, strict=True))
        views.update(zip(INTS, ints.view(torch.int32).split_with_sizes(int_sizes), strict=False))
        views.update(batch_sizes=batch_sizes, lengths=lengths)
        return views


def layout_of(sizes: tuple[int, int, int, int, int], outcomes: Sequence[Any]) -> Layout:
    there = tuple(name for name, given in zip(OUTCOMES, outcomes, strict=True) if given is not None)
    return Layout(*sizes, there)
