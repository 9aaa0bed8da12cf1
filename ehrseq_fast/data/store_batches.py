"""Batches of a store's patients, packed straight from its files."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import Array, ArrayLike, longs
from ..batch import PackedVisits
from ..batch.builder import from_prefixes
from .store import EventStore
from .tasks.outcomes import Outcomes, days_at_risk
from .tasks.search import DAY_US, latest_so_far, microseconds

Ints = NDArray[np.int64]
MOST_OF_AVAILABLE = 0.5
READ = ("codes", "visit_offsets", "patient_offsets", "visit_times", "visit_ends")


class StoreBatches:
    """What a batch of a store's patients holds, and where it is read from.

    Args:
        store: the store.
        outcomes: a row for each item of the data set; None: ``patients`` with all their visits and
            no outcomes.
        patients: int64 ``[n]``, without ``outcomes``.
        with_time_features: give batches visit features, see :class:`PatientDataset`.
        with_visits: give batches ``visit_targets["visit"]``, each visit's index in the store.
        code_map: integers ``[n_codes]``, the model's code of each of the store's, in place of its
            vocabulary.
        vocab_size: what these are below.

    Raises:
        ValueError: outcomes of another store, or beyond the visits that it has.
        IndexError: a vocabulary that points outside its size.
    """

    def __init__(
        self,
        store: EventStore,
        outcomes: Outcomes | None,
        patients: Ints,
        *,
        with_time_features: bool,
        with_visits: bool,
        code_map: ArrayLike | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.store, self.outcomes = store, outcomes
        self.with_time_features, self.with_visits = with_time_features, with_visits
        self.patients = np.ascontiguousarray(patients, np.int64)
        visits_there = (
            store.patient_offsets[self.patients + 1] - store.patient_offsets[self.patients]
        )
        if outcomes is None:
            self.n_visits = np.ascontiguousarray(visits_there)
        else:
            _check_outcomes(store, outcomes, visits_there)
            self.n_visits = np.ascontiguousarray(outcomes.n_visits, np.int64)
        self.vocab_size = store.vocab_size if vocab_size is None else vocab_size
        self.code_map = _checked_map(store, code_map, self.vocab_size)

    def codes_per_item(self) -> Ints:
        """int64 ``[n]``: how many entries of the store each item's visits have."""
        first = self.store.patient_offsets[self.patients]
        offsets = self.store.visit_offsets
        return offsets[first + self.n_visits] - offsets[first]

    def pack(self, rows: Ints) -> PackedVisits:
        """The batch of some items."""
        store, outcomes = self.store, self.outcomes
        patients, n_visits = self.patients[rows], self.n_visits[rows]
        times = indicators = types = None
        targets: dict[str, Array] = {"patient": patients}
        if outcomes is not None:
            times = outcomes.event_times[rows]
            indicators = outcomes.event_indicators[rows].astype(np.int64)
            if outcomes.event_types is not None:
                types = outcomes.event_types[rows].astype(np.int64)
            targets["entry_times"] = outcomes.entry_times[rows]
            if outcomes.labels is not None:
                kind = np.int64 if outcomes.categories else np.float32
                targets["labels"] = outcomes.labels[rows].astype(kind)
        contents, visits = from_prefixes(
            store.codes,
            store.visit_offsets,
            store.patient_offsets,
            patients,
            n_visits,
            self.code_map,
            self.vocab_size,
            times,
            indicators,
            types,
        )
        features, by_visit = None, {}
        if outcomes is not None or self.with_time_features:
            of_row = _patient_of_row(contents.layout, contents.host, contents.fields)
            visit_us = microseconds(store.visit_times)[visits]
            if outcomes is not None:
                starts = microseconds(outcomes.risk_starts)[rows]
                ends = microseconds(outcomes.end_times)[rows]
                visit_ends = np.asarray(microseconds(store.visit_ends))
                until = _seen_until(visit_ends, visits, of_row, len(patients))
                days = days_at_risk(until, starts[of_row], ends[of_row])
                by_visit["days_to_end"] = days.astype(np.float32)
            if self.with_time_features:
                first = store.patient_offsets[patients][of_row]
                features = torch.from_numpy(_time_features(store, visits, visit_us, first))
        if self.with_visits:
            by_visit["visit"] = visits
        return PackedVisits(
            *contents._replace(
                visit_features=features,
                targets={name: torch.from_numpy(values) for name, values in targets.items()},
                visit_targets={name: torch.from_numpy(values) for name, values in by_visit.items()},
            )
        )

    def prefetch(self) -> bool:
        """Ask the system to read the files ahead, where half of its free memory holds them; whether
        it was asked."""
        arrays = [getattr(self.store, name) for name in READ]
        free, ahead = available_memory(), getattr(mmap, "MADV_WILLNEED", None)
        if (
            ahead is None
            or free is None
            or sum(array.nbytes for array in arrays) > MOST_OF_AVAILABLE * free
        ):
            return False
        maps = [found for array in arrays if (found := _map_of(array)) is not None]
        for found in maps:
            found.madvise(ahead)
        return bool(maps)


