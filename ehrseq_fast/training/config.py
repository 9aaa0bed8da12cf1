"""The configuration of a run: dataclasses, checked when they are made, and their YAML form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checks import expect_option
from .convert import flat, from_dict, plain, read_yaml, yaml_module
from .files import write_atomically

MODELS = ("hazard_and_horizons", "hazard", "hazard_with_time", "horizons", "competing_risks")
CELLS = ("lstm", "gru")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")
STRATEGIES = ("auto", "none", "ddp", "fsdp")


def _expect(name: str, value: Any, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how large.

    Args:
        name: ``"hazard_and_horizons"``: at each visit the hazard of the event at the next one, and
            the risk within each horizon of days, from one recurrent layer; ``"hazard"`` and
            ``"hazard_with_time"`` (which also sees the times of visits): the first alone;
            ``"horizons"``: the second alone. ``"competing_risks"``: at each visit the hazards of
            the task's competing outcomes, which it must have, and the other models must not.
        embedding_dim, hidden_dim, num_layers, dropout, cell: as in
            :class:`~ehrseq_fast.models.DiscreteTimeSurvivalLSTM`.
        horizons_days: ascending, for the models that have horizons.
    """

    name: str = "hazard_and_horizons"
    embedding_dim: int = 128
    hidden_dim: int = 128
    num_layers: int = 1
    dropout: float = 0.1
    cell: str = "lstm"
    horizons_days: tuple[int, ...] = (30, 90, 180, 365, 730)

    def __post_init__(self) -> None:
        expect_option("model.name", self.name, MODELS)
        expect_option("model.cell", self.cell, CELLS)
        for name in ("embedding_dim", "hidden_dim", "num_layers"):
            _expect(f"model.{name}", getattr(self, name), "at least 1", getattr(self, name) >= 1)
        _expect("model.dropout", self.dropout, "a number in [0, 1)", 0 <= self.dropout < 1)
        days = tuple(self.horizons_days)
        ascending = all(a < b for a, b in zip((0, *days), days, strict=False))
        _expect("model.horizons_days", days, "ascending days above 0", bool(days) and ascending)
        object.__setattr__(self, "horizons_days", days)

    @property
    def has_horizons(self) -> bool:
        """Whether the model gives risks by horizon."""
        return self.name in ("hazard_and_horizons", "horizons")

    @property
    def has_hazard(self) -> bool:
        """Whether the model gives a hazard per visit."""
        return self.name != "horizons"

    @property
    def has_causes(self) -> bool:
        """Whether its hazards are those of competing outcomes."""
        return self.name == "competing_risks"


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how.

    Args:
        visits_per_batch: real visits of a global batch (of all processes together).
        bucket: how many patients are sorted by length together before they are cut into batches.
            1 sorts nothing: a batch is a random sample of patients. Records end at their event, so
            batches of one length are of one outcome, and the steps they make point to and fro;
            sorting saves a recurrent layer steps, but no work, as nothing is padded.
        workers: data-loader processes of each training process; 0 loads in the process itself.
        train_split, tuning_split: names of the store's splits. Early stopping and the choice of
            the best epoch go by the loss on ``tuning_split``. Where that is None, all epochs are
            trained and the last one is the result; likewise, with a warning, where nobody is left
            there, and in a store that has no split of the default name.
    """

    visits_per_batch: int = 4096
    bucket: int = 1
    workers: int = 0
    train_split: str = "train"
    tuning_split: str | None = "tuning"

    def __post_init__(self) -> None:
        _expect(
            "data.visits_per_batch", self.visits_per_batch, "at least 1", self.visits_per_batch >= 1
        )
        _expect("data.bucket", self.bucket, "at least 1", self.bucket >= 1)
        _expect("data.workers", self.workers, "0 or more", self.workers >= 0)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Weights of the recurrent layer and the heads decay; biases and the embedding do not.

    Args:
        learning_rate: at the top of the schedule.
        weight_decay, betas, eps: as in ``torch.optim.AdamW``.
        clip_norm: gradients of a larger norm are scaled down to it; None leaves them.
    """

    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _expect("optimizer.learning_rate", self.learning_rate, "above 0", self.learning_rate > 0)
        _expect("optimizer.weight_decay", self.weight_decay, "0 or more", self.weight_decay >= 0)
        fits = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _expect("optimizer.betas", self.betas, "two numbers in [0, 1)", fits)
        _expect("optimizer.eps", self.eps, "above 0", self.eps > 0)
        positive = self.clip_norm is None or self.clip_norm > 0
        _expect("optimizer.clip_norm", self.clip_norm, "above 0, or none", positive)
        object.__setattr__(self, "betas", tuple(self.betas))


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes.

    Args:
        name: ``"cosine"``: down to ``final_fraction`` of the rate at the end of the last epoch;
            ``"constant"``.
        warmup_steps: steps over which the rate rises linearly from 0, before either.
        final_fraction: of the learning rate, at the end of a cosine.
    """

    name: str = "cosine"
    warmup_steps: int = 20
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        expect_option("schedule.name", self.name, SCHEDULES)
        _expect("schedule.warmup_steps", self.warmup_steps, "0 or more", self.warmup_steps >= 0)
        fits = 0 <= self.final_fraction <= 1
        _expect("schedule.final_fraction", self.final_fraction, "a number in [0, 1]", fits)


@dataclass(frozen=True)
class StoppingConfig:
    """Early stopping on the loss of the tuning split.

    Args:
        patience: epochs without a new lowest loss after which training stops; None never stops.
        min_delta: by how much a loss must be lower to count.
    """

    patience: int | None = 3
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        positive = self.patience is None or self.patience >= 1
        _expect("stopping.patience", self.patience, "at least 1, or none", positive)
        _expect("stopping.min_delta", self.min_delta, "0 or more", self.min_delta >= 0)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written (at the end of every epoch in any case) and how many stay.

    Args:
        every_steps: also after so many steps; None for the ends of epochs alone.
        keep_last: how many stay, besides that of the best epoch.
    """

    every_steps: int | None = 1000
    keep_last: int = 2

    def __post_init__(self) -> None:
        positive = self.every_steps is None or self.every_steps >= 1
        _expect("checkpoints.every_steps", self.every_steps, "at least 1, or none", positive)
        _expect("checkpoints.keep_last", self.keep_last, "at least 1", self.keep_last >= 1)


