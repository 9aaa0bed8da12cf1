"""One training step of the survival model, computed in the three ways that the model offers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ehrseq_fast import use_backend
from ehrseq_fast.data import PaddedBatch
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
from ehrseq_fast.survival_nll import DiscreteTimeSurvivalLoss

PATHS = ("padded", "packed", "fused")

# The packed path is the one to compare with: in float32 its gradients stand within 3e-6 of those in
# float64. The padded path's nn.LSTM runs in oneDNN, whose tanh and sigmoid are approximations; on
# batches of 256 patients its gradients stand as far as 2e-4 from those in float64.
EXPECTED = "packed"
LOSS_RTOL = 1e-5
GRADIENT_RTOL = {"padded": 1e-3, "packed": 0.0, "fused": 2e-5}


@dataclass(frozen=True)
class ModelSize:
    vocabulary: int
    embedding_dim: int = 128
    hidden_dim: int = 256


class TrainingStep:
    """Forward, loss, backward and Adam on one path; call it with a batch.

    The plain paths also take the plain PyTorch loss, as code without this package would. Dropout is
    off, so that the paths can be compared.
    """

    def __init__(self, path: str, size: ModelSize, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.path = path
        self.model = DiscreteTimeSurvivalLSTM(
            size.vocabulary, size.embedding_dim, size.hidden_dim, dropout=0.0, path=path
        )
        self.loss = DiscreteTimeSurvivalLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def _backends(self) -> AbstractContextManager[None]:
        return nullcontext() if self.path == "fused" else use_backend("reference")

    def backward(self, batch: PaddedBatch) -> Tensor:
        """Forward and backward; the gradients are left on the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._backends():
            hazards = self.model(batch.visit_codes, batch.visit_mask, batch.sequence_mask)
            loss = self.loss(
                hazards, batch.event_times, batch.event_indicators, batch.sequence_mask
            )
            loss.backward()
        return loss.detach()

    def __call__(self, batch: PaddedBatch) -> None:
        self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Equality:
    """The paths' losses, and the greatest relative difference of a gradient from packed's."""

    losses: dict[str, float]
    gradient_difference: dict[str, float]


def check_equal(steps: dict[str, TrainingStep], batch: PaddedBatch) -> Equality:
    """Compare the paths' losses and gradients with those of ``"packed"``, from the same weights.

    A gradient's difference is that of its greatest entry, over the greatest entry of the gradient.

    Raises:
        AssertionError: where they differ by more than ``LOSS_RTOL`` or ``GRADIENT_RTOL``.
    """
    losses = {path: float(step.backward(batch)) for path, step in steps.items()}
    expected = dict(steps[EXPECTED].model.named_parameters())
    differences = {
        path: max(
            _relative_difference(parameter.grad, expected[name].grad)
            for name, parameter in step.model.named_parameters()
        )
        for path, step in steps.items()
    }
    for path in steps:
        if not abs(losses[path] - losses[EXPECTED]) <= LOSS_RTOL * abs(losses[EXPECTED]):
            raise AssertionError(f"the {path} path's loss differs from {EXPECTED}'s: {losses}")
        if not differences[path] <= GRADIENT_RTOL[path]:
            raise AssertionError(
                f"the {path} path's gradients differ from {EXPECTED}'s: relative differences "
                f"{differences}, allowed {GRADIENT_RTOL}"
            )
    return Equality(losses, differences)


def _relative_difference(actual: Tensor | None, expected: Tensor | None) -> float:
    if actual is None or expected is None:
        raise AssertionError("a parameter has no gradient")
    return float((actual - expected).abs().max() / expected.abs().max())
