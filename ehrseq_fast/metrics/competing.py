"""The part of an evaluation that is about cause-specific hazards per visit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .causes import CauseBaselines
from .dynamic import concordance
from .figures import Computed, Figures
from .incidence import LIFELINES, Patients, aalen_johansen
from .report import OWN, Metric
from .values import Floats, Ints, VisitValues

_EPS = 1e-7  # hazards are clamped as in the losses
_OF_CAUSES = (
    ("c_td", "higher", OWN),
    ("observed/expected", "1", OWN),
    ("incidence", "lower", LIFELINES),
)


def add_cause_metrics(
    figures: Figures,
    patients: Patients,
    causes: tuple[str, ...],
    span: tuple[int, int] | str,
    fitted: CauseBaselines | None,
) -> None:
    """The loss of all causes; of each C_td, observed / expected events, and how far the predicted
    cumulative incidence is from that of Aalen and Johansen within ``span``, or why there is none.
    """
    visit = np.arange(len(patients.hazards)) - np.repeat(patients.starts, patients.visits + 1)
    hazards = {"model": patients.hazards}
    if fitted is not None:
        hazards["constant"] = np.broadcast_to(fitted.constant, patients.hazards.shape)
        hazards["by_visit"] = fitted.hazards(visit)
    nlls = {whose: _nll(values, patients) for whose, values in hazards.items()}
    sizes = patients.visits + 1

    def block(chosen: Ints, whose: Sequence[str]) -> Computed:
        of = patients.take(chosen)
        rows, _ = of.rows_at_risk()
        observed = None if isinstance(span, str) else aalen_johansen(of, span)
        computed: Computed = {by: {} for by in whose}
        for by, values in computed.items():
            values["nll", None, None, None] = float(nlls[by][chosen].mean())
            expected = hazards[by][rows].sum(0)
            gaps: Floats | None = None
            if observed is not None and not isinstance(span, str):
                gaps = np.abs(of.predicted(hazards[by], span)[0] - observed).max(0)
            for k, cause in enumerate(causes):
                of_cause = of.types == k + 1
                column = VisitValues("hazards", hazards[by][:, k], of.starts, sizes[chosen])
                values["c_td", None, None, cause] = concordance(
                    column,
                    of.visits,
                    of_cause,
                    of.entry,
                    of.with_censored,
                    (of.types > 0) & ~of_cause,
                )
                values["observed/expected", None, None, cause] = (
                    float(of_cause.sum() / expected[k])
                    if expected[k] > 0
                    else "every predicted hazard is 0"
                )
                values["incidence", None, None, cause] = (
                    str(span) if gaps is None else float(gaps[k])
                )
        return computed

    metrics = [Metric("nll", None, None, None, "lower", OWN, n=figures.patients)]
    metrics += [
        Metric(name, None, None, None, best, library, n=figures.patients, cause=cause)
        for cause in causes
        for name, best, library in _OF_CAUSES
    ]
    figures.add(metrics, block, baselines=fitted is not None)


def _nll(hazards: Floats, patients: Patients) -> Floats:
    """``[B]``: ``−Σ log(1 − Σ_k h_k) − log h_type``, of hazards at visits 0 to T."""
    log_survival = np.log1p(-hazards.sum(1).clip(0, 1 - _EPS))
    before = np.concatenate([[0.0], -log_survival.cumsum()])
    at_end = patients.starts + patients.visits
    of_cause = hazards[at_end, np.maximum(patients.types - 1, 0)]
    survived = -log_survival[at_end] if patients.with_censored else 0.0
    last = np.where(patients.types > 0, -np.log(of_cause.clip(_EPS, 1)), survived)
    return before[at_end] - before[patients.starts + patients.entry] + last
