"""Train the fused survival model on the real records, and see what it has learnt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import log
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from tqdm import tqdm

from ehrseq_fast import PackedVisits
from ehrseq_fast.data import EventRecords, PatientDataset, split_by_person
from ehrseq_fast.metrics import concordance_index
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
from ehrseq_fast.survival_nll import DiscreteTimeSurvivalLoss

from .step import ModelSize


@dataclass(frozen=True)
class Epoch:
    epoch: int
    train_loss: float
    held_out_loss: float
    held_out_c_index: float
    seconds: float


@dataclass(frozen=True)
class Training:
    """``constant_loss``: what one hazard for every visit scores held out, the rate of train's."""

    epochs: list[Epoch]
    train_patients: int
    held_out_patients: int
    held_out_events: int
    constant_loss: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    records: EventRecords, size: ModelSize, *, epochs: int, batch_size: int = 64, seed: int = 0
) -> Training:
    """Adam on the train split; after each epoch the loss and the C-index of the held-out split."""
    parts = split_by_person(records.person_ids)
    torch.manual_seed(seed)
    model = DiscreteTimeSurvivalLSTM(
        size.vocabulary, size.embedding_dim, size.hidden_dim, path="fused"
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = PatientDataset(records, parts["train"])
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, collate_fn=data.collate)

    done: list[Epoch] = []
    with tqdm(total=epochs * len(loader), desc="train", unit="step") as progress:
        for epoch in range(1, epochs + 1):
            start, total = perf_counter(), 0.0
            for batch in loader:
                optimizer.zero_grad(set_to_none=True)
                loss = model.loss(batch)
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(batch)
                progress.update()
                progress.set_postfix(loss=f"{float(loss.detach()):.3f}")
            took = perf_counter() - start
            held_out_loss, c_index = evaluate(model, records, parts["held_out"])
            done.append(Epoch(epoch, total / len(data), held_out_loss, c_index, took))
    return Training(
        epochs=done,
        train_patients=len(parts["train"]),
        held_out_patients=len(parts["held_out"]),
        held_out_events=int(records.event_indicators[parts["held_out"]].sum()),
        constant_loss=constant_hazard_loss(records, parts["train"], parts["held_out"]),
    )


@torch.no_grad()
def evaluate(
    model: DiscreteTimeSurvivalLSTM, records: EventRecords, patients: NDArray[np.int64]
) -> tuple[float, float]:
    """Mean loss per patient and C-index."""
    model.eval()
    batches = list(_in_order(records, patients))
    rows = [model(batch) for batch in batches]
    model.train()
    longest = max(batch.max_visits for batch in batches)
    hazard = torch.cat([row.to_padded(total_length=longest) for row in rows])
    lengths = torch.cat([batch.lengths for batch in batches])
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    times = torch.cat([batch.event_times for batch in batches])
    indicators = torch.cat([batch.event_indicators for batch in batches])
    loss = DiscreteTimeSurvivalLoss()(hazard, times, indicators, mask)
    return float(loss), float(concordance_index(hazard, times, indicators, mask))


def constant_hazard_loss(
    records: EventRecords, train_: NDArray[np.int64], held_out: NDArray[np.int64]
) -> float:
    """The held-out loss of a single hazard, the train split's events per visit at risk."""
    indicators, times = records.event_indicators.astype(np.float64), records.event_times
    survived = times.astype(np.float64)
    rate = indicators[train_].sum() / (survived[train_] + indicators[train_]).sum()
    nll = -survived[held_out] * log(1 - rate) - indicators[held_out] * log(rate)
    return float(nll.mean())


def _in_order(records: EventRecords, patients: NDArray[np.int64]) -> Iterator[PackedVisits]:
    data = PatientDataset(records, patients)
    yield from DataLoader(data, batch_size=256, collate_fn=data.collate)
