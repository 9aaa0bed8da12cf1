"""Configuration, checkpoints, logs and the loop; what a trained model is worth."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from ehrseq_fast.data import FirstEvent, PartWriter, SubjectChunk, write_store
from ehrseq_fast.training import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    RunConfig,
    ScheduleConfig,
    StoppingConfig,
    fit,
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
from ehrseq_fast.training.data import TrainingData, visit_hazard
from ehrseq_fast.training.distributed import Processes
from ehrseq_fast.training.files import replacing, write_json
from ehrseq_fast.training.loggers import COLUMNS, CsvLog
from ehrseq_fast.training.loop import make_optimizer
from ehrseq_fast.training.model import make_model, start_at_rates
from ehrseq_fast.training.schedule import rate_factor, step_seed
from ehrseq_fast.training.scoring import score_outcomes
from tests.extras import needs
from tests.known_hazards import EVENT, KnownHazards

pytestmark = needs("train")


@pytest.fixture(scope="module")
def drawn():
    return KnownHazards.draw(1500)


@pytest.fixture(scope="module")
def store(drawn, tmp_path_factory):
    return drawn.store(tmp_path_factory.mktemp("known"))


def small(store, run, **changes):
    """A run of seconds."""
    config = RunConfig(
        store=str(store.path),
        run=str(run),
        task=FirstEvent(EVENT),
        epochs=2,
        device="cpu",
        model=ModelConfig(embedding_dim=16, hidden_dim=32, horizons_days=(30, 90)),
        data=DataConfig(visits_per_batch=512),
        logging=LoggingConfig(every_steps=5, progress=False),
    )
    return dataclasses.replace(config, **changes)


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


# Models


def test_models_start_at_the_observed_rates():
    for name in ("hazard_and_horizons", "hazard", "hazard_with_time", "horizons"):
        model = make_model(ModelConfig(name, embedding_dim=4, hidden_dim=6), 9)
        start_at_rates(model, 0.02, [0.01, 0.02, 0.03, 0.04, 0.05])
        if name != "horizons":
            assert model.hazard_head[3].bias.sigmoid().item() == pytest.approx(0.02)
        if "horizons" in name:
            biases = model.horizon_head[3].bias.sigmoid()
            assert biases.tolist() == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("name", ["hazard_and_horizons", "hazard", "hazard_with_time", "horizons"])
def test_every_model_learns(store, tmp_path, name, cell):
    model = ModelConfig(name, embedding_dim=16, hidden_dim=32, horizons_days=(30, 90), cell=cell)
    fast = OptimizerConfig(learning_rate=0.01)
    run = fit(small(store, tmp_path / "run", model=model, optimizer=fast))
    losses = {
        split: [
            row["loss"] for row in run.history() if row["split"] == split and row["over"] == "epoch"
        ]
        for split in ("train", "tuning")
    }
    assert losses["train"][1] < losses["train"][0]
    assert min(losses["tuning"]) == run.result["best_loss"]
    assert run.result["epochs"] == 2
    assert len(run.codes) == store.vocab_size
    assert run.model().training is False
    assert set(run.codes[2:]) == set(store.codes_of)
    assert Run.open(tmp_path / "run").result == run.result


def test_the_log_adds_up(store, tmp_path):
    """Rows over steps hold each patient once, and their weighted mean is the epoch's row."""
    run = fit(small(store, tmp_path / "run"))
    for epoch in (1, 2):
        rows = [r for r in run.history() if r["epoch"] == epoch and r["split"] == "train"]
        steps = [row for row in rows if row["over"] == "steps"]
        (whole,) = (row for row in rows if row["over"] == "epoch")
        assert len(steps) >= 2
        assert sum(row["patients"] for row in steps) == whole["patients"]
        assert whole["patients"] == run.result["patients"]["train"]
        mean = sum(row["loss"] * row["patients"] for row in steps) / whole["patients"]
        assert mean == pytest.approx(whole["loss"])


def test_the_best_epoch_is_the_result(store, tmp_path):
    """Not the last one, which a learning rate that is far too high has made worse."""
    config = small(
        store,
        tmp_path / "run",
        epochs=4,
        optimizer=OptimizerConfig(learning_rate=0.3),
        schedule=ScheduleConfig("constant", warmup_steps=40),
        stopping=StoppingConfig(patience=None),
        checkpoints=CheckpointConfig(keep_last=1),
    )
    run = fit(config)
    assert run.result["best_epoch"] < 4
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) == 2
    best = {k.removeprefix("model/"): v for k, v in load_tensors(kept[0]).tensors.items()}
    for name, tensor in run.model().state_dict().items():
        assert torch.equal(tensor, best[name])


