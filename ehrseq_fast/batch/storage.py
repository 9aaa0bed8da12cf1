"""The tensors of a batch and how they move between devices, processes and files."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from .layout import Layout

Batch = TypeVar("Batch", bound="Storage")


class Storage:
    """Two buffers, and what does not fit into them: where a batch's tensors lie, and how they move.
    :class:`PackedVisits` says what each of them means."""

    codes: Tensor
    code_offsets: Tensor
    index_codes: Tensor
    index_offsets: Tensor
    index_visits: Tensor
    batch_sizes: Tensor
    lengths: Tensor
    sorted_indices: Tensor
    unsorted_indices: Tensor
    row_starts: Tensor
    last_rows: Tensor
    event_times: Tensor | None
    event_indicators: Tensor | None
    event_types: Tensor | None
    visit_features: Tensor | None
    targets: dict[str, Tensor]
    visit_targets: dict[str, Tensor]
    vocab_size: int | None

    def __init__(
        self,
        layout: Layout,
        host: Tensor,
        fields: Tensor,
        vocab_size: int | None = None,
        visit_features: Tensor | None = None,
        targets: dict[str, Tensor] | None = None,
        visit_targets: dict[str, Tensor] | None = None,
    ) -> None:
        # Two buffers hold everything but features and targets: `host` never leaves the host, and
        # `fields` moves to a device, to pinned memory or to another process in one piece.
        self._layout = layout
        self._host = host
        self._fields = fields
        self._slots: Tensor | None = None
        self.vocab_size = vocab_size
        self.visit_features = visit_features
        self.targets = {} if targets is None else targets
        self.visit_targets = {} if visit_targets is None else visit_targets
        self.batch_sizes, self.lengths = host.split_with_sizes(
            [layout.max_visits, layout.n_patients]
        )
        (
            self.sorted_indices,
            self.unsorted_indices,
            self.last_rows,
            self.row_starts,
            *outcomes,
            ints,
        ) = fields.split_with_sizes(layout.longs())
        self.event_times = self.event_indicators = self.event_types = None
        for name, outcome in zip(layout.outcomes, outcomes, strict=True):
            setattr(self, name, outcome)
        sizes = layout.ints()
        if sum(sizes) % 2:
            sizes.append(1)
        (
            self.code_offsets,
            self.codes,
            self.index_visits,
            self.index_codes,
            self.index_offsets,
        ) = ints.view(torch.int32).split_with_sizes(sizes)[:5]

    def __len__(self) -> int:
        """The number of patients."""
        return self._layout.n_patients

    @property
    def n_patients(self) -> int:
        """The number of patients."""
        return self._layout.n_patients

    @property
    def n_visits(self) -> int:
        """The number of real visits, all patients together: the number of packed rows."""
        return self._layout.n_visits

    @property
    def n_codes(self) -> int:
        """The number of real codes, all visits together."""
        return self._layout.n_codes

    @property
    def max_visits(self) -> int:
        """The number of visits of the longest patient; 0 in an empty batch."""
        return self._layout.max_visits

    @property
    def device(self) -> torch.device:
        """Where the batch lies (``batch_sizes`` and ``lengths`` are always on the CPU)."""
        return self._fields.device

    def __repr__(self) -> str:
        return (
            f"PackedVisits(patients={self.n_patients}, visits={self.n_visits}, "
            f"codes={self.n_codes}, distinct_codes={self._layout.n_distinct}, "
            f"max_visits={self.max_visits}, device={self.device})"
        )

    def to(self: Batch, device: torch.device | str | int, non_blocking: bool = False) -> Batch:
        """This batch on ``device``; itself where it already is. ``batch_sizes`` and ``lengths``
        stay on the CPU. One copy carries all but the features and targets, without waiting for the
        device if the batch is pinned (:meth:`pin_memory`) and ``non_blocking`` is set.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> PackedVisits.from_lists([[[1]]]).to("cpu").device
            device(type='cpu')
        """
        fields = self._fields.to(device, non_blocking=non_blocking)
        features = self.visit_features
        moved = type(self)(
            self._layout,
            self._host,
            fields,
            self.vocab_size,
            None if features is None else features.to(device, non_blocking=non_blocking),
            {k: v.to(device, non_blocking=non_blocking) for k, v in self.targets.items()},
            {k: v.to(device, non_blocking=non_blocking) for k, v in self.visit_targets.items()},
        )
        return self if self._holds_the_same_tensors(moved) else moved

    def pin_memory(self: Batch) -> Batch:
        """This batch in page-locked memory, for ``to(device, non_blocking=True)``. A ``DataLoader``
        with ``pin_memory=True`` calls it."""
        features = self.visit_features
        return type(self)(
            self._layout,
            self._host,
            self._fields.pin_memory(),
            self.vocab_size,
            None if features is None else features.pin_memory(),
            {name: target.pin_memory() for name, target in self.targets.items()},
            {name: target.pin_memory() for name, target in self.visit_targets.items()},
        )

    def is_pinned(self) -> bool:
        """Whether the batch lies in page-locked memory."""
        return self._fields.is_pinned()

    def _holds_the_same_tensors(self, other: Storage) -> bool:
        return (
            self._fields is other._fields
            and self.visit_features is other.visit_features
            and all(self.targets[name] is other.targets[name] for name in self.targets)
            and all(self.visit_targets[k] is other.visit_targets[k] for k in self.visit_targets)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The buffers travel, not the views into them: two tensors to another process, not sixteen.
        return type(self), (
            self._layout,
            self._host,
            self._fields,
            self.vocab_size,
            self.visit_features,
            self.targets,
            self.visit_targets,
        )
