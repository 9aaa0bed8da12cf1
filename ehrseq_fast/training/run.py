"""The folder of a run: what is in it, who may write to it, and how it is read back."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, CheckpointError, Checkpoints, load_tensors, load_weights
from .config import ModelConfig, RunConfig, differences
from .files import read_json, remove_temporaries, write_json
from .model import make_model

FORMAT = "ehrseq_fast.Run"
VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are.

    ``config.yaml`` (the whole configuration), ``run.json`` (store, task, and at the end the
    result), ``vocabulary.json`` (the code of each row of the embedding), ``log.csv``,
    ``checkpoints/`` and, at the end, ``patients.safetensors`` (the subject ids of those who were
    trained and tuned on) and ``model.safetensors``: the weights of the best epoch.
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def state(self) -> Path:
        return self.path / "run.json"

    @property
    def vocabulary(self) -> Path:
        return self.path / "vocabulary.json"

    @property
    def log(self) -> Path:
        return self.path / "log.csv"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def patients(self) -> Path:
        return self.path / "patients.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def is_taken(self) -> bool:
        """Whether there is anything in it but its lock."""
        return self.path.exists() and (
            not self.path.is_dir() or any(p.name != ".lock" for p in self.path.iterdir())
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other processes from training in it.

        Raises:
            RuntimeError: where one does already.
            NotADirectoryError: where the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path}: expected a folder for the run, got a file")
        self.path.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            yield
            return
        import fcntl

        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"{self.path}: another process is training in it") from None
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(descriptor)


def refuse_existing(folder: RunFolder) -> None:
    """``FileExistsError`` for a folder with anything in it."""
    if folder.is_taken():
        raise FileExistsError(
            f"{folder.path}: exists; --resume (resume=True) goes on with a run, a new one needs "
            "a folder of its own"
        )


def begin(folder: RunFolder, config: RunConfig, identity: dict[str, Any], codes: list[str]) -> None:
    """Write what identifies a run, before its first step; ``run.json`` comes last.

    Raises:
        FileExistsError: for a folder with anything else in it than a crash here leaves.
    """
    own = (".lock", folder.vocabulary.name, folder.config.name, folder.state.name, "checkpoints")
    others = sorted(p.name for p in folder.path.iterdir() if not p.name.startswith(own))
    if others:
        raise FileExistsError(f"{folder.path}: expected a run or nothing, got {others[0]!r} in it")
    remove_temporaries(folder.path)
    folder.checkpoints.mkdir(exist_ok=True)
    write_json(folder.vocabulary, codes)
    config.save(folder.config)
    write_json(
        folder.state, {"format": FORMAT, "version": VERSION, "status": "training"} | identity
    )


def refuse_another(folder: RunFolder, config: RunConfig, identity: dict[str, Any]) -> None:
    """``ValueError`` where a run is not one of this configuration, task and store."""
    differing = differences(RunConfig.load(folder.config), config)
    held = read_json(folder.state)
    for name, value in identity.items():
        if held.get(name) != value and name not in ("store_path", "task"):  # the configuration's
            differing.append(f"{name}: {held.get(name)!r}, now {value!r}")
    if differing:
        raise ValueError(
            f"{folder.path}: cannot go on with another configuration ({'; '.join(differing)})"
        )


def is_finished(folder: RunFolder) -> bool:
    """Whether training has ended, and its weights are there."""
    if not (folder.state.exists() and folder.weights.exists()):
        return False
    return read_json(folder.state).get("status") == "finished"


def last_checkpoint(folder: RunFolder, keep_last: int) -> tuple[Checkpoint | None, list[str]]:
    """Where to go on, and what is wrong with later checkpoints."""
    remove_temporaries(folder.path)
    remove_temporaries(folder.checkpoints)
    return Checkpoints(folder.checkpoints, keep_last).latest()


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        folder: its files.
        config: the configuration.
        result: ``run.json``: ``epochs``, ``best_epoch``, ``best_loss``, ``steps``, ``seconds``, ...

    Example:
        >>> from ehrseq_fast.training import Run
        >>> Run.open("no_such_run")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no_such_run: expected the folder of a run, with config.yaml and run.json
    """

    folder: RunFolder
    config: RunConfig
    result: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read a run back.

        Raises:
            FileNotFoundError: for a folder that holds no run, or one without weights yet.
            ValueError: for files that are damaged or of another version, naming them.
        """
        folder = RunFolder(Path(path))
        if not (folder.config.exists() and folder.state.exists()):
            raise FileNotFoundError(
                f"{path}: expected the folder of a run, with config.yaml and run.json"
            )
        result = read_json(folder.state)
        found = (result.get("format"), result.get("version"))
        if found != (FORMAT, VERSION):
            raise ValueError(f"{folder.state}: expected {FORMAT} {VERSION}, got {found}")
        if not is_finished(folder):
            raise FileNotFoundError(
                f"{folder.weights}: this run has not ended; `train ... --resume` goes on with it"
            )
        return cls(folder, RunConfig.load(folder.config), result)

    @property
    def codes(self) -> list[str]:
        """The code of each row of the embedding; ``""`` for padding and the unknown code."""
        return read_json(self.folder.vocabulary)

    def model(self, device: str | torch.device = "cpu") -> Any:
        """The model with its weights, in evaluation mode.

        Raises:
            CheckpointError: for a damaged ``model.safetensors``, naming it.
        """
        held = load_tensors(self.folder.weights)
        about = held.state
        config = ModelConfig(**about["model"])
        model = make_model(config, about["vocab_size"], about.get("n_causes", 0))
        try:
            load_weights(model, held.tensors)
        except ValueError as error:
            raise CheckpointError(f"{self.folder.weights}: {error}") from error
        return model.to(device).eval()

    def history(self) -> list[dict[str, Any]]:
        """The rows of ``log.csv``: numbers as numbers, what is empty as None."""
        with self.folder.log.open(newline="") as file:
            return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    if text == "":
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
