"""Each batch's gradients, whole, without a step: run by torchrun, or as one process.

``python tests/training_gradients.py CONFIG OUT STRATEGY ...`` writes ``OUT.STRATEGY.pt`` with a
dictionary of gradients for each batch of the first epoch, and how many patients this process had.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
import torch.distributed as dist

from ehrseq_fast.data import EventStore
from ehrseq_fast.training import RunConfig
from ehrseq_fast.training.checkpoint import whole
from ehrseq_fast.training.data import TrainingData
from ehrseq_fast.training.distributed import Processes, started
from ehrseq_fast.training.model import loss_options, make_model, start_at_rates


def gradients(config: RunConfig, processes: Processes) -> tuple[list[dict], list[int]]:
    data = TrainingData(config, EventStore(config.store), processes)
    torch.manual_seed(config.seed)
    model = make_model(config.model, data.store.vocab_size)
    start_at_rates(model, *data.observed_rates())
    training = processes.wrap(model, **data.loss_options).train()
    found, shares = [], []
    data.start_epoch(0, 0)
    for batch in data.training_batches():
        training(batch, **loss_options(batch)).backward()
        if processes.strategy == "fsdp":
            parts = [p for p in model.parameters() if p.to_local().numel() < p.numel()]
            assert len(parts) > 5, "not divided"
        found.append({name: whole(p.grad) for name, p in model.named_parameters()})
        shares.append(len(batch))
        model.zero_grad(set_to_none=True)
    return found, shares


if __name__ == "__main__":
    path, out, *strategies = sys.argv[1:]
    config = RunConfig.load(path)
    with started(config.distributed, config.device) as processes:
        for strategy in strategies:
            these = dataclasses.replace(processes, strategy=strategy)
            found, shares = gradients(config, these)
            everybody: list = [None] * these.world_size
            if these.world_size > 1:
                dist.all_gather_object(everybody, shares)
            if these.is_main:
                torch.save({"gradients": found, "shares": everybody}, f"{out}.{strategy}.pt")
