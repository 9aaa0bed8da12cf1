"""The report on held-out patients: ``report.md``, its plots and ``report.json``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..data import EventStore, FirstEvent, Outcomes
from ..data.tasks import IndexDates
from ..metrics import Evaluation, TrainingOutcomes
from ..metrics import evaluate as evaluate_predictions
from ..metrics.every_visit import EVERY_VISIT
from ..optional import need
from .data import censored_in_window, censored_visit
from .distributed import device_of
from .files import write_atomically, write_json
from .held_out import Overlap, overlap_of
from .plots import calibration_plot, hazard_plot, incidence_plot, learning_curve
from .run import Run
from .scoring import Scores, cautions, score_outcomes

# Of the events of the training split: as many must follow a landmark within the longest horizon.
_FEWEST_EVENTS = 20


@dataclass(frozen=True)
class Report:
    """What :func:`evaluate` has written.

    Attributes:
        folder: where ``report.md``, ``report.json`` and the plots are.
        evaluation: the figures.
        outcomes: the patients whom they are of.
        overlap: how many of them the run was trained or tuned on.
    """

    folder: Path
    evaluation: Evaluation
    outcomes: Outcomes
    overlap: Overlap

    def summary(self) -> str:
        """The figures as a table, where they are of patients who were not held out with a line that
        says so, and where the report is."""
        table = self.evaluation.table()
        if self.overlap.note:
            table = f"{_sentence(self.overlap.note)}\n\n{table}"
        return f"{table}\n\n{self.folder / 'report.md'}"


def evaluate(
    run: Run | str | Path,
    store: EventStore | str | Path,
    *,
    split: str = "held_out",
    out: str | Path | None = None,
    device: str = "auto",
    landmarks_days: Sequence[float | str] | None = None,
    n_bootstrap: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Evaluate a run on a split of a store, and write a report.

    Beside each figure stand those of a constant hazard and of a hazard that depends on the index of
    the visit alone, fitted on the training split. Where anybody who is evaluated was trained or
    tuned on, a warning and the report say how many, above the figures. What each figure means, its
    chance level and how ties and censoring count is in :mod:`ehrseq_fast.metrics`, which computes
    them.

    Args:
        run: a run that has ended, or its folder.
        store: the records, or their folder; not necessarily those of training.
        split: whom to evaluate on.
        out: the report's folder; ``RUN/report`` by default.
        device: as in :class:`RunConfig`.
        landmarks_days: days after the index at which risks are evaluated, or ``"every visit"`` for
            each visit, pooled; None: that, the index itself, and the first quartile and median of
            the times of events in training, as far as events follow them there
            (:func:`landmarks`).
        n_bootstrap: samples for the intervals; 0 for none.
        seed: of these samples.
        progress: show a progress bar, on a terminal.

    Raises:
        FileNotFoundError: no finished run, no store.
        ValueError: no such split, nobody in it, a task that the store does not have, or whose index
            dates stand by position and are those of another store's patients.
        ImportError: packages of the extras ``train`` and ``metrics`` are missing.
    """
    need("matplotlib", "train", "the plots of a report")
    need("sklearn", "metrics", "evaluating risks")
    run = run if isinstance(run, Run) else Run.open(run)
    store = store if isinstance(store, EventStore) else EventStore(store)
    task = FirstEvent.from_dict(run.config.task)
    if task.competing is not None:
        need("lifelines", "metrics", "evaluating competing outcomes")
    _refuse_dates_of_others(run, store, task)
    outcomes = task.apply(store, split=split)
    if not len(outcomes):
        raise ValueError(
            f"nobody of the split {split!r} of {store.path} has this task's outcome "
            f"or is at risk\n{outcomes.attrition}"
        )
    overlap = overlap_of(run, store, outcomes)
    told = cautions(run, store)
    for text in (overlap.note, "; ".join(told)):
        if text:
            warnings.warn(text, stacklevel=2)
    progress = progress and sys.stderr.isatty()
    scores = score_outcomes(run, store, outcomes, device_of(device), progress=progress)
    train, note = _training_outcomes(run, store, task)
    horizons = run.config.model.horizons_days
    if landmarks_days is None:
        landmarks_days = (EVERY_VISIT, *landmarks(train, max(horizons)))
    has_days = bool(np.isfinite(scores.days_to_end).all())
    causes = outcomes.causes
    evaluation = evaluate_predictions(
        scores.hazards,
        outcomes.event_times,
        None if causes else outcomes.event_indicators,
        event_types=outcomes.event_types,
        causes=causes or None,
        risks=scores.risks,
        horizons_days=horizons if has_days else None,
        days_to_end=scores.days_to_end if has_days else None,
        landmarks_days=landmarks_days,
        lengths=outcomes.n_visits,
        entry_times=outcomes.entry_times,
        train=train,
        censored_visit=censored_visit(outcomes),
        groups=outcomes.patients if len(np.unique(outcomes.patients)) < len(outcomes) else None,
        bootstrap=n_bootstrap,
        seed=seed,
        progress=progress,
    )
    folder = Path(out) if out is not None else run.folder.path / "report"
    folder.mkdir(parents=True, exist_ok=True)
    plots = _draw(folder, run, outcomes, scores, evaluation, _described_causes(task, store))
    notes = [*outcomes.warnings, *([note] if note else [])]
    in_window = censored_in_window(run.config.model, outcomes)
    notes += [*told, *([in_window] if in_window else [])]
    text = _markdown(run, store, split, task, outcomes, evaluation, plots, notes, overlap)
    write_atomically(folder / "report.md", text.encode())
    about = {
        "run": str(run.folder.path),
        "store": str(store.path),
        "store_sha256": store.header["content_sha256"],
        "split": split,
        **overlap.to_dict(),
        "task": run.config.task,
        "model": run.config.to_dict()["model"],
        "training": {k: run.result[k] for k in ("epochs", "best_epoch", "best_loss", "seconds")},
        "attrition": outcomes.attrition.to_dict(),
        "censored_by": dict(outcomes.censored_by),
        "notes": [*([overlap.note] if overlap.note else []), *notes],
    }
    write_json(folder / "report.json", about | evaluation.to_dict())
    return Report(folder, evaluation, outcomes, overlap)


