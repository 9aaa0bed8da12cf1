"""The trainers of docs/trainers.md, each as ``way(feature)``: the weights that it ends with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .features import EVERYBODY, FEATURES, TOGETHER, Feature, weights
from .page import definitions

Way = Callable[[Feature], list[Tensor]]
RANKS = 2
# Steps of TOGETHER patients, of which the first process has three and the second one.
UNEQUAL = [
    [[0, 1, 2], [4, 5, 6]],
    [[3], [7]],
]
assert sorted(one for rank in UNEQUAL for step in rank for one in step) == EVERYBODY


def plain(feature: Feature) -> list[Tensor]:
    training = feature.training()
    definitions().plain(training, feature.loader())
    return weights(training.model)


def of_page(name: str, batches: Any = TOGETHER, **options: Any) -> Way:
    """A function ``name(training, loader)`` of the page."""

    def way(feature: Feature) -> list[Tensor]:
        training = feature.training()
        getattr(definitions(), name)(training, feature.loader(batches), **options)
        return weights(training.model)

    return way


def with_lightning(feature: Feature) -> list[Tensor]:
    training = feature._replace(bfloat16=False).training()
    definitions().with_lightning(training, feature.loader(), **_of_lightning(feature))
    return weights(training.model)


def with_accelerate(feature: Feature) -> list[Tensor]:
    reset_accelerate()
    training = feature._replace(bfloat16=False).training()
    definitions().with_accelerate(training, feature.loader(), **_of_accelerate(feature))
    return weights(training.model)


class PublicTrainer:
    """A loop of the kind that ``ehrsequencing.training.Trainer`` has: dictionaries of tensors."""

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        self.model, self.criterion = model, criterion
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def train(self, batches: Any, num_epochs: int) -> None:
        for _ in range(num_epochs):
            self.model.train()
            for given in batches:
                batch = {k: v.to("cpu") if isinstance(v, Tensor) else v for k, v in given.items()}
                self.optimizer.zero_grad()
                masks = {name: batch.get(name) for name in ("visit_mask", "sequence_mask")}
                outputs = self.model(batch["visit_codes"], **masks)
                self.criterion(outputs["logits"], batch["labels"]).backward()
                self.optimizer.step()


def public_trainer(packed: bool) -> Way:
    """On the page's packed dictionaries, or on padded ones."""

    def way(feature: Feature) -> list[Tensor]:
        model, given = feature.model(), []
        for numbers in (EVERYBODY[:TOGETHER], EVERYBODY[TOGETHER:]):
            batch = definitions().collate(numbers, feature.patients)
            if not packed:
                names = ("visit_codes", "visit_mask", "sequence_mask")
                batch |= dict(zip(names, batch["visit_codes"].to_padded(), strict=True))
            batch["labels"] = batch["labels"].to(feature.dtype)[:, None]
            given.append(batch)
        PublicTrainer(model, nn.BCEWithLogitsLoss()).train(given, 2)
        return weights(model)

    return way


# Of two processes: what each of them calls


def divided(name: str, wrap: Callable[[nn.Module], nn.Module] = lambda training: training) -> Any:
    """A function ``name(training, loader)`` of the page, whose loss is wrapped before."""

    def way(feature: Feature, rank: int) -> list[Tensor]:
        training = feature.training(across_processes=True)
        getattr(definitions(), name)(wrap(training), feature.loader(UNEQUAL[rank]))
        whole = weights(training.model)
        return [w.full_tensor() if isinstance(w, DTensor) else w for w in whole]

    return way


def fully_sharded(training: nn.Module) -> nn.Module:
    return fully_shard(training, mesh=init_device_mesh("cpu", (RANKS,)))


def divided_by_lightning(feature: Feature, rank: int) -> list[Tensor]:
    training = feature._replace(bfloat16=False).training(across_processes=True)
    several = {"devices": RANKS, "strategy": "ddp", "use_distributed_sampler": False}
    options = several | _of_lightning(feature)
    definitions().with_lightning(training, feature.loader(UNEQUAL[rank]), **options)
    return weights(training.model)


def divided_by_accelerate(feature: Feature, rank: int) -> list[Tensor]:
    reset_accelerate()
    training = feature._replace(bfloat16=False).training(across_processes=True)
    loader = feature.loader(TOGETHER // RANKS)
    definitions().with_accelerate(training, loader, **_of_accelerate(feature))
    return weights(training.model)


def _of_lightning(feature: Feature) -> dict[str, Any]:
    return {"precision": "bf16-mixed"} if feature.bfloat16 else {}


def _of_accelerate(feature: Feature) -> dict[str, str]:
    return {"mixed_precision": "bf16" if feature.bfloat16 else "no"}


def reset_accelerate() -> None:
    """Its state is one for each process, and keeps the precision that it was made with."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


OF_LABELS = ("labels", "labels, GRU")
ONE: dict[str, Way] = {
    "gradient accumulation": of_page(
        "accumulated", batches=[batch for pair in zip(*UNEQUAL, strict=True) for batch in pair]
    ),
    "averaged weights": of_page("averaged"),
    "`torch.compile`": of_page("compiled", backend="eager"),
    "activation checkpointing": of_page("recomputed"),
    "gradients of single patients": of_page("per_patient"),
    "Lightning": with_lightning,
    "Accelerate": with_accelerate,
    "`Trainer` of `ehrsequencing`, padded": public_trainer(packed=False),
    "`Trainer` of `ehrsequencing`, packed": public_trainer(packed=True),
}
TWO: dict[str, Callable[[Feature, int], list[Tensor]]] = {
    "DDP, two processes": divided("distributed"),
    "DDP, activation checkpointing": divided("recomputed", DistributedDataParallel),
    "FSDP2, two processes": divided("sharded"),
    "FSDP2, activation checkpointing": divided("recomputed", fully_sharded),
    "Lightning, DDP": divided_by_lightning,
    "Accelerate, two processes": divided_by_accelerate,
}


def cells(trainers: Any) -> list[tuple[str, str]]:
    """Which features each trainer is tried on."""
    only = {name: OF_LABELS for name in ONE if name.startswith("`Trainer`")}
    return [(trainer, feature) for trainer in trainers for feature in only.get(trainer, FEATURES)]


def table() -> str:
    """Trainer × feature, in Markdown."""
    tried = set(cells([*ONE, *TWO]))
    lines = ["| | " + " | ".join(FEATURES) + " |", "| --- |" + " :-: |" * len(FEATURES)]
    for trainer in [*ONE, *TWO]:
        marks = ["✓" if (trainer, feature) in tried else "" for feature in FEATURES]
        lines.append(f"| {trainer} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
