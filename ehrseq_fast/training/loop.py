"""The training loop: epochs, the loss on the tuning split, checkpoints, and going on from one.

Whatever happens in a step is a function of what a checkpoint holds (weights, optimizer, the number
of steps and the place in the epoch) and of the configuration: the order of batches, the learning
rate and the random numbers of dropout are drawn anew from seed, epoch and step. So a run that was
killed at any moment and resumed ends with the same bits as one that was not, on a machine where two
runs do.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import PackedVisits
from .checkpoint import Checkpoint, Checkpoints, restore, tensors_of
from .config import RunConfig
from .data import TrainingData
from .distributed import Processes
from .loggers import CsvLog, Logger, Progress
from .model import loss_options
from .schedule import rate_factor, step_seed

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Totals:
    """Sums since the last row of the log."""

    loss: float = 0.0
    patients: int = 0
    visits: int = 0
    seconds: float = 0.0


@dataclass
class State:
    """Where a run is; what a checkpoint holds besides tensors.

    Attributes:
        epoch, position: the epoch, and how many of its batches are done.
        step: steps taken in all.
        best, best_epoch, best_loss: the checkpoint with the lowest loss on the tuning split.
        epochs_since_best: epochs without a lower one.
        stopped: whether early stopping has ended the run.
        seconds: spent training, evaluation included.
        totals: sums since the last row of the log; of this process alone, in a checkpoint of all.
        epoch_totals: sums over the epoch, up to that row, of all processes.
        log_bytes: length of ``log.csv``.
        scaler: of float16.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    best: str | None = None
    best_epoch: int | None = None
    best_loss: float | None = None
    epochs_since_best: int = 0
    stopped: bool = False
    seconds: float = 0.0
    totals: Totals = field(default_factory=Totals)
    epoch_totals: Totals = field(default_factory=Totals)
    log_bytes: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, held: dict[str, Any]) -> State:
        """What :func:`dataclasses.asdict` gave."""
        values = {each.name: held[each.name] for each in fields(cls)}
        totals = {name: Totals(**held[name]) for name in ("totals", "epoch_totals")}
        return cls(**values | totals)


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW in two groups: weights of products decay, the embedding and biases do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        decays = parameter.dim() > 1 and id(parameter) not in embeddings
        (decaying if decays else others).append(parameter)
    options = config.optimizer
    groups = [
        {"params": decaying, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True
    )


class Trainer:
    """One process's part of a run, from a state to its end.

    Args:
        config: of the run.
        processes: who trains.
        model: with its first weights; wrapped for training here.
        data: of the run.
        identity: what a checkpoint must match to be gone on from.
        checkpoints: where they are written; process 0 alone does.
    """

    def __init__(
        self,
        config: RunConfig,
        processes: Processes,
        model: nn.Module,
        data: TrainingData,
        identity: dict[str, Any],
        checkpoints: Checkpoints,
    ) -> None:
        self.config = config
        self.processes = processes
        self.model = model.to(processes.device)
        self.training = processes.wrap(self.model, **data.loss_options)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(
            processes.device.type, enabled=config.precision == "float16"
        )
        self.data = data
        self.identity = identity
        self.checkpoints = checkpoints
        self.state = State()
        self.loggers: list[Logger] = []
        self.csv: CsvLog | None = None
        self.progress = Progress(config.logging, epochs=config.epochs, here=processes.is_main)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=processes.device)
        self._began = time.monotonic()

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint holds."""
        restore(self.model, self.optimizer, checkpoint.tensors)
        self.state = State.of(checkpoint.state["progress"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(self.state.scaler)
        if self.processes.is_main:
            self._loss_sum.fill_(self.state.totals.loss)
        else:
            self.state.totals = Totals()

    def run(self) -> State:
        """Train to the end.

        Raises:
            RuntimeError: for a loss that is not finite, naming the step.
        """
        state = self.state
        self._began = time.monotonic()
        while state.epoch < self.config.epochs and not state.stopped:
            self._train_epoch()
            self._end_epoch()
        self.progress.close()
        return state

    # One epoch

    def _train_epoch(self) -> None:
        config, state = self.config, self.state
        self.training.train()
        batches = self.data.start_epoch(state.epoch, state.position)
        self.progress.start(state.epoch, batches, state.position)
        for batch in self.data.training_batches():
            loss = self._step(batch, (state.epoch + state.position / batches) / config.epochs)
            state.position += 1
            state.step += 1
            at_end = state.position == batches
            if at_end or state.step % config.logging.every_steps == 0:
                self._log_steps()
            self._show(loss, batch.n_visits)
            every = config.checkpoints.every_steps
            if not at_end and every is not None and state.step % every == 0:
                self._save()

    def _step(self, batch: PackedVisits, progress: float) -> Tensor:
        config, state = self.config, self.state
        torch.manual_seed(step_seed(config.seed, state.step, self.processes.rank))
        batch = batch.to(self.processes.device, non_blocking=True)
        rate = config.optimizer.learning_rate * rate_factor(config.schedule, state.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._autocast():
            loss = self.training(batch, **loss_options(batch))
        self.scaler.scale(loss).backward()
        if config.optimizer.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss.detach()
        # each process's loss is the global mean's share of it, times their number
        everybody = self.data.patients_of_batch(state.position)
        self._loss_sum += loss.double() * (everybody / self.processes.world_size)
        state.totals.patients += len(batch)
        state.totals.visits += batch.n_visits
        return loss

    def _end_epoch(self) -> None:
        config, state = self.config, self.state
        trained = self._log_epoch()
        loss = self.tuning_loss()
        said = f"epoch {state.epoch + 1}/{config.epochs}: training loss {trained:.5f}"
        if loss is not None:
            lower = state.best_loss is None or loss < state.best_loss - config.stopping.min_delta
            if lower:
                state.best, state.best_loss = self.checkpoints.name(state.step), loss
                state.best_epoch, state.epochs_since_best = state.epoch, 0
            else:
                state.epochs_since_best += 1
            patience = config.stopping.patience
            state.stopped = patience is not None and state.epochs_since_best >= patience
            said += f", tuning loss {loss:.5f}{' (lowest)' if lower else ''}"
        state.epoch, state.position = state.epoch + 1, 0
        self._save()
        self.progress.end(f"{said}, {state.seconds:.1f} s")
        if state.stopped:
            self.progress.say(f"stopped: no lower tuning loss in {state.epochs_since_best} epochs")

    @torch.no_grad()
    def tuning_loss(self) -> float | None:
        """The mean loss of the tuning split's patients, and a row of the log; None without any.

        Raises:
            RuntimeError: where it is not finite.
        """
        if not self.data.has_tuning:
            return None
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        patients = visits = 0
        self._lap()
        with _undivided(self.training), self._autocast():
            for batch in self.data.tuning_batches():
                patients += len(batch)
                visits += batch.n_visits
                if len(batch):
                    total += self._summed_loss(batch)
        sums = self.processes.sum(float(total), patients, visits)
        totals = Totals(sums[0], int(sums[1]), int(sums[2]), self._lap())
        return self._write("tuning", "epoch", totals)

    def _summed_loss(self, batch: PackedVisits) -> Tensor:
        batch = batch.to(self.processes.device, non_blocking=True)
        options = self.data.loss_options | loss_options(batch)
        model: Any = self.model
        return model.loss(batch, reduction="sum", **options).double()

    # What is told, and what is kept

    def _log_steps(self) -> None:
        """A row of the steps since the last one."""
        self._lap()
        totals = self._over_all_processes()
        self._write("train", "steps", totals)
        epoch = self.state.epoch_totals
        epoch.loss += totals.loss
        epoch.patients += totals.patients
        epoch.visits += totals.visits
        epoch.seconds += totals.seconds
        self.state.totals = Totals()
        self._loss_sum.zero_()

    def _log_epoch(self) -> float:
        """A row of the epoch; its mean loss."""
        loss = self._write("train", "epoch", self.state.epoch_totals)
        self.state.epoch_totals = Totals()
        return loss

    def _write(self, split: str, over: str, totals: Totals) -> float:
        state = self.state
        loss = totals.loss / totals.patients
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the {split} loss is {loss} at step {state.step} (epoch {state.epoch + 1}): "
                "expected a finite one; a lower optimizer.learning_rate, optimizer.clip_norm or "
                "precision: float32 may help"
            )
        row = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "split": split,
            "over": over,
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "patients": totals.patients,
            "visits": totals.visits,
            "visits_per_second": round(totals.visits / max(totals.seconds, 1e-9), 1),
            "seconds": round(state.seconds, 3),
        }
        for logger in self.loggers:
            logger.write(row)
        return loss

    def _lap(self) -> float:
        """Add the time since the last call to what was spent."""
        now = time.monotonic()
        spent, self._began = now - self._began, now
        self.state.seconds += spent
        self.state.totals.seconds += spent
        return spent

    def _over_all_processes(self) -> Totals:
        own = self.state.totals
        loss, patients, visits = self.processes.sum(float(self._loss_sum), own.patients, own.visits)
        return Totals(loss, int(patients), int(visits), own.seconds)

    def _show(self, loss: Tensor, visits: int) -> None:
        # on a GPU reading the loss would wait for the step
        reads = self.progress.is_bar and loss.device.type == "cpu"
        self.progress.step(loss.item() if reads else None, visits)

    def _save(self) -> None:
        self._lap()
        totals = self._over_all_processes()
        is_main = self.processes.is_main
        if not is_main and self.processes.strategy != "fsdp":
            return
        tensors = tensors_of(self.model, self.optimizer, keep=is_main)
        if not is_main:
            return
        state = self.state
        state.log_bytes = self.csv.length() if self.csv is not None else 0
        state.scaler = self.scaler.state_dict()
        held = {"progress": asdict(replace(state, totals=totals)), "best": state.best}
        self.checkpoints.save(state.step, tensors, held | {"identity": self.identity})

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _DTYPES.get(self.config.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, dtype)


@contextlib.contextmanager
def _undivided(training: nn.Module) -> Iterator[None]:
    """Within it a model that FSDP divides has whole parameters, and needs no other process."""
    if not hasattr(training, "unshard"):
        yield
        return
    divided: Any = training
    divided.unshard()
    try:
        yield
    finally:
        divided.reshard()
