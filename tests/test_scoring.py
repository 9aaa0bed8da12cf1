"""Predictions and reports of a trained run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedVisits, cli
from ehrseq_fast.data import EventStore, FirstEvent, PartWriter, SubjectChunk, write_store
from ehrseq_fast.metrics import TrainingOutcomes
from ehrseq_fast.training import ModelConfig, OptimizerConfig, Run, evaluate, fit, predict, scoring
from ehrseq_fast.training import report as reports
from ehrseq_fast.training.checkpoint import CheckpointError
from ehrseq_fast.training.data import observed_days, unobserved_horizons
from ehrseq_fast.training.model import predictions
from ehrseq_fast.training.report import landmarks
from tests.extras import needs
from tests.known_hazards import EVENT, KnownHazards
from tests.test_training import small

pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ehrseq_fast[meds]'")
pytestmark = needs("train", "metrics", "meds")


@pytest.fixture(scope="module")
def drawn():
    return KnownHazards.draw(900, seed=2)


@pytest.fixture(scope="module")
def store(drawn, tmp_path_factory):
    return drawn.store(tmp_path_factory.mktemp("known"))


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    fast = OptimizerConfig(learning_rate=0.03)
    return fit(small(store, tmp_path_factory.mktemp("run") / "run", epochs=4, optimizer=fast))


# Predictions


def test_every_visit_is_scored_in_the_stores_order(store, run, tmp_path):
    out = tmp_path / "new" / "out.parquet"
    assert predict(run, store, out) == store.n_visits
    table = pq.read_table(out)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("subject_id", "int64"),
        ("time", "timestamp[us]"),
        ("hazard", "float"),
        ("risk_30d", "float"),
        ("risk_90d", "float"),
    ]
    lengths = np.diff(store.patient_offsets)
    ids = table["subject_id"].to_numpy()
    assert np.array_equal(ids, np.repeat(store.subject_ids, lengths))
    assert np.array_equal(table["time"].to_numpy(), store.visit_times)
    hazards = np.column_stack([table[name].to_numpy() for name in table.column_names[2:]])
    assert ((hazards > 0) & (hazards < 1)).all()
    assert (hazards[:, 1] < hazards[:, 2]).all()
    model = run.model()
    for patient in (0, 17, store.n_patients - 1):
        visits = range(store.patient_offsets[patient], store.patient_offsets[patient + 1])
        record = [
            store.vocabulary[store.codes[store.visit_offsets[v] : store.visit_offsets[v + 1]]]
            for v in visits
        ]
        hazard, risks = predictions(model, PackedVisits.from_lists([[v.tolist() for v in record]]))
        expected = torch.cat([hazard[:, None], risks], 1).numpy()
        np.testing.assert_allclose(hazards[list(visits)], expected, rtol=1e-4, atol=1e-6)


def test_chunks_change_nothing_but_row_groups(store, run, tmp_path, monkeypatch):
    predict(run, store, tmp_path / "one.parquet")
    monkeypatch.setattr(scoring, "VISITS_PER_CHUNK", 300)
    predict(run, store, tmp_path / "many.parquet")
    one, many = (pq.ParquetFile(tmp_path / f"{name}.parquet") for name in ("one", "many"))
    assert one.num_row_groups == 1
    assert many.num_row_groups > 10
    for column in one.schema_arrow.names:
        arrays = [file.read()[column].to_numpy() for file in (one, many)]
        if arrays[0].dtype == np.float32:
            np.testing.assert_allclose(*arrays, rtol=1e-4, atol=1e-7)
        else:
            assert np.array_equal(*arrays)


def test_the_patients_of_a_split(store, run, tmp_path):
    n = predict(run, store, tmp_path / "out.parquet", split="held_out")
    patients = store.patients_of("held_out")
    assert n == np.diff(store.patient_offsets)[patients].sum()
    ids = pq.read_table(tmp_path / "out.parquet")["subject_id"].to_numpy()
    assert np.array_equal(np.unique(ids), store.subject_ids[patients])


def test_a_store_of_other_codes_is_scored_by_their_names(store, run, tmp_path):
    """The second patient has the codes of the first under another number, and one that is new."""
    part = PartWriter(tmp_path / "part")
    times = np.array(["2020-01-01", "2020-02-01"] * 2, "M8[us]")
    codes = ["C01", "C02", "C01", "NEW"]
    part.add(
        SubjectChunk(
            subject_ids=np.array([1, 2, 3]),
            event_subject=np.array([0, 0, 1, 1]),
            event_times=times,
            event_codes=codes,
        )
    )
    part.finish()
    other = write_store(tmp_path / "store", [tmp_path / "part"], source={})
    with pytest.warns(UserWarning, match=r"1 of 3 codes of .* count as the unknown code"):
        assert predict(run, other, tmp_path / "out.parquet") == 4
    found = pq.read_table(tmp_path / "out.parquet")["hazard"].to_numpy()
    row = {code: row for row, code in enumerate(run.codes)}
    records = [[[row["C01"]], [row["C02"]]], [[row["C01"]], [1]]]
    expected = [predictions(run.model(), PackedVisits.from_lists([r]))[0] for r in records]
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), rtol=1e-5)


def test_a_store_of_other_visits_is_told(drawn, store, run, tmp_path, recwarn):
    """The same records with visits of another kind: a next visit is another one."""
    other = drawn.store(tmp_path, visit_rule=48)
    assert other.n_visits <= store.n_visits
    predict(run, store, tmp_path / "same.parquet")
    assert not recwarn.list
    said = r"by 48, the model was trained on visits by 'day'"
    with pytest.warns(UserWarning, match=said):
        predict(run, other, tmp_path / "out.parquet")
    with pytest.warns(UserWarning, match=said):
        report = evaluate(run, other, out=tmp_path / "report", n_bootstrap=0, progress=False)
    assert "by 48, the model was trained" in (report.folder / "report.md").read_text()


def test_horizons_beyond_the_time_at_risk_are_told(store, tmp_path, recwarn):
    """After it no event counts, so risks within them do not rise."""
    model = ModelConfig(embedding_dim=8, hidden_dim=8, horizons_days=(30, 90, 300))
    task = FirstEvent(EVENT, index="first_visit", time_at_risk_days=90)
    said = r"more than 90 days of the time at risk: risks within 300 days hold no event"
    config = small(store, tmp_path / "run", model=model, task=task, epochs=1)
    with pytest.warns(UserWarning, match=said):
        run = fit(config)
    with pytest.warns(UserWarning, match=said):
        predict(run, store, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    means = [table[f"risk_{days}d"].to_numpy().mean() for days in (30, 90, 300)]
    assert means[2] < means[1] + 0.5 * (means[1] - means[0])
    with pytest.warns(UserWarning, match=said):
        report = evaluate(run, store, n_bootstrap=0, progress=False)
    assert "risks within 300 days hold no event" in (report.folder / "report.md").read_text()
    assert "within 90, 300 days" in unobserved_horizons(model, 89.6)
    assert unobserved_horizons(model, 300.0) == ""
    assert unobserved_horizons(replace(model, name="hazard"), 1.0) == ""
    follow_up = FirstEvent(EVENT)
    outcomes = follow_up.apply(store)
    longest = outcomes.days_to_end(store).max()
    assert observed_days(follow_up, outcomes) == pytest.approx(longest)


def test_several_predictions_of_a_person_are_resampled_together(store, run, tmp_path, monkeypatch):
    dates = np.repeat(store.visit_times[store.patient_offsets[:-1]], 2).astype("M8[us]")
    dates[1::2] += np.timedelta64(3, "D")
    index = {"subject_id": np.repeat(store.subject_ids, 2).tolist(), "time": dates.tolist()}
    task = FirstEvent(EVENT, index=index)
    dated = replace(run, config=replace(run.config, task=task.to_dict()))
    given = []
    evaluate_predictions = reports.evaluate_predictions

    def noted(*arguments, **options):
        given.append(options["groups"])
        return evaluate_predictions(*arguments, **options)

    monkeypatch.setattr(reports, "evaluate_predictions", noted)
    report = evaluate(dated, store, out=tmp_path / "r", n_bootstrap=0, progress=False)
    assert np.array_equal(given[0], report.outcomes.patients)
    assert len(np.unique(given[0])) < len(given[0])


def test_a_file_that_exists_is_replaced_only_when_asked(store, run, tmp_path):
    out = tmp_path / "out.parquet"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        predict(run, store, out)
    assert out.read_text() == "mine"
    predict(run, store, out, overwrite=True)
    assert pq.read_metadata(out).num_rows == store.n_visits
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    with pytest.raises(IsADirectoryError):
        predict(run, store, tmp_path)


def test_a_run_that_is_not_whole_is_refused(store, run, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        predict(tmp_path, store, tmp_path / "o.parquet")
    weights = run.folder.weights
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-3])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Run.open(run.folder.path).model()
        weights.unlink()
        with pytest.raises(FileNotFoundError, match="has not ended"):
            predict(run.folder.path, store, tmp_path / "o.parquet")
    finally:
        weights.write_bytes(content)


# Reports


@pytest.fixture(scope="module")
def report(store, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return evaluate(run, store, out=out, landmarks_days=(0.0, 60.0), n_bootstrap=5, progress=False)


def test_a_report_has_figures_baselines_and_the_attrition_table(report, store, run):
    text = (report.folder / "report.md").read_text()
    assert text.startswith("# First event: EVENT")
    for said in ("negative log-likelihood", "C_td", "AUC, day 60 + 30", "scikit-learn", "| rule |"):
        assert said in text
    figures = json.loads((report.folder / "report.json").read_text())
    outcomes = FirstEvent(EVENT).apply(store, split="held_out")
    assert figures["patients"] == len(outcomes)
    assert figures["events"] == outcomes.event_indicators.sum()
    assert figures["attrition"] == outcomes.attrition.to_dict()
    nll, c_td = (next(m for m in figures["metrics"] if m["name"] == n) for n in ("nll", "c_td"))
    assert nll["model"] < nll["constant"]
    assert c_td["constant"] == c_td["by_visit"] == 0.5 < c_td["model"]
    assert c_td["interval"][0] < c_td["model"] < c_td["interval"][1]


def test_the_figures_are_those_of_the_models_own_loss(report, store, run):
    """The evaluation's likelihood is computed from hazards; the model's from logits."""
    from ehrseq_fast import packed_survival_nll
    from ehrseq_fast.data import PatientDataset

    outcomes = FirstEvent(EVENT).apply(store, split="held_out")
    batch = PatientDataset(store, outcomes).batch(np.arange(len(outcomes)))
    hazard, _ = predictions(run.model(), batch)
    loss = packed_survival_nll(hazard, batch, entry_times=batch.targets["entry_times"])
    assert report.evaluation["nll"].model == pytest.approx(loss.item(), rel=1e-5)


def test_the_plots_are_images_with_something_on_them(report):
    image = pytest.importorskip("matplotlib.image")
    for name in ("learning_curve", "hazards", "calibration"):
        assert f"]({name}.png)" in (report.folder / "report.md").read_text()
        pixels = image.imread(report.folder / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels[..., :3].sum(-1))) > 20


@pytest.mark.parametrize("name", ["hazard", "hazard_with_time", "horizons"])
def test_every_model_can_be_evaluated_and_scored(store, tmp_path, name):
    """On the predictions of one date each."""
    model = ModelConfig(name, embedding_dim=8, hidden_dim=8, horizons_days=(30, 90))
    task = FirstEvent(EVENT, index="first_visit", time_at_risk_days=200)
    run = fit(small(store, tmp_path / "run", model=model, task=task, epochs=1))
    report = evaluate(run, store, n_bootstrap=0, progress=False)
    assert report.folder == tmp_path / "run" / "report"
    assert "predictions with" in (report.folder / "report.md").read_text()
    names = {metric.name for metric in report.evaluation.metrics if metric.model is not None}
    assert {"auc"} < names
    assert ("nll" in names) == (name != "horizons")
    predict(run, store, tmp_path / "out.parquet", split="held_out")
    columns = pq.read_schema(tmp_path / "out.parquet").names[2:]
    assert columns == (["risk_30d", "risk_90d"] if name == "horizons" else ["hazard"])


def test_landmarks_are_where_events_are():
    def training(days, events):
        n = len(days)
        return TrainingOutcomes(
            np.zeros(n, np.int64),
            np.array(events),
            np.zeros(n, np.int64),
            days_to_end=np.array(days, float),
            lengths=np.ones(n, np.int64),
        )

    early = np.linspace(1, 200, 100)
    assert landmarks(training(early, np.ones(100, int)), 90) == (0.0, 30.0, 90.0)
    assert landmarks(training(early, np.zeros(100, int) + (early < 3)), 90) == (0.0,)
    assert landmarks(training(early + 9000, np.ones(100, int)), 365) == (8760.0,)
    assert landmarks(None, 90) == (0.0,)
    assert landmarks(training(early, np.zeros(100, int)), 90) == (0.0,)  # no event at all


def test_a_split_without_patients_is_refused(store, run):
    with pytest.raises(ValueError, match="'train', 'tuning', 'held_out'"):
        evaluate(run, store, split="test")


def not_held_out(run, store, split="held_out"):
    """The report of an evaluation that must warn."""
    with pytest.warns(UserWarning, match="not held out"):
        return evaluate(run, store, split=split, n_bootstrap=0, progress=False)


def test_patients_who_were_held_out_need_no_word(run, store, report, recwarn):
    assert report.overlap.to_dict() == {"held_out": True, "trained_on": 0, "tuned_on": 0}
    evaluate(run, store, n_bootstrap=0, progress=False)
    assert not [w for w in recwarn if "held out" in str(w.message)]
    assert "ot held out" not in (report.folder / "report.md").read_text() + report.summary()


@pytest.mark.parametrize(("split", "seen"), [("train", "trained_on"), ("tuning", "tuned_on")])
def test_evaluating_those_who_were_trained_or_tuned_on_is_told(store, run, split, seen):
    report = not_held_out(run, store, split)
    n = len(FirstEvent(EVENT).apply(store, split=split))
    expected = {"held_out": False, "trained_on": 0, "tuned_on": 0, seen: n}
    assert report.overlap.to_dict() == expected
    figures = json.loads((report.folder / "report.json").read_text())
    assert {name: figures[name] for name in expected} == expected
    assert figures["notes"][0].startswith(f"not held out: of the {n} patients evaluated {n} ")
    text = (report.folder / "report.md").read_text()
    assert text.index("> **Not held out: ") < text.index("## Figures (not held out)")
    assert report.summary().startswith("Not held out: ")


def test_another_split_of_the_same_patients_is_found_out(drawn, store, run, tmp_path):
    """The store was read again with another seed, and that of training is gone or not."""
    again = drawn.store(tmp_path, seed=7)
    trained = store.subject_ids[FirstEvent(EVENT).apply(store, split="train").patients]
    tuned = store.subject_ids[FirstEvent(EVENT).apply(store, split="tuning").patients]
    evaluated = again.subject_ids[FirstEvent(EVENT).apply(again, split="held_out").patients]
    overlap = not_held_out(run, again).overlap
    assert overlap.evaluated == len(evaluated)
    assert overlap.trained == np.isin(evaluated, trained).sum() > 0
    assert overlap.tuned == np.isin(evaluated, tuned).sum() > 0
    assert "if its ids are those of other persons" in overlap.note


def test_dates_by_position_are_those_of_the_store_of_training_alone(drawn, store, run, tmp_path):
    """Another store of as many patients would take them for its own."""
    begins = store.visit_times[store.patient_offsets[:-1]]
    task = FirstEvent(EVENT, index=begins)
    dated = replace(run, config=replace(run.config, task=task.to_dict()))
    evaluate(dated, store, out=tmp_path / "report", n_bootstrap=0, progress=False)
    again = drawn.store(tmp_path, seed=7)
    assert again.n_patients == store.n_patients
    with pytest.raises(ValueError, match="by position"):
        evaluate(dated, again, n_bootstrap=0, progress=False)


def test_a_run_that_does_not_say_whom_it_saw(store, run, tmp_path):
    copy = shutil.copytree(run.folder.path, tmp_path / "run")
    (copy / "patients.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"cannot be told.*patients\.safetensors"):
        report = evaluate(copy, store, n_bootstrap=0, progress=False)
    assert report.overlap.held_out is None


# From records to a report, by commands


def test_four_commands_from_records_to_predictions(drawn, store, tmp_path, capsys):
    path = {name: str(tmp_path / name) for name in ("meds", "store", "run", "out.parquet", "task")}

    def run(*arguments):
        assert cli.main(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr()

    run("store", "to-meds", str(store.path), path["meds"])
    assert "900" in run("store", "meds", path["meds"], path["store"]).out
    read = EventStore(path["store"])
    assert read.header["content_sha256"] == store.header["content_sha256"]
    assert run("store", "describe", path["store"], "--verify").out.startswith("store")
    (tmp_path / "task").write_text("codes: [EVENT]\nwashout_days: 10\n")
    options = ["--epochs", "2", "--model.hidden_dim", "16", "--model.horizons_days", "[30,90]"]
    said = run("train", path["store"], path["run"], "--task", path["task"], *options).err
    assert "epoch 2/2: training loss" in said
    config = Run.open(path["run"]).config
    assert (config.model.hidden_dim, config.epochs) == (16, 2)
    assert config.task == {"codes": ["EVENT"], "washout_days": 10}
    assert "has ended already" in run("train", path["store"], path["run"], "--resume").err
    assert cli.main(["train", path["store"], path["run"], "--resume", "--seed", "4"]) == 1
    assert "seed: 0, now 4" in capsys.readouterr().err
    assert "C_td" in run("evaluate", path["run"], path["store"], "--bootstrap", "0").out
    assert (tmp_path / "run" / "report" / "calibration.png").exists()
    run("predict", path["run"], path["store"], path["out.parquet"])
    assert pq.read_metadata(path["out.parquet"]).num_rows == store.n_visits
    (tmp_path / "part.yaml").write_text("model: {hidden_dim: 16}\n")  # the rest is the run's
    part = ["--config", str(tmp_path / "part.yaml")]
    assert "has ended" in run("train", path["store"], path["run"], "--resume", *part).err
    again = ["train", path["store"], path["run"] + "2", "--config", f"{path['run']}/config.yaml"]
    run(*again, "--outcome", EVENT, "--seed", "1", "--outcome", "C39")
    config = Run.open(path["run"] + "2").config
    assert (config.seed, config.model.hidden_dim) == (1, 16)
    assert config.task == {"codes": ["EVENT", "C39"]}
