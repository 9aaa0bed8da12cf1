"""The order of a packed batch's rows, in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Longs = npt.NDArray[np.int64]


def offsets_of(counts: Longs) -> Longs:
    """Where each of consecutive groups begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


class PatientOrder:
    """Patients by falling length (stable), and whose visit each packed row is."""

    def __init__(self, lengths: Longs) -> None:
        n_patients = len(lengths)
        max_visits = int(lengths.max(initial=0))
        self.lengths = lengths
        self.sorted = np.argsort(-lengths, kind="stable")
        self.unsorted = np.empty_like(self.sorted)
        self.unsorted[self.sorted] = np.arange(n_patients)
        at_least = np.bincount(lengths, minlength=max_visits + 1)[::-1].cumsum()[::-1]
        self.batch_sizes = at_least[1:]
        self.row_starts = offsets_of(self.batch_sizes)
        self.time_of_row = np.repeat(np.arange(max_visits), self.batch_sizes)
        ranks = np.arange(len(self.time_of_row)) - self.row_starts[self.time_of_row]
        self.patient_of_row = self.sorted[ranks]

    @property
    def last_rows(self) -> Longs:
        return self.row_starts[self.lengths - 1] + self.unsorted
