"""Configuration, files and checkpoints of a run."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch

from ehrseq_fast.data import FirstEvent
from ehrseq_fast.training import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StoppingConfig,
)
from ehrseq_fast.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    load_tensors,
    restore,
    save_tensors,
    tensors_of,
)
from ehrseq_fast.training.config import differences
from ehrseq_fast.training.convert import read_yaml
from ehrseq_fast.training.files import replacing, write_json
from ehrseq_fast.training.loggers import COLUMNS, CsvLog
from ehrseq_fast.training.loop import make_optimizer
from ehrseq_fast.training.model import make_model
from ehrseq_fast.training.schedule import rate_factor, step_seed
from tests.extras import needs

pytestmark = needs("train")


# Configuration


def test_a_configuration_survives_yaml(tmp_path):
    config = RunConfig(
        store="s",
        run="r",
        task=FirstEvent(["A", "B"], washout_days=3),
        model=ModelConfig("horizons", horizons_days=(7, 14)),
        stopping=StoppingConfig(patience=None),
        optimizer=OptimizerConfig(clip_norm=None, eps=1e-9),
    )
    config.save(tmp_path / "config.yaml")
    assert RunConfig.load(tmp_path / "config.yaml") == config
    assert FirstEvent.from_dict(config.task) == FirstEvent(["A", "B"], washout_days=3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epoch": 3}, "epoch: no such field; expected one of store, run, task, epochs"),
        ({"model": {"width": 3}}, "model.width: no such field; expected one of name"),
        ({"model": 3}, "model: expected a mapping, got int"),
        ({"epochs": "3"}, "epochs: expected int, got '3'"),
        ({"epochs": True}, "epochs: expected int, got True"),
        ({"model": {"dropout": 1}}, r"model.dropout: expected a number in \[0, 1\), got 1.0"),
        ({"model": {"horizons_days": [30, 30]}}, "ascending days above 0, got"),
        ({"model": {"cell": "rnn"}}, "model.cell: expected one of 'lstm', 'gru', got 'rnn'"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas: expected two numbers"),
        ({"seed": -1}, "seed: expected a number in"),
        ({"precision": "float8"}, "precision: expected one of"),
    ],
)
def test_a_wrong_configuration_is_refused(values, said):
    with pytest.raises((ValueError, TypeError), match=said):
        RunConfig.from_dict(values)


def test_a_file_that_is_no_configuration_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    for text, said in (("a: [", "expected YAML"), ("- 1", "expected a YAML mapping, got list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"c.yaml: {said}"):
            RunConfig.load(path)


@pytest.mark.parametrize(("written", "read"), [("0123", 83), ("1_000", 1000), ("12:30", 750)])
def test_a_number_that_yaml_reads_as_another_is_refused(tmp_path, written, read):
    """As a code it would be another outcome."""
    path = tmp_path / "task.yaml"
    path.write_text(f"codes: [7, {written}]\n")
    said = f"task.yaml: .*expected a decimal number .* got {written}, which YAML reads as {read}"
    with pytest.raises(ValueError, match=said):
        read_yaml(path)
    path.write_text(f"codes: [7, '{written}', -3]\n")
    assert read_yaml(path) == {"codes": [7, written, -3]}


def test_what_differs_between_two_configurations():
    old = RunConfig(store="a", run="b", seed=1)
    free = dataclasses.replace(
        old, store="c", run="d", device="cpu", data=DataConfig(workers=3), logging=LoggingConfig(7)
    )
    assert differences(old, free) == []
    new = dataclasses.replace(old, seed=2, model=ModelConfig(cell="gru"))
    assert differences(old, new) == ["seed: 1, now 2", "model.cell: 'lstm', now 'gru'"]


def test_the_learning_rate_is_a_function_of_the_place():
    cosine = ScheduleConfig("cosine", warmup_steps=4, final_fraction=0.1)
    assert [rate_factor(cosine, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate_factor(cosine, 100, 1.0) == pytest.approx(0.1)
    assert rate_factor(cosine, 100, 0.5) == pytest.approx(0.55)
    assert rate_factor(ScheduleConfig("constant", warmup_steps=0), 0, 0.9) == 1.0
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


# Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_have_the_permissions_of_any_new_file(tmp_path, umask):
    """Whatever library writes them; others of a group may read a run."""
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "x.safetensors", tensors(), {})
        write_json(tmp_path / "y.json", {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["x.safetensors", "y.json"], 0o666 & ~umask)


def tensors():
    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(3, dtype=torch.int64),
        "c": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "d": torch.zeros(0, 4),
    }


def test_tensors_and_their_state_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors(), {"loss": 0.1, "none": None})
    found = load_tensors(path)
    assert found.state == {"loss": 0.1, "none": None}
    for name, tensor in tensors().items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)
    save_tensors(tmp_path / "y.safetensors", tensors(), {"none": None, "loss": 0.1})
    assert path.read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors(), {"loss": 0.1})
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-20] ^= 1  # of a tensor
    another = bytearray(whole)
    another[whole.index(b"0.1")] = ord("7")  # of the state
    for content in (whole[:-5], whole[:9], b"", bytes(damaged), bytes(another), b"{}" * 50):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            load_tensors(path)


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_file_for_which_there_is_no_space_is_named(tmp_path):
    """By a limit on the size of files, in a process of its own, which has it to itself."""
    script = f"""
