"""One training step of the survival model, in the ways that the model offers.

``padded`` and ``packed`` are plain PyTorch on padded tensors: masked-unpacked, and packed around
the LSTM. ``fused from padded`` is this package as a drop-in for them, which packs the tensors at
the door; ``fused`` takes the batch as this package's data loading makes it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ehrseq_fast import PackedVisits, use_backend
from ehrseq_fast.data import PaddedBatch
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
from ehrseq_fast.survival_nll import DiscreteTimeSurvivalLoss

PATHS = ("padded", "packed", "fused from padded", "fused")

# The paths are compared with the packed one, in float64, where they must agree to rounding. In
# float32, which is what is timed, a hidden unit of the hazard head that one path finds just above
# zero another may find just below: the visit's whole share of that unit's gradient comes or goes
# (2e-4 of the largest entry was seen on batches of 256 patients).
EXPECTED = "packed"
LOSS_RTOL = {torch.float64: 1e-12, torch.float32: 1e-5}
GRADIENT_RTOL = {torch.float64: 1e-10, torch.float32: 1e-3}


@dataclass(frozen=True)
class StepBatch:
    """The same patients in both forms; a data loader's worker would have made either."""

    padded: PaddedBatch
    packed: PackedVisits


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

    def __init__(
        self, path: str, size: ModelSize, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(seed)
        self.path = path
        self.fused = path.startswith("fused")
        self.model = DiscreteTimeSurvivalLSTM(
            size.vocabulary,
            size.embedding_dim,
            size.hidden_dim,
            dropout=0.0,
            path="fused" if self.fused else path,
        )
        self.model.to(dtype)
        self.loss = DiscreteTimeSurvivalLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)

    def _backends(self) -> AbstractContextManager[None]:
        return nullcontext() if self.fused else use_backend("reference")

    def backward(self, batch: StepBatch) -> Tensor:
        """Forward and backward; the gradients are left on the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._backends():
            loss = self.forward(batch)
            loss.backward()
        return loss.detach()

    def forward(self, batch: StepBatch) -> Tensor:
        """The loss."""
        if self.path == "fused":
            return self.model.loss(batch.packed)
        padded = batch.padded
        hazards = self.model(padded.visit_codes, padded.visit_mask, padded.sequence_mask)
        return self.loss(hazards, padded.event_times, padded.event_indicators, padded.sequence_mask)

    def __call__(self, batch: StepBatch) -> None:
        self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Equality:
    """The paths' losses, and the greatest relative difference of a gradient from packed's."""

    losses: dict[str, float]
    gradient_difference: dict[str, float]


def check_equal(steps: dict[str, TrainingStep], batch: StepBatch) -> Equality:
    """Compare the paths' losses and gradients with those of ``"packed"``, from the same weights.

    A gradient's difference is the greatest of any entry, over the greatest entry of the gradient.

    Raises:
        AssertionError: where they differ by more than ``LOSS_RTOL`` or ``GRADIENT_RTOL``.
    """
    losses = {path: float(step.backward(batch)) for path, step in steps.items()}
    expected = dict(steps[EXPECTED].model.named_parameters())
    dtype = steps[EXPECTED].model.embedding.weight.dtype
    differences = {
        path: max(
            _relative_difference(parameter.grad, expected[name].grad)
            for name, parameter in step.model.named_parameters()
        )
        for path, step in steps.items()
    }
    for path in steps:
        if not abs(losses[path] - losses[EXPECTED]) <= LOSS_RTOL[dtype] * abs(losses[EXPECTED]):
            raise AssertionError(f"the {path} path's loss differs from {EXPECTED}'s: {losses}")
        if not differences[path] <= GRADIENT_RTOL[dtype]:
            raise AssertionError(
                f"the {path} path's gradients differ from {EXPECTED}'s: relative differences "
                f"{differences}, allowed {GRADIENT_RTOL[dtype]}"
            )
    return Equality(losses, differences)


def _relative_difference(actual: Tensor | None, expected: Tensor | None) -> float:
    if actual is None or expected is None:
        raise AssertionError("a parameter has no gradient")
    return float((actual - expected).abs().max() / expected.abs().max())
