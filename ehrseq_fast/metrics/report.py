"""What :func:`~ehrseq_fast.metrics.evaluate` returns: a table, and a dictionary for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .calibration import Calibration

# What computes a figure.
OWN = "ehrseq_fast (NumPy)"
SKLEARN = "scikit-learn"


@dataclass(frozen=True)
class Metric:
    """One figure, with those of both baselines beside it.

    Attributes:
        name: ``"nll"``, ``"c_td"``, ``"auc"``, ``"brier"``, ``"integrated_brier"``, ``"ici"`` or
            ``"observed/expected"``.
        model: the model's; None where it is not defined, for the ``reason`` given.
        constant, by_visit: those of one hazard for all, and of a hazard by the visit's index alone;
            None where there is none.
        best: ``"higher"``, ``"lower"`` or ``"1"``.
        library: what computed it.
        landmark_days, horizon_days: s (or ``"every visit"``) and w, or None.
        interval: of the bootstrap, or None.
        n: patients that it is about.
    """

    name: str
    model: float | None
    constant: float | None
    by_visit: float | None
    best: str
    library: str
    landmark_days: float | str | None = None
    horizon_days: float | None = None
    interval: tuple[float, float] | None = None
    n: int = 0
    reason: str | None = None

    @property
    def title(self) -> str:
        """The name with landmark and horizon."""
        title = _TITLES[self.name]
        if self.horizon_days is None:
            return title
        if isinstance(self.landmark_days, str):
            return f"{title}, {self.landmark_days} + {self.horizon_days:g}"
        return f"{title}, day {self.landmark_days:g} + {self.horizon_days:g}"


_TITLES = {
    "nll": "negative log-likelihood per patient",
    "c_td": "C_td",
    "auc": "AUC",
    "brier": "Brier score",
    "integrated_brier": "integrated Brier score",
    "ici": "calibration (ICI)",
    "observed/expected": "observed / expected",
}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one model on held-out patients.

    Attributes:
        patients, events: how many were evaluated.
        censored_visit: the convention.
        metrics: in the order of the table; also by ``evaluation["c_td"]`` or, with landmark and
            horizon, ``evaluation["auc", 365, 365]``.
        calibrations: the curves, by (landmark, horizon) in days.
        bootstrap: number of samples, and their seed and level.
        versions: of the libraries that computed the figures.
    """

    patients: int
    events: int
    censored_visit: str
    metrics: tuple[Metric, ...]
    calibrations: Mapping[tuple[float | str, float], Calibration] = field(default_factory=dict)
    bootstrap: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str | tuple[str, float | str, float]) -> Metric:
        wanted = (key, None, None) if isinstance(key, str) else key
        for metric in self.metrics:
            if (metric.name, metric.landmark_days, metric.horizon_days) == wanted:
                return metric
        raise KeyError(key)

    def table(self) -> str:
        """The figures as a Markdown table."""
        rows = [["metric", "model", "constant hazard", "hazard by visit", "better", "computed by"]]
        if self.bootstrap:
            rows[0].insert(2, f"{100 * self.bootstrap['level']:g} % interval")
        for metric in self.metrics:
            row = [
                metric.title,
                _number(metric.model),
                _number(metric.constant),
                _number(metric.by_visit),
                metric.best,
                metric.library,
            ]
            if self.bootstrap:
                low_high = metric.interval
                row.insert(2, "–" if low_high is None else "–".join(map(_number, low_high)))
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
            for row in rows
        ]
        lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
        notes = [f"{m.title}: {m.reason}." for m in self.metrics if m.reason]
        return "\n".join([*lines, *([""] if notes else []), *notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, for JSON."""
        metrics = []
        for metric in self.metrics:
            entry = asdict(metric)
            entry["interval"] = None if metric.interval is None else list(metric.interval)
            metrics.append(entry)
        return {
            "patients": self.patients,
            "events": self.events,
            "censored_visit": self.censored_visit,
            "metrics": metrics,
            "calibration": [
                {"landmark_days": landmark, **curve.to_dict()}
                for (landmark, _), curve in self.calibrations.items()
            ],
            "bootstrap": dict(self.bootstrap),
            "versions": dict(self.versions),
        }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
