"""A model and its loss as one module: a batch goes in, the loss comes out, through ``forward``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import PackedVisits
from .base import VisitSequenceModel
from .sequences import expect_batch


class ModelWithLoss(nn.Module):
    """``forward(batch)`` is ``model.loss(batch)``.

    What wraps a module for training (``DistributedDataParallel``, FSDP, ``torch.compile``) acts on
    ``forward`` alone: ``ddp.module.loss(batch)`` would train every process by itself. Wrap this
    module instead, and call it. The weights stay the model's own: save ``training.model``.

    ``DistributedDataParallel`` takes the plain average of the processes' gradients. With shards of
    unequal size that is not the gradient of the mean over all patients; with
    ``across_processes=True`` it is. In training, each process then sends the others how many
    patients it has, and returns its share of that mean times the number of processes: the average
    over the processes is the loss of all their patients. A process may have no patient (the last
    shard of an epoch): its share is 0, and so are its gradients. Without gradients, or after
    ``eval()``, it does not communicate, and returns the loss of its own patients.

    Args:
        model: a model of this package, or any module with ``loss(batch, **options)``.
        across_processes: as above; all processes of the group must call. Only for the mean loss of
            a model of this package.
        process_group: which processes; by default all.
        options: for ``model.loss``, at every call (``censored_visit``, ``target``, ...).

    Raises:
        TypeError: for a model without ``loss``.
        ValueError: for ``across_processes=True`` with another ``reduction`` than ``"mean"``.

    Example:
        >>> from ehrseq_fast import PackedVisits
        >>> from ehrseq_fast.models import DiscreteTimeSurvivalLSTM, ModelWithLoss
        >>> model = DiscreteTimeSurvivalLSTM(10, embedding_dim=4, hidden_dim=8)
        >>> training = ModelWithLoss(model, censored_visit="included")
        >>> batch = PackedVisits.from_lists([[[3], [5]]], event_times=[1], event_indicators=[1])
        >>> training(batch).backward()
        >>> all(parameter.grad is not None for parameter in model.parameters())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        across_processes: bool = False,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not callable(getattr(model, "loss", None)):
            raise TypeError(f"model: expected one with a method loss, got {type(model).__name__}")
        if across_processes and not isinstance(model, VisitSequenceModel):
            raise TypeError(
                "model: expected one of this package with across_processes=True, whose loss is a "
                f"mean over patients, got {type(model).__name__}"
            )
        self.model: Any = model
        self.across_processes = across_processes
        self.process_group = process_group
        self.options = options
        self._check(options)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"across_processes={self.across_processes}{options}"

    def forward(self, batch: PackedVisits, **options: Any) -> Tensor:
        """The loss of a batch.

        Args:
            batch: as ``model.loss`` takes it.
            options: for ``model.loss`` at this call (``sample_weight``, ...), before those of the
                constructor.

        Raises:
            ValueError, KeyError: as ``model.loss``; with ``across_processes=True`` a batch without
                patients is refused, in every process, where no process has any.
        """
        options = self.options | options
        self._check(options)
        together = self.across_processes and self.training and torch.is_grad_enabled()
        if not together or not dist.is_initialized():
            return self.model.loss(batch, **options)
        expect_batch(batch)
        patients = len(batch)
        divisor = self.model._loss_divisor(batch, **options)
        sums = torch.stack([divisor, torch.full_like(divisor, patients)])
        dist.all_reduce(sums, group=self.process_group)
        total, everybody = sums.unbind()
        if patients == 0:
            # Read here alone: where no process has a patient, all of them come here.
            if not everybody.item():
                raise ValueError("batch: expected a patient in at least one process, got none")
            return _zero_of(self.model)
        processes = dist.get_world_size(self.process_group)
        loss = self.model.loss(batch, **options | {"reduction": "sum"})
        return loss * (processes / total).to(loss.dtype)

    def _check(self, options: dict[str, Any]) -> None:
        if self.across_processes and options.get("reduction", "mean") != "mean":
            raise ValueError(
                "reduction: expected 'mean' with across_processes=True, got "
                f"{options['reduction']!r}"
            )


def _zero_of(model: nn.Module) -> Tensor:
    """0, of which every weight has a gradient of zeros, whatever the weight holds: what shares
    gradients between processes waits for all of them."""
    sparse = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse}
    zeros = []
    for weight in model.parameters():
        if not weight.requires_grad:
            continue
        if id(weight) in sparse:
            nothing = torch.zeros(0, dtype=torch.long, device=weight.device)
            zeros.append(F.embedding(nothing, weight, sparse=True).sum())
        else:
            zeros.append(weight.flatten()[:0].sum())
    return torch.stack([zero.to(zeros[0]) for zero in zeros]).sum()
