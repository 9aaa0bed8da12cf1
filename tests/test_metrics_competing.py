"""Metrics of competing events against pairs, loops, the losses, lifelines and the truth."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedRows, PackedVisits, competing_risks_nll
from ehrseq_fast.metrics import (
    TrainingOutcomes,
    brier,
    calibration,
    cause_baselines,
    cause_day_baselines,
    concordance_td,
    cumulative_incidence,
    day_baselines,
    evaluate,
    incidence_curves,
    integrated_brier,
    landmark_auc,
    visit_baselines,
)
from ehrseq_fast.metrics.dynamic import NO_PAIR

from .competing_cases import (
    concordance_pairs_of_cause,
    incidences_by_loops,
    landmark_pairs_of_cause,
    simulate_competing,
)
from .metric_cases import CONVENTIONS

pytestmark = pytest.mark.filterwarnings("error:Tied event times")


def few(seed, n=70, visits=8):
    """Times, types, entries and hazards with ties everywhere."""
    rng = np.random.default_rng(seed)
    times, types = rng.integers(0, visits, n), rng.integers(0, 3, n)
    entry = np.minimum(rng.integers(0, 3, n), times)
    hazards = rng.integers(1, 5, (n, visits, 2)) / 10
    return times, types, entry, hazards


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
@pytest.mark.parametrize("seed", range(2))
def test_concordance_is_its_definition(seed, censored_visit):
    times, types, entry, hazards = few(seed)
    for cause in (1, 2):
        for late in (None, entry):
            risk = hazards[..., cause - 1]
            expected = concordance_pairs_of_cause(risk, times, types, cause, censored_visit, late)
            options = {"event_types": types, "cause": cause, "censored_visit": censored_visit}
            for given in (risk, hazards):
                found = concordance_td(given, times, entry_times=late, **options)
                assert found == expected
            assert 0.2 < expected < 0.8
            assert expected != 0.5


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
def test_a_score_of_the_visit_alone_is_chance_for_each_cause(censored_visit):
    times, types, _, _ = few(3, n=3000, visits=15)
    risk = np.broadcast_to(np.random.default_rng(0).normal(size=15), (3000, 15))
    for cause in (1, 2):
        found = concordance_td(
            risk, times, event_types=types, cause=cause, censored_visit=censored_visit
        )
        assert found == 0.5


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
def test_landmarks_are_their_definition(censored_visit):
    times, types, _, hazards = few(1)
    for cause, landmark, horizon in ((1, 0, 3), (2, 1, 4)):
        score = hazards[:, landmark, cause - 1]
        auc, error = landmark_pairs_of_cause(
            score, times, types, cause, landmark, horizon, censored_visit
        )
        options = {"event_types": types, "cause": cause, "censored_visit": censored_visit}
        options |= {"landmark": landmark, "horizon": horizon}
        risk = hazards[..., cause - 1]
        assert landmark_auc(risk, times, **options) == pytest.approx(auc, abs=1e-12)
        assert brier(risk, times, **options) == pytest.approx(error, abs=1e-12)
        del options["horizon"]
        whole = integrated_brier(hazards[..., [cause - 1]], times, horizons=[horizon], **options)
        assert whole == pytest.approx(error / 2, abs=1e-12)


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
def test_one_cause_is_one_event(censored_visit):
    times, types, entry, hazards = few(2)
    seen, risk = (types > 0).astype(int), hazards[..., 0]
    options = {"event_types": seen, "cause": 1, "censored_visit": censored_visit}
    at = {"landmark": 1, "horizon": 3}
    one = {"censored_visit": censored_visit}
    assert concordance_td(risk, times, entry_times=entry, **options) == concordance_td(
        risk, times, seen, entry_times=entry, **one
    )
    for metric in (landmark_auc, brier):
        assert metric(risk, times, **at, **options) == metric(risk, times, seen, **at, **one)
    assert calibration(risk, times, **at, **options) == calibration(risk, times, seen, **at, **one)
    fitted = cause_baselines(times, seen, 1, entry, censored_visit=censored_visit)
    single = visit_baselines(times, seen, entry, censored_visit=censored_visit)
    assert fitted.constant[0] == single.constant
    np.testing.assert_array_equal(fitted.by_visit[:, 0], single.by_visit)
    days, lengths = np.linspace(0, 900, 140), np.full(70, 2)
    (of_cause,) = cause_day_baselines(days, seen, 1, lengths, (90, 365))
    of_event = day_baselines(days, seen, lengths, (90, 365))
    np.testing.assert_allclose(of_cause.by_visit, of_event.by_visit, rtol=1e-12)


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
@pytest.mark.parametrize("late", [False, True])
def test_the_observed_incidence_is_aalen_johansens(censored_visit, late):
    """By its definition, and by lifelines of patients with censorings moved by half a visit."""
    lifelines = pytest.importorskip("lifelines", reason="lifelines is the oracle")
    times, types, entry, hazards = few(4, n=200)
    entry = entry if late else None
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    found = incidence_curves(
        hazards,
        times,
        types,
        entry_times=entry,
        censored_visit=censored_visit,
        fewest=1,
    )
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    size = len(found.visits)
    assert size >= 7
    expected = incidences_by_loops(times, types, censored_visit, size, 2, entry)
    np.testing.assert_allclose(np.transpose(found.observed), expected, atol=1e-12)
    shift = 0.5 if censored_visit == "included" else -0.5
    rng = np.random.default_rng(0)
    moved = times + np.where(types > 0, rng.uniform(0, 0.1, 200), shift) + 1
    for cause in (1, 2):
        fitted = lifelines.AalenJohansenFitter(calculate_variance=False)
        fitted.fit(moved, types, cause, entry=None if entry is None else entry + 0.25)
        place = np.searchsorted(fitted.cumulative_density_.index, np.arange(size) + 1.2) - 1
        of_lifelines = fitted.cumulative_density_.to_numpy()[place, 0]
        np.testing.assert_allclose(found.observed[cause - 1], of_lifelines, atol=1e-12)
    low, high, observed = (np.array(x) for x in (found.low, found.high, found.observed))
    assert (low <= observed).all()
    assert (observed <= high).all()
    assert (high > low)[:, :-1].all()


def test_the_predicted_incidence():
    """Of hazards that depend on the visit alone it is theirs; of observed hazards the observed."""
    times, types, _, _ = few(5, n=300)
    events = np.stack([np.bincount(times[types == k], minlength=8) for k in (1, 2)], 1)
    at_risk = np.array([((times > t) | ((times == t) & (types > 0))).sum() for t in range(8)])
    by_visit = events / at_risk[:, None]
    found = incidence_curves(np.broadcast_to(by_visit, (300, 8, 2)), times, types)
    expected = cumulative_incidence(torch.tensor(by_visit)[None])[0].numpy()
    visits = found.visits
    np.testing.assert_allclose(np.transpose(found.predicted), expected[visits], atol=1e-12)
    np.testing.assert_allclose(found.predicted, found.observed, atol=1e-12)
    assert max(found.largest_difference) < 1e-12
    assert found.at_risk == at_risk[visits].tolist()


def test_the_curves_span_visits_with_enough_patients():
    times, types = np.array([5] * 40 + [1]), np.array([1, 2] * 20 + [1])
    entry = np.array([3] * 20 + [4] * 20 + [0])
    found = incidence_curves(np.full((41, 6, 2), 0.1), times, types, entry_times=entry, fewest=20)
    assert found.visits == [3, 4, 5]
    assert found.at_risk == [20, 40, 40]
    assert found.observed == [[0, 0, pytest.approx(0.5)]] * 2


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_truth_of_a_simulation(share, censored_visit):
    """Against the same patients without censoring, within Monte-Carlo error."""
    n = 20_000
    found = simulate_competing(n, share, censored_visit, changing=True)
    assert abs((found.types == 0).mean() - share) < 0.03
    options = {"causes": ("first", "second"), "censored_visit": censored_visit}
    train = {"train": TrainingOutcomes(found.times, event_types=found.types)}
    seen = evaluate(
        found.hazards,
        found.times,
        event_types=found.types,
        lengths=found.lengths,
        **options,
        **train,
    )
    truth = evaluate(found.hazards, found.event, event_types=found.cause, **options)
    for cause, number in (("first", 1), ("second", 2)):
        events = (found.types == number).sum()
        error = 4 * 0.3 / np.sqrt(events)
        c_td = seen["c_td", cause]
        assert c_td.model == pytest.approx(truth["c_td", cause].model, abs=error + 0.005)
        assert c_td.constant == c_td.by_visit == 0.5
        assert c_td.model > 0.65
        ratio = seen["observed/expected", cause].model
        assert ratio == pytest.approx(1, abs=4 / np.sqrt(events))
    curves = seen.incidences
    # the true incidences, of all patients' hazards: they are drawn anew at each visit
    means = found.hazards[:, 0].mean(0)
    t = np.arange(1, len(curves.visits) + 1)
    true = means / means.sum() * (1 - (1 - means.sum()) ** t[:, None])
    few_left = np.array(curves.at_risk) < 300
    spread = np.where(few_left, 0.2, 4 * 0.5 / np.sqrt(np.maximum(curves.at_risk, 1)))
    for k in range(2):
        assert (np.abs(curves.observed[k] - true[:, k]) < spread).all()
        assert (np.abs(curves.predicted[k] - true[:, k]) < spread).all()
    assert seen["nll"].model < min(seen["nll"].constant, seen["nll"].by_visit)


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_truth_at_a_landmark(share, censored_visit):
    n, landmark, horizon = 60_000, 1, 4
    found = simulate_competing(n, share, censored_visit, changing=False)
    own = torch.tensor(found.hazards[:, :horizon])
    risk = cumulative_incidence(own)[:, -1].numpy()
    options = {"landmark": np.full(n, landmark), "horizon": horizon}
    options["censored_visit"] = censored_visit
    for cause in (1, 2):
        of = {"cause": cause, **options}
        p = risk[:, cause - 1]
        curve = calibration(p, found.times, event_types=found.types, **of)
        free = calibration(p, found.event, event_types=found.cause, **of)
        error = 0.02 if share > 0.5 else 0.01
        assert curve.ici < error
        assert curve.mean_observed == pytest.approx(free.mean_observed, abs=error)
        for metric in (landmark_auc, brier):
            truth = metric(p, found.event, event_types=found.cause, **of)
            seen = metric(p, found.times, event_types=found.types, **of)
            assert seen == pytest.approx(truth, abs=1.5 * error), metric.__name__
        # competing events as censoring: the incidence would be far too large
        alone = calibration(p, found.times, found.types == cause, **options)
        assert alone.mean_observed > 1.05 * free.mean_observed


def test_the_observed_risk_of_all_is_aalen_johansens():
    lifelines = pytest.importorskip("lifelines", reason="lifelines is the oracle")
    rng = np.random.default_rng(7)
    days, types = rng.exponential(400, 500), rng.integers(0, 3, 500)
    curve = calibration(rng.random(500), days, event_types=types, cause=2, landmark=0, horizon=365)
    fitted = lifelines.AalenJohansenFitter(calculate_variance=False).fit(days, types, 2)
    density = fitted.cumulative_density_
    expected = density.to_numpy()[np.searchsorted(density.index, 365, "right") - 1, 0]
    assert curve.mean_observed == pytest.approx(expected, rel=1e-9)


def records(n=500, seed=0, gap=60.0):
    """What evaluate takes, flat: rates of two causes, in visits and in days."""
    rng = np.random.default_rng(seed)
    rates = np.exp(rng.normal(-6.6, 1, (n, 2)))
    event, end = rng.exponential(1 / rates.sum(1)), rng.uniform(30, 1500, n)
    total, seen = np.minimum(event, end), event <= end
    types = np.where(seen, 1 + (rng.random(n) > rates[:, 0] / rates.sum(1)), 0)
    lengths = (total // gap).astype(int) + 1
    of = np.repeat(np.arange(n), lengths)
    visit = np.arange(len(of)) - np.repeat(lengths.cumsum() - lengths, lengths)
    within = -np.expm1(-rates.sum(1)[:, None] * np.array([gap, 90, 365]))
    shares = (rates / rates.sum(1, keepdims=True))[:, None]
    risks = within[..., None] * shares
    return {
        "hazards": risks[of, 0],
        "risks": risks[of, 1:],
        "event_times": lengths - 1,
        "event_types": types,
        "lengths": lengths,
        "days_to_end": total[of] - gap * visit,
    }, total


def test_each_figure_is_that_of_its_function():
    (r, total), (other, _) = records(), records(seed=1)
    names = ("event_times", "event_types", "days_to_end", "lengths")
    train = TrainingOutcomes(**{name: other[name] for name in names})
    landmarks = (0, "every visit")
    found = evaluate(
        **r,
        horizons_days=(90, 365),
        landmarks_days=landmarks,
        causes=("stroke", "death"),
        train=train,
        bootstrap=10,
        progress=False,
    )
    starts = r["lengths"].cumsum() - r["lengths"]
    mask = np.arange(r["lengths"].max()) < r["lengths"][:, None]
    p = np.zeros((*mask.shape, 2))
    p[mask] = r["hazards"]
    logits = torch.tensor(np.concatenate([1 - p.sum(2, keepdims=True), p], 2)).log()
    nll = competing_risks_nll(
        logits,
        *map(torch.tensor, (r["event_times"], r["event_types"], mask)),
        from_logits=True,
        link="softmax",
    )
    assert found["nll"].model == pytest.approx(float(nll), rel=1e-6)
    curves = incidence_curves(
        r["hazards"], r["event_times"], r["event_types"], lengths=r["lengths"]
    )
    assert found.incidences.observed == curves.observed
    days = cause_day_baselines(
        other["days_to_end"], other["event_types"], 2, other["lengths"], (90, 365)
    )
    for k, cause in enumerate(("stroke", "death")):
        of = {"event_types": r["event_types"], "cause": k + 1}
        c_td = concordance_td(r["hazards"][:, k], r["event_times"], lengths=r["lengths"], **of)
        assert found["c_td", cause].model == c_td
        gap = curves.largest_difference[k]
        assert found["incidence", cause].model == pytest.approx(gap, abs=1e-15)
        assert found["incidence", cause].library == "lifelines"
        for j, w in enumerate((90, 365)):
            at = {"landmark": 0, "horizon": w, **of}
            risk = r["risks"][starts, j, k]
            assert found["auc", 0, w, cause].model == pytest.approx(landmark_auc(risk, total, **at))
            assert found["brier", 0, w, cause].model == pytest.approx(brier(risk, total, **at))
            constant = np.full(len(total), days[k].constant[j])
            assert found["brier", 0, w, cause].constant == pytest.approx(
                brier(constant, total, **at)
            )
            assert found.calibrations[0, w, cause].n == len(total)
        assert found["auc", "every visit", 365, cause].constant == 0.5
    for metric in found.metrics:
        if metric.name not in ("ici", "incidence", "observed/expected"):
            assert metric.interval[0] < metric.model < metric.interval[1], metric
    held = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert held["causes"] == ["stroke", "death"]
    assert held["incidences"]["visits"] == curves.visits
    assert {m["library"] for m in held["metrics"]} == {
        "ehrseq_fast (NumPy)",
        "scikit-learn",
        "lifelines",
    }
    assert "lifelines" in held["versions"]
    assert "| C_td, death " in found.table()
    assert "AUC, stroke, day 0 + 365" in found.table()
    with pytest.raises(KeyError):
        found["c_td"]


def test_layouts_are_alike():
    r, _ = records(150)
    options = {"horizons_days": (90, 365), "causes": ("a", "b")}
    expected = evaluate(**r, **options)
    batch = PackedVisits.from_lists(
        [[[1]] * n for n in r["lengths"]],
        event_times=r["event_times"],
        event_types=r["event_types"],
        visit_targets={name: r[name] for name in ("hazards", "risks", "days_to_end")},
    )

    def rows(part):
        return {name: PackedRows(part.visit_targets[name], part) for name in part.visit_targets}

    parts = [rows(batch[:70]), rows(batch[70:])]
    assert evaluate(**rows(batch), **options).to_dict() == expected.to_dict()
    together = {name: [part[name] for part in parts] for name in parts[0]}
    assert evaluate(**together, **options).to_dict() == expected.to_dict()
    mask = np.arange(r["lengths"].max()) < r["lengths"][:, None]
    padded = {}
    for name in ("hazards", "risks", "days_to_end"):
        padded[name] = np.full((*mask.shape, *r[name].shape[1:]), np.nan)
        padded[name][mask] = r[name]
    assert evaluate(**(r | padded), **options).to_dict() == expected.to_dict()
    hazards = rows(batch)["hazards"]
    flat = concordance_td(
        r["hazards"][:, 1],
        r["event_times"],
        event_types=r["event_types"],
        cause=2,
        lengths=r["lengths"],
    )
    assert concordance_td(hazards, cause=2) == flat
    assert concordance_td([hazards], cause=2) == flat
    curves = incidence_curves(hazards)
    assert curves.observed == expected.incidences.observed


def test_a_plot():
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    r, _ = records(150)
    found = evaluate(
        r["hazards"], r["event_times"], event_types=r["event_types"], lengths=r["lengths"]
    )
    axes = found.incidences.plot()
    assert axes.get_xlabel() == "visit"
    assert [text.get_text() for text in axes.get_legend().get_texts()][:1] == ["cause 1, predicted"]


def test_too_few_patients_for_a_curve():
    found = evaluate(np.full((3, 2, 2), 0.1), [0, 1, 1], event_types=[0, 2, 1])
    assert found.incidences is None
    assert found["incidence", "cause 1"].model is None
    assert "10 patients at risk, got at most 2" in found["incidence", "cause 1"].reason
    assert found["c_td", "cause 2"].reason == NO_PAIR
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_cause_without_events():
    found = evaluate(
        np.full((30, 2, 2), 0.1),
        np.ones(30, int),
        event_types=[1, 0] * 15,
        train=TrainingOutcomes([0, 1], event_types=[0, 1]),
    )
    assert found["c_td", "cause 2"].reason == NO_PAIR
    assert found["observed/expected", "cause 2"].model == 0
    assert np.isfinite([found["nll"].constant, found["nll"].by_visit]).all()
    full = cause_baselines([0, 0, 0], [1, 1, 1], 3)
    assert (full.constant > 0).all()
    assert full.constant.sum() < 1
    assert (full.by_visit.sum(1) < 1).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"event_types": [0, 3, 1]}, ValueError, r"0 \(censored\) to K = 2, got 3 \(patient 1; 1"),
        ({"event_types": [0, 1, -1]}, ValueError, r"got -1 \(patient 2; 1 in all"),
        ({"event_types": [0, 0.5, 1]}, ValueError, r"got 0.5 \(patient 1; 1 in all"),
        ({"event_types": [0, 1]}, ValueError, r"event_types: expected \[B\] = \[3\]"),
        ({"event_types": None}, TypeError, "expected one per patient, got None"),
        ({"event_indicators": [0, 1, 1]}, TypeError, "event_indicators: expected None with"),
        ({"hazards": np.full((3, 2, 2), 0.6)}, ValueError, r"a sum of at most 1, got \[0.6, 0.6\]"),
        ({"hazards": np.full((3, 2, 2), -0.1)}, ValueError, r"patient 0, visit 0; 5 visits in all"),
        ({"hazards": np.full((3, 2, 2), np.nan)}, ValueError, "hazards: expected numbers, got NaN"),
        ({"causes": ("one",)}, ValueError, r"causes: expected 2 different names, got \['one'\]"),
        ({"causes": ("x", "x")}, ValueError, "causes: expected 2 different names"),
        ({"event_times": [0, 2, 1]}, ValueError, "patient 1 has event time 2 and 2 visits"),
        ({"train": TrainingOutcomes([0], [1])}, TypeError, "train.event_types: expected with"),
    ],
)
def test_refuses(changes, error, message):
    arguments = {
        "hazards": np.full((3, 2, 2), 0.1),
        "event_times": [0, 1, 1],
        "event_types": [0, 2, 1],
        "causes": ("one", "two"),
    } | changes
    with pytest.raises(error, match=message):
        evaluate(**arguments)


def test_refuses_causes():
    risk, outcomes = np.zeros((3, 2, 2)), {"event_types": [0, 2, 1]}
    with pytest.raises(ValueError, match="cause: expected 1 to 2, got 3"):
        concordance_td(risk, [0, 1, 1], **outcomes, cause=3)
    with pytest.raises(ValueError, match="cause: expected 1 to 2, got 0"):
        concordance_td(risk, [0, 1, 1], **outcomes, cause=0)
    with pytest.raises(TypeError, match="cause: expected an integer, got float"):
        concordance_td(risk, [0, 1, 1], **outcomes, cause=1.0)
    with pytest.raises(TypeError, match="cause: expected one of the event types from 1 on"):
        concordance_td(risk[..., 0], [0, 1, 1], **outcomes)
    with pytest.raises(TypeError, match="event_indicators: expected None with a cause"):
        concordance_td(risk, [0, 1, 1], [0, 1, 1], cause=1)
    with pytest.raises(ValueError, match=r"K = 2, got 3 \(patient 1"):
        concordance_td(risk, [0, 1, 1], event_types=[0, 3, 1], cause=1)
    with pytest.raises(ValueError, match="a visit with 10 patients at risk, got at most 3"):
        incidence_curves(risk, [0, 1, 1], [1, 2, 1])
    with pytest.raises(ValueError, match=r"patient 1, was observed for 90 \(Ĝ = 0\)"):
        brier([0.1, 0.2], [30.0, 90.0], [1, 0], landmark=0, horizon=365)
