"""How good predicted risks are: ranking at each visit, landmarks, calibration, baselines.

The headline of per-visit hazards is :func:`concordance_td`, whose chance level is 0.5. Each
docstring says what a metric means, its chance level, its conventions about ties and censoring and
what computes it. ``docs/evaluate.md`` is the guide.
"""

from ..predictions import cumulative_incidence
from .baselines import DayBaselines, VisitBaselines, day_baselines, visit_baselines
from .calibration import Calibration, calibration
from .causes import CauseBaselines, cause_baselines, cause_day_baselines
from .dynamic import concordance_td
from .evaluation import evaluate
from .harrell import concordance_index
from .held import TrainingOutcomes
from .incidence import IncidenceCurves, incidence_curves
from .landmark import brier, integrated_brier, landmark_auc
from .report import Evaluation, Metric

__all__ = [
    "Calibration",
    "CauseBaselines",
    "DayBaselines",
    "Evaluation",
    "IncidenceCurves",
    "Metric",
    "TrainingOutcomes",
    "VisitBaselines",
    "brier",
    "calibration",
    "cause_baselines",
    "cause_day_baselines",
    "concordance_index",
    "concordance_td",
    "cumulative_incidence",
    "day_baselines",
    "evaluate",
    "incidence_curves",
    "integrated_brier",
    "landmark_auc",
    "visit_baselines",
]