@pytest.mark.parametrize(
    ("tuning_split", "fractions", "said"),
    [
        (None, None, None),
        ("tuning", {"train": 0.9, "tuning": 0.0, "held_out": 0.1}, "nobody of the split 'tuning'"),
        ("tuning", {"train": 0.9, "held_out": 0.1}, "the store has no split 'tuning'"),
    ],
)
def test_without_a_tuning_split_the_last_epoch_is_the_result(
    drawn, store, tmp_path, tuning_split, fractions, said
):
    """Where it is not asked for, where nobody is in it, and where the store has none."""
    if fractions is not None:
        store = drawn.store(tmp_path, split=fractions)
    data = DataConfig(visits_per_batch=512, tuning_split=tuning_split)
    config = small(store, tmp_path / "run", data=data, stopping=StoppingConfig(patience=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(config)
    told = [str(w.message) for w in caught if "data.tuning_split" in str(w.message)]
    assert len(told) == (said is not None)
    assert all(said in text and "the last one is the result" in text for text in told)
    assert (run.result["epochs"], run.result["best_epoch"]) == (2, None)
    assert {row["split"] for row in run.history()} == {"train"}
    last = load_tensors(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]).tensors
    for name, tensor in run.model().state_dict().items():
        assert torch.equal(tensor, last[f"model/{name}"])


def test_training_leaves_torchs_generator_alone(store, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(small(store, tmp_path / "run", epochs=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_16_bits_train_as_32_do(store, tmp_path, precision):
    model = ModelConfig(embedding_dim=16, hidden_dim=32, dropout=0.0, horizons_days=(30, 90))
    runs = [
        fit(small(store, tmp_path / name, model=model, precision=name))
        for name in ("float32", precision)
    ]
    losses = [run.result["best_loss"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]
    assert {tensor.dtype for tensor in runs[1].model().state_dict().values()} == {torch.float32}


def test_a_prediction_from_a_date_learns_who_has_the_event(store, tmp_path):
    """A row says something of the whole time at risk: no event in it is survival."""
    task = FirstEvent(EVENT, index="first_visit", time_at_risk_days=200)
    run = fit(small(store, tmp_path / "run", task=task))
    outcomes = task.apply(store, split="train")
    rate = outcomes.event_indicators.mean()
    assert 0.1 < rate < 0.9
    model = make_model(run.config.model, store.vocab_size)
    hazard = run.model().hazard_head[3].bias.sigmoid().item()
    assert abs(hazard - rate) < 0.2
    assert model.visit_hazard


def test_predictions_censored_within_the_time_at_risk_are_told_of(store, tmp_path):
    """The hazard counts them as survivors; risks by horizon and a follow-up by visits do not."""

    def told(model, **window):
        task = FirstEvent(EVENT, **window)
        config = small(store, tmp_path / "run", task=task, model=ModelConfig(model))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = TrainingData(config, store, Processes(0, 1, torch.device("cpu"), "none"))
        notes = [str(w.message) for w in caught if "censored by the end" in str(w.message)]
        return data.outcomes, notes

    window = {"index": "first_visit", "time_at_risk_days": 365}
    outcomes, (note,) = told("hazard", **window)
    number = outcomes.censored_by["the end of observation"]
    assert note.startswith(f"{number:,} of {len(outcomes):,} predictions")
    assert "horizon" not in note
    assert "risks by horizon are not affected" in told("hazard_and_horizons", **window)[1][0]
    assert told("horizons", **window)[1] == []
    assert told("hazard", **window, min_observation_days=365)[1] == []
    assert told("hazard")[1] == []


def test_a_loss_that_is_not_finite_ends_a_run(store, tmp_path):
    config = small(
        store,
        tmp_path / "run",
        optimizer=OptimizerConfig(learning_rate=1e30, clip_norm=None),
        schedule=ScheduleConfig("constant", warmup_steps=0),
    )
    with pytest.raises(RuntimeError, match=r"loss is (nan|inf) at step \d+ \(epoch 1\)"):
        fit(config)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"task": {}}, ValueError, "task: expected an outcome to predict"),
        ({"task": FirstEvent("EVNT")}, LookupError, "EVENT"),
        ({"task": {"code": "EVENT"}}, ValueError, "task: expected settings of codes"),
        ({"data": DataConfig(train_split="training")}, ValueError, "'train', 'tuning', 'held_out'"),
        ({"data": DataConfig(train_split="training")}, ValueError, "data.train_split: expected a"),
        (
            {"data": DataConfig(tuning_split="dev")},
            ValueError,
            "data.tuning_split: .*'tuning'.*dev",
        ),
        ({"device": "cuda:99"}, ValueError, "device: 'cuda:99' is not there"),
        ({"device": "tpu"}, ValueError, "device: expected 'auto', 'cpu', 'cuda'"),
        ({"store": "nowhere"}, FileNotFoundError, "expected the folder of an EventStore"),
        ({"run": ""}, ValueError, "run: expected a folder"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(
    store, tmp_path, changes, error, said
):
    with pytest.raises(error, match=said):
        fit(dataclasses.replace(small(store, tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_outcomes_that_do_not_count_are_told_where_none_is_left(tmp_path):
    """A death after the end of observation, as of persons whose periods end before."""
    part = PartWriter(tmp_path / "part")
    ids, day = np.arange(40), np.timedelta64(1, "D")
    start = np.datetime64("2015-01-01", "us")
    part.add(
        SubjectChunk(
            subject_ids=ids,
            event_subject=np.repeat(ids, 2),
            event_times=np.tile([start, start + 30 * day], 40),
            event_codes=np.zeros(80, int),
            chunk_codes=["A"],
            death_times=np.repeat(start + 200 * day, 40),
            period_subject=ids,
            period_starts=np.repeat(start, 40),
            period_ends=np.repeat(start + 100 * day, 40),
        )
    )
    part.finish()
    store = write_store(tmp_path / "store", [tmp_path / "part"], source={"kind": "test"})
    said = r"patients without \(\d+ outcomes after the end of observation .*\)\nrule +persons"
    with pytest.raises(ValueError, match=said):
        fit(small(store, tmp_path / "run", task=FirstEvent("death")))


@needs("mlflow")
def test_a_tracking_uri_that_mlflow_refuses_ends_before_a_folder_is_made(
    store, tmp_path, monkeypatch
):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    config = small(store, tmp_path / "run", logging=LoggingConfig(mlflow="nonsense://there"))
    with pytest.raises(ValueError, match=r"logging\.mlflow: .*:5000.*got 'nonsense://there'"):
        fit(config)
    assert not (tmp_path / "run").exists()


@needs("tensorboard")
def test_tensorboard_gets_the_rows_of_the_log(store, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(small(store, tmp_path / "run", logging=LoggingConfig(5, False, tensorboard=True)))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [scalar.value for scalar in events.Scalars("tuning_epoch/loss")]
    assert losses == pytest.approx([r["loss"] for r in run.history() if r["split"] == "tuning"])


@needs("mlflow")
def test_mlflow_gets_the_rows_of_the_log(store, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server, in earnest
    uri = (tmp_path / "mlflow").as_uri()
    logging = LoggingConfig(5, False, mlflow=uri, mlflow_experiment="known")
    run = fit(small(store, tmp_path / "run", logging=logging))
    client = MlflowClient(tracking_uri=uri)
    (logged,) = client.search_runs([client.get_experiment_by_name("known").experiment_id])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["model.hidden_dim"] == "32"
    rows = [r["loss"] for r in run.history() if r["split"] == "tuning"]
    found = client.get_metric_history(logged.info.run_id, "tuning_epoch_loss")
    assert [metric.value for metric in found] == pytest.approx(rows)


def test_a_trained_model_comes_within_2_percent_of_the_true_hazards(tmp_path):
    """20,000 patients whose hazards are known: the held-out loss of the hazard per visit."""
    drawn = KnownHazards.draw(20_000)
    store = drawn.store(tmp_path)
    config = small(
        store,
        tmp_path / "run",
        epochs=6,
        optimizer=OptimizerConfig(learning_rate=0.01),
        data=DataConfig(visits_per_batch=1024),
    )
    run = fit(config)
    outcomes = FirstEvent(EVENT).apply(store, split="held_out")
    scores = score_outcomes(run, store, outcomes, torch.device("cpu"))
    losses = visit_losses(outcomes, scores.hazards)
    true = drawn.loss(outcomes.patients)
    constant = visit_losses(outcomes, np.full_like(scores.hazards, visit_hazard(outcomes)))
    assert true < losses < 1.02 * true
    assert constant > 1.2 * true  # what there is to be learned


def visit_losses(outcomes, hazards):
    starts = np.cumsum(outcomes.n_visits) - outcomes.n_visits
    survived = -np.log1p(-hazards.astype(np.float64))
    last = starts + outcomes.event_times
    survived[last] = np.where(outcomes.event_indicators, -np.log(hazards[last]), 0)
    return np.add.reduceat(survived, starts).mean()
