"""One of two processes, which try every trainer of several processes on every feature:

python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.trainers.processes FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DataLoaderConfiguration
from torch.utils.data import DataLoader

from ehrseq_fast import PackedVisits
from ehrseq_fast.models import ModelWithLoss

from .features import EVERYBODY, FEATURES, TOGETHER, visit_budget, weights
from .page import definitions
from .ways import RANKS, TWO, cells, reset_accelerate

SEVEN = list(range(7))


class Repacked(torch.nn.Module):
    """The loss of padded tensors."""

    def __init__(self, training: torch.nn.Module) -> None:
        super().__init__()
        self.of_packed = training

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.of_packed(PackedVisits.from_padded(**batch))


def refused(call: Callable[[], Any]) -> str:
    """What the error says."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "not refused"


def found(rank: int) -> dict[Any, Any]:
    """The weights of each cell, and what else is compared."""
    results: dict[Any, Any] = {(t, f): TWO[t](FEATURES[f], rank) for t, f in cells(TWO)}
    feature = FEATURES["LSTM"]

    # without the package's division by the patients of all processes
    alone = ModelWithLoss(feature.model())
    shares = feature.loader([[[0, 1, 2], [4, 5, 6]], [[3], [7]]][rank])
    definitions().distributed(alone, shares)
    results["DDP of local means"] = list(alone.parameters())

    several = {"devices": RANKS, "strategy": "ddp"}
    training = feature.training(across_processes=True)
    _, by_visits = visit_budget(rank=rank, world_size=RANKS)
    undivided = several | {"use_distributed_sampler": False}
    definitions().with_lightning(training, by_visits, **undivided)
    results["by visits"] = weights(training.model)
    results["divided again by Lightning"] = refused(
        lambda: definitions().with_lightning(feature.training(), by_visits, **several)
    )
    for divided in (True, False):
        reset_accelerate()
        training = feature.training(across_processes=True)
        _, given = visit_budget(rank=rank, world_size=RANKS) if divided else visit_budget()
        definitions().with_accelerate(training, given, divided)
        results["by visits", divided] = weights(training.model)

    whole = feature.patients
    seven = DataLoader(SEVEN, batch_size=2, collate_fn=lambda numbers: whole[numbers])

    def tensors(numbers: list[int]) -> dict[str, torch.Tensor]:
        return definitions().padded(whole[numbers])

    reset_accelerate()
    training = Repacked(feature.training(across_processes=True))
    definitions().with_accelerate(
        training,
        DataLoader(EVERYBODY, batch_size=TOGETHER, collate_fn=tensors),
        dataloader_config=DataLoaderConfiguration(dispatch_batches=True, split_batches=True),
    )
    results["dispatched"] = weights(training)

    reset_accelerate()
    results["gathered"] = definitions().gathered_risks(feature.model(), seven)

    trainer = definitions().lightning_trainer(**several)
    module = definitions().Module(ModelWithLoss(feature.model()))
    # all eight: in validation Lightning repeats patients where they cannot be divided
    results["validated"] = trainer.validate(module, feature.loader(3), verbose=False)
    rows = trainer.predict(module, feature.loader(3))
    results["predicted"] = torch.cat([of_batch.last() for of_batch in rows])
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    result = found(dist.get_rank())
    torch.save(result, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
