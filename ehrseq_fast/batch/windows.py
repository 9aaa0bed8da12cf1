"""The first or the last visits of each patient as a batch of their own."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, integer
from ..autograd import outside_transforms
from .changes import Changes
from .join import cut
from .layout import MOST_CODES, OUTCOMES

Batch = TypeVar("Batch", bound="Windows")
_ENTRY = "entry_times"
_DAYS = "days_to_end"


class Windows(Changes):
    """Batches with shorter records."""

    def first_visits(self: Batch, n: int) -> Batch:
        """The batch of each patient's first n visits, or all of those who have fewer.

        What is per visit follows. Outcomes become those known at the end of the n visits: who has
        the event, or is censored, at a visit after them is censored at visit n − 1
        (``event_times`` n − 1, ``event_indicators`` and ``event_types`` 0), which is survived: with
        ``censored_visit="included"`` that visit counts too. Visit features stay as they are, those
        that depend on other visits too. A batch on a GPU is copied to the host and back.

        Raises:
            ValueError: an n below 1; event times after the n visits in a batch without indicators
                or types, or with ``visit_targets["days_to_end"]``, whose indicators say of the days
                that the event was seen; ``targets["entry_times"]`` after the n visits.
            TypeError: an n that is no integer.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists(
            ...     [[[1], [2], [3]], [[4]]], event_times=[2, 0], event_indicators=[1, 1]
            ... ).first_visits(2)
            >>> batch.lengths, batch.event_times, batch.event_indicators
            (tensor([2, 1]), tensor([1, 0]), tensor([0, 1]))
        """
        n = integer("n", n, 1, MOST_CODES)
        with outside_transforms():
            outcomes = self._outcomes_on_host()
            times, indicators, types = outcomes
            entry = self._entry_times()
            if entry is not None:
                wrong = entry >= n
                _refuse(wrong, f"targets[{_ENTRY!r}]", entry, f"within the first {n} visits")
            late = None if times is None else times >= n
            if late is not None and late.any():
                if indicators is None and types is None:
                    _refuse(
                        late,
                        "event_times",
                        times,
                        f"within the first {n} visits of a batch that has neither event_indicators "
                        "nor event_types, which would say that later ones are censored",
                    )
                if _DAYS in self.visit_targets:
                    _refuse(
                        late,
                        "event_times",
                        times,
                        f"within the first {n} visits of a batch with visit_targets[{_DAYS!r}], "
                        "whose event is seen by the same indicators; take one of the two away with "
                        "with_outcomes(...) before",
                    )
                times = np.minimum(np.asarray(times), n - 1)
                indicators = None if indicators is None else np.where(late, 0, indicators)
                types = None if types is None else np.where(late, 0, types)
            lengths = np.minimum(self.lengths.numpy(), n)
            contents = cut(self, np.zeros_like(lengths), lengths, (times, indicators, types))
            return type(self)(*contents)

    def last_visits(self: Batch, n: int) -> Batch:
        """The batch of each patient's last n visits, or all of those who have fewer.

        What is per visit follows. ``event_times`` and ``targets["entry_times"]`` count from the
        first visit that is left: less by the number of visits that are gone, entry times at least
        0. (The likelihood is then that of patients who are without the event at the first visit
        that is left.) Visit features stay as they are, those that depend on other visits too. A
        batch on a GPU is copied to the host and back.

        Raises:
            ValueError: an n below 1, an event time before the last n visits.
            TypeError: an n that is no integer.

        Example:
            >>> from ehrseq_fast.batch import PackedVisits
            >>> batch = PackedVisits.from_lists(
            ...     [[[1], [2], [3]], [[4]]], event_times=[2, 0], event_indicators=[1, 0]
            ... ).last_visits(2)
            >>> batch.codes, batch.event_times
            (tensor([2, 4, 3], dtype=torch.int32), tensor([1, 0]))
        """
        n = integer("n", n, 1, MOST_CODES)
        with outside_transforms():
            times, indicators, types = self._outcomes_on_host()
            lengths = self.lengths.numpy()
            gone = lengths - np.minimum(lengths, n)
            if times is not None:
                _refuse(times < gone, "event_times", times, f"within the last {n} visits")
                times = times - gone
            targets = dict(self.targets)
            if self._entry_times() is not None:
                entry = targets[_ENTRY]
                less = torch.from_numpy(gone).to(entry.device, entry.dtype)
                targets[_ENTRY] = (entry - less).clamp(min=0)
            contents = cut(self, gone, lengths - gone, (times, indicators, types))
            return type(self)(*contents._replace(targets=targets))

    def _outcomes_on_host(self) -> tuple[Array | None, Array | None, Array | None]:
        found = (getattr(self, name) for name in OUTCOMES)
        times, indicators, types = (None if x is None else x.cpu().numpy() for x in found)
        return times, indicators, types

    def _entry_times(self) -> Array | None:
        """What the losses take from the targets: one first visit at risk for each patient."""
        entry: Tensor | None = self.targets.get(_ENTRY)
        if entry is None or entry.shape != (len(self),) or entry.is_complex():
            return None
        return entry.detach().cpu().numpy()


def _refuse(wrong: Array, name: str, values: Array | None, expected: str) -> None:
    if wrong.any():
        patient = int(wrong.argmax())
        assert values is not None
        raise ValueError(
            f"{name}: expected {expected}, got {values[patient]} (patient {patient}; "
            f"{int(wrong.sum())} in all)"
        )
