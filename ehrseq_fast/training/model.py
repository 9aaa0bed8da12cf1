"""The models that a run can train, by the names of its configuration, and where they start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..arrays import ArrayLike
from ..batch import PackedVisits
from ..models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    HorizonSurvivalLSTM,
)
from .config import ModelConfig


def make_model(config: ModelConfig, vocab_size: int, n_causes: int = 0) -> nn.Module:
    """The model of a configuration, with new weights from torch's generator; ``n_causes`` for
    competing outcomes.

    Example:
        >>> from ehrseq_fast.training import ModelConfig
        >>> from ehrseq_fast.training.model import make_model
        >>> type(make_model(ModelConfig("hazard", hidden_dim=8), vocab_size=10)).__name__
        'DiscreteTimeSurvivalLSTM'
    """
    shape = (config.embedding_dim, config.hidden_dim, config.num_layers, config.dropout)
    if config.name == "hazard":
        return DiscreteTimeSurvivalLSTM(vocab_size, *shape, cell=config.cell)
    if config.name == "hazard_with_time":
        return DiscreteTimeSurvivalLSTMWithTime(vocab_size, *shape, cell=config.cell)
    if config.has_causes:
        return CompetingRisksSurvivalLSTM(
            vocab_size, n_causes, *shape, cell=config.cell, link="softmax"
        )
    return HorizonSurvivalLSTM(
        vocab_size, config.horizons_days, *shape, visit_hazard=config.has_hazard, cell=config.cell
    )


@torch.no_grad()
def start_at_rates(model: Any, hazard: ArrayLike | None, horizons: ArrayLike | None) -> None:
    """Let the heads' last biases say the observed hazards, from which training then starts.

    Args:
        model: of :func:`make_model`.
        hazard: events per visit at risk, for a model with a hazard per visit; of competing outcomes
            K of them.
        horizons: the hazard of each interval of days, for a model with horizons.
    """
    if isinstance(model, HorizonSurvivalLSTM):
        assert horizons is not None
        intervals = torch.as_tensor(horizons, dtype=torch.float64)
        model.set_base_hazards(intervals, hazard if model.visit_hazard else None)
        return
    assert hazard is not None
    if isinstance(model, CompetingRisksSurvivalLSTM):
        model.set_base_hazards(hazard)
        return
    model.hazard_head[3].bias.fill_(torch.tensor(hazard, dtype=torch.float64).logit().item())


@torch.no_grad()
def predictions(model: Any, batch: PackedVisits) -> tuple[Tensor | None, Tensor | None]:
    """The hazard ``[n_visits]`` (of competing outcomes ``[n_visits, K]``) and the risks by horizon
    ``[n_visits, J]`` of a batch's rows; None for what the model does not give."""
    if not isinstance(model, HorizonSurvivalLSTM):
        return model(batch).values, None
    found = model(batch, output="risks")
    if isinstance(found, dict):
        return found["visit"].values, found["horizons"].values
    return None, found.values


def loss_options(batch: PackedVisits) -> dict[str, Any]:
    """What a model's ``loss`` is told of a batch besides its outcomes."""
    entry = batch.targets.get("entry_times")
    return {} if entry is None else {"entry_times": entry}