def landmarks(train: TrainingOutcomes | None, longest: float) -> tuple[float, ...]:
    """Days after the index from which risks are worth evaluating, by the training split alone: 0,
    and the first quartile and the median of the times of its events, in whole years (months, below
    a year), where ``_FEWEST_EVENTS`` follow within the longest horizon; 0 where there are none.

    Example:
        >>> import numpy as np
        >>> from ehrseq_fast.metrics import TrainingOutcomes
        >>> late = TrainingOutcomes(np.zeros(50), np.ones(50), days_to_end=np.arange(50) + 3000.0,
        ...                         lengths=np.ones(50, np.int64))
        >>> landmarks(late, 365)
        (2920.0,)
    """
    if train is None or train.days_to_end is None:
        return (0.0,)
    lengths = np.asarray(train.lengths)
    first = np.cumsum(lengths) - lengths
    if train.entry_times is not None:
        first = first + np.asarray(train.entry_times)
    times = np.asarray(train.days_to_end)[first[np.asarray(train.event_indicators) != 0]]
    found: list[float] = []
    if not len(times):
        return (0.0,)
    for time in (0.0, *np.quantile(times, [0.25, 0.5]).tolist()):
        unit = 365.0 if time >= 365 else 30.0
        landmark = time // unit * unit
        follow = ((times > landmark) & (times <= landmark + longest)).sum()
        if follow >= _FEWEST_EVENTS and landmark not in found:
            found.append(landmark)
    return tuple(found) or (0.0,)


