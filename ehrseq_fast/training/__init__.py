"""Training, evaluation and prediction of survival models on a store's patients.

:func:`fit` is what ``ehrseq-fast train`` calls, :func:`evaluate` and :func:`predict` likewise.
"""

from .config import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StoppingConfig,
)
from .fit import fit
from .report import Report, evaluate
from .run import Run
from .scoring import predict

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Report",
    "Run",
    "RunConfig",
    "ScheduleConfig",
    "StoppingConfig",
    "evaluate",
    "fit",
    "predict",
]
