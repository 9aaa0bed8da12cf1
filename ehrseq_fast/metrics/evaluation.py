"""All metrics of a model on held-out patients at once, with both baselines and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from ..arrays import ArrayLike, integer
from ..models.intervals import boundaries
from .at_landmarks import Landmark, add_landmark
from .baselines import DayBaselines, VisitBaselines, day_baselines, visit_baselines
from .dynamic import concordance
from .every_visit import EVERY_VISIT, EveryVisit
from .figures import Computed, Figures
from .landmark import last_visits
from .report import OWN, Evaluation, Metric
from .values import (
    Bools,
    Floats,
    Ints,
    VisitValues,
    included,
    read_entry_times,
    read_outcomes,
    read_values,
    read_visit_times,
)

_EPS = 1e-7  # hazards are clamped as in the losses


@dataclass(frozen=True)
class TrainingOutcomes:
    """Outcomes of the training patients, which the baselines are fitted on.

    Attributes:
        event_times, event_indicators: ``[B]``.
        entry_times: ``[B]``, or None.
        days_to_end: ``[n_visits]`` patient by patient, with ``lengths`` ``[B]``, for the baselines
            in days; or None.
    """

    event_times: ArrayLike
    event_indicators: ArrayLike
    entry_times: ArrayLike | None = None
    days_to_end: ArrayLike | None = None
    lengths: ArrayLike | None = None


@dataclass(frozen=True)
class _Held:
    """Checked outcomes of the evaluated patients."""

    visits: Ints
    seen: Bools
    entry: Ints
    with_censored: bool

    def __len__(self) -> int:
        return len(self.visits)


def evaluate(
    hazards: Any = None,
    event_times: ArrayLike | None = None,
    event_indicators: ArrayLike | None = None,
    *,
    risks: Any = None,
    horizons_days: Iterable[float] | None = None,
    days_to_end: Any = None,
    landmarks_days: Sequence[float | str] = (EVERY_VISIT, 0.0, 365.0),
    lengths: ArrayLike | None = None,
    entry_times: ArrayLike | None = None,
    train: TrainingOutcomes | None = None,
    censored_visit: str = "excluded",
    bootstrap: int = 0,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Held-out negative log-likelihood and C_td of hazards per visit; AUC, Brier score and
    calibration of risks by horizon from landmarks; beside each the two baselines.

    Landmarks are days after the patient's first visit (after the entry visit with ``entry_times``).
    Without ``risks`` the AUC is that of the hazard at the landmark. A figure that is not defined
    (nobody at risk at a landmark, a horizon beyond observation) is None, with the reason.

    Args:
        hazards: the hazard at each visit: ``[B, V]`` padded, ``[n_visits]`` patient by patient with
            ``lengths``, :class:`~ehrseq_fast.PackedRows` or a list of them. Or None.
        event_times: ``[B]``, the visit of event or censoring, counted from 0.
        event_indicators: ``[B]``, 1 event seen, 0 censored.
        risks: the risk within each horizon at each visit, the same with a last dimension J; None
            for a model without.
        horizons_days: J horizons; needed with ``risks`` or ``days_to_end``.
        days_to_end: at each visit, the days to the event or the end of observation, in the layout
            of ``hazards``; without it there are no figures at landmarks.
        landmarks_days: s of the landmarks; ``"every visit"`` for each visit as a landmark of its
            own, pooled (:mod:`ehrseq_fast.metrics.every_visit`).
        lengths: ``[B]``, visits of each patient.
        entry_times: ``[B]``, the first visit at risk.
        train: the training patients' outcomes, for the baselines; without them they are missing.
        censored_visit: what the time of a censoring says.
        bootstrap: samples for intervals; patients are resampled. 0 for none.
        level: of the intervals (percentiles).
        seed: of the samples.
        progress: show a progress bar of the bootstrap, where tqdm is installed.

    Returns:
        An :class:`~ehrseq_fast.metrics.report.Evaluation`; ``print(evaluation.table())``,
        ``json.dumps(evaluation.to_dict())``.

    Raises:
        ValueError: for shapes and values as the single metrics have it.
        TypeError: where neither hazards nor risks are given, or outcomes are missing.
        ImportError: where scikit-learn is not installed.

    Example:
        >>> import numpy as np
        >>> from ehrseq_fast.metrics import TrainingOutcomes, evaluate
        >>> hazards = np.array([[0.1, 0.9], [0.2, 0.3], [0.1, 0.1]])
        >>> outcomes = [1, 1, 1], [1, 0, 0]
        >>> found = evaluate(hazards, *outcomes, train=TrainingOutcomes(*outcomes),
        ...                  censored_visit="included")
        >>> found["c_td"].model, found["c_td"].constant
        (1.0, 0.5)
    """
    given = [(name, x, t) for name, x, t in (("hazards", hazards, 0), ("risks", risks, 1))]
    read = {
        name: read_values(name, x, lengths, trailing=t) for name, x, t in given if x is not None
    }
    if not read:
        raise TypeError("hazards and risks: expected at least one of them, got None")
    values = next(iter(read.values()))
    if any((other.lengths != values.lengths).any() for other in read.values()):
        raise ValueError("risks: expected the visits of hazards, got other lengths")
    held = _outcomes(values, event_times, event_indicators, entry_times, censored_visit)
    bootstrap = integer("bootstrap", bootstrap, 0, 10**6)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    figures = Figures(len(held))
    if "hazards" in read:
        _add_visit_metrics(figures, read["hazards"], held, _fit_visits(train, censored_visit))
    if days_to_end is not None or "risks" in read:
        if horizons_days is None or days_to_end is None:
            missing = "horizons_days" if horizons_days is None else "days_to_end"
            raise TypeError(f"{missing}: expected with risks or landmarks in days, got None")
        horizons = boundaries(horizons_days)
        days = _days(values, days_to_end, lengths)
        _add_landmarks(figures, read, held, days, horizons, landmarks_days, train)
    if bootstrap:
        figures.add_intervals(bootstrap, level, seed, progress)
    return Evaluation(
        patients=len(held),
        events=int(held.seen.sum()),
        censored_visit=censored_visit,
        metrics=tuple(figures.metrics),
        calibrations=figures.calibrations,
        bootstrap={"samples": bootstrap, "level": level, "seed": seed} if bootstrap else {},
        versions=_versions("ehrseq_fast", "numpy", "scikit-learn"),
    )


