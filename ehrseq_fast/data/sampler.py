"""Batches of about as many visits each, in an order that a number describes.

The plan of an epoch's batches is a function of the seed and the epoch alone: it is the same for any
number of processes, and to resume an epoch takes no state but the number of batches that are done.
Its random order comes from a hash of the items' numbers, and so is the same with any version of
NumPy.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ..arrays import integer
from .dataset import PatientDataset
from .split import splitmix64

Ints = NDArray[np.int64]
MOST = 2**31 - 2  # visits or codes that a batch can hold
BATCHES_PER_BUCKET = 64


class Plan(NamedTuple):
    """The batches of an epoch.

    Attributes:
        items: int64 ``[len(dataset)]``, one batch after the other.
        begins, ends: int64 ``[n_batches]``, where each batch is in ``items``.
    """

    items: Ints
    begins: Ints
    ends: Ints


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of as many patients as a budget of visits, or of codes, has space for.

    Shuffled, in each epoch anew: patients are put in a random order, sorted by length within large
    random buckets, cut into batches by the budget, and the batches put in a random order. Patients
    of a batch are thus of similar lengths, which is what a recurrent layer's number of steps
    depends on. A patient who is longer than the budget is a batch alone (``n_oversized``).

    With several processes each gets a part of every batch, patients whole, so that their visits
    balance (the longest first, each to whom has the least so far); :meth:`imbalance` says how well.
    All have the same number of batches, of which a process may have nobody: an empty list, for
    which a store's data set gives a batch without patients.

    Args:
        dataset: whose items are to be batched.
        visits_per_batch, codes_per_batch: the budget of a batch of all processes together; one of
            the two.
        shuffle: without it, the data set's order is kept, whatever the lengths.
        seed: of the order.
        rank, world_size: this process, and how many there are.
        bucket: how many patients are sorted by length together; None: 64 batches' worth.

    Raises:
        ValueError, TypeError: options outside their range, both budgets or neither.

    Example:
        >>> from ehrseq_fast.data import EventRecords, PatientDataset, Vocabulary
        >>> records = EventRecords(
        ...     codes=np.array([1, 2, 1, 2], np.int32), visit_offsets=np.array([0, 1, 2, 3, 4]),
        ...     patient_offsets=np.array([0, 1, 3, 4]),
        ...     visit_days=np.array(["2020-01-01"] * 4, "datetime64[D]"),
        ...     person_ids=np.array([7, 8, 9]), event_times=np.array([0, 1, 0]),
        ...     event_indicators=np.array([1, 0, 0], np.uint8),
        ...     vocabulary=Vocabulary(np.array([0, 40, 41]), ("", "a", "b")))
        >>> sampler = TokenBudgetSampler(PatientDataset(records), visits_per_batch=3, shuffle=False)
        >>> list(sampler), len(sampler)
        ([[0, 1], [2]], 2)
        >>> sampler.set_position(1)
        >>> list(sampler)
        [[2]]
    """

    def __init__(
        self,
        dataset: PatientDataset,
        *,
        visits_per_batch: int | None = None,
        codes_per_batch: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        bucket: int | None = None,
    ) -> None:
        if (visits_per_batch is None) == (codes_per_batch is None):
            raise ValueError(
                "expected one of visits_per_batch and codes_per_batch, got "
                + ("neither" if visits_per_batch is None else "both")
            )
        self.visits = np.ascontiguousarray(dataset.visits_per_item(), np.int64)
        if visits_per_batch is not None:
            self.budget = integer("visits_per_batch", visits_per_batch, 1, MOST)
            self.sizes = self.visits
        else:
            self.budget = integer("codes_per_batch", codes_per_batch, 1, MOST)
            self.sizes = np.ascontiguousarray(dataset.codes_per_item(), np.int64)
        self.shuffle = bool(shuffle)
        self.seed = integer("seed", seed, 0, 2**63 - 1)
        self.world_size = integer("world_size", world_size, 1, 2**20)
        self.rank = integer("rank", rank, 0, self.world_size - 1)
        most = max(len(self.sizes), 1)
        if bucket is None:
            mean = float(self.sizes.mean()) if len(self.sizes) else 1.0
            self.bucket = min(max(round(BATCHES_PER_BUCKET * self.budget / max(mean, 1)), 1), most)
        else:
            self.bucket = integer("bucket", bucket, 1, 2**62)
        self.n_oversized = int(np.count_nonzero(self.sizes > self.budget))
        self.epoch, self.position = 0, 0
        self._plan: tuple[int, Plan] | None = None

    @property
    def sampler(self) -> TokenBudgetSampler:
        """Itself: Lightning and Accelerate call ``set_epoch`` of the ``sampler`` that a
        ``DataLoader``'s batch sampler has, and without one each epoch would be the first."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch, from its first batch."""
        self.epoch, self.position = integer("epoch", epoch, 0, 2**63 - 1), 0

    def set_position(self, position: int) -> None:
        """Begin iterations of this epoch with this batch: so many are done.

        Raises:
            ValueError: beyond the epoch's batches.
        """
        self.position = integer("position", position, 0, self.n_batches)

    @property
    def n_batches(self) -> int:
        """How many batches the epoch has in all."""
        return len(self.plan().begins)

    def __len__(self) -> int:
        """How many batches the next iteration gives."""
        return self.n_batches - self.position

    def __iter__(self) -> Iterator[list[int]]:
        plan, position = self.plan(), self.position  # now, not when the first batch is taken
        return (
            self._share(plan.items[plan.begins[batch] : plan.ends[batch]])[0]
            for batch in range(position, len(plan.begins))
        )

    def plan(self) -> Plan:
        """The batches of this epoch, of all processes together."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = self.epoch, self._new_plan()
        return self._plan[1]

    def patients_of_batch(self, batch: int) -> int:
        """How many items a batch of this epoch has, in all processes together."""
        plan = self.plan()
        return int(plan.ends[batch] - plan.begins[batch])

    def imbalance(self, batches: int | None = None) -> float:
        """By how much the process with the most visits has more than the average, in the mean over
        the epoch's first ``batches`` batches (None: all): what waiting for it costs. 0: nothing."""
        plan = self.plan()
        n = len(plan.begins) if batches is None else min(batches, len(plan.begins))
        excess = []
        for batch in range(n):
            loads = self._share(plan.items[plan.begins[batch] : plan.ends[batch]])[1]
            excess.append(max(loads) * self.world_size / max(sum(loads), 1) - 1)
        return float(np.mean(excess)) if excess else 0.0

    def _new_plan(self) -> Plan:
        n = len(self.sizes)
        order = np.arange(n)
        if self.shuffle:
            order = _random_order(n, self.seed, 2 * self.epoch)
            order = order[_sorted_in_buckets(self.sizes[order], self.bucket)]
        begins = _cut(self.sizes[order], self.budget)
        ends = np.append(begins[1:], n)[: len(begins)]
        if self.shuffle:
            batches = _random_order(len(begins), self.seed, 2 * self.epoch + 1)
            begins, ends = begins[batches], ends[batches]
        return Plan(order, begins, ends)

    def _share(self, items: Ints) -> tuple[list[int], list[int]]:
        """This process's part of a batch, in the batch's order, and the visits of each process."""
        if self.world_size == 1:
            return items.tolist(), [int(self.visits[items].sum())]
        visits = self.visits[items]
        loads = [(0, rank) for rank in range(self.world_size)]
        mine = []
        for place in np.argsort(-visits, kind="stable").tolist():
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + int(visits[place]), rank))
            if rank == self.rank:
                mine.append(place)
        return items[sorted(mine)].tolist(), [load for load, _ in loads]


def _random_order(n: int, seed: int, stream: int) -> Ints:
    """A permutation that depends on nothing but its arguments."""
    salt = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ np.array([stream], np.uint64))
    return np.argsort(splitmix64(np.arange(n, dtype=np.uint64) ^ salt), kind="stable")


def _sorted_in_buckets(sizes: Ints, bucket: int) -> Ints:
    """An order that sorts by size within each bucket, upwards and downwards in turn, so that the
    batch across a bucket's edge is of similar sizes too."""
    number = np.arange(len(sizes)) // bucket
    signed = np.where(number % 2 == 0, sizes, -sizes)
    if len(sizes) <= bucket:
        return np.argsort(signed, kind="stable")
    return np.lexsort((signed, number))


def _cut(sizes: Ints, budget: int) -> Ints:
    """Where batches begin that hold as much as the budget has space for, or one item."""
    ends = np.cumsum(sizes).tolist()
    begins, first, before = [], 0, 0
    while first < len(ends):
        begins.append(first)
        first = max(bisect_right(ends, before + budget, lo=first), first + 1)
        before = ends[first - 1]
    return np.array(begins, np.int64)