def _patient_of_row(layout: Any, host: torch.Tensor, fields: torch.Tensor) -> Ints:
    """int64 ``[n_visits]``: whose visit each packed row is, as a place in the batch."""
    batch_sizes = host.numpy()[: layout.max_visits]
    ranks = np.arange(layout.n_visits)
    ranks -= np.repeat(np.cumsum(batch_sizes) - batch_sizes, batch_sizes)
    return fields.numpy()[: layout.n_patients][ranks]


def _seen_until(ends: Ints, visits: Ints, of_row: Ints, n_patients: int) -> Ints:
    """int64 ``[n_visits]``: when the last code of each packed row's visit and of the patient's
    earlier ones was recorded."""
    until = ends[visits]
    # packed rows begin with the patients' first visits
    if not (ends[visits[n_patients:] - 1] > until[n_patients:]).any():
        return until
    order = np.lexsort((visits, of_row))
    begins = np.concatenate([[0], np.bincount(of_row).cumsum()])
    until[order] = latest_so_far(until[order], begins)
    return until


def _time_features(
    store: EventStore, visits: Ints, visit_us: Ints, first: Ints
) -> NDArray[np.float32]:
    times = microseconds(store.visit_times)
    index = visits - first
    features = np.empty((len(visits), 3), np.float32)
    features[:, 0] = (visit_us - times[visits - (index > 0)]) / DAY_US
    features[:, 1] = (visit_us - times[first]) / DAY_US
    features[:, 2] = index
    return features


def _checked_map(store: EventStore, given: ArrayLike | None, size: int) -> NDArray[np.int32]:
    """The model's code of each of the store's, in memory."""
    name = f"vocabulary of {store.path}" if given is None else "code_map"
    codes = longs(name, store.vocabulary if given is None else given)
    if codes.shape != (store.n_codes,):
        raise ValueError(
            f"{name}: expected one code for each of {store.n_codes} of the store, got shape "
            f"{list(codes.shape)}"
        )
    outside = (codes < 1) | (codes >= size)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise IndexError(
            f"{name}: expected 1 <= code < {size}, got {codes[at]} at {at} "
            f"({int(outside.sum())} outside)"
        )
    return codes.astype(np.int32)


def _check_outcomes(store: EventStore, outcomes: Outcomes, visits_there: Ints) -> None:
    made_of, this = outcomes.store_sha256, store.header.get("content_sha256")
    if made_of is not None and made_of != this:
        raise ValueError(
            f"outcomes: expected those of the store {store.path} (content {this}), got those of "
            f"another one (content {made_of})"
        )
    outside = (outcomes.n_visits < 1) | (outcomes.n_visits > visits_there)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"outcomes: expected n_visits of 1 to {visits_there[at]} for patient "
            f"{outcomes.patients[at]} of the store, got {outcomes.n_visits[at]}, in row {at}"
        )


def _map_of(array: Array) -> mmap.mmap | None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
