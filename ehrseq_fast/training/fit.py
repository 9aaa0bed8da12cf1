"""From a configuration to a trained model."""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..data import EventStore
from .checkpoint import Checkpoint, Checkpoints, load_tensors, save_tensors, weights_of
from .config import RunConfig
from .data import TrainingData
from .distributed import Processes, started
from .files import write_json
from .held_out import save_patients
from .loggers import CsvLog, MlflowLog, TensorBoardLog, check_loggers
from .loop import State, Trainer
from .model import make_model, start_at_rates
from .run import (
    FORMAT,
    VERSION,
    Run,
    RunFolder,
    begin,
    is_finished,
    last_checkpoint,
    refuse_another,
    refuse_existing,
)


def fit(config: RunConfig, *, resume: bool = False) -> Run:
    """Train a model on a store's patients, and write the folder ``config.run``.

    The folder has ``model.safetensors`` (the weights of the epoch with the lowest loss on the
    tuning split), ``config.yaml``, ``log.csv`` and what ``evaluate`` and ``predict`` need. A run
    that was interrupted at any moment goes on with ``resume=True``, and ends on the CPU with the
    same bits as one that was not. Under ``torchrun`` all processes train together. torch's global
    generators are left as they were.

    Args:
        config: all that decides the run.
        resume: go on with the run in the folder. Where there is none yet, it begins; where it has
            ended, that is said, and it is returned.

    Raises:
        FileExistsError: the folder exists, without ``resume``.
        ValueError: a configuration, task or store that does not fit, or is not that of the run to
            go on with; the message says what differs.
        RuntimeError: another process trains in that folder; a loss that is not finite.
        ImportError: packages of the extra ``train`` are missing.

    Example::

        from ehrseq_fast.data.tasks import FirstEvent
        from ehrseq_fast.training import RunConfig, fit

        run = fit(RunConfig(store="store", run="run", task=FirstEvent("I21")))
        model = run.model()
    """
    with ExitStack() as stack:
        processes = stack.enter_context(started(config.distributed, config.device))
        on_gpu = [processes.device] if processes.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(on_gpu))
        return _fit(config, resume, processes, stack)


def _fit(config: RunConfig, resume: bool, processes: Processes, stack: ExitStack) -> Run:
    if processes.strategy == "fsdp" and config.precision == "float16":
        raise ValueError("precision: expected 'float32' or 'bfloat16' with fsdp, got 'float16'")
    if not config.run:
        raise ValueError("run: expected a folder, got ''")
    folder = RunFolder(Path(config.run))
    if not resume:
        processes.on_main(lambda: refuse_existing(folder))
    store = EventStore(config.store)
    data = TrainingData(config, store, processes)
    processes.on_main(lambda: check_loggers(config.logging))
    identity = {
        "store_path": str(store.path),
        "store_sha256": store.header["content_sha256"],
        "vocab_size": store.vocab_size,
        "task": config.to_dict()["task"],
    }

    checkpoint: Checkpoint | None = None

    def prepare() -> str:
        nonlocal checkpoint
        stack.enter_context(folder.locked())
        if not resume:
            refuse_existing(folder)
        if not folder.state.exists():
            begin(folder, config, identity, _codes_by_row(store))
            return "begin"
        refuse_another(folder, config, identity)
        if is_finished(folder):
            return "finished"
        checkpoint, wrong = last_checkpoint(folder, config.checkpoints.keep_last)
        for what in wrong:
            warnings.warn(f"going on from an earlier checkpoint: {what}", stacklevel=2)
        return "begin" if checkpoint is None else str(checkpoint.path)

    plan = processes.on_main(prepare)
    say = processes.is_main and config.logging.progress
    if plan == "finished":
        if say:
            print(f"{folder.path}: this run has ended already", file=sys.stderr)
        return Run.open(folder.path)
    if plan != "begin" and checkpoint is None:
        checkpoint = load_tensors(Path(plan))

    torch.manual_seed(config.seed)
    model = make_model(config.model, store.vocab_size, config.n_causes)
    hazard, horizons = data.observed_rates()
    start_at_rates(model, hazard, horizons)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoints.keep_last)
    trainer = Trainer(config, processes, model, data, identity, checkpoints)
    if checkpoint is not None:
        trainer.go_on_from(checkpoint)
        if say:
            at = f"epoch {trainer.state.epoch + 1}, step {trainer.state.step}"
            print(f"going on from {checkpoint.path.name} ({at})", file=sys.stderr)
        checkpoint = None
    if processes.is_main:
        _add_loggers(trainer, folder, config, stack)
    state = trainer.run()
    processes.on_main(lambda: _finish(folder, config, identity, data, state))
    return Run.open(folder.path)


def _add_loggers(trainer: Trainer, folder: RunFolder, config: RunConfig, stack: ExitStack) -> None:
    state, options = trainer.state, config.logging
    trainer.csv = CsvLog(folder.log, state.log_bytes)
    trainer.loggers.append(trainer.csv)
    if options.tensorboard:
        trainer.loggers.append(TensorBoardLog(folder.path / "tensorboard", state.step))
    if options.mlflow is not None:
        trainer.loggers.append(
            MlflowLog(
                options.mlflow,
                options.mlflow_experiment,
                folder.path / "mlflow_run",
                dict(config.flat()),
            )
        )
    for logger in trainer.loggers:
        stack.callback(logger.close)


def _finish(
    folder: RunFolder,
    config: RunConfig,
    identity: dict[str, Any],
    data: TrainingData,
    state: State,
) -> None:
    """Write the weights of the best epoch, and then that the run has ended."""
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoints.keep_last)
    best = folder.checkpoints / (state.best or checkpoints.name(state.step))
    about = {
        "format": "ehrseq_fast.model",
        "model": config.to_dict()["model"],
        "vocab_size": identity["vocab_size"],
        "n_causes": config.n_causes,
    }
    save_tensors(folder.weights, weights_of(load_tensors(best).tensors), about)
    outcomes, tuning = data.outcomes, data.tuning_outcomes
    save_patients(folder, data.store, outcomes, tuning)
    result = {
        "epochs": state.epoch,
        "steps": state.step,
        "best_epoch": None if state.best_epoch is None else state.best_epoch + 1,
        "best_loss": state.best_loss,
        "stopped_early": state.stopped,
        "seconds": round(state.seconds, 3),
        "patients": {"train": len(outcomes), "tuning": len(tuning)},
        "events": {
            "train": int(outcomes.event_indicators.sum()),
            "tuning": int(tuning.event_indicators.sum()),
        },
        "attrition": outcomes.attrition.to_dict(),
        "warnings": list(outcomes.warnings),
        "observed_days": data.observed_days,
        "visit_rule": data.store.visit_rule,
    }
    about_run = {"format": FORMAT, "version": VERSION, "status": "finished"}
    write_json(folder.state, about_run | identity | result)


def _codes_by_row(store: EventStore) -> list[str]:
    """The code of each row of the embedding; ``""`` for padding and the unknown code."""
    codes = [""] * store.vocab_size
    for code, row in zip(store.codes_of, store.vocabulary.tolist(), strict=True):
        if row >= 2:
            codes[row] = code
    return codes
