"""Models that take the place of their namesakes in the ``ehrsequencing`` package."""

from .competing_risks import CompetingRisksSurvivalLSTM
from .lstm_baseline import LSTMBaseline, VisitEncoder, create_lstm_baseline
from .survival_lstm import DiscreteTimeSurvivalLSTM, DiscreteTimeSurvivalLSTMWithTime

__all__ = [
    "CompetingRisksSurvivalLSTM",
    "DiscreteTimeSurvivalLSTM",
    "DiscreteTimeSurvivalLSTMWithTime",
    "LSTMBaseline",
    "VisitEncoder",
    "create_lstm_baseline",
]
