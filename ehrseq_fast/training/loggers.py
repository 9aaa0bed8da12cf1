"""What is told of a run while it trains: ``log.csv``, TensorBoard, MLflow, and the progress bar."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from ..optional import need
from .config import LoggingConfig
from .files import write_atomically

COLUMNS = (
    "epoch",
    "step",
    "split",
    "over",
    "loss",
    "learning_rate",
    "patients",
    "visits",
    "visits_per_second",
    "seconds",
)


class Logger(Protocol):
    """Takes rows of ``COLUMNS``; ``position`` is where it stands, for a checkpoint."""

    def write(self, row: dict[str, Any]) -> None:
        """Take one row."""

    def close(self) -> None:
        """Write out what is left."""


class CsvLog:
    """``log.csv``. A checkpoint keeps its length; resuming cuts off what was written after it, so
    that each row is there exactly once.

    Args:
        path: the file.
        length: bytes to keep of it; 0 starts it anew.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        have = path.stat().st_size if path.exists() else 0
        if have < length:
            raise ValueError(f"{path}: expected at least {length} bytes, got {have}")
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self._file.truncate(length)
        self._file.seek(length)
        if length == 0:
            self._file.write(_line(list(COLUMNS)))

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(_line([row.get(name, "") for name in COLUMNS]))
        self._file.flush()

    def length(self) -> int:
        """Bytes written so far, all of them on disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _line(values: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def check_loggers(config: LoggingConfig) -> None:
    """Refuse what cannot be logged to, before anything of a run is written.

    Raises:
        ImportError: packages of the extra ``tensorboard`` or ``mlflow`` are missing.
        ValueError: an MLflow tracking URI that MLflow does not take, or that does not answer.
    """
    if config.tensorboard:
        _tensorboard()
    if config.mlflow is not None:
        _mlflow(config.mlflow, config.mlflow_experiment)


def _tensorboard() -> Any:
    need("tensorboard", "tensorboard", "logging.tensorboard")
    return need("torch.utils.tensorboard", "tensorboard", "logging.tensorboard")


def _mlflow(uri: str, experiment: str) -> tuple[Any, Any]:
    """A client, and the experiment, or None where there is none of that name yet."""
    need("mlflow", "mlflow", "logging.mlflow")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        return client, client.get_experiment_by_name(experiment)
    except MlflowException as error:
        said = " ".join(str(error).split())
        raise ValueError(
            "logging.mlflow: expected the tracking URI of a server that answers "
            "('http://localhost:5000'), or, where the package mlflow is installed and not "
            "mlflow-skinny alone, of a database ('sqlite:////home/me/mlflow.db'), "
            f"got {uri!r}: {said}"
        ) from error


class TensorBoardLog:
    """Event files in ``folder``. What an interrupted run wrote from ``step`` on is hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        board = _tensorboard()
        self._writer = board.SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        for name in ("loss", "learning_rate", "visits_per_second"):
            self._writer.add_scalar(f"{_series(row)}/{name}", row[name], row["step"])

    def close(self) -> None:
        self._writer.close()


class MlflowLog:
    """A run of MLflow, which a resumed run goes on with.

    Args:
        uri: the tracking URI.
        experiment: the experiment's name, made where it is missing.
        id_file: where the run's id is kept.
        parameters: logged once.
    """

    def __init__(
        self, uri: str, experiment: str, id_file: Path, parameters: dict[str, Any]
    ) -> None:
        self._client, found = _mlflow(uri, experiment)
        if id_file.exists():
            self._id = id_file.read_text().strip()
            return
        where = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self._id = self._client.create_run(where).info.run_id
        write_atomically(id_file, self._id.encode())
        for name, value in parameters.items():
            self._client.log_param(self._id, name, str(value)[:500])

    def write(self, row: dict[str, Any]) -> None:
        for name in ("loss", "learning_rate", "visits_per_second"):
            key = f"{_series(row)}_{name}"
            self._client.log_metric(self._id, key, float(row[name]), step=int(row["step"]))

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _series(row: dict[str, Any]) -> str:
    return f"{row['split']}_{row['over']}"


class Progress:
    """A bar for each epoch with the loss, visits per second and time left, on stderr; where that is
    no terminal, a line at the end of each epoch."""

    def __init__(self, config: LoggingConfig, *, epochs: int, here: bool) -> None:
        self._shown = config.progress and here
        self._epochs = epochs
        self._bar: Any = None
        self._loss = ""
        self._visits = 0
        self._began = 0.0

    def start(self, epoch: int, batches: int, position: int) -> None:
        """An epoch begins, or goes on at its batch ``position``."""
        self._visits, self._began = 0, time.monotonic()
        if self._shown and sys.stderr.isatty():
            tqdm = need("tqdm", "train", "the progress bar").tqdm
            self._bar = tqdm(
                total=batches,
                initial=position,
                desc=f"epoch {epoch + 1}/{self._epochs}",
                unit="batch",
                dynamic_ncols=True,
                leave=False,
            )

    @property
    def is_bar(self) -> bool:
        """Whether a bar is shown."""
        return self._bar is not None

    def step(self, loss: float | None, visits: int) -> None:
        """One more batch, of so many visits."""
        if self._bar is None:
            return
        self._visits += visits
        seconds = max(time.monotonic() - self._began, 1e-9)
        if loss is not None:
            self._loss = f"loss {loss:.4f}, "
        said = f"{self._loss}{self._visits / seconds:,.0f} visits/s"
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update()

    def end(self, line: str) -> None:
        """The epoch is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self.say(line)

    def say(self, line: str) -> None:
        """One line, where anything is shown."""
        if self._shown:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()
