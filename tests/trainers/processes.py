"""One of two processes, which try every trainer of several processes on every feature:

python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.trainers.processes FOLDER
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from ehrseq_fast.models import ModelWithLoss

from .features import FEATURES
from .page import definitions
from .ways import RANKS, TWO, cells, reset_accelerate

SEVEN = list(range(7))


def found(rank: int) -> dict[Any, Any]:
    """The weights of each cell, and what else is compared."""
    results: dict[Any, Any] = {(t, f): TWO[t](FEATURES[f], rank) for t, f in cells(TWO)}
    feature = FEATURES["LSTM"]

    # without the package's division by the patients of all processes
    alone = ModelWithLoss(feature.model())
    shares = feature.loader([[[0, 1, 2], [4, 5, 6]], [[3], [7]]][rank])
    definitions().distributed(alone, shares)
    results["DDP of local means"] = list(alone.parameters())

    whole = feature.patients
    seven = DataLoader(SEVEN, batch_size=2, collate_fn=lambda numbers: whole[numbers])
    reset_accelerate()
    results["gathered"] = definitions().gathered_risks(feature.model(), seven)

    two = {"devices": RANKS, "strategy": "ddp"}
    trainer = definitions().lightning_trainer(**two)
    module = definitions().Module(ModelWithLoss(feature.model()))
    # of eight patients: the library repeats one of seven
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
