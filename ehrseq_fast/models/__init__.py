"""Models that take the place of their namesakes in the ``ehrsequencing`` package, and
:class:`ModelWithLoss` to train them."""

from .competing_risks import CompetingRisksSurvivalLSTM
from .horizon_lstm import HorizonSurvivalLSTM
from .lstm_baseline import LSTMBaseline, VisitEncoder, create_lstm_baseline
from .survival_lstm import DiscreteTimeSurvivalLSTM, DiscreteTimeSurvivalLSTMWithTime
from .with_loss import ModelWithLoss

__all__ = [
    "CompetingRisksSurvivalLSTM",
    "DiscreteTimeSurvivalLSTM",
    "DiscreteTimeSurvivalLSTMWithTime",
    "HorizonSurvivalLSTM",
    "LSTMBaseline",
    "ModelWithLoss",
    "VisitEncoder",
    "create_lstm_baseline",
]
