"""Models that take the place of their namesakes in the ``ehrsequencing`` package, and
:class:`ModelWithLoss` to train them."""

from typing import Any

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

# which ehrsequencing.models has too; loaded when asked for, as losses imports from this package
_LOSSES = (
    "DiscreteTimeSurvivalLoss",
    "HybridSurvivalLoss",
    "PairwiseRankingLoss",
    "concordance_index",
)


def __getattr__(name: str) -> Any:
    if name in _LOSSES:
        from . import losses

        return getattr(losses, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOSSES})
