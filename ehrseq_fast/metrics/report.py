"""What :func:`~ehrseq_fast.metrics.evaluate` returns: a table, and a dictionary for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .calibration import Calibration
from .incidence import IncidenceCurves

# What computes a figure.
OWN = "ehrseq_fast (NumPy)"
SKLEARN = "scikit-learn"


@dataclass(frozen=True)
class Metric:
    """One figure, with those of both baselines beside it.

    Attributes:
        name: ``"nll"``, ``"c_td"``, ``"auc"``, ``"brier"``, ``"integrated_brier"``, ``"ici"``,
            ``"observed/expected"`` or, of competing events, ``"incidence"``.
        model: the model's; None where it is not defined, for the ``reason`` given.
        constant, by_visit: those of one hazard for all, and of a hazard by the visit's index alone;
            None where there is none.
        best: ``"higher"``, ``"lower"`` or ``"1"``.
        library: what computed it.
        landmark_days, horizon_days: s (or ``"every visit"``) and w, or None.
        interval: of the bootstrap, or None.
        n: patients that it is about.
        cause: of competing events, the name of that which it is about; None for all.
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
    cause: str | None = None

    @property
    def title(self) -> str:
        """The name with cause, landmark and horizon."""
        title = _TITLES[self.name]
        if self.cause is not None:
            title += f", {self.cause}"
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
    "incidence": "cumulative incidence, largest difference",
}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one model on held-out patients.

    Attributes:
        patients, events: how many were evaluated.
        censored_visit: the convention.
        metrics: in the order of the table; also by ``evaluation["c_td"]`` or, with landmark and
            horizon, ``evaluation["auc", 365, 365]``; of competing events with the cause as well,
            ``evaluation["c_td", "death"]``, ``evaluation["auc", 365, 365, "death"]``.
        calibrations: the curves, by (landmark, horizon) in days, of competing events by (landmark,
            horizon, cause).
        bootstrap: number of samples, and their seed and level.
        versions: of the libraries that computed the figures.
        causes: names of competing events; empty where there is one event.
        incidences: of competing events, predicted and observed cumulative incidences.
    """

    patients: int
    events: int
    censored_visit: str
    metrics: tuple[Metric, ...]
    calibrations: Mapping[tuple[Any, ...], Calibration] = field(default_factory=dict)
    bootstrap: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    causes: tuple[str, ...] = ()
    incidences: IncidenceCurves | None = None

    def __getitem__(self, key: str | tuple[Any, ...]) -> Metric:
        name, *rest = (key,) if isinstance(key, str) else key
        cause = rest.pop() if len(rest) in (1, 3) else None
        landmark, horizon = rest or (None, None)
        for metric in self.metrics:
            found = (metric.name, metric.landmark_days, metric.horizon_days, metric.cause)
            if found == (name, landmark, horizon, cause):
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
            if not self.causes:
                del entry["cause"]
            metrics.append(entry)
        competing: dict[str, Any] = {}
        if self.causes:
            curves = None if self.incidences is None else self.incidences.to_dict()
            competing = {"causes": list(self.causes), "incidences": curves}
        return {
            "patients": self.patients,
            "events": self.events,
            "censored_visit": self.censored_visit,
            "metrics": metrics,
            "calibration": [
                {"landmark_days": landmark, **curve.to_dict()}
                | ({"cause": cause[0]} if cause else {})
                for (landmark, _, *cause), curve in self.calibrations.items()
            ],
            "bootstrap": dict(self.bootstrap),
            "versions": dict(self.versions),
            **competing,
        }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
