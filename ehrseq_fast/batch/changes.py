"""Changed copies of a batch: with other outcomes, codes, features or weights of codes."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import backend
from ..arrays import ArrayLike, any_integers, as_array, clamped_longs, truth
from ..autograd import outside_inference
from ..checks import refuse_codes_outside
from .checks import code_limit, outcome, wide_codes
from .gather import as_tensor, as_values, gather, gather_all, gather_features
from .layout import LONGS, OUTCOMES
from .reference_checks import Names, check_outcomes
from .rows import Rows
from .visits import Visits
from .weights import weights_of_codes

Batch = TypeVar("Batch", bound="Changes")


class Keep(Enum):
    """The default of what is to stay as it is, since None takes it away."""

    KEEP = "keep"

    def __repr__(self) -> str:
        return "KEEP"


KEEP = Keep.KEEP


class Changes(Visits):
    """A batch is immutable; these make another one of it."""

    def with_outcomes(
        self: Batch,
        *,
        event_times: ArrayLike | Keep | None = KEEP,
        event_indicators: ArrayLike | Keep | None = KEEP,
        event_types: ArrayLike | Keep | None = KEEP,
        targets: Mapping[str, ArrayLike] | Keep | None = KEEP,
        visit_targets: Mapping[str, ArrayLike] | Keep | None = KEEP,
    ) -> Batch:
        """A copy with other outcomes: what is given replaces, None takes away, the rest stays.

        Features, and targets that stay, are the same tensors in both batches. Integers on a GPU
        are taken as they are, without waiting for the device to check them, unless
        ``EHRSEQ_FAST_VALIDATE`` is set.

        Args:
            event_times, event_indicators, event_types: integers ``[n_patients]`` in the caller's
                order.
            targets: ``[n_patients, ...]`` by name; all of them.
            visit_targets: ``[n_visits, ...]`` by name, in the order of the batch's rows (as
                :meth:`pack` gives them); all of them.

        Raises:
            ValueError, TypeError: as :meth:`PackedVisits.from_lists`.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]], event_times=[0, 1])
            >>> batch.with_outcomes(event_times=[0, 0], event_indicators=[1, 0]).event_times
            tensor([0, 0])
            >>> batch.event_times
            tensor([0, 1])
        """
        self.refuse_changes()
        with outside_inference():
            outcomes = {}
            given = (event_times, event_indicators, event_types)
            for name, values in zip(OUTCOMES, given, strict=True):
                value = getattr(self, name) if values is KEEP else self._outcome(name, values)
                if value is not None:
                    outcomes[name] = value
            layout = self._layout._replace(outcomes=tuple(outcomes))
            sizes = self._layout.longs()
            before, _, ints = self._fields.split_with_sizes(
                [sum(sizes[: len(LONGS)]), sum(sizes[len(LONGS) : -1]), sizes[-1]]
            )
            fields = torch.cat([before, *outcomes.values(), ints])
            if not isinstance(targets, Keep):
                targets = gather_all(targets, None, len(self), "patients", self.device)
            if not isinstance(visit_targets, Keep):
                visit_targets = gather_all(
                    visit_targets, None, self.n_visits, "visits", self.device
                )
            return type(self)(
                layout,
                self._host,
                fields,
                self.vocab_size,
                self.visit_features,
                self.targets if isinstance(targets, Keep) else targets,
                self.visit_targets if isinstance(visit_targets, Keep) else visit_targets,
                self.code_weights,
            )

    def with_codes(
        self: Batch, codes: ArrayLike | None = None, *, keep: ArrayLike | None = None
    ) -> Batch:
        """A copy with other codes in the same visits, and the code index that belongs to them.

        For augmentation: code dropout (``keep``), masking (``codes``). Weights of codes follow
        their codes. All else stays, and is the same tensors in both batches. On a GPU this waits for the device, for the numbers of codes.

        Args:
            codes: integers ``[n_codes]`` in place of :attr:`PackedVisits.codes`.
            keep: booleans ``[n_codes]``: which codes stay, of ``codes`` where that is given. A
                visit may lose all of its codes; it stays a visit.

        Raises:
            ValueError: a wrong shape.
            IndexError: a code below 0 or not below ``vocab_size``.
            TypeError: codes that are no integers, or ``keep`` that is not boolean.

        Example:
            >>> import torch
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists([[[1, 2], [2]]])
            >>> batch.with_codes(torch.where(batch.codes == 2, 9, batch.codes)).codes
            tensor([1, 9, 9], dtype=torch.int32)
            >>> dropped = batch.with_codes(keep=torch.tensor([True, False, True]))
            >>> dropped.codes, dropped.code_offsets, dropped.index_codes
            (tensor([1, 2], dtype=torch.int32), tensor([0, 1, 2], dtype=torch.int32), tensor([1, 2], dtype=torch.int32))
        """  # noqa: E501
        self.refuse_changes()
        with outside_inference():
            new = self.codes if codes is None else self._new_codes(codes)
            rows = self.row_of_code
            if keep is not None:
                kept = self._kept(keep)
                new, rows = new[kept], rows[kept]
            counts = torch.bincount(rows, minlength=self.n_visits)
            by_code = torch.sort(new, stable=True)
            distinct, repeats = torch.unique_consecutive(by_code.values, return_counts=True)
            layout = self._layout._replace(n_codes=len(new), n_distinct=len(distinct))
            ints = [
                _offsets(counts),
                new,
                rows[by_code.indices],
                distinct,
                _offsets(repeats),
                counts.new_zeros(sum(layout.ints()) % 2),
            ]
            packed = torch.cat([part.to(torch.int32) for part in ints]).view(torch.int64)
            fields = torch.cat([self._fields[: -self._layout.longs()[-1]], packed])
            weights = self.code_weights
            if weights is not None and keep is not None:
                weights = weights[kept]
            return type(self)(
                layout,
                self._host,
                fields,
                self.vocab_size,
                self.visit_features,
                self.targets,
                self.visit_targets,
                weights,
            )

    def with_features(self: Batch, visit_features: ArrayLike | None) -> Batch:
        """A copy with other visit features, ``[n_visits, F]`` in the order of the batch's rows (as
        :meth:`pack` gives them), or with none. They are copied; gradients flow back to a tensor.

        Raises:
            ValueError: a wrong shape.
            TypeError: features that are not floating.

        Example:
            >>> import torch
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists([[[1]], [[2], [3]]])
            >>> batch.with_features(torch.ones(3, 2)).visit_features.shape
            torch.Size([3, 2])
        """
        self.refuse_changes()
        features = gather_features(visit_features, None, self.n_visits, self.device)
        return type(self)(
            self._layout,
            self._host,
            self._fields,
            self.vocab_size,
            features,
            self.targets,
            self.visit_targets,
            self.code_weights,
        )

    def with_code_weights(self: Batch, code_weights: ArrayLike | None) -> Batch:
        """A copy with other weights of codes, ``[n_codes]`` in the order of
        :attr:`PackedVisits.codes`, or with none. They are copied; gradients flow back to a tensor.

        Raises:
            ValueError: a wrong shape.
            TypeError: weights that are not floating.

        Example:
            >>> import torch
            >>> from ehrseq_fast import PackedVisits, packed_visit_pool
            >>> batch = PackedVisits.from_lists([[[1, 2]]])
            >>> weighted = batch.with_code_weights(torch.tensor([3.0, 1.0]))
            >>> packed_visit_pool(weighted, torch.tensor([[0.0], [2.0], [4.0]]))
            tensor([[2.5000]])
        """
        self.refuse_changes()
        if code_weights is not None:
            checked = weights_of_codes(code_weights, (self.n_codes,))
            code_weights = gather(checked, None, self.device)
        return type(self)(
            self._layout,
            self._host,
            self._fields,
            self.vocab_size,
            self.visit_features,
            self.targets,
            self.visit_targets,
            code_weights,
        )

    def _outcome(self, name: str, values: ArrayLike | None) -> Tensor | None:
        if values is None:
            return None
        if isinstance(values, Tensor) and values.device == self.device and not _is_on_host(self):
            if values.is_floating_point() or values.is_complex():
                raise TypeError(f"{name}: expected integers, got {values.dtype}")
            if values.shape != (len(self),):
                raise ValueError(
                    f"{name}: expected one per patient, shape [{len(self)}], "
                    f"got {list(values.shape)}"
                )
            if not backend.validate_on_device():
                return values.long()
        longs = outcome(name, values, len(self), None)
        checked = (longs if name == other else None for other in OUTCOMES)
        times, indicators, types = checked
        check_outcomes(self.lengths.numpy(), (times, indicators, types), Names(None))
        return torch.from_numpy(longs).to(self.device)

    def _new_codes(self, codes: ArrayLike) -> Tensor:
        if isinstance(codes, Tensor):
            new = as_tensor(as_values("codes", codes), self.device).detach()
            new = wide_codes("codes", new)
        else:
            new = torch.from_numpy(np.array(clamped_longs(any_integers("codes", codes))))
            new = new.to(self.device)
        if new.shape != (self.n_codes,):
            raise ValueError(f"codes: expected shape [{self.n_codes}], got {list(new.shape)}")
        refuse_codes_outside(new, code_limit(self.vocab_size))
        return new

    def _kept(self, keep: ArrayLike) -> Tensor:
        if isinstance(keep, Tensor) and keep.dtype == torch.bool:
            as_values("keep", keep)
            kept = keep.detach().view(torch.uint8).to(self.device) != 0
        else:
            array = as_array("keep", keep)
            if array.dtype != np.bool_:
                raise TypeError(f"keep: expected booleans, got {array.dtype}")
            kept = torch.from_numpy(truth(array)).to(self.device)
        if kept.shape != (self.n_codes,):
            raise ValueError(f"keep: expected shape [{self.n_codes}], got {list(kept.shape)}")
        return kept


def _is_on_host(batch: Rows) -> bool:
    return batch.device.type == "cpu"


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
