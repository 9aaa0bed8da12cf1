"""The part of an evaluation that looks from landmarks in days: AUC, Brier score, calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .baselines import DayBaselines
from .calibration import calibrated
from .figures import Figures, Key
from .landmark import AtLandmark, at_landmark, column_of, squared_error, weighted_auc
from .report import OWN, SKLEARN, Metric
from .values import Bools, Floats, Ints, VisitValues

# in the order of the table: name, what is better, what computes it
_OF_RISKS = (
    ("auc", "higher", SKLEARN),
    ("brier", "lower", OWN),
    ("ici", "lower", SKLEARN),
    ("observed/expected", "1", OWN),
)


@dataclass(frozen=True)
class Landmark:
    """One landmark, of patients whose outcomes were checked.

    Attributes:
        days: s.
        visits: ``[B]``, each patient's last visit by then, -1 where there is none.
        since: ``[B]``, each patient's time after it, in days.
        seen: ``[B]``, the indicators.
        with_censored: whether the time of a censoring was survived.
    """

    days: float
    visits: Ints
    since: Floats
    seen: Bools
    with_censored: bool

    def select(self, chosen: Ints, horizon: float) -> AtLandmark:
        """Who of the chosen patients, by their place among them, is at risk.

        Raises:
            ValueError: where nobody is, or the horizon is not observed.
        """
        found = at_landmark(
            self.visits[chosen],
            self.since[chosen],
            self.seen[chosen],
            horizon,
            self.with_censored,
        )
        if not len(found.patients):
            raise ValueError(f"nobody is at risk after day {self.days:g}")
        return found


def add_landmark(
    figures: Figures,
    at: Landmark,
    horizons: tuple[float, ...],
    model: VisitValues,
    fitted: DayBaselines | None,
) -> None:
    """All figures from one landmark: ``model`` holds ``[n_visits, J]`` risks, or ``[n_visits]``
    scores, of which there is the AUC alone."""
    is_risk = model.values.ndim == 2
    kinds = _OF_RISKS if is_risk else _OF_RISKS[:1]
    everybody = np.arange(figures.patients)
    metrics = []
    for j, horizon in enumerate(horizons):
        try:
            found = at.select(everybody, horizon)
        except ValueError:
            n = 0
        else:
            n = len(found.patients)
            if is_risk:
                curve = calibrated(found, found.risks(column_of(model, j)), horizon)
                figures.calibrations[at.days, horizon] = curve
        metrics += [
            Metric(name, None, None, None, best, library, at.days, horizon, n=n)
            for name, best, library in kinds
        ]
    if is_risk and len(horizons) > 1:
        brier = next(metric for metric in metrics[::-1] if metric.name == "brier")
        name, last = "integrated_brier", horizons[-1]
        metrics.append(Metric(name, None, None, None, "lower", OWN, at.days, last, n=brier.n))

    def block(chosen: Ints, whose: str) -> Mapping[Key, float | str]:
        figures: dict[Key, float | str] = {}
        for j, horizon in enumerate(horizons):
            for name, value in _scores(at, chosen, horizon, j, whose, model, fitted).items():
                figures[name, at.days, horizon] = value
        if is_risk and len(horizons) > 1:
            scores = [figures["brier", at.days, horizon] for horizon in horizons]
            figures["integrated_brier", at.days, horizons[-1]] = _integral(scores, horizons)
        return figures

    figures.add(metrics, block, baselines=fitted is not None)


def _scores(
    at: Landmark,
    chosen: Ints,
    horizon: float,
    j: int,
    whose: str,
    model: VisitValues,
    fitted: DayBaselines | None,
) -> dict[str, float | str]:
    """Each figure at one horizon, or why it is not defined."""
    is_risk = model.values.ndim == 2
    names = [name for name, _, _ in (_OF_RISKS if is_risk else _OF_RISKS[:1])]
    try:
        found = at.select(chosen, horizon)
    except ValueError as error:
        return dict.fromkeys(names, str(error))
    if whose == "model":
        of = model.take(chosen)
        risks = found.risks(column_of(of, j)) if is_risk else of.at(found.patients, found.visits)
    else:
        assert fitted is not None
        risks = np.full(len(found.patients), fitted.constant[j])
        if whose == "by_visit":
            risks = fitted.risks(found.visits)[:, j]
    score: dict[str, Callable[[], float]] = {
        "auc": lambda: weighted_auc(found, risks),
        "brier": lambda: squared_error(found, risks),
        "ici": lambda: calibrated(found, risks, horizon).ici,
        "observed/expected": lambda: _observed_over_expected(found, risks),
    }
    values: dict[str, float | str] = {}
    for name in names:
        try:
            values[name] = score[name]()
        except ValueError as error:  # no cases, no controls
            values[name] = str(error)
    return values


def _observed_over_expected(found: AtLandmark, risks: Floats) -> float:
    observed = float((found.weight * found.case).sum() / found.weight.sum())
    expected = float(risks.mean())
    if expected == 0:
        raise ValueError("every predicted risk is 0")
    return observed / expected


def _integral(scores: list[float | str], horizons: tuple[float, ...]) -> float | str:
    """The mean over horizons from 0, where the score is 0, by the trapezoidal rule."""
    for score in scores:
        if isinstance(score, str):
            return score
    values = np.array([0.0, *scores], np.float64)
    widths = np.diff(horizons, prepend=0.0)
    return float(((values[1:] + values[:-1]) / 2 * widths).sum() / horizons[-1])
