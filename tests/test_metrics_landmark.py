"""Landmark AUC, Brier score and calibration against pairs, libraries and the truth."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedRows, PackedVisits
from ehrseq_fast.metrics import brier, calibration, integrated_brier, landmark_auc
from ehrseq_fast.metrics.calibration import _spline
from ehrseq_fast.metrics.censoring import Censoring
from ehrseq_fast.metrics.landmark import select
from ehrseq_fast.metrics.values import read_values

from .metric_cases import CONVENTIONS, landmark_pairs, observed_chance, simulate

METRICS = (landmark_auc, brier, calibration)


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_definition_in_visits(seed, censored_visit):
    rng = np.random.default_rng(seed)
    times, seen = rng.integers(0, 12, 80), rng.random(80) < 0.5
    risk = rng.random((80, 12)).round(1)
    for landmark, horizon in ((0, 3), (2, 4), (3, 1)):
        options = {
            "landmark": landmark,
            "horizon": horizon,
            "censored_visit": censored_visit,
        }
        score = risk[:, landmark]
        auc, error = landmark_pairs(score, times, seen, landmark, horizon, censored_visit)
        if auc is not None:
            assert landmark_auc(risk, times, seen, **options) == pytest.approx(auc, abs=1e-12)
        assert brier(risk, times, seen, **options) == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
def test_definition_in_days_with_visits_before_the_landmark(censored_visit):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 7, 90)
    days = [np.cumsum(rng.integers(0, 90, n)) for n in lengths]
    end = np.array([d[-1] for d in days]) + rng.integers(1, 200, 90).astype(float)
    seen = rng.random(90) < 0.6
    risk = [rng.random(n).round(1) for n in lengths]
    landmark, horizon = 100.0, 150.0
    has = np.array([d[0] <= landmark for d in days])
    score = np.array(
        [r[max((d <= landmark).sum() - 1, 0)] for r, d in zip(risk, days, strict=True)]
    )
    auc, error = landmark_pairs(score[has], end[has], seen[has], landmark, horizon, censored_visit)
    options = {"landmark": landmark, "horizon": horizon, "censored_visit": censored_visit}
    flat = {"visit_times": np.concatenate(days), "lengths": lengths}
    found = landmark_auc(np.concatenate(risk), end, seen, **options, **flat)
    assert found == pytest.approx(auc, abs=1e-12)
    found = brier(np.concatenate(risk), end, seen, **options, **flat)
    assert found == pytest.approx(error, abs=1e-12)
    # padded, with anything on the padding, and packed
    mask = np.arange(6) < lengths[:, None]
    padded, when = np.full((90, 6), np.nan), np.full((90, 6), np.nan)
    padded[mask], when[mask] = np.concatenate(risk), np.concatenate(days)
    found = brier(padded, end, seen, **options, visit_times=when, lengths=lengths)
    assert found == pytest.approx(error, abs=1e-12)
    batch = PackedVisits.from_lists([[[1]] * n for n in lengths])
    rows, times = (PackedRows(batch.pack(torch.tensor(x)), batch) for x in (padded, when))
    assert brier(rows, end, seen, **options, visit_times=times) == pytest.approx(error, abs=1e-12)
    # a flat one may be in the order of the rows, or patient by patient
    for flat_times in (times.values, np.concatenate(days), list(np.concatenate(days))):
        for given in (rows, [rows]):
            with pytest.raises(TypeError, match="visit_times: expected risk's layout, PackedRows"):
                brier(given, end, seen, **options, visit_times=flat_times)
    assert brier(rows, end, seen, **options, visit_times=when) == pytest.approx(error, abs=1e-12)


def test_a_landmark_of_each_patient():
    """Times are counted from it: the same as scores and times that were shifted by hand."""
    rng = np.random.default_rng(4)
    risk, start = rng.random((200, 5)), rng.integers(0, 3, 200)
    times, seen = rng.integers(0, 5, 200), rng.random(200) < 0.6
    later = times >= start
    for metric in (landmark_auc, brier):
        found = metric(risk, times, seen, landmark=start, horizon=2)
        chosen = risk[np.arange(200), start][later]
        by_hand = metric(chosen, (times - start)[later], seen[later], landmark=0, horizon=2)
        assert found == pytest.approx(by_hand, abs=1e-14)


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
def test_censoring_is_lifelines_of_shifted_times(censored_visit):
    lifelines = pytest.importorskip("lifelines", reason="lifelines is the oracle")
    rng = np.random.default_rng(0)
    times, seen = rng.integers(0, 15, 400), rng.random(400) < 0.6
    shift = 0.5 if censored_visit == "included" else -0.5
    moved = np.where(seen, times, times + shift) + 1.0
    fitted = lifelines.KaplanMeierFitter().fit(moved, ~seen)
    ours = Censoring.fit(times, seen, censored_visit == "included")
    at = np.arange(0, 15)
    # of shifted times no tie is left, so that Ĝ(t) is Ĝ(t−)
    expected = fitted.survival_function_at_times(at + 1.0).to_numpy()
    np.testing.assert_allclose(ours.seen(at), expected, atol=1e-12)
    for t in (0, 3, 9):
        loop = observed_chance(times, seen, t, censored_visit)
        assert float(ours.seen(t)) == pytest.approx(loop, abs=1e-12)


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_truth_in_visits(share, censored_visit):
    """Against the same patients without censoring; the difference is Monte-Carlo error alone."""
    n, landmark, horizon = 100_000, 1, 3
    found = simulate(n, share, censored_visit, changing=False)
    everybody = np.ones(n, bool)
    risk = 1 - (1 - found.hazard[:, 0]) ** horizon
    options = {"landmark": np.full(n, landmark), "horizon": horizon}
    options["censored_visit"] = censored_visit
    outcome = found.times, found.seen, None
    weight = select(
        read_values("risk", risk), outcome, landmark, horizon, None, censored_visit
    ).weight
    error = 0.5 * np.sqrt((weight**2).sum()) / weight.sum()  # of a weighted mean
    assert error < 0.02
    for metric in (landmark_auc, brier):
        truth = metric(risk, found.event, everybody, **options)
        seen = metric(risk, found.times, found.seen, **options)
        assert seen == pytest.approx(truth, abs=4 * error), metric.__name__
    curve = calibration(risk, found.times, found.seen, **options)
    assert curve.ici < 4 * error
    assert curve.mean_observed == pytest.approx(curve.mean_predicted, abs=4 * error)
    for predicted, observed in zip(curve.predicted, curve.observed, strict=True):
        assert observed == pytest.approx(predicted, abs=4 * error * np.sqrt(10))
    doubled = calibration(np.minimum(2 * risk, 1), found.times, found.seen, **options)
    free = calibration(np.minimum(2 * risk, 1), found.event, everybody, **options)
    assert doubled.ici == pytest.approx(free.ici, abs=4 * error)
    assert doubled.ici > 0.1


def test_weights_by_the_time_of_the_event_would_be_too_large():
    """The tie that other packages take wrongly: what is mended is larger than what is left."""
    found = simulate(200_000, 0.6, "included", changing=False)
    risk = 1 - (1 - found.hazard[:, 0]) ** 4
    everybody = np.ones(len(found.event), bool)
    options = {"landmark": 0, "horizon": 4, "censored_visit": "included"}
    since = found.times.astype(float)
    truth = brier(risk, found.event, everybody, **options)
    ours = brier(risk, since, found.seen, **options)
    case = found.seen & (since <= 4) & (since > 0)
    control = since > 4
    at_risk = (since > 0) | ~found.seen
    naive = Censoring.fit(since[at_risk], found.seen[at_risk], True)
    steps = np.concatenate([[1.0], naive.steps])
    after = steps[np.searchsorted(naive.times, np.minimum(since, 4), "right")]
    wrong = ((case * (1 - risk) ** 2 + control * risk**2) / after)[at_risk].mean()
    assert abs(ours / truth - 1) < 0.01
    assert wrong / truth > 1.03


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truth_in_days(share):
    rng = np.random.default_rng(6)
    n, horizon = 60_000, 365.0
    rate = np.exp(rng.normal(-6.5, 1, n))
    event = rng.exponential(1 / rate)
    scale = {0.3: 3000.0, 0.7: 450.0}[share]
    end = rng.exponential(scale, n)
    times, seen = np.minimum(event, end), event <= end
    risk = -np.expm1(-rate * horizon)
    options, everybody = {"landmark": 0, "horizon": horizon}, np.ones(n, bool)
    for metric in (landmark_auc, brier):
        truth = metric(risk, event, everybody, **options)
        assert metric(risk, times, seen, **options) == pytest.approx(truth, abs=1.5 / np.sqrt(n))
    curve = calibration(risk, times, seen, **options)
    assert curve.ici < 0.012
    assert curve.e50 <= curve.e90 <= curve.emax
    risks = -np.expm1(-rate[:, None] * [100.0, 365.0, 730.0])
    ends = [100.0, 365.0, 730.0]
    truth = integrated_brier(risks, event, everybody, landmark=0, horizons=ends)
    found = integrated_brier(risks, times, seen, landmark=0, horizons=ends)
    assert found == pytest.approx(truth, abs=2 / np.sqrt(n))
    single = [brier(risks[:, j], times, seen, landmark=0, horizon=w) for j, w in enumerate(ends)]
    by_hand = (single[0] * 50 + (single[0] + single[1]) * 265 / 2) / 730
    by_hand += (single[1] + single[2]) * 365 / 2 / 730
    assert found == pytest.approx(by_hand, abs=1e-12)


def test_constant_risks():
    rng = np.random.default_rng(0)
    times, seen = rng.exponential(300, 3000), rng.random(3000) < 0.7
    options = {"landmark": 0, "horizon": 200}
    risk = np.full(3000, 0.4)
    assert landmark_auc(risk, times, seen, **options) == 0.5
    curve = calibration(risk, times, seen, **options)
    assert len(curve.predicted) == 1
    assert curve.ici == pytest.approx(abs(curve.mean_observed - 0.4), abs=1e-12)
    two = calibration(np.where(times < 100, 0.6, 0.1), times, seen, **options)
    assert two.predicted == pytest.approx([0.1, 0.6])
    assert json.loads(json.dumps(two.to_dict())) == two.to_dict()
    nobody = calibration(np.zeros(3000), times, np.zeros(3000, bool), **options)
    assert nobody.ici == 0
    risk = np.random.default_rng(2).random(3000)  # more than bins: these differ in size
    nobody = calibration(risk, times, np.zeros(3000, bool), **options)
    assert nobody.ici == pytest.approx(risk.mean(), abs=1e-12)


def test_the_curve_is_linear_in_the_logit_beyond_the_outer_knots():
    basis = _spline(np.linspace(-3, 5, 400))
    assert basis.shape == (400, 3)
    bends = np.abs(np.diff(basis, 2, axis=0))
    assert bends[:18].max() < 1e-12 > bends[-18:].max()
    assert (bends[:, 1:].max(0) > 1e-6).all()


def test_a_fit_that_takes_another_method_is_quiet(recwarn):
    """A bootstrap of few events would print a line for every other sample."""
    rng = np.random.default_rng(92)  # one that scikit-learn 1.9 warns of
    found = calibration(
        rng.uniform(0, 0.5, 9), rng.uniform(0, 20, 9), np.ones(9), landmark=0, horizon=10
    )
    assert 0 < found.ici < 1
    assert not [str(each.message) for each in recwarn]


def test_a_plot():
    matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert matplotlib
    rng = np.random.default_rng(0)
    risk = rng.random(500)
    found = calibration(risk, rng.exponential(300, 500), np.ones(500), landmark=0, horizon=200)
    axes = found.plot()
    assert axes.get_xlabel() == "predicted risk"
    assert len(axes.lines) == 3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon: expected a number above 0, got 0"),
        ({"horizon": np.nan}, "horizon: expected a number above 0, got nan"),
        ({"landmark": -1}, r"landmark: expected numbers from 0, got -1"),
        ({"landmark": np.zeros(3)}, r"landmark: expected a number or \[B\] = \[5\]"),
        ({"landmark": 900}, "expected patients at risk after 900, got none of 5"),
        ({"horizon": 600}, r"horizon: expected one that is observed, got 600 .*\(Ĝ = 0\)"),
        ({"event_indicators": [1, 0, 2, 0, 1]}, r"got 2 \(patient 2"),
        ({"event_times": [1, 2, np.nan, 4, 5]}, r"event_times: .*got nan \(patient 2"),
        ({"risk": [0.1, 0.2, 0.3, np.nan, 0.3]}, r"risk: .*got NaN \(patient 3, visit 0"),
        ({"censored_visit": "no"}, "censored_visit: expected one of"),
        ({"visit_times": [1.0, 2.0]}, r"visit_times: expected one row per visit \(5 by len"),
    ],
)
def test_refuses(metric, changes, message):
    arguments = {
        "risk": [0.1, 0.2, 0.3, 0.4, 0.5],
        "event_times": [100.0, 200.0, 300.0, 400.0, 500.0],
        "event_indicators": [1, 0, 1, 1, 0],
        "landmark": 0,
        "horizon": 250,
    } | changes
    with pytest.raises(ValueError, match=message):
        metric(**arguments)


@pytest.mark.parametrize("wrong", [1.0, np.nan])
def test_refuses_visits_that_are_not_in_order(wrong):
    days = np.array([[0.0, 5.0, 5.0, 9.0], [0.0, 3.0, wrong, np.nan], [0.0, 2.0, 4.0, 6.0]])
    options = {"landmark": 4, "horizon": 8, "lengths": [4, 3, 4]}
    outcomes = [10.0, 20.0, 30.0], [1, 1, 0]
    for metric in METRICS:
        with pytest.raises(ValueError, match=rf"got 3 and then {wrong:g} \(patient 1, visit 2; 1 "):
            metric(np.full((3, 4), 0.2), *outcomes, visit_times=days, **options)
    days[1, 2] = 3  # of one day
    assert brier(np.full((3, 4), 0.2), *outcomes, visit_times=days, **options) > 0


def test_refuses_what_is_no_probability_and_what_has_no_pairs():
    times, seen = [100.0, 200.0, 300.0], [1, 0, 1]
    options = {"landmark": 0, "horizon": 150}
    for metric in (brier, calibration):
        with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5 \(patient 1, visit 0"):
            metric([0.1, 1.5, 0.2], times, seen, **options)
    assert landmark_auc([0.1, 1.5, 0.2], times, seen, **options) == 0.0
    with pytest.raises(ValueError, match="got 0 events within it and 3 patients"):
        landmark_auc([0.1, 0.2, 0.3], times, seen, landmark=0, horizon=50)
    with pytest.raises(ValueError, match="expected one for each of 2 risks"):
        integrated_brier(np.zeros((3, 2)), times, seen, landmark=0, horizons=[1])
    with pytest.raises(ValueError, match="expected ascending numbers above 0"):
        integrated_brier(np.zeros((3, 2)), times, seen, landmark=0, horizons=[2, 1])
