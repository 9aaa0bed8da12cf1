"""Two processes train as one does, and end together when one is lost."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ehrseq_fast.data.tasks import FirstEvent
from ehrseq_fast.training import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    LoggingConfig,
    ModelConfig,
    Run,
    RunConfig,
    fit,
    scoring,
)
from ehrseq_fast.training.distributed import Processes
from tests import small_chunks
from tests.extras import needs
from tests.known_hazards import EVENT, KnownHazards
from tests.training_gradients import gradients

pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ehrseq_fast[meds]'")
pytestmark = [
    needs("train"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
]


def config(store, run, **changes):
    """No dropout. The last batches of an epoch are of a few visits, so that a share of them may be
    empty."""
    made = RunConfig(
        store=str(store.path),
        run=str(run),
        task=FirstEvent(EVENT),
        epochs=2,
        device="cpu",
        model=ModelConfig(embedding_dim=8, hidden_dim=16, dropout=0.0, horizons_days=(30, 90)),
        data=DataConfig(visits_per_batch=70),
        checkpoints=CheckpointConfig(every_steps=None),
        logging=LoggingConfig(every_steps=1, progress=False),
    )
    return dataclasses.replace(made, **changes)


ROOT = Path(__file__).parent.parent


def torchrun(*arguments, processes=2, program=("-m", "ehrseq_fast")):
    """``python -m ehrseq_fast``, or another program, in so many processes."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            f"--nproc-per-node={processes}",
            *program,
            *map(str, arguments),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def train(config):
    path = config.run + ".yaml"
    config.save(path)
    running = torchrun("train", config.store, config.run, "--config", path)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 0, error
    return Run.open(config.run)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return KnownHazards.draw(150).store(tmp_path_factory.mktemp("known"))


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    return fit(config(store, tmp_path_factory.mktemp("alone") / "run"))


def assert_trained_alike(one, other):
    losses = [[row["loss"] for row in run.history()] for run in (one, other)]
    assert len(losses[0]) == len(losses[1]) > 10
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-4)
    states = [run.model().state_dict() for run in (one, other)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(store, alone, tmp_path, strategy):
    two = config(store, tmp_path / "run", distributed=DistributedConfig(strategy=strategy))
    assert_trained_alike(alone, train(two))


def test_gradients_of_two_processes_are_those_of_one(store, tmp_path):
    """At each batch of an epoch, whatever the shares: of unequal size, and of the last nothing."""
    made = config(store, tmp_path / "run")
    path = tmp_path / "config.yaml"
    made.save(path)
    running = torchrun(
        path, tmp_path / "two", "ddp", "fsdp", program=["-m", "tests.training_gradients"]
    )
    _, error = running.communicate(timeout=120)
    assert running.returncode == 0, error
    expected, _ = gradients(made, Processes(0, 1, torch.device("cpu"), "none"))
    for strategy in ("ddp", "fsdp"):
        found = torch.load(tmp_path / f"two.{strategy}.pt", weights_only=True)
        assert len(found["gradients"]) == len(expected) > 5
        for got, wanted in zip(found["gradients"], expected, strict=True):
            for name in wanted:
                torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)
        shares = list(zip(*found["shares"], strict=True))
        assert any(one != other for one, other in shares)
        assert any(0 in share for share in shares)


# A process that is lost


def start_and_wait(config, rows):
    """A run in two processes, once its log has so many rows."""
    path = config.run + ".yaml"
    config.save(path)
    running = torchrun("train", config.store, config.run, "--config", path)
    wait_for_rows(Path(config.run), rows, running)
    return running


def wait_for_rows(run, rows, running):
    """Until a run's log has so many rows."""
    deadline = time.monotonic() + 90
    log = run / "log.csv"
    while time.monotonic() < deadline and running.poll() is None:
        if log.exists() and log.read_text().count("\n") > rows:
            return
        time.sleep(0.02)
    running.kill()
    raise AssertionError(running.communicate()[1])


def process_of_rank(rank, launcher):
    """The process id of a rank that torchrun has started."""
    psutil = pytest.importorskip("psutil")
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError(f"no process of rank {rank}")


def test_the_loss_of_a_process_ends_all_and_costs_nothing(store, alone, tmp_path):
    """The launcher ends with an error; the run then goes on, in one process: checkpoints are whole,
    and do not depend on how many processes wrote them."""
    run = tmp_path / "run"
    two = config(store, run, checkpoints=CheckpointConfig(every_steps=1))
    running = start_and_wait(two, rows=4)
    os.kill(process_of_rank(1, running), signal.SIGKILL)
    _, error = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "SIGKILL" in error
    assert_trained_alike(alone, fit(config(store, run), resume=True))


def test_a_process_that_does_not_answer_is_not_waited_for_forever(store, tmp_path):
    """Started without torchrun, which would see to a lost process itself."""
    run = tmp_path / "run"
    made = config(store, run, epochs=10_000, distributed=DistributedConfig(timeout_seconds=3))
    made.save(tmp_path / "c.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ehrseq_fast", "train", made.store, made.run]
    command += ["--config", str(tmp_path / "c.yaml"), "--stopping.patience", "null"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            command,
            env=os.environ | place | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in (0, 1)
    ]
    try:
        wait_for_rows(Path(made.run), 3, both[0])
        os.kill(both[1].pid, signal.SIGSTOP)
        _, error = both[0].communicate(timeout=60)
        assert both[0].returncode == 1
        assert "one of the 2 processes was lost, or did not answer within 3 s" in error
        assert error.strip().count("\n") == 0
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_predictions_are_the_same_bytes_for_any_number_of_processes(
    store, alone, tmp_path, monkeypatch
):
    """Of the same row groups, of which one process has more than the other."""
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    arguments = ["predict", alone.folder.path, store.path, two, "--device", "cpu"]
    running = torchrun(*arguments, program=["-m", "tests.small_chunks"])
    monkeypatch.setattr(scoring, "VISITS_PER_CHUNK", small_chunks.VISITS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there; the plain PyTorch of no kernels depends on it
    try:
        scoring.predict(alone, store, one, device="cpu")
    finally:
        torch.set_num_threads(threads)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 0, error
    assert one.read_bytes() == two.read_bytes()
    assert pq.ParquetFile(one).num_row_groups == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.parquet", "two.parquet"]