def _refuse_dates_of_others(run: Run, store: EventStore, task: FirstEvent) -> None:
    """Dates by position are those of the patients of the store of training, in its order."""
    by_position = isinstance(task.index, IndexDates) and task.index.subject_ids is None
    if by_position and store.header["content_sha256"] != run.result["store_sha256"]:
        raise ValueError(
            f"index: expected dates by subject id to evaluate on {store.path}, which is not the "
            "store of training, got one date for each patient of that store, by position: train "
            "with a mapping of subject ids to dates"
        )


def _training_outcomes(
    run: Run, store: EventStore, task: FirstEvent
) -> tuple[TrainingOutcomes | None, str]:
    """Of the run's training split, for the baselines; None and why, where its store is gone."""
    expected = run.result["store_sha256"]
    if store.header["content_sha256"] != expected:
        try:
            store = EventStore(run.result["store_path"])
        except (OSError, ValueError):
            store = None  # type: ignore[assignment]
        if store is None or store.header["content_sha256"] != expected:
            path = run.result["store_path"]
            return None, f"no baselines: the store of training is no longer at {path}"
    fitted = task.apply(store, split=run.config.data.train_split)
    days = fitted.days_to_end(store)
    known = bool(np.isfinite(days).all())
    return (
        TrainingOutcomes(
            fitted.event_times,
            fitted.event_indicators,
            fitted.entry_times,
            days_to_end=days if known else None,
            lengths=fitted.n_visits if known else None,
            event_types=fitted.event_types,
        ),
        "",
    )


def _draw(
    folder: Path,
    run: Run,
    outcomes: Outcomes,
    scores: Scores,
    evaluation: Evaluation,
    causes: tuple[str, ...],
) -> list[tuple[str, str]]:
    """Files of plots and their captions."""
    plots = [("learning_curve.png", "Loss per patient by epoch", learning_curve(run.history()))]
    if evaluation.incidences is not None and outcomes.each_visit:
        drawn = incidence_plot(replace(evaluation.incidences, causes=causes))
        caption = "Predicted and observed (Aalen–Johansen) cumulative incidence by visit"
        plots.append(("incidence.png", caption, drawn))
    elif scores.hazards is not None and outcomes.each_visit:
        drawn = hazard_plot(outcomes, scores.hazards)
        plots.append(("hazards.png", "Mean predicted hazard and share of events by visit", drawn))
    if evaluation.calibrations:
        drawn = calibration_plot(evaluation.calibrations)
        plots.append(("calibration.png", "Predicted and observed risk by horizon", drawn))
    for name, _, content in plots:
        write_atomically(folder / name, content)
    return [(name, caption) for name, caption, _ in plots]


def _markdown(
    run: Run,
    store: EventStore,
    split: str,
    task: FirstEvent,
    outcomes: Outcomes,
    evaluation: Evaluation,
    plots: list[tuple[str, str]],
    notes: list[str],
    overlap: Overlap,
) -> str:
    config, result = run.config, run.result
    titled = f"{task.name}{_described(task, store)}"
    events = int(outcomes.event_indicators.sum())
    ended = " (stopped early)" if result["stopped_early"] else ""
    best = result["best_epoch"]
    parts = [
        f"# First event: {' or '.join(_described_causes(task, store)) or titled}",
        f"Model `{config.model.name}` ({config.model.cell}, width {config.model.hidden_dim}), "
        f"trained on {result['patients']['train']:,} patients with "
        f"{result['events']['train']:,} events for {result['epochs']} epochs{ended} in "
        f"{result['seconds']:.0f} s"
        + ("." if best is None else f"; weights of epoch {best}, of the lowest tuning loss."),
        f"Evaluated on {len(outcomes):,} {'patients' if outcomes.each_visit else 'predictions'} "
        f"with {events:,} events{_by_cause(outcomes)} of the split `{split}` of "
        f"`{store.path.name}`.",
        *([f"> **{_sentence(overlap.note)}**"] if overlap.note else []),
        "## Figures" if overlap.held_out is not False else "## Figures (not held out)",
        *_tables(evaluation),
        _reading(outcomes),
        "## Study population",
        outcomes.attrition.to_markdown(),
    ]
    if outcomes.censored_by:
        ends = ", ".join(f"{number:,} by {what}" for what, number in outcomes.censored_by.items())
        parts.append(f"Censored: {ends}.")
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    parts.append("## Plots")
    parts += [f"![{caption}]({name})\n\n{caption}." for name, caption in plots]
    versions = ", ".join(f"{name} {number}" for name, number in evaluation.versions.items())
    parts += ["## Computed with", f"{versions}."]
    return "\n\n".join(parts) + "\n"


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}."


