"""From a store and a task to batches: the training and the tuning split of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from ..batch import PackedVisits
from ..data import (
    EventStore,
    FirstEvent,
    Outcomes,
    PatientDataset,
    TokenBudgetSampler,
    loader,
)
from ..metrics.causes import cause_baselines
from ..models.intervals import interval_hazards
from .config import DataConfig, ModelConfig, RunConfig
from .distributed import Processes


class TrainingData:
    """Both splits of a run, as one process sees them.

    Args:
        config: of the run.
        store: the records.
        processes: who trains; each process's batches are its share of the global ones.

    Raises:
        ValueError: without a task, and where nobody in the training split has the outcome.
    """

    def __init__(self, config: RunConfig, store: EventStore, processes: Processes) -> None:
        if not config.task:
            raise ValueError("task: expected an outcome to predict (--outcome or --task), got none")
        self.config = config
        self.store = store
        self.processes = processes
        task = FirstEvent.from_dict(config.task)
        split = _split_of(store, "train_split", config.data.train_split)
        self.outcomes = task.apply(store, split=split)
        if not len(self.outcomes):
            raise ValueError(
                f"task {task.name!r}: nobody of the split {split!r} is left\n"
                f"{self.outcomes.attrition}"
            )
        missing = [cause for cause, n in self.outcomes.events_by_cause().items() if not n]
        if missing and self.outcomes.event_indicators.any():
            raise ValueError(
                f"task {task.name!r}: expected someone with each outcome in the split {split!r}, "
                f"got nobody with {', '.join(missing)}{_left_out(self.outcomes)}\n"
                f"{self.outcomes.attrition}"
            )
        if not self.outcomes.event_indicators.any():
            raise ValueError(
                f"task {task.name!r}: expected someone with the outcome in the split {split!r}, "
                f"got {len(self.outcomes):,} patients without{_left_out(self.outcomes)}\n"
                f"{self.outcomes.attrition}"
            )
        self.tuning_outcomes = self._tuning_outcomes(task)
        self.observed_days = observed_days(task, self.outcomes)
        for note in (
            censored_in_window(config.model, self.outcomes),
            unobserved_horizons(config.model, self.observed_days),
        ):
            if note:
                warnings.warn(note, stacklevel=2)
        self._training, self._sampler = self._batches(self.outcomes, shuffle=True)
        self._tuning = None
        if self.has_tuning:
            self._tuning, _ = self._batches(self.tuning_outcomes, shuffle=False)

    def _tuning_outcomes(self, task: FirstEvent) -> Outcomes:
        """Of the tuning split; nobody, with a warning, where there is none of the default name."""
        name, nobody = self.config.data.tuning_split, self.outcomes.select([])
        if name is None:
            return nobody
        if name == DataConfig.tuning_split and name not in self.store.split_names:
            have = ", ".join(map(repr, self.store.split_names))
            _warn_of_no_tuning(f"the store has no split {name!r} (it has {have})")
            return nobody
        split = _split_of(self.store, "tuning_split", name)
        found = task.apply(self.store, split=split)
        if not len(found):
            _warn_of_no_tuning(f"nobody of the split {name!r} is in the task's population")
        return found

    @property
    def has_tuning(self) -> bool:
        """Whether anybody is in the tuning split."""
        return len(self.tuning_outcomes) > 0

    @property
    def loss_options(self) -> dict[str, Any]:
        """How the loss treats the visit of a censoring; see :func:`censored_visit`."""
        said = censored_visit(self.outcomes)
        return {"censored_visit": said} if self.config.model.has_hazard else {}

    def start_epoch(self, epoch: int, position: int) -> int:
        """Let the next training batches be those of an epoch, from ``position`` on; how many the
        whole epoch has."""
        self._sampler.set_epoch(epoch)
        self._sampler.set_position(position)
        return self._sampler.n_batches

    def patients_of_batch(self, position: int) -> int:
        """How many patients the epoch's global batch has, in all processes."""
        return self._sampler.patients_of_batch(position)

    def training_batches(self) -> Iterator[PackedVisits]:
        """This process's share of each batch, possibly without patients."""
        return iter(self._training)

    def tuning_batches(self) -> Iterator[PackedVisits]:
        """This process's share of the tuning split."""
        assert self._tuning is not None
        return iter(self._tuning)

    def observed_rates(
        self,
    ) -> tuple[float | NDArray[np.float64] | None, NDArray[np.float64] | None]:
        """Events per visit at risk in the training split (of competing outcomes ``[K]``), and the
        hazard of each interval of days; None for what the model does not have."""
        config = self.config.model
        if config.has_causes:
            return cause_hazards(self.outcomes), None
        hazard = visit_hazard(self.outcomes) if config.has_hazard else None
        if not config.has_horizons:
            return hazard, None
        return hazard, horizon_hazards(self.outcomes, self.store, config.horizons_days)

    def _batches(
        self, outcomes: Outcomes, *, shuffle: bool
    ) -> tuple[DataLoader[Any], TokenBudgetSampler]:
        config, processes = self.config, self.processes
        dataset = PatientDataset(
            self.store, outcomes, with_time_features=config.model.name == "hazard_with_time"
        )
        sampler = TokenBudgetSampler(
            dataset,
            visits_per_batch=config.data.visits_per_batch,
            shuffle=shuffle,
            seed=config.seed,
            bucket=config.data.bucket,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        on_gpu = processes.device.type == "cuda"
        workers = config.data.workers if shuffle else 0
        batches = loader(dataset, sampler, workers=workers, pin_memory=on_gpu, start_method="spawn")
        return batches, sampler


def _split_of(store: EventStore, field: str, name: str) -> str:
    if name not in store.split_names:
        have = ", ".join(map(repr, store.split_names)) or "none"
        raise ValueError(f"data.{field}: expected a split of {store.path} ({have}), got {name!r}")
    return name


def _warn_of_no_tuning(why: str) -> None:
    warnings.warn(
        f"data.tuning_split: {why}: all epochs are trained, and the last one is the result",
        stacklevel=2,
    )


def _left_out(outcomes: Outcomes) -> str:
    """In brackets what outcomes there are that do not count, and why."""
    said = ", ".join(f"{number:,} {what}" for what, number in outcomes.left_out.items())
    return f" ({said})" if said else ""


def censored_visit(outcomes: Outcomes) -> str:
    """What the hazard's loss takes the visit of a censoring for.

    Where patients are followed from visit to visit the hazard at the last one is that of a visit
    which was not seen: ``"excluded"``. One prediction for each row is a statement about the whole
    time at risk, which a patient without the event has survived: ``"included"``.
    """
    return "excluded" if outcomes.each_visit else "included"


def censored_in_window(model: ModelConfig, outcomes: Outcomes) -> str:
    """What to know of a hazard that is one prediction for each row, where the observation of some
    ends within the time at risk: they count as without the event for all of it. ``""`` otherwise.
    """
    number = outcomes.censored_by.get("the end of observation", 0)
    if outcomes.each_visit or not model.has_hazard or not number:
        return ""
    said = (
        f"{number:,} of {len(outcomes):,} predictions are censored by the end of observation "
        "within the time at risk; the hazard counts them as without the event, and is too low as "
        "its risk: min_observation_days leaves them out"
    )
    return said + ("; risks by horizon are not affected" if model.has_horizons else "")


def observed_days(task: FirstEvent, outcomes: Outcomes) -> float:
    """For how many days of the risk window anybody is observed at most; of a task with a time at
    risk no more than that, though its last day is observed to its end."""
    days = (outcomes.end_times - outcomes.risk_starts) / np.timedelta64(1, "D")
    longest = float(np.nanmax(days, initial=0.0))
    most = task.time_at_risk_days
    return longest if most is None else min(longest, float(most))


def unobserved_horizons(model: ModelConfig, days: float | None) -> str:
    """What to know of risks within horizons beyond the ``days`` that anybody is observed for in
    training: no event after these is known, so that they are hardly above the risk within them.
    ``""`` where there are none.
    """
    beyond = [f"{each:g}" for each in model.horizons_days if days is not None and each > days]
    if not model.has_horizons or not beyond:
        return ""
    return (
        f"in training nobody is observed for more than {days:.0f} days of the time at risk: risks "
        f"within {', '.join(beyond)} days hold no event after that and are too low; a longer time "
        "at risk, or model.horizons_days up to it"
    )


def visit_hazard(outcomes: Outcomes) -> float:
    """Events per visit at risk, half an event and one visit more, so that it lies in (0, 1)."""
    seen = outcomes.event_indicators.astype(np.int64)
    last = seen if censored_visit(outcomes) == "excluded" else np.ones_like(seen)
    at_risk = int((outcomes.event_times - outcomes.entry_times + last).sum())
    return (int(seen.sum()) + 0.5) / (at_risk + 1)


def cause_hazards(outcomes: Outcomes) -> NDArray[np.float64]:
    """``[K]``: the same of each of competing outcomes."""
    assert outcomes.event_types is not None
    return cause_baselines(
        outcomes.event_times,
        outcomes.event_types,
        len(outcomes.causes),
        outcomes.entry_times,
        censored_visit=censored_visit(outcomes),
    ).constant


def horizon_hazards(
    outcomes: Outcomes, store: EventStore, horizons_days: tuple[int, ...], most: int = 1_000_000
) -> NDArray[np.float64]:
    """The observed hazard of each interval of days since a visit; of ``most`` evenly spaced rows,
    where there are more."""
    if len(outcomes) > most:
        outcomes = outcomes.select(np.linspace(0, len(outcomes) - 1, most).astype(np.int64))
    days = outcomes.days_to_end(store)
    row = np.repeat(np.arange(len(outcomes)), outcomes.n_visits)
    visit = np.arange(len(row)) - np.repeat(
        np.cumsum(outcomes.n_visits) - outcomes.n_visits, outcomes.n_visits
    )
    counts = visit >= outcomes.entry_times[row]
    events = outcomes.event_indicators[row[counts]]
    return interval_hazards(days[counts], events, horizons_days)
