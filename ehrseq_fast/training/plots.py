"""The plots of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import Outcomes
from ..metrics import Calibration, IncidenceCurves
from ..metrics.incidence import FEWEST
from ..optional import need

_FEWEST = 10  # patients at risk at a visit that is drawn
_FEWEST_EVENTS = 5  # that a calibration curve is drawn of
_SIZE = 3.6  # inches of one panel


def learning_curve(history: Sequence[Mapping[str, Any]]) -> bytes:
    """The loss of the training and the tuning split by epoch, from the rows of ``log.csv``."""
    figure, axes = _figure(1, 1)
    axes = axes[0][0]
    for split, label, style in (("train", "training", "C0o-"), ("tuning", "tuning", "C1o-")):
        rows = [row for row in history if row["split"] == split and row["over"] == "epoch"]
        if rows:
            losses = [row["loss"] for row in rows]
            axes.plot([row["epoch"] for row in rows], losses, style, markersize=3, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel="loss per patient")
    axes.legend(frameon=False)
    return _png(figure)


def hazard_plot(outcomes: Outcomes, hazards: NDArray[np.floating[Any]]) -> bytes:
    """Mean predicted hazard and share of events among those at risk, by visit.

    Args:
        outcomes: of the patients.
        hazards: ``[sum(n_visits)]``, one patient after the other.
    """
    row = np.repeat(np.arange(len(outcomes)), outcomes.n_visits)
    starts = np.cumsum(outcomes.n_visits) - outcomes.n_visits
    visit = np.arange(len(row)) - starts[row]
    seen = outcomes.event_indicators[row] != 0
    is_last = visit == outcomes.event_times[row]
    at_risk = (visit >= outcomes.entry_times[row]) & (
        (visit < outcomes.event_times[row]) | (is_last & seen)
    )
    counts = np.bincount(visit[at_risk])
    events = np.bincount(visit[at_risk & is_last], minlength=len(counts))
    predicted = np.bincount(visit[at_risk], hazards[at_risk].astype(np.float64))
    shown = np.flatnonzero(counts >= _FEWEST)
    figure, axes = _figure(1, 1)
    axes = axes[0][0]
    if len(shown):
        observed = events[shown] / counts[shown]
        spread = 1.96 * np.sqrt(observed * (1 - observed) / counts[shown])
        low, high = np.maximum(observed - spread, 0), observed + spread
        axes.fill_between(shown + 1, low, high, color="C1", alpha=0.2, linewidth=0)
        axes.plot(shown + 1, observed, "C1.-", label="events / at risk (95 %)", linewidth=1)
        axes.plot(shown + 1, predicted[shown] / counts[shown], "C0", label="predicted, mean")
        axes.legend(frameon=False)
    axes.set(xlabel=f"visit (of {_FEWEST} patients or more)", ylabel="hazard")
    axes.set_ylim(bottom=0)
    return _png(figure)


def incidence_plot(curves: IncidenceCurves) -> bytes:
    """Predicted and observed cumulative incidence of each of competing outcomes, by visit."""
    figure, axes = _figure(1, 1, width=1.6)
    curves.plot(axes[0][0])
    axes[0][0].set_xlabel(f"visit (of {FEWEST} patients at risk or more)")
    return _png(figure)


def calibration_plot(calibrations: Mapping[tuple[float | str, float], Calibration]) -> bytes:
    """A panel for each horizon, a row of them for each landmark."""
    landmarks = list(dict.fromkeys(landmark for landmark, _ in calibrations))
    horizons = sorted({horizon for _, horizon in calibrations})
    figure, axes = _figure(len(landmarks), len(horizons))
    for i, landmark in enumerate(landmarks):
        for j, horizon in enumerate(horizons):
            panel = axes[i][j]
            found = calibrations.get((landmark, horizon))
            if found is None:
                panel.set_axis_off()
                continue
            if found.mean_observed * found.n < _FEWEST_EVENTS:
                panel.text(0.5, 0.5, f"fewer than {_FEWEST_EVENTS} events", ha="center")
                panel.set(xticks=[], yticks=[])
            else:
                found.plot(panel)
            place = landmark if isinstance(landmark, str) else f"day {landmark:g}"
            title = f"{place} + {horizon:g}: ICI {found.ici:.3f}, n {found.n:,}"
            panel.set_title(title, fontsize=9)
    return _png(figure)


def _figure(rows: int, columns: int, width: float = 1.0) -> tuple[Any, Any]:
    figures = need("matplotlib.figure", "train", "the plots of a report")
    size = (_SIZE * columns * width + 0.6, _SIZE * rows)
    figure = figures.Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
