"""The loop and its logs; what a trained model is worth."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from ehrseq_fast.data import FirstEvent, PartWriter, SubjectChunk, read_meds, write_store
from ehrseq_fast.models.intervals import interval_hazards
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
    load_tensors,
)
from ehrseq_fast.training.data import TrainingData, horizon_hazards, visit_hazard
from ehrseq_fast.training.distributed import Processes
from ehrseq_fast.training.model import make_model, start_at_rates
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


@needs("meds")
def test_defaults_come_within_2_percent_on_generated_meds_records(tmp_path):
    """The command of docs/train.md, from MEDS files on; only the number of epochs is given."""
    from tests.generated_meds import OUTCOME, write_generated_meds

    generated = write_generated_meds(tmp_path / "meds", 20_000)
    store = read_meds(tmp_path / "meds", tmp_path / "store")
    config = RunConfig(
        store=str(store.path),
        run=str(tmp_path / "run"),
        task=FirstEvent(OUTCOME),
        epochs=6,
        device="cpu",
        logging=LoggingConfig(progress=False),
    )
    outcomes = FirstEvent(OUTCOME).apply(store, split="held_out")
    scores = score_outcomes(fit(config), store, outcomes, torch.device("cpu"))
    losses, true = visit_losses(outcomes, scores.hazards), generated.loss("held_out")
    assert len(outcomes) == (generated.splits == "held_out").sum()
    assert true < losses < 1.02 * true
    assert generated.constant_loss("held_out") > 1.2 * true


def visit_losses(outcomes, hazards):
    starts = np.cumsum(outcomes.n_visits) - outcomes.n_visits
    survived = -np.log1p(-hazards.astype(np.float64))
    last = starts + outcomes.event_times
    survived[last] = np.where(outcomes.event_indicators, -np.log(hazards[last]), 0)
    return np.add.reduceat(survived, starts).mean()


def test_rates_to_start_from_are_those_of_visits_at_risk(store):
    """Not of visits before the entry, from which the event cannot have followed."""
    outcomes = applied(FirstEvent([EVENT], washout_days=60), store)
    assert (outcomes.entry_times > 0).sum() > 100
    days, ends = outcomes.days_to_end(store), np.cumsum(outcomes.n_visits)
    at_risk, events = [], []
    for row, end in enumerate(ends):
        visits = days[end - outcomes.n_visits[row] : end][outcomes.entry_times[row] :]
        at_risk += visits.tolist()
        events += [outcomes.event_indicators[row]] * len(visits)
    expected = interval_hazards(at_risk, events, (30, 90, 365))
    np.testing.assert_allclose(horizon_hazards(outcomes, store, (30, 90, 365)), expected)


def applied(task, store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return task.apply(store)