@dataclass(frozen=True)
class LoggingConfig:
    """What is told of a run while it trains. ``log.csv`` is always written.

    Args:
        every_steps: a row of the training loss after so many steps, and at the end of every epoch.
        progress: a progress bar on a terminal, a line for each epoch elsewhere.
        tensorboard: also write event files to ``RUN/tensorboard``.
        mlflow: an MLflow tracking URI to log to as well, or None: a server's
            (``http://localhost:5000``), or, with the package ``mlflow`` beside ``mlflow-skinny``, a
            database's (``sqlite:////home/me/mlflow.db``).
        mlflow_experiment: the experiment's name there.
    """

    every_steps: int = 50
    progress: bool = True
    tensorboard: bool = False
    mlflow: str | None = None
    mlflow_experiment: str = "ehrseq_fast"

    def __post_init__(self) -> None:
        _expect("logging.every_steps", self.every_steps, "at least 1", self.every_steps >= 1)


@dataclass(frozen=True)
class DistributedConfig:
    """Training in several processes, which ``torchrun`` starts.

    Args:
        strategy: ``"ddp"``: each process holds the whole model; ``"fsdp"``: parameters, gradients
            and optimizer state are divided between them (FSDP2); ``"none"``; ``"auto"``: ``"ddp"``
            where there are several processes.
        timeout_seconds: how long a process waits for the others before all end with an error.
    """

    strategy: str = "auto"
    timeout_seconds: float = 300.0

    def __post_init__(self) -> None:
        expect_option("distributed.strategy", self.strategy, STRATEGIES)
        positive = self.timeout_seconds > 0
        _expect("distributed.timeout_seconds", self.timeout_seconds, "above 0", positive)


@dataclass(frozen=True)
class RunConfig:
    """All that decides a run.

    Args:
        store: folder of the :class:`~ehrseq_fast.data.EventStore`.
        run: folder that the run writes to.
        task: the outcome: a :class:`~ehrseq_fast.data.tasks.FirstEvent`, or its ``to_dict()``.
        epochs: at most so many passes over the training split.
        seed: of the weights, of the order of batches and of dropout.
        device: ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        precision: ``"float32"``, or 16 bits by ``torch.autocast`` (``"float16"`` with scaled
            gradients).
        model, data, optimizer, schedule, stopping, checkpoints, logging, distributed: see there.

    Raises:
        ValueError: for values out of range, naming field, value and what was expected.

    Example:
        >>> from ehrseq_fast.training import ModelConfig, RunConfig
        >>> config = RunConfig(store="store", run="run", model=ModelConfig(hidden_dim=64))
        >>> RunConfig.from_dict(config.to_dict()) == config
        True
        >>> RunConfig(epochs=0)
        Traceback (most recent call last):
        ...
        ValueError: epochs: expected at least 1, got 0
    """

    store: str = ""
    run: str = ""
    task: dict[str, Any] = field(default_factory=dict)
    epochs: int = 20
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", str(self.store))
        object.__setattr__(self, "run", str(self.run))
        task = self.task.to_dict() if hasattr(self.task, "to_dict") else self.task
        object.__setattr__(self, "task", plain(task))
        _expect("epochs", self.epochs, "at least 1", self.epochs >= 1)
        _expect("seed", self.seed, "a number in [0, 2**63)", 0 <= self.seed < 2**63)
        expect_option("precision", self.precision, PRECISIONS)
        if self.task and self.model.has_causes != ("competing" in self.task):
            expected = "another" if self.model.has_causes else "'competing_risks'"
            raise ValueError(
                f"model.name: expected {expected} for a task "
                f"{'without' if self.model.has_causes else 'with'} competing outcomes, got "
                f"{self.model.name!r}"
            )

    @property
    def n_causes(self) -> int:
        """How many competing outcomes the task has; 0 for one outcome."""
        return 1 + len(self.task["competing"]) if "competing" in self.task else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, as YAML and JSON have them."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration of :meth:`to_dict`; what is not given has its default.

        Raises:
            ValueError: for unknown fields, and values out of range.
            TypeError: for values of another type.
        """
        return from_dict(cls, values)

    def flat(self) -> list[tuple[str, Any]]:
        """Every field with its dotted name, such as ``("model.cell", "lstm")``."""
        return flat(self)

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML, atomically."""
        write_atomically(
            Path(path), yaml_module().safe_dump(self.to_dict(), sort_keys=False).encode()
        )

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: for a file that is not such YAML, naming it.
            OSError: for one that cannot be read.
        """
        return cls.from_dict(read_yaml(path))


# What may differ between a run and its resumption. None of it changes the parameters, but for the
# rounding of another device or number of processes.
_FREE = (
    "run.",
    "store.",  # it may have moved: a store is known by its content
    "device.",
    "data.workers.",
    "checkpoints.",
    "logging.",
    "distributed.",
)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The fields that differ and decide the parameters: ``"model.cell: 'gru', now 'lstm'"``."""
    return [
        f"{name}: {before!r}, now {after!r}"
        for (name, before), (_, after) in zip(old.flat(), new.flat(), strict=True)
        if before != after and not f"{name}.".startswith(_FREE)
    ]
