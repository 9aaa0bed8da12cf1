"""Runs with competing outcomes: the model, its training, scores and report, and the command."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedVisits, cli, competing_risks_nll
from ehrseq_fast.data import FirstEvent
from ehrseq_fast.metrics import cause_baselines, cumulative_incidence
from ehrseq_fast.metrics import evaluate as evaluate_arrays
from ehrseq_fast.models import CompetingRisksSurvivalLSTM
from ehrseq_fast.training import (
    ModelConfig,
    OptimizerConfig,
    Run,
    RunConfig,
    evaluate,
    fit,
    predict,
)
from ehrseq_fast.training.data import TrainingData, cause_hazards
from ehrseq_fast.training.distributed import Processes
from ehrseq_fast.training.model import make_model, predictions, start_at_rates
from ehrseq_fast.training.scoring import score_outcomes
from tests.extras import needs
from tests.known_hazards import EVENT, KnownHazards
from tests.test_training import small

OTHER = "C38"  # means nothing, and comes at every visit with the same probability
TASK = FirstEvent(EVENT, competing={"other": OTHER})

ALONE = Processes(0, 1, torch.device("cpu"), "none")


# The model


def batch_of(lengths=(3, 1, 2)):
    return PackedVisits.from_lists(
        [[[1 + i % 5, 6] for i in range(n)] for n in lengths],
        event_times=[n - 1 for n in lengths],
        event_types=[1, 0, 2],
    )


@pytest.mark.parametrize("censored_visit", ["excluded", "included"])
@pytest.mark.parametrize("path", ["fused", "packed", "padded"])
def test_the_softmax_loss_is_that_of_the_hazards(path, censored_visit):
    torch.manual_seed(0)
    model = CompetingRisksSurvivalLSTM(9, 2, 6, 5, link="softmax", path=path).double().eval()
    batch, options = batch_of(), {"censored_visit": censored_visit}
    hazards = model(batch).to_padded()
    assert (hazards.sum(2) < 1).all()
    logits = torch.cat([1 - hazards.sum(2, keepdim=True), hazards], 2).log()
    mask = torch.arange(3) < batch.lengths[:, None]
    expected = competing_risks_nll(
        logits,
        batch.event_times,
        batch.event_types,
        mask,
        from_logits=True,
        link="softmax",
        **options,
    )
    torch.testing.assert_close(model.loss(batch, **options), expected)
    model.loss(batch).backward()
    assert all(head[3].weight.grad.any() for head in model.hazard_heads)
    summed = cumulative_incidence(model(batch)).values.sum(1)
    assert (summed < 1).all()


@pytest.mark.parametrize("link", ["sigmoid", "softmax"])
def test_base_hazards(link):
    torch.manual_seed(1)
    model = CompetingRisksSurvivalLSTM(9, 3, 6, 5, link=link).eval()
    for head in model.hazard_heads:
        torch.nn.init.zeros_(head[3].weight)
    model.set_base_hazards(np.array([0.02, 0.3, 0.1]))
    hazards = model(batch_of()).values
    torch.testing.assert_close(hazards, torch.tensor([0.02, 0.3, 0.1]).expand_as(hazards))
    with pytest.raises(ValueError, match="hazards: expected 3 of them, got"):
        model.set_base_hazards([0.1, 0.2])
    with pytest.raises(ValueError, match=r"expected hazards in \(0, 1\)"):
        model.set_base_hazards([0.0, 0.2, 0.3])
    if link == "softmax":
        with pytest.raises(ValueError, match="with a sum below 1, got"):
            model.set_base_hazards([0.4, 0.4, 0.4])
    with pytest.raises(
        ValueError, match="link: expected one of 'sigmoid', 'softmax', got 'probit'"
    ):
        CompetingRisksSurvivalLSTM(9, 3, link="probit")


# A run


@pytest.fixture(scope="module")
def drawn():
    return KnownHazards.draw(1500, seed=4)


@pytest.fixture(scope="module")
def store(drawn, tmp_path_factory):
    return drawn.store(tmp_path_factory.mktemp("known"))


def config_of(store, run, **changes):
    model = ModelConfig("competing_risks", 16, 32, horizons_days=(30, 90))
    fast = OptimizerConfig(learning_rate=0.02)
    options = {"task": TASK, "model": model, "optimizer": fast, "epochs": 4} | changes
    return small(store, run, **options)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    pytest.importorskip("safetensors", reason="pip install 'ehrseq_fast[train]'")
    return fit(config_of(store, tmp_path_factory.mktemp("run") / "run"))


@needs("train")
def test_training_starts_at_the_rates_of_the_causes(store, tmp_path):
    config = config_of(store, tmp_path / "run")
    data = TrainingData(config, store, ALONE)
    hazards, horizons = data.observed_rates()
    assert horizons is None
    outcomes = data.outcomes
    expected = cause_baselines(
        outcomes.event_times, outcomes.event_types, 2, outcomes.entry_times
    ).constant
    assert hazards.tolist() == cause_hazards(outcomes).tolist() == expected.tolist()
    model = make_model(config.model, store.vocab_size, config.n_causes)
    start_at_rates(model, hazards, None)
    mean = predictions(model.eval(), next(data.training_batches()))[0].mean(0)
    np.testing.assert_allclose(mean, hazards, rtol=0.3)


@needs("train", "metrics", "meds")
def test_a_run_learns_and_is_reported(store, run, tmp_path):
    losses = [r["loss"] for r in run.history() if r["split"] == "tuning"]
    assert min(losses) < losses[0]
    assert Run.open(run.folder.path).model().link == "softmax"
    report = evaluate(run, store, n_bootstrap=5, out=tmp_path / "report", progress=False)
    found = report.evaluation
    assert found.causes == (EVENT, "other")
    assert found["c_td", EVENT].model > 0.65
    assert found["c_td", "other"].model == pytest.approx(0.5, abs=0.2)
    assert found["nll"].model < min(found["nll"].constant, found["nll"].by_visit)
    for cause in found.causes:
        assert found["observed/expected", cause].model == pytest.approx(1, abs=0.5)
        assert found["incidence", cause].library == "lifelines"
    # as of the arrays
    outcomes = report.outcomes
    scores = score_outcomes(run, store, outcomes, torch.device("cpu"))
    assert scores.risks is None
    again = evaluate_arrays(
        scores.hazards,
        outcomes.event_times,
        event_types=outcomes.event_types,
        lengths=outcomes.n_visits,
        entry_times=outcomes.entry_times,
        causes=found.causes,
    )
    for name in (("nll",), ("c_td", EVENT), ("incidence", "other")):
        assert again[name].model == pytest.approx(found[name].model)
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"# First event: {EVENT} or other" in text
    events = outcomes.events_by_cause()
    assert f"({events[EVENT]} {EVENT}, {events['other']} other)" in text
    assert "![Predicted and observed (Aalen–Johansen) cumulative incidence by visit]" in text
    assert (tmp_path / "report" / "incidence.png").stat().st_size > 1000
    held = json.loads((tmp_path / "report" / "report.json").read_text())
    assert held["incidences"]["causes"] == [EVENT, "other"]


@needs("train", "meds")
def test_predictions_have_a_column_for_each_cause(store, run, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ehrseq_fast[meds]'")
    assert predict(run, store, tmp_path / "out.parquet") == store.n_visits
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["subject_id", "time", "hazard_1", "hazard_2"]
    hazards = np.stack([table[f"hazard_{k}"].to_numpy() for k in (1, 2)], 1)
    assert (hazards > 0).all()
    assert (hazards.sum(1) < 1).all()
    codes = [
        store.vocabulary[store.codes[store.visit_offsets[v] : store.visit_offsets[v + 1]]].tolist()
        for v in range(store.patient_offsets[1])
    ]
    expected, _ = predictions(run.model(), PackedVisits.from_lists([codes]))
    np.testing.assert_allclose(hazards[: len(codes)], expected, rtol=1e-4)


@needs("train")
@pytest.mark.filterwarnings("ignore")
def test_configurations_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match="expected 'competing_risks' for a task with competing"):
        RunConfig(task=TASK)
    with pytest.raises(ValueError, match="expected another for a task without competing outcomes"):
        RunConfig(task=FirstEvent(EVENT), model=ModelConfig("competing_risks"))
    nobody = FirstEvent(EVENT, competing={"other": OTHER}, time_at_risk_days=1)
    config = dataclasses.replace(config_of(store, tmp_path / "run"), task=nobody)
    with pytest.raises(ValueError, match="expected someone with"):
        TrainingData(config, store, ALONE)


# The command


SHORT = [
    "--epochs",
    "1",
    "--device",
    "cpu",
    "--model.hidden_dim",
    "8",
    "--model.embedding_dim",
    "8",
]


@needs("train")
def test_the_command(store, tmp_path, capsys):
    path, run = str(store.path), str(tmp_path / "run")
    command = ["train", path, run, "--outcome", EVENT, "--competing", OTHER, *SHORT]
    assert cli.main([*command, "--competing", "C36", "C37"]) == 0
    config = Run.open(run).config
    assert config.model.name == "competing_risks"
    assert config.task == {
        "codes": [EVENT],
        "competing": {OTHER: [OTHER], "C36, C37": ["C36", "C37"]},
    }
    assert cli.main(["train", path, run, "--resume"]) == 0
    assert "has ended already" in capsys.readouterr().err
    file = tmp_path / "task.yaml"
    file.write_text(f"codes: {EVENT}\ncompeting: {{other: {OTHER}}}\n")
    assert cli.main(["train", path, str(tmp_path / "b"), "--task", str(file), *SHORT]) == 0
    assert Run.open(tmp_path / "b").config.task["competing"] == {"other": [OTHER]}
    capsys.readouterr()
    for arguments, message in (
        (["--outcome", EVENT, "--competing", OTHER, "--model.name", "hazard"], "competing_risks"),
        (["--competing", OTHER], "--competing: expected --outcome beside it, got none"),
        (["--outcome", EVENT, "--competing", EVENT], "competing: expected 1 to 100 outcomes of"),
        (["--outcome", EVENT, "--model.name", "competing_risks"], "without competing outcomes"),
    ):
        assert cli.main(["train", path, str(tmp_path / "c"), *arguments, *SHORT]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
