"""The tensors of a batch and how they move between devices, processes and files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from ..arrays import kind_of
from ..autograd import outside_inference
from .layout import Layout

Batch = TypeVar("Batch", bound="Storage")


def _view(name: str) -> Any:
    """A read-only attribute: a view of the buffers, returned while these are unchanged."""

    def read(batch: Storage) -> Tensor | None:
        batch.refuse_changes()
        return batch._views.get(name)

    return property(read)


class ReadOnly(dict[str, Tensor]):
    """A dictionary that refuses changes."""

    def _refuse(self, *arguments: Any, **options: Any) -> NoReturn:
        raise TypeError(
            "the targets of a PackedVisits are read-only: make a changed copy with "
            "with_outcomes(targets=..., visit_targets=...)"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    update = setdefault = pop = popitem = clear = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class Storage:
    """The storage of a batch's tensors: two buffers, what does not fit into them, and moves.
    :class:`PackedVisits` says what each of them means."""

    codes: Tensor = _view("codes")
    code_offsets: Tensor = _view("code_offsets")
    index_codes: Tensor = _view("index_codes")
    index_offsets: Tensor = _view("index_offsets")
    index_visits: Tensor = _view("index_visits")
    batch_sizes: Tensor = _view("batch_sizes")
    lengths: Tensor = _view("lengths")
    sorted_indices: Tensor = _view("sorted_indices")
    unsorted_indices: Tensor = _view("unsorted_indices")
    row_starts: Tensor = _view("row_starts")
    last_rows: Tensor = _view("last_rows")
    event_times: Tensor | None = _view("event_times")
    event_indicators: Tensor | None = _view("event_indicators")
    event_types: Tensor | None = _view("event_types")
    visit_features: Tensor | None
    code_weights: Tensor | None
    targets: dict[str, Tensor]
    visit_targets: dict[str, Tensor]
    vocab_size: int | None

    _layout: Layout
    _host: Tensor
    _fields: Tensor
    _views: dict[str, Tensor]
    _versions: tuple[int, int]

    def __init__(
        self,
        layout: Layout | tuple[Any, ...],
        host: Tensor,
        fields: Tensor,
        vocab_size: int | None = None,
        visit_features: Tensor | None = None,
        targets: Mapping[str, Tensor] | None = None,
        visit_targets: Mapping[str, Tensor] | None = None,
        code_weights: Tensor | None = None,
    ) -> None:
        # Two buffers hold everything but features, weights and targets: `host` never leaves the
        # host, and `fields` moves to a device, to pinned memory or to another process in one piece.
        layout = Layout(*layout)
        host, fields = trainable(host), trainable(fields)
        of_visits = {k: trainable(v) for k, v in (visit_targets or {}).items()}
        with outside_inference():  # a view as another dtype would be an inference tensor
            views = layout.views(host, fields)
        for name, value in (
            ("_layout", layout),
            ("_host", host),
            ("_fields", fields),
            ("_views", views),
            ("_versions", (host._version, fields._version)),
            ("vocab_size", None if vocab_size is None else int(vocab_size)),
            ("visit_features", None if visit_features is None else trainable(visit_features)),
            ("code_weights", None if code_weights is None else trainable(code_weights)),
            ("targets", ReadOnly({k: trainable(v) for k, v in (targets or {}).items()})),
            ("visit_targets", ReadOnly(of_visits)),
        ):
            object.__setattr__(self, name, value)
        if "torch._dynamo" in sys.modules:  # a compiled model may be given this batch
            _mark_dynamic([*views.values(), *self._moving_tensors()])

    def _moving_tensors(self) -> list[Tensor]:
        """What does not fit into the two buffers."""
        loose = (self.visit_features, self.code_weights)
        return [
            *(tensor for tensor in loose if tensor is not None),
            *self.targets.values(),
            *self.visit_targets.values(),
        ]

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(
            f"a PackedVisits is immutable, so {name!r} cannot be set: make a changed copy with "
            "with_outcomes(...), with_codes(...), with_features(...) or with_code_weights(...)"
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a PackedVisits is immutable, so {name!r} cannot be deleted")

    def refuse_changes(self) -> None:
        """Notice a change in place, which would leave the other fields behind: gradients would go
        to the rows that the codes were in.

        Raises:
            RuntimeError: if a tensor of this batch was written to. A write through
                ``.numpy()`` or ``.data`` is not noticed.
        """
        if torch.compiler.is_compiling():
            return
        host, fields = self._versions
        if host != self._host._version or fields != self._fields._version:
            raise RuntimeError(
                "the tensors of this PackedVisits were changed in place, and its other fields do "
                "not follow: make a changed copy with with_outcomes(...) or with_codes(...)"
            )

    def fields(self, *names: str) -> tuple[Any, ...]:
        """Several of the attributes above in one look at whether they were changed."""
        self.refuse_changes()
        views = self._views
        return tuple([views.get(name) for name in names])

    def __len__(self) -> int:
        """The number of patients."""
        return self.n_patients

    @property
    def n_patients(self) -> int:
        """The number of patients."""
        if torch.compiler.is_compiling():  # sizes of tensors are dynamic from the first call on
            return self._views["sorted_indices"].shape[0]
        return self._layout.n_patients

    @property
    def n_visits(self) -> int:
        """The number of real visits, all patients together: the number of packed rows."""
        if torch.compiler.is_compiling():
            return self._views["code_offsets"].shape[0] - 1
        return self._layout.n_visits

    @property
    def n_codes(self) -> int:
        """The number of real codes, all visits together."""
        if torch.compiler.is_compiling():
            return self._views["codes"].shape[0]
        return self._layout.n_codes

    @property
    def max_visits(self) -> int:
        """The number of visits of the longest patient; 0 in an empty batch."""
        if torch.compiler.is_compiling():
            return self._views["batch_sizes"].shape[0]
        return self._layout.max_visits

    @property
    def device(self) -> torch.device:
        """The batch's device (``batch_sizes`` and ``lengths`` are always on the CPU)."""
        return self._fields.device

    def same_visits(self, other: Storage) -> bool:
        """Whether the rows of ``other`` are those of this batch: it is this one, or one of both was
        made from the other by :meth:`with_outcomes`, :meth:`with_codes`, :meth:`with_features`,
        :meth:`to` or :meth:`pin_memory`. What was copied or loaded from a file is another batch.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
            >>> batch.same_visits(batch.with_outcomes(event_times=[0, 1]))
            True
            >>> batch.same_visits(PackedVisits.from_lists([[[1]], [[2], [3]]]))
            False
        """
        return self._host is other._host

    def __repr__(self) -> str:
        return (
            f"PackedVisits(patients={self.n_patients}, visits={self.n_visits}, "
            f"codes={self.n_codes}, distinct_codes={self._layout.n_distinct}, "
            f"max_visits={self.max_visits}, device={self.device})"
        )

    def to(
        self: Batch,
        device: torch.device | str | int | None = None,
        non_blocking: bool = False,
        *,
        dtype: None = None,
    ) -> Batch:
        """This batch on ``device``; itself where it already is. ``batch_sizes`` and ``lengths``
        stay on the CPU. One copy carries all but features, weights and targets, without waiting for
        the device if the batch is pinned (:meth:`pin_memory`) and ``non_blocking`` is set.

        Raises:
            TypeError: for a dtype, or a tensor in place of a device. A batch has no dtype: codes,
                offsets and outcomes are integers, and features keep the dtype they were given in.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> PackedVisits.from_lists([[[1]]]).to("cpu").device
            device(type='cpu')
        """
        given = device if isinstance(device, (torch.dtype, Tensor)) else dtype
        if given is not None:
            found = kind_of(given) if isinstance(given, Tensor) else given
            raise TypeError(
                f"PackedVisits.to: expected a device, got {found}. A batch has no dtype to "
                "convert; for its features: "
                "batch.with_features(batch.visit_features.to(dtype))"
            )
        self.refuse_changes()
        with outside_inference():
            moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return self if self._holds_the_same_tensors(moved) else moved

    def pin_memory(self: Batch) -> Batch:
        """This batch in page-locked memory, for ``to(device, non_blocking=True)``. A ``DataLoader``
        with ``pin_memory=True`` calls it."""
        self.refuse_changes()
        with outside_inference():
            return self._map(lambda tensor: tensor.pin_memory())

    def is_pinned(self) -> bool:
        """Whether the batch is in page-locked memory."""
        return self._fields.is_pinned()

    def _map(self: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
        features, weights = self.visit_features, self.code_weights
        return type(self)(
            self._layout,
            self._host,
            move(self._fields),
            self.vocab_size,
            None if features is None else move(features),
            {name: move(target) for name, target in self.targets.items()},
            {name: move(target) for name, target in self.visit_targets.items()},
            None if weights is None else move(weights),
        )

    def _holds_the_same_tensors(self, other: Storage) -> bool:
        return (
            self._fields is other._fields
            and self.visit_features is other.visit_features
            and self.code_weights is other.code_weights
            and all(self.targets[name] is other.targets[name] for name in self.targets)
            and all(self.visit_targets[k] is other.visit_targets[k] for k in self.visit_targets)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The buffers, not the views into them: two tensors go to another process, not sixteen.
        # All else is of plain types, so that torch.load can read it with weights_only.
        self.refuse_changes()
        return type(self), (
            tuple(self._layout),
            self._host,
            self._fields,
            self.vocab_size,
            self.visit_features,
            dict(self.targets),
            dict(self.visit_targets),
            self.code_weights,
        )


def _mark_dynamic(tensors: Iterable[Tensor]) -> None:
    """Tell ``torch.compile`` that first dimensions differ from batch to batch, so that the first
    compilation serves all sizes but 0 and 1, and the second batch does not compile again."""
    mark = torch._dynamo.maybe_mark_dynamic
    for tensor in tensors:
        if tensor.dim():
            mark(tensor, 0)


def trainable(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy of what ``torch.inference_mode`` made: autograd can save no
    tensor of that kind, so that a batch could be validated on, but not trained on."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with outside_inference():
        return tensor.clone()