def _add_visit_metrics(
    figures: Figures, hazards: VisitValues, held: _Held, fitted: VisitBaselines | None
) -> None:
    sizes = held.visits + 1  # later ones are not read
    starts = sizes.cumsum() - sizes
    of = np.repeat(np.arange(len(held)), sizes)
    visit = np.arange(len(of)) - starts[of]
    found = hazards.at(of, visit).astype(np.float64)
    wrong = ~((found >= 0) & (found <= 1))
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"hazards: expected probabilities in [0, 1], got {found[first]:g} (patient "
            f"{of[first]}, visit {visit[first]}; {int(wrong.sum())} in all)"
        )
    flat = {"model": found}
    if fitted is not None:
        flat["constant"] = np.full(len(found), fitted.constant)
        flat["by_visit"] = fitted.hazards(visit)
    nlls = {whose: _nll(values, starts, held) for whose, values in flat.items()}
    ranked = {
        whose: VisitValues("hazards", values, starts, sizes) for whose, values in flat.items()
    }

    def block(chosen: Ints, whose: Sequence[str]) -> Computed:
        outcomes = held.visits[chosen], held.seen[chosen], held.entry[chosen]
        return {
            by: {
                ("nll", None, None): float(nlls[by][chosen].mean()),
                ("c_td", None, None): concordance(
                    ranked[by].take(chosen), *outcomes, held.with_censored
                ),
            }
            for by in whose
        }

    metrics = [
        Metric(name, None, None, None, best, OWN, n=len(held))
        for name, best in (("nll", "lower"), ("c_td", "higher"))
    ]
    figures.add(metrics, block, baselines=fitted is not None)


