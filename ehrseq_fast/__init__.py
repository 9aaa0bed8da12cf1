"""EHR sequence models that cost what their real codes cost.

The functions of this module are operations on tensors and packed batches: visit pooling (codes →
visit vectors), recurrent layers (visit vectors → hidden states) and survival losses; ``__all__``
lists them. Models are in :mod:`ehrseq_fast.models`, data in :mod:`ehrseq_fast.data`, what hazards
predict in :mod:`ehrseq_fast.predictions`, and its evaluation in :mod:`ehrseq_fast.metrics`.
:func:`warmup` compiles GPU kernels ahead of the first training step.
"""

from typing import Any

from . import backend, operations
from .backend import use_backend
from .batch import PackedVisits
from .deephit_ranking import (
    DeepHitLoss,
    DeepHitRankingLoss,
    deephit_competing_ranking_loss,
    deephit_ranking_loss,
)
from .dropin import accelerate, restore
from .fixed_horizon import fixed_horizon_bce, fixed_horizon_labels
from .next_codes import NextCodesLoss, next_codes_bce
from .packed_gru import PackedGRU, packed_gru
from .packed_lstm import PackedLSTM, packed_lstm
from .piecewise_hazard import PiecewiseHazardLoss, piecewise_hazard_nll
from .pmf_nll import PMFCompetingRisksLoss, PMFLoss, pmf_competing_risks_nll, pmf_nll
from .predictions import cumulative_incidence
from .rows import PackedRows
from .survival_nll import (
    CompetingRisksSurvivalLoss,
    DiscreteTimeSurvivalLoss,
    competing_risks_nll,
    discrete_time_survival_nll,
    packed_competing_risks_nll,
    packed_survival_nll,
)
from .visit_cross_entropy import VisitCrossEntropyLoss, visit_cross_entropy
from .visit_pool import masked_pool, packed_visit_pool, visit_mean_pool
from .visit_pool.module import VisitPool
from .warmup import warmup

__all__ = [
    "CompetingRisksSurvivalLoss",
    "DeepHitLoss",
    "DeepHitRankingLoss",
    "DiscreteTimeSurvivalLoss",
    "NextCodesLoss",
    "PMFCompetingRisksLoss",
    "PMFLoss",
    "PackedGRU",
    "PackedLSTM",
    "PackedRows",
    "PackedVisits",
    "PiecewiseHazardLoss",
    "VisitCrossEntropyLoss",
    "VisitPool",
    "accelerate",
    "competing_risks_nll",
    "cumulative_incidence",
    "deephit_competing_ranking_loss",
    "deephit_ranking_loss",
    "discrete_time_survival_nll",
    "fixed_horizon_bce",
    "fixed_horizon_labels",
    "masked_pool",
    "next_codes_bce",
    "packed_competing_risks_nll",
    "packed_gru",
    "packed_lstm",
    "packed_survival_nll",
    "packed_visit_pool",
    "piecewise_hazard_nll",
    "pmf_competing_risks_nll",
    "pmf_nll",
    "restore",
    "use_backend",
    "visit_cross_entropy",
    "visit_mean_pool",
    "warmup",
]

operations.import_all()  # those too that only models call
backend.load_triton_kernels()

_SUBMODULES = ("data", "exporting", "losses", "metrics", "models", "predictions")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES]
