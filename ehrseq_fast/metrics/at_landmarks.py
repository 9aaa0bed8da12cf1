"""The part of an evaluation that looks from landmarks in days: AUC, Brier score, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .baselines import DayBaselines
from .calibration import Calibration, calibrated
from .every_visit import EveryVisit
from .figures import Computed, Figures
from .landmark import AtLandmark, at_landmark, squared_error, weighted_auc
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
        competing: ``[B]``, who had an event of another cause; None where there is none.
    """

    days: float
    visits: Ints
    since: Floats
    seen: Bools
    with_censored: bool
    competing: Bools | None = None

    def of(self, chosen: Ints) -> Landmark:
        """Of some patients, who are then called by their place among them."""
        return replace(
            self,
            visits=self.visits[chosen],
            since=self.since[chosen],
            seen=self.seen[chosen],
            competing=None if self.competing is None else self.competing[chosen],
        )

    def select(self, horizon: float) -> AtLandmark:
        """Who is at risk.

        Raises:
            ValueError: where nobody is, or the horizon is not observed.
        """
        found = at_landmark(
            self.visits, self.since, self.seen, horizon, self.with_censored, self.competing
        )
        if not len(found.patients):
            raise ValueError(f"nobody is at risk after day {self.days:g}")
        return found


def add_landmark(
    figures: Figures,
    at: Landmark | EveryVisit,
    horizons: tuple[float, ...],
    model: VisitValues,
    fitted: DayBaselines | None,
    cause: str | None = None,
) -> None:
    """All figures from one landmark: ``model`` holds ``[n_visits, J]`` risks, or ``[n_visits]``
    scores, of which there is the AUC alone. Of competing events those of ``cause``, by its name."""
    is_risk = model.values.ndim == 2
    kinds = _OF_RISKS if is_risk else _OF_RISKS[:1]
    # everybody's, as what takes longest
    selected = _select(at, figures.everybody, horizons)
    metrics = []
    for horizon, found in selected.items():
        n = 0 if isinstance(found, str) else len(found.patients)
        metrics += [
            Metric(name, None, None, None, best, library, at.days, horizon, n=n, cause=cause)
            for name, best, library in kinds
        ]
    if is_risk and len(horizons) > 1:
        n, last = metrics[-1].n, horizons[-1]
        metrics.append(
            Metric(
                "integrated_brier", None, None, None, "lower", OWN, at.days, last, n=n, cause=cause
            )
        )

    def block(chosen: Ints, whose: Sequence[str]) -> Computed:
        all_of_them = chosen is figures.everybody
        of = model.take(chosen)
        chosen_at = selected if all_of_them else _select(at, chosen, horizons)
        computed: Computed = {by: {} for by in whose}
        for j, horizon in enumerate(horizons):
            found = chosen_at[horizon]
            for by, values in computed.items():
                if isinstance(found, str):
                    values |= {(name, at.days, horizon, cause): found for name, _, _ in kinds}
                    continue
                risks = _predicted(found, by, of, fitted, j)
                keys = _ranks(fitted, found.visits, j) if by == "by_visit" else risks
                ordered, risks = _in_order(found, risks, keys)  # once for all that sort them
                curve = calibrated(ordered, risks, horizon) if is_risk else None
                for name, _, _ in kinds:
                    values[name, at.days, horizon, cause] = _score(name, ordered, risks, curve)
                if all_of_them and by == "model" and curve is not None:
                    figures.calibrations[at.days, horizon, cause] = curve
        if is_risk and len(horizons) > 1:
            for values in computed.values():
                scores = [values["brier", at.days, horizon, cause] for horizon in horizons]
                last = ("integrated_brier", at.days, horizons[-1], cause)
                values[last] = _integral(scores, horizons)
        return computed

    figures.add(metrics, block, baselines=fitted is not None)


def _select(
    at: Landmark | EveryVisit, chosen: Ints, horizons: tuple[float, ...]
) -> dict[float, AtLandmark | str]:
    """Who is at risk, or why there is nobody."""
    of = at.of(chosen)
    found: dict[float, AtLandmark | str] = {}
    for horizon in horizons:
        try:
            found[horizon] = of.select(horizon)
        except ValueError as error:
            found[horizon] = str(error)
    return found


def _in_order(found: AtLandmark, risks: Floats, keys: NDArray[Any]) -> tuple[AtLandmark, Floats]:
    """Ascending by the risks, of which the keys have the order."""
    if risks.min() == risks.max():
        return found, risks
    order = _stable_order(keys)
    ordered = AtLandmark(
        found.patients[order],
        found.visits[order],
        found.case[order],
        found.control[order],
        found.weight[order],
    )
    return ordered, risks[order]


def _stable_order(keys: NDArray[Any]) -> Ints:
    """``np.argsort(keys, kind="stable")``. What float32 holds, from 0 on, is ordered by its bits,
    in two passes over 16 of them, which NumPy sorts by radix: in a quarter of the time.
    """
    if keys.dtype.kind == "f":
        narrow = keys.astype(np.float32)
        if not ((narrow == keys) & (narrow >= 0)).all():
            return np.argsort(keys, kind="stable")
        bits = (narrow + np.float32(0)).view(np.uint32)  # +0 makes -0 0
        order = np.argsort((bits & 0xFFFF).astype(np.uint16), kind="stable")
        return order[np.argsort((bits >> 16).astype(np.uint16)[order], kind="stable")]
    return np.argsort(keys, kind="stable")


def _ranks(fitted: DayBaselines | None, visits: Ints, j: int) -> NDArray[Any]:
    """The places of the baseline's risks at these visits among its distinct risks."""
    assert fitted is not None
    ranks = np.unique(fitted.by_visit[:, j], return_inverse=True)[1]
    if len(ranks) <= np.iinfo(np.uint16).max:
        ranks = ranks.astype(np.uint16)  # which NumPy sorts by radix
    return ranks[np.minimum(visits, len(ranks) - 1)]


def _predicted(
    found: AtLandmark, by: str, model: VisitValues, fitted: DayBaselines | None, j: int
) -> Floats:
    """What the model or a baseline says of those at risk."""
    if by == "model":
        if model.values.ndim == 2:
            return found.risks(model.column(j))
        return model.at(found.patients, found.visits)
    assert fitted is not None
    if by == "constant":
        return np.full(len(found.patients), fitted.constant[j])
    return fitted.risks(found.visits)[:, j]


def _score(name: str, found: AtLandmark, risks: Floats, curve: Calibration | None) -> float | str:
    try:
        if name == "auc":
            return weighted_auc(found, risks)
        if name == "brier":
            return squared_error(found, risks)
        assert curve is not None
        if name == "ici":
            return curve.ici
        if curve.mean_predicted == 0:
            return "every predicted risk is 0"
        return curve.mean_observed / curve.mean_predicted
    except ValueError as error:  # no cases, no controls
        return str(error)


def _integral(scores: list[float | str], horizons: tuple[float, ...]) -> float | str:
    """The mean over horizons from 0, where the score is 0, by the trapezoidal rule."""
    for score in scores:
        if isinstance(score, str):
            return score
    values = np.array([0.0, *scores], np.float64)
    widths = np.diff(horizons, prepend=0.0)
    return float(((values[1:] + values[:-1]) / 2 * widths).sum() / horizons[-1])