def _nll(hazards: Floats, start: Ints, held: _Held) -> Floats:
    """``[B]``: the loss of each patient, of hazards at visits 0 to T."""
    hazards = hazards.clip(_EPS, 1 - _EPS)
    survived = np.concatenate([[0.0], -np.log1p(-hazards).cumsum()])
    at_end = start + held.visits
    last = np.where(held.seen, -np.log(hazards[at_end]), 0.0)
    if held.with_censored:
        last = np.where(held.seen, last, -np.log1p(-hazards[at_end]))
    return survived[at_end] - survived[start + held.entry] + last


def _add_landmarks(
    figures: Figures,
    read: dict[str, VisitValues],
    held: _Held,
    days: VisitValues,
    horizons: tuple[float, ...],
    landmarks: Sequence[float | str],
    train: TrainingOutcomes | None,
) -> None:
    model = read.get("risks", read.get("hazards"))
    assert model is not None
    if "risks" in read and model.values.shape[1:] != (len(horizons),):
        raise ValueError(
            f"horizons_days: expected one for each of {model.values.shape[-1]} risks, got "
            f"{len(horizons)}"
        )
    fitted = _fit_days(train, horizons)
    total = days.at(np.arange(len(held)), held.entry)  # from the entry visit
    since = np.repeat(total, days.lengths) - days.values
    since_entry = VisitValues("days_to_end", since, days.starts, days.lengths)
    for landmark in landmarks:
        if landmark == EVERY_VISIT:
            every = EveryVisit(days, held.entry, held.visits, held.seen, held.with_censored)
            add_landmark(figures, every, horizons, model, fitted)
            continue
        if isinstance(landmark, str) or not 0 <= landmark < math.inf:
            raise ValueError(
                f"landmarks_days: expected numbers from 0 or {EVERY_VISIT!r}, got {landmark!r}"
            )
        visits = last_visits(days, since_entry, np.full(len(held), float(landmark)))
        at = Landmark(float(landmark), visits, total - landmark, held.seen, held.with_censored)
        add_landmark(figures, at, horizons, model, fitted)


def _outcomes(
    values: VisitValues,
    event_times: ArrayLike | None,
    event_indicators: ArrayLike | None,
    entry_times: ArrayLike | None,
    censored_visit: str,
) -> _Held:
    with_censored = included(censored_visit)
    times, seen = read_outcomes(values, event_times, event_indicators)
    visits = read_visit_times(values, times)
    entry = read_entry_times(values, entry_times, visits)
    entry = np.zeros(len(visits), np.int64) if entry is None else entry
    if not len(visits):
        raise ValueError("event_times: expected at least one patient, got none")
    return _Held(visits, seen, entry, with_censored)


def _days(values: VisitValues, days_to_end: Any, lengths: ArrayLike | None) -> VisitValues:
    """Patient by patient, without padding."""
    days = read_values("days_to_end", days_to_end, lengths)
    if len(days) != len(values) or (days.lengths != values.lengths).any():
        raise ValueError("days_to_end: expected the visits of hazards and risks, got other lengths")
    of = np.repeat(np.arange(len(days)), days.lengths)
    starts = days.lengths.cumsum() - days.lengths
    visit = np.arange(len(of)) - starts[of]
    found = days.at(of, visit).astype(np.float64)
    wrong = ~((found >= 0) & (found < math.inf))
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"days_to_end: expected finite days from 0, got {found[first]:g} (patient "
            f"{of[first]}, visit {visit[first]}; {int(wrong.sum())} in all)"
        )
    return VisitValues("days_to_end", found, starts, days.lengths)


def _fit_visits(train: TrainingOutcomes | None, censored_visit: str) -> VisitBaselines | None:
    if train is None:
        return None
    return visit_baselines(
        train.event_times, train.event_indicators, train.entry_times, censored_visit=censored_visit
    )


def _fit_days(train: TrainingOutcomes | None, horizons: tuple[float, ...]) -> DayBaselines | None:
    if train is None or train.days_to_end is None:
        return None
    if train.lengths is None:
        raise TypeError("train.lengths: expected with days_to_end, got None")
    return day_baselines(
        train.days_to_end, train.event_indicators, train.lengths, horizons, train.entry_times
    )


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
