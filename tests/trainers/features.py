"""Models and batches that every trainer is tried on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ehrseq_fast import PackedVisits
from ehrseq_fast.data import EventRecords, PatientDataset, TokenBudgetSampler, Vocabulary
from ehrseq_fast.data import loader as data_loader
from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    HorizonSurvivalLSTM,
    LSTMBaseline,
    ModelWithLoss,
)

VOCABULARY = 11
RECORDS = [
    [[1, 2], [3], [], [4, 4, 5]],
    [[6]],
    [[7, 8, 9], [1, 10], [2]],
    [[2], [], [10]],
    [[3, 5], [8]],
    [[9], [1], [4], [2, 6], [7]],
    [[5, 10]],
    [[8, 1], [3, 3]],
]
VISITS = [len(visits) for visits in RECORDS]
EVERYBODY = list(range(len(RECORDS)))
TOGETHER = 4  # patients of a step
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def patients(dtype: torch.dtype, *, features: bool = False, weights: bool = False) -> PackedVisits:
    """All patients, with outcomes for each of the models."""
    generator = torch.Generator().manual_seed(1)
    codes = sum(len(visit) for visits in RECORDS for visit in visits)
    return PackedVisits.from_lists(
        RECORDS,
        vocab_size=VOCABULARY,
        event_times=[3, 0, 1, 2, 1, 4, 0, 0],
        event_indicators=[1, 0, 1, 1, 0, 1, 1, 0],
        event_types=[2, 0, 1, 1, 0, 2, 1, 0],
        targets={"labels": [1, 0, 0, 1, 1, 0, 1, 0]},
        visit_targets={"days_to_end": [torch.arange(n, 0.0, -1) * 50 for n in VISITS]},
        visit_features=torch.rand(sum(VISITS), 3, generator=generator, dtype=dtype)
        if features
        else None,
        code_weights=0.5 + torch.rand(codes, generator=generator, dtype=dtype) if weights else None,
    )


class Feature(NamedTuple):
    """A model, the patients that it is trained on, and how near to the plain loop that ends."""

    build: Callable[[], nn.Module]
    dtype: torch.dtype = torch.float64
    options: tuple[str, ...] = ()
    bfloat16: bool = False
    tolerance: dict[str, float] = EXACT

    @property
    def patients(self) -> PackedVisits:
        return patients(self.dtype, **dict.fromkeys(self.options, True))

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        return self.build().to(self.dtype)

    def training(self, across_processes: bool = False) -> Any:
        """The model with its loss, under autocast where that is the feature."""
        training = ModelWithLoss(self.model(), across_processes=across_processes)
        return Autocast(training) if self.bfloat16 else training

    def loader(self, batches: Iterable[list[int]] | int = TOGETHER) -> DataLoader:
        """Batches of so many patients, or the given ones."""
        whole = self.patients

        def collate(numbers: list[int]) -> PackedVisits:
            return whole[numbers]

        if isinstance(batches, int):
            return DataLoader(EVERYBODY, batch_size=batches, collate_fn=collate)
        return DataLoader(EVERYBODY, batch_sampler=list(batches), collate_fn=collate)


class Autocast(nn.Module):
    """``with torch.autocast`` around the loss of a batch."""

    def __init__(self, training: nn.Module) -> None:
        super().__init__()
        self.training_alone = training
        self.model = training.model

    def forward(self, batch: PackedVisits, **options: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.training_alone(batch, **options)


def survival(**options: Any) -> nn.Module:
    return DiscreteTimeSurvivalLSTM(VOCABULARY, 6, 8, dropout=0.0, **options)


def baseline(cell: str = "lstm") -> nn.Module:
    return LSTMBaseline(VOCABULARY, 6, 8, num_layers=1, dropout=0.0, cell=cell)


FEATURES = {
    "LSTM": Feature(survival),
    "LSTM, float32": Feature(survival, dtype=torch.float32, tolerance={"rtol": 1e-4, "atol": 1e-6}),
    "LSTM, bfloat16": Feature(
        survival, dtype=torch.float32, bfloat16=True, tolerance={"rtol": 1e-2, "atol": 3e-4}
    ),
    "GRU": Feature(lambda: survival(cell="gru")),
    "visit features": Feature(
        lambda: DiscreteTimeSurvivalLSTMWithTime(VOCABULARY, 6, 8, dropout=0.0),
        options=("features",),
    ),
    "code weights": Feature(survival, options=("weights",)),
    "competing risks": Feature(
        lambda: CompetingRisksSurvivalLSTM(VOCABULARY, 2, 6, 8, dropout=0.0)
    ),
    "horizons": Feature(
        lambda: HorizonSurvivalLSTM(VOCABULARY, (30, 120), 6, 8, dropout=0.0, visit_hazard=True)
    ),
    "labels": Feature(baseline),
    "labels, GRU": Feature(lambda: baseline("gru")),
}


def weights(module: nn.Module) -> list[Tensor]:
    return [copy.deepcopy(parameter.detach()) for parameter in module.parameters()]


def visit_budget(**processes: int) -> tuple[TokenBudgetSampler, DataLoader]:
    """Shuffled batches of about eight visits, of this package's loader."""
    starts = np.cumsum([0, *VISITS])
    visits = [visit for visits in RECORDS for visit in visits]
    records = EventRecords(
        codes=np.array([code for visit in visits for code in visit], np.int32),
        visit_offsets=np.cumsum([0, *map(len, visits)]),
        patient_offsets=starts,
        visit_days=np.datetime64("2020-01-01", "D") + np.arange(len(visits)),
        person_ids=np.arange(len(RECORDS)),
        event_times=np.array(VISITS) - 1,
        event_indicators=np.array([1, 0, 1, 1, 0, 1, 1, 0], np.uint8),
        vocabulary=Vocabulary(np.arange(VOCABULARY), ("", *map(str, range(1, VOCABULARY)))),
    )
    data = PatientDataset(records)
    sampler = TokenBudgetSampler(data, visits_per_batch=8, bucket=1, **processes)
    return sampler, data_loader(data, sampler)