import resource, signal, torch
from pathlib import Path
from ehrseq_fast.training.checkpoint import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
save_tensors(Path({str(tmp_path / "x.safetensors")!r}), {{"a": torch.zeros(9999)}}, {{}})
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.search(r"OSError: .*/x\.safetensors: cannot be written: .*too large", done.stderr)
    assert not list(tmp_path.iterdir())


def test_the_last_checkpoints_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 6):
        best = checkpoints.name(2 if step >= 2 else 1)
        checkpoints.save(step, tensors(), {"best": best})
    assert [path.name for path in checkpoints.paths()] == [
        checkpoints.name(step) for step in (2, 4, 5)
    ]


def test_damaged_checkpoints_are_passed_over_and_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    assert checkpoints.latest() == (None, [])
    for step in (1, 2, 3):
        checkpoints.save(step, tensors(), {"best": checkpoints.name(1), "step": step})
    for step, found in ((3, 2), (2, 1)):
        path = tmp_path / checkpoints.name(step)
        path.write_bytes(path.read_bytes()[:-1])
        checkpoint, wrong = checkpoints.latest()
        assert checkpoint.state["step"] == found
        assert path.name in wrong[-1]
    (tmp_path / checkpoints.name(1)).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        checkpoints.latest()


def test_nothing_that_is_loaded_can_run_code(tmp_path):
    """A pickle in place of a checkpoint is refused, not opened."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "step-0000000001.safetensors"
    torch.save({"a": Bomb()}, path)
    with pytest.raises(CheckpointError):
        Checkpoints(tmp_path, 1).latest()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["hazard_and_horizons", "hazard", "hazard_with_time", "horizons"])
def test_a_model_and_its_optimizer_come_back(name):
    config = RunConfig(model=ModelConfig(name, embedding_dim=4, hidden_dim=6))

    def made(seed):
        torch.manual_seed(seed)
        model = make_model(config.model, 9)
        optimizer = make_optimizer(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return model, optimizer

    held = {name: tensor.clone() for name, tensor in tensors_of(*made(0)).items()}
    model, optimizer = made(1)
    restore(model, optimizer, held)
    for key, tensor in tensors_of(model, optimizer).items():
        assert torch.equal(tensor, held[key]), key
    with pytest.raises(ValueError, match="weights: missing"):
        restore(model, optimizer, {k: v for k, v in held.items() if "embedding" not in k})


def test_csv_goes_on_where_a_checkpoint_says(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path)
    log.write({"epoch": 1, "loss": 0.5})
    length = log.length()
    log.write({"epoch": 2, "loss": 0.25})
    log.close()
    with path.open("ab") as file:
        file.write(b"3,1")  # cut off
    log = CsvLog(path, length)
    log.write({"epoch": 2, "loss": 0.25})
    log.close()
    rows = list(csv.DictReader(path.open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert tuple(rows[0]) == COLUMNS
    with pytest.raises(ValueError, match="at least 100000 bytes"):
        CsvLog(path, 100_000)
