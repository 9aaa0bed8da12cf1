"""A run that is killed at any moment and resumed ends with the bits of one that is not."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import sys

import numpy as np
import pytest

from ehrseq_fast.data.tasks import FirstEvent
from ehrseq_fast.training import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    RunConfig,
    StoppingConfig,
    fit,
)
from ehrseq_fast.training.checkpoint import CheckpointError
from tests import killed
from tests.extras import needs
from tests.known_hazards import EVENT, KnownHazards

pytestmark = [
    needs("train"),
    pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9"),
]


def config(store, run, **changes):
    """Dropout, a warm-up and a cosine, and early stopping before the last epoch."""
    made = RunConfig(
        store=str(store.path),
        run=str(run),
        task=FirstEvent(EVENT),
        epochs=9,
        seed=3,
        device="cpu",
        model=ModelConfig(embedding_dim=8, hidden_dim=16, dropout=0.3, horizons_days=(30, 90)),
        data=DataConfig(visits_per_batch=300),
        optimizer=OptimizerConfig(learning_rate=0.06),
        stopping=StoppingConfig(patience=1),
        checkpoints=CheckpointConfig(every_steps=3, keep_last=2),
        logging=LoggingConfig(every_steps=2, progress=False),
    )
    return dataclasses.replace(made, **changes)


def rows(run):
    """The log without what a clock says."""
    with (run / "log.csv").open() as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return KnownHazards.draw(600).store(tmp_path_factory.mktemp("known"))


@pytest.fixture(scope="module")
def uninterrupted(store, tmp_path_factory):
    """The folder of a whole run, and how many moments it had."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, killed.moments_of(config(store, run))


def test_the_whole_run_is_worth_interrupting(uninterrupted):
    run = Run.open(uninterrupted[0])
    assert run.result["stopped_early"]
    assert 2 <= run.result["best_epoch"] < run.result["epochs"] < 9
    assert run.result["steps"] > 15
    assert uninterrupted[1] > 60


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(store, uninterrupted, tmp_path, seed):
    """Several times each, and once more while it is resumed at its end."""
    whole, moments = uninterrupted
    random = np.random.default_rng(seed)
    run = tmp_path / "run"
    kills = 0
    while True:
        code = killed.run(
            config(store, run), moment=int(random.integers(moments // 4)), resume=kills > 0
        )
        if code == 0:
            break
        assert code == -9
        kills += 1
        assert kills < 40
    assert kills >= 1
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert rows(run) == rows(whole)
    assert not list(run.rglob("*.tmp"))
    same = ("epochs", "steps", "best_epoch", "best_loss", "stopped_early")
    old, new = Run.open(whole).result, Run.open(run).result
    assert [new[name] for name in same] == [old[name] for name in same]


def test_killed_at_the_first_and_the_last_moments(store, uninterrupted, tmp_path):
    whole, moments = uninterrupted
    for moment in (1, 4, moments - 1, moments - 3):
        run = tmp_path / str(moment)
        assert killed.run(config(store, run), moment=moment) == -9
        assert killed.run(config(store, run), resume=True) == 0
        assert (run / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes()
        assert rows(run) == rows(whole)


def test_other_checkpoints_give_the_same_bits(store, uninterrupted, tmp_path):
    """What does not decide the parameters may differ, also when a run goes on."""
    run = tmp_path / "run"
    other = {"checkpoints": CheckpointConfig(every_steps=None), "logging": LoggingConfig(7, False)}
    assert killed.run(config(store, run, **other), moment=uninterrupted[1] // 3) == -9
    assert killed.run(config(store, run), resume=True) == 0
    weights = [folder / "model.safetensors" for folder in (run, uninterrupted[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_damaged_last_checkpoint_costs_steps_and_no_bits(store, uninterrupted, tmp_path):
    whole, moments = uninterrupted
    run = tmp_path / "run"
    assert killed.run(config(store, run), moment=moments * 2 // 3) == -9
    last = sorted((run / "checkpoints").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=last.name):
        fit(config(store, run), resume=True)
    assert rows(run)[-1]["step"] == rows(whole)[-1]["step"]
    for path in (run / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"nothing")
    (run / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        fit(config(store, run), resume=True)


def test_workers_change_nothing(store, uninterrupted, tmp_path):
    """A run is begun with workers, killed, and goes on with another number of them."""
    run = tmp_path / "run"
    with_workers = config(store, run, data=DataConfig(visits_per_batch=300, workers=2))
    assert killed.run(with_workers, moment=uninterrupted[1] // 2) == -9
    assert killed.run(config(store, run), resume=True) == 0
    weights = [folder / "model.safetensors" for folder in (run, uninterrupted[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# What is refused


def test_a_folder_that_exists_is_refused(store, uninterrupted, tmp_path):
    with pytest.raises(FileExistsError, match="--resume"):
        fit(config(store, uninterrupted[0]))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="exists"):
        fit(config(store, tmp_path / "file"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"exists|'thesis\.tex'"):
            fit(config(store, tmp_path / "mine"), resume=resume)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_finished_run_is_told_of_and_left_alone(store, uninterrupted, capsys):
    before = {path: path.read_bytes() for path in uninterrupted[0].rglob("*") if path.is_file()}
    said = config(store, uninterrupted[0], logging=LoggingConfig(2, progress=True))
    assert fit(said, resume=True).result["steps"] > 0
    assert "has ended already" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in uninterrupted[0].rglob("*") if p.is_file()}


def test_another_configuration_task_or_store_is_refused(store, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    gru = dataclasses.replace(config(store, run).model, cell="gru")
    with pytest.raises(ValueError, match=r"seed: 3, now 4; model\.cell: 'lstm', now 'gru'"):
        fit(config(store, run, seed=4, model=gru), resume=True)
    with pytest.raises(ValueError, match=r"task: {'codes': \['EVENT'\]}, now"):
        fit(config(store, run, task=FirstEvent("C00")), resume=True)
    another = KnownHazards.draw(600, seed=1).store(tmp_path)
    with pytest.raises(ValueError, match="store_sha256: "):
        fit(config(another, run), resume=True)


def test_two_processes_cannot_train_in_one_folder(store, tmp_path):
    from ehrseq_fast.training.run import RunFolder

    run = tmp_path / "run"
    with RunFolder(run).locked(), pytest.raises(RuntimeError, match="another process is training"):
        fit(config(store, run))
    fit(config(store, run, epochs=1))
