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
from ehrseq_fast.data import EventRecords, PatientDataset, select, split_by_person
from ehrseq_fast.metrics import Evaluation, TrainingOutcomes, evaluate, visit_baselines
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM

from .step import ModelSize

HORIZON_DAYS = 365.0


@dataclass(frozen=True)
class Figures:
    """Held out: loss per patient, C_td of the hazards (chance is 0.5), and how well the hazard at a
    visit tells who has the event within a year, each visit a landmark (chance is 0.5; None without
    such events)."""

    loss: float
    c_td: float
    auc_one_year: float | None


@dataclass(frozen=True)
class Epoch:
    epoch: int
    train_loss: float
    held_out: Figures
    seconds: float


@dataclass(frozen=True)
class Training:
    """``constant`` and ``by_visit``: what one hazard for every visit, the train split's events per
    visit at risk, and one for each index of the visit score on the held-out patients."""

    epochs: list[Epoch]
    train_patients: int
    held_out_patients: int
    held_out_events: int
    constant: Figures
    by_visit: Figures

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    records: EventRecords,
    end_days: NDArray[np.datetime64],
    size: ModelSize,
    *,
    epochs: int,
    batch_size: int = 64,
    seed: int = 0,
) -> Training:
    """Adam on the train split, from a hazard that is its event rate; after each epoch the figures
    of the held-out split.

    Args:
        end_days: ``[n_patients]``, the day of the event, or the last day of observation.
    """
    parts = split_by_person(records.person_ids)
    here, away = (Split(records, end_days, parts[name]) for name in ("train", "held_out"))
    torch.manual_seed(seed)
    model = DiscreteTimeSurvivalLSTM(
        size.vocabulary, size.embedding_dim, size.hidden_dim, path="fused"
    )
    start_at_event_rate(model, here.outcomes)
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
            found = held_out(model, here, away)
            done.append(Epoch(epoch, total / len(data), _figures(found, "model"), took))
    return Training(
        epochs=done,
        train_patients=len(here),
        held_out_patients=len(away),
        held_out_events=int(away.records.event_indicators.sum()),
        constant=_figures(found, "constant"),
        by_visit=_figures(found, "by_visit"),
    )


class Split:
    """The patients of one split, and their outcomes in visits and in days."""

    def __init__(
        self, records: EventRecords, end_days: NDArray[np.datetime64], patients: NDArray[np.int64]
    ) -> None:
        self.records = select(records, patients)
        lengths = self.records.visits_per_patient
        days = end_days[patients].repeat(lengths) - self.records.visit_days
        self.outcomes = TrainingOutcomes(
            self.records.event_times,
            self.records.event_indicators,
            days_to_end=days / np.timedelta64(1, "D"),
            lengths=lengths,
        )

    def __len__(self) -> int:
        return self.records.n_patients


@torch.no_grad()
def start_at_event_rate(model: DiscreteTimeSurvivalLSTM, outcomes: TrainingOutcomes) -> None:
    """The head's last bias says the rate of events; 0.5 would cost the first epochs."""
    rate = visit_baselines(outcomes.event_times, outcomes.event_indicators).constant
    bias: Any = model.hazard_head[3].bias
    bias.fill_(log(rate) - log(1 - rate))


@torch.no_grad()
def held_out(model: DiscreteTimeSurvivalLSTM, here: Split, away: Split) -> Evaluation:
    """The model's figures on the patients ``away``, beside those of hazards fitted ``here``."""
    model.eval()
    rows = [model(batch) for batch in _in_order(away.records)]
    model.train()
    # one patient after the other, as the records have their visits
    flat = [row.values[row.batch.rows_of(i)] for row in rows for i in range(len(row.batch))]
    return evaluate(
        torch.cat(flat),
        **vars(away.outcomes),
        horizons_days=(HORIZON_DAYS,),
        landmarks_days=("every visit",),
        train=here.outcomes,
    )


def _figures(found: Evaluation, whose: str) -> Figures:
    loss, c_td = (getattr(found[name], whose) for name in ("nll", "c_td"))
    return Figures(loss, c_td, getattr(found["auc", "every visit", HORIZON_DAYS], whose))


def _in_order(records: EventRecords) -> Iterator[PackedVisits]:
    data = PatientDataset(records, np.arange(records.n_patients))
    yield from DataLoader(data, batch_size=256, collate_fn=data.collate)
