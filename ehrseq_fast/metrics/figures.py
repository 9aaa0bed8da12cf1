"""The figures of an evaluation: the model's, both baselines', and the bootstrap's intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from ..data.records import spans
from .calibration import Calibration
from .report import Metric
from .values import Ints

# The metric's name, landmark, horizon and cause.
Key = tuple[str, float | str | None, float | None, str | None]
# Of patients, who may be repeated, by each of some of WHOSE: each figure, or why there is none.
Computed = dict[str, dict[Key, float | str]]
Block = Callable[[Ints, Sequence[str]], Computed]

WHOSE = ("model", "constant", "by_visit")
_MOST_FAILED = 0.1  # share of bootstrap samples in which a figure may be undefined


class Figures:
    """Metrics, and how they are computed again for a sample of patients.

    Args:
        patients: how many rows are evaluated.
        groups: ``[B]``, whose each row is, where several are of one person; or None.

    Attributes:
        patients: as above.
        metrics: with their figures, in the order of :meth:`add`.
        calibrations: the curves, by landmark, horizon and cause.
    """

    def __init__(self, patients: int, groups: Ints | None = None) -> None:
        self.patients = patients
        self._order: Ints | None = None
        self._sizes = np.ones(patients, np.int64)
        if groups is not None:  # their rows one behind the other
            self._order = np.argsort(groups, kind="stable")
            self._sizes = np.unique(groups, return_counts=True)[1]
        self.everybody = np.arange(patients)
        self.metrics: list[Metric] = []
        self.calibrations: dict[tuple[float | str, float, str | None], Calibration] = {}
        self._blocks: list[Block] = []

    def add(self, metrics: Sequence[Metric], block: Block, *, baselines: bool) -> None:
        """Fill the figures of ``metrics`` in, of the model and, where there are, the baselines."""
        found = block(self.everybody, WHOSE if baselines else WHOSE[:1])
        for metric in metrics:
            at = key_of(metric)
            reason = found["model"].get(at)
            self.metrics.append(
                replace(
                    metric,
                    model=_number(reason),
                    constant=_number(found.get("constant", {}).get(at)),
                    by_visit=_number(found.get("by_visit", {}).get(at)),
                    reason=reason if isinstance(reason, str) else None,
                )
            )
        self._blocks.append(block)

    def add_intervals(self, samples: int, level: float, seed: int, progress: bool) -> None:
        """Percentile intervals of the model's figures, patients being resampled."""
        rng = np.random.default_rng(seed)
        defined = {key_of(m): k for k, m in enumerate(self.metrics) if m.model is not None}
        found: dict[Key, list[float]] = {at: [] for at in defined}
        for _ in _with_progress(samples, progress):
            chosen = self._draw(rng)
            for block in self._blocks:
                for at, value in block(chosen, WHOSE[:1])["model"].items():
                    number = _number(value)
                    if number is not None and at in found:
                        found[at].append(number)
        edges = [(1 - level) / 2, (1 + level) / 2]
        for at, values in found.items():
            if len(values) >= (1 - _MOST_FAILED) * samples:
                low, high = np.quantile(values, edges).tolist()
                k = defined[at]
                self.metrics[k] = replace(self.metrics[k], interval=(low, high))

    def _draw(self, rng: np.random.Generator) -> Ints:
        """The rows of as many persons as there are, drawn with replacement."""
        drawn = rng.integers(0, len(self._sizes), len(self._sizes))
        if self._order is None:
            return drawn
        first = self._sizes.cumsum() - self._sizes
        return self._order[spans(first[drawn], self._sizes[drawn])[2]]


def key_of(metric: Metric) -> Key:
    """What a block calls the metric's figure."""
    return metric.name, metric.landmark_days, metric.horizon_days, metric.cause


def _number(value: float | str | None) -> float | None:
    return value if isinstance(value, float) and math.isfinite(value) else None


def _with_progress(samples: int, progress: bool) -> Iterable[int]:
    if progress:
        try:
            from tqdm import tqdm
        except ImportError:
            return range(samples)
        return tqdm(range(samples), desc="bootstrap", unit="sample")
    return range(samples)