def _tables(evaluation: Evaluation) -> list[str]:
    """A table of what concerns all visits, and one for each landmark."""
    parts = []
    for landmark in dict.fromkeys(metric.landmark_days for metric in evaluation.metrics):
        if landmark is not None:
            place = landmark if isinstance(landmark, str) else f"{landmark:g} days after the index"
            parts.append(f"### Risks from {place}")
        of_it = tuple(m for m in evaluation.metrics if m.landmark_days == landmark)
        parts.append(replace(evaluation, metrics=of_it).table())
    return parts


def _described_causes(task: FirstEvent, store: EventStore) -> tuple[str, ...]:
    """The names of competing outcomes, with what they are where they are one code each."""
    if task.competing is None:
        return ()
    of_codes = {task.name: task} | {
        name: FirstEvent(codes) for name, codes in task.competing if name != "death"
    }
    return tuple(
        f"{name}{_described(of_codes[name], store)}" if name in of_codes else name
        for name in task.causes
    )


def _by_cause(outcomes: Outcomes) -> str:
    """In brackets how many events are of each of competing outcomes."""
    said = ", ".join(f"{number:,} {cause}" for cause, number in outcomes.events_by_cause().items())
    return f" ({said})" if said else ""


def _described(task: FirstEvent, store: EventStore) -> str:
    """In brackets what the outcome is, where it is one code of which the store knows that."""
    if task.is_death or task.prefix or not isinstance(task.codes, tuple) or len(task.codes) > 1:
        return ""
    at = store.code_index.get(str(task.codes[0]))
    description = "" if at is None else store.descriptions[at]
    return f" ({description})" if description else ""


def _reading(outcomes: Outcomes) -> str:
    said = [
        "Negative log-likelihood: of the hazard per visit, a mean over patients; lower is better, "
        "and it must lie below both baselines.",
        "C_td: at the visit before an event, how often the patient who has it had the higher "
        "hazard than one who is still at risk; chance is 0.5, also for a hazard by visit alone.",
        "AUC, Brier score, calibration, day s + w: of patients still at risk s days after the "
        "index, the risk within the next w days, from their last visit by then; at every visit + "
        "w: from each visit, pooled. Chance is 0.5 for the AUC. Weights by the inverse probability "
        "of censoring make up for those whose outcome is not known. The s were chosen by the times "
        "of events in training.",
        "ICI: the mean distance between predicted and observed risk; observed / expected is 1 for "
        "a model that is right on average.",
    ]
    if outcomes.causes:
        said[0] = said[0].replace("the hazard per visit", "the hazards of all outcomes per visit")
        said += [
            "Of competing outcomes each has its own hazard and figures; who has another one is no "
            "longer at risk. AUC, day s + w: those with the outcome within w days against all "
            "others, by its hazard at their last visit.",
            "Cumulative incidence: the largest difference, over visits at which 10 patients or "
            "more are at risk, of that which the mean predicted hazards of those at risk give from "
            "the Aalen–Johansen estimate. It is above 0 for a perfect model too.",
        ]
    if not outcomes.each_visit:
        said[0] += " There is one prediction for each row, and the hazard is its risk."
    return "\n".join(f"- {line}" for line in said)
