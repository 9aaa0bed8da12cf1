"""All metrics of a model on held-out patients at once, with both baselines and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from ..arrays import ArrayLike, integer, longs
from ..models.intervals import boundaries
from .at_landmarks import Landmark, add_landmark
from .baselines import DayBaselines, VisitBaselines, day_baselines, visit_baselines
from .causes import CauseBaselines, cause_baselines, cause_day_baselines
from .competing import add_cause_metrics
from .dynamic import concordance
from .every_visit import EVERY_VISIT, EveryVisit
from .figures import Computed, Figures
from .held import Held, TrainingOutcomes, read_days, read_held
from .incidence import FEWEST, Patients, cause_names, curves
from .landmark import last_visits
from .report import OWN, Evaluation, Metric
from .values import Floats, Ints, VisitValues, read_values

_EPS = 1e-7  # hazards are clamped as in the losses


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
    event_types: ArrayLike | None = None,
    causes: Sequence[str] | None = None,
    train: TrainingOutcomes | None = None,
    censored_visit: str = "excluded",
    groups: ArrayLike | None = None,
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

    Of competing events (``event_types`` or ``causes``) hazards and risks have a further dimension
    K, and the figures are those of each cause: C_td of the cause-specific hazard, events observed /
    expected, how far the predicted cumulative incidence is from the Aalen–Johansen estimate
    (:func:`~ehrseq_fast.metrics.incidence_curves`), and at landmarks AUC, Brier score and
    calibration of the cause's cumulative incidence within a horizon. The negative log-likelihood is
    that of ``competing_risks_nll(link="softmax")``, with the hazards as the probabilities of its
    classes 1 to K. The baselines are hazards of each cause.

    Args:
        hazards: the hazard at each visit: ``[B, V]`` padded, ``[n_visits]`` patient by patient with
            ``lengths``, :class:`~ehrseq_fast.PackedRows` or a list of them; of competing events
            with a last dimension K, and a sum of at most 1. Or None.
        event_times: ``[B]``, the visit of event or censoring, counted from 0.
        event_indicators: ``[B]``, 1 event seen, 0 censored; None with competing events.
        risks: the risk within each horizon at each visit, the same with a last dimension J (of
            competing events J, K: cumulative incidences); None for a model without.
        horizons_days: J horizons; needed with ``risks`` or ``days_to_end``.
        days_to_end: at each visit, the days to the event or the end of observation, in the layout
            of ``hazards``, not rising from visit to visit; without it there are no figures at
            landmarks.
        landmarks_days: s of the landmarks; ``"every visit"`` for each visit as a landmark of its
            own, pooled (:mod:`ehrseq_fast.metrics.every_visit`).
        lengths: ``[B]``, visits of each patient.
        entry_times: ``[B]``, the first visit at risk.
        event_types: ``[B]``, 0 censored, 1 to K the cause of the event; with ``causes`` and packed
            rows their batches' by default.
        causes: K names; by default ``"cause 1"``, ...
        train: the training patients' outcomes, for the baselines; without them they are missing.
        censored_visit: what the time of a censoring says.
        groups: ``[B]``, integers: whose each row is, where several rows (predictions of several
            dates, say) are of one person. Persons are then resampled with all of their rows, as
            intervals of rows that are taken for independent are too narrow. None: a row is a
            patient.
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
    competing = int(event_types is not None or causes is not None)
    if competing and event_indicators is not None:
        raise TypeError("event_indicators: expected None with event_types, which say it")
    given = (("hazards", hazards, competing), ("risks", risks, 1 + competing))
    read = {
        name: read_values(name, x, lengths, trailing=trailing)
        for name, x, trailing in given
        if x is not None
    }
    if not read:
        raise TypeError("hazards and risks: expected at least one of them, got None")
    values = next(iter(read.values()))
    if any((other.lengths != values.lengths).any() for other in read.values()):
        raise ValueError("risks: expected the visits of hazards, got other lengths")
    n_causes = values.values.shape[-1] if competing else None
    names = cause_names(causes, n_causes) if n_causes is not None else ()
    held = read_held(
        values, event_times, event_indicators, event_types, entry_times, censored_visit, n_causes
    )
    bootstrap = integer("bootstrap", bootstrap, 0, 10**6)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    figures = Figures(len(held), None if groups is None else _read_groups(groups, len(held)))
    incidences = None
    if "hazards" in read and held.types is not None:
        patients = Patients.of(
            read["hazards"], held.visits, held.types, held.entry, held.with_censored
        )
        span: tuple[int, int] | str
        try:
            span = patients.span(FEWEST)
        except ValueError as error:  # too few patients
            span = str(error)
        fitted = _fit_causes(train, len(names), censored_visit)
        add_cause_metrics(figures, patients, names, span, fitted)
        incidences = None if isinstance(span, str) else curves(patients, names, span)
    elif "hazards" in read:
        _add_visit_metrics(figures, read["hazards"], held, _fit_visits(train, censored_visit))
    if days_to_end is not None or "risks" in read:
        if horizons_days is None or days_to_end is None:
            missing = "horizons_days" if horizons_days is None else "days_to_end"
            raise TypeError(f"{missing}: expected with risks or landmarks in days, got None")
        horizons = boundaries(horizons_days)
        days = read_days(values, days_to_end, lengths)
        _add_landmarks(figures, read, held, days, horizons, landmarks_days, train, names)
    if bootstrap:
        figures.add_intervals(bootstrap, level, seed, progress)
    return Evaluation(
        patients=len(held),
        events=int(held.seen.sum()),
        censored_visit=censored_visit,
        metrics=tuple(figures.metrics),
        calibrations={
            at if competing else at[:2]: curve for at, curve in figures.calibrations.items()
        },
        bootstrap={"samples": bootstrap, "level": level, "seed": seed} if bootstrap else {},
        versions=_versions("ehrseq_fast", "numpy", "scikit-learn", *["lifelines"] * competing),
        causes=names,
        incidences=incidences,
    )


def _read_groups(groups: ArrayLike, n: int) -> Ints:
    found = longs("groups", groups)
    if found.shape != (n,):
        raise ValueError(f"groups: expected one per row, [{n}], got {list(found.shape)}")
    return found


def _add_visit_metrics(
    figures: Figures, hazards: VisitValues, held: Held, fitted: VisitBaselines | None
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
                ("nll", None, None, None): float(nlls[by][chosen].mean()),
                ("c_td", None, None, None): concordance(
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


def _nll(hazards: Floats, start: Ints, held: Held) -> Floats:
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
    held: Held,
    days: VisitValues,
    horizons: tuple[float, ...],
    landmarks: Sequence[float | str],
    train: TrainingOutcomes | None,
    causes: tuple[str, ...],
) -> None:
    model = read.get("risks", read.get("hazards"))
    assert model is not None
    if "risks" in read and model.values.shape[1] != len(horizons):
        raise ValueError(
            f"horizons_days: expected one for each of {model.values.shape[1]} risks, got "
            f"{len(horizons)}"
        )
    fitted = _fit_days(train, horizons, len(causes))
    total = days.at(np.arange(len(held)), held.entry)  # from the entry visit
    since = np.repeat(total, days.lengths) - days.values
    since_entry = VisitValues("days_to_end", since, days.starts, days.lengths)
    for landmark in landmarks:
        every = landmark == EVERY_VISIT
        if not every and (isinstance(landmark, str) or not 0 <= landmark < math.inf):
            raise ValueError(
                f"landmarks_days: expected numbers from 0 or {EVERY_VISIT!r}, got {landmark!r}"
            )
        visits = held.visits
        if not every:
            visits = last_visits(since_entry, np.full(len(held), float(landmark)))
        for k, cause in enumerate(causes or (None,)):
            seen, others, values = held.seen, None, model
            if held.types is not None:
                seen, values = held.types == k + 1, model.column(k)
                others = held.seen & ~seen
            at: Landmark | EveryVisit
            if every:
                at = EveryVisit(days, held.entry, visits, seen, held.with_censored, others)
            else:
                start = float(landmark)
                at = Landmark(start, visits, total - start, seen, held.with_censored, others)
            by_cause = None if fitted is None else fitted[k]
            add_landmark(figures, at, horizons, values, by_cause, cause)


def _fit_visits(train: TrainingOutcomes | None, censored_visit: str) -> VisitBaselines | None:
    if train is None:
        return None
    return visit_baselines(
        train.event_times, _indicators(train), train.entry_times, censored_visit=censored_visit
    )


def _fit_causes(
    train: TrainingOutcomes | None, n_causes: int, censored_visit: str
) -> CauseBaselines | None:
    if train is None:
        return None
    if train.event_types is None:
        raise TypeError("train.event_types: expected with competing events, got None")
    return cause_baselines(
        train.event_times,
        train.event_types,
        n_causes,
        train.entry_times,
        censored_visit=censored_visit,
    )


def _fit_days(
    train: TrainingOutcomes | None, horizons: tuple[float, ...], n_causes: int
) -> tuple[DayBaselines, ...] | None:
    """Of each cause, or of the event."""
    if train is None or train.days_to_end is None:
        return None
    if train.lengths is None:
        raise TypeError("train.lengths: expected with days_to_end, got None")
    days, lengths, entry = train.days_to_end, train.lengths, train.entry_times
    if not n_causes:
        return (day_baselines(days, _indicators(train), lengths, horizons, entry),)
    if train.event_types is None:
        raise TypeError("train.event_types: expected with competing events, got None")
    return cause_day_baselines(days, train.event_types, n_causes, lengths, horizons, entry)


def _indicators(train: TrainingOutcomes) -> ArrayLike:
    if train.event_indicators is None:
        raise TypeError("train.event_indicators: expected one per patient, got None")
    return train.event_indicators


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
