"""All figures at once: each that of its own function, beside both baselines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ehrseq_fast import PackedRows, PackedVisits, discrete_time_survival_nll
from ehrseq_fast.metrics import (
    TrainingOutcomes,
    brier,
    calibration,
    concordance_td,
    day_baselines,
    evaluate,
    integrated_brier,
    landmark_auc,
    visit_baselines,
)
from ehrseq_fast.metrics.at_landmarks import _stable_order
from ehrseq_fast.metrics.dynamic import NO_PAIR

from .metric_cases import CONVENTIONS, observed_chance

HORIZONS = (90.0, 365.0)


def records(n=800, seed=0, gap=60.0):
    """Patients with a rate of their own: what each metric is computed from, flat."""
    rng = np.random.default_rng(seed)
    rate = np.exp(rng.normal(-6, 1.2, n))
    event, end = rng.exponential(1 / rate), rng.uniform(30, 1500, n)
    total, seen = np.minimum(event, end), event <= end
    days = [np.concatenate([[0.0], np.cumsum(rng.exponential(gap, 40))]) for _ in range(n)]
    days = [d[d < t] for d, t in zip(days, total, strict=True)]
    lengths = np.array([len(d) for d in days])
    of = np.repeat(np.arange(n), lengths)
    return {
        "event_times": lengths - 1,
        "event_indicators": seen.astype(int),
        "lengths": lengths,
        "days_to_end": total[of] - np.concatenate(days),
        "hazards": -np.expm1(-rate * gap)[of],
        "risks": -np.expm1(-rate[of][:, None] * HORIZONS),
        "visit_days": np.concatenate(days),
        "total": total,
    }


def train_of(r):
    names = ("event_times", "event_indicators", "days_to_end", "lengths")
    return TrainingOutcomes(**{name: r[name] for name in names})


NAMES = ("event_times", "event_indicators", "lengths", "days_to_end", "hazards", "risks")


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
def test_each_figure_is_that_of_its_function(censored_visit):
    r, other = records(), records(seed=1)
    found = evaluate(
        **{name: r[name] for name in NAMES},
        horizons_days=HORIZONS,
        landmarks_days=(0, 200),
        train=train_of(other),
        censored_visit=censored_visit,
    )
    outcomes = r["event_times"], r["event_indicators"]
    options = {"lengths": r["lengths"], "censored_visit": censored_visit}
    assert found["c_td"].model == concordance_td(r["hazards"], *outcomes, **options)
    assert found["c_td"].model > 0.7
    assert found["c_td"].constant == found["c_td"].by_visit == 0.5
    mask = np.arange(r["lengths"].max()) < r["lengths"][:, None]
    padded = np.zeros(mask.shape)
    padded[mask] = r["hazards"]
    nll = discrete_time_survival_nll(
        torch.tensor(padded),
        *map(torch.tensor, outcomes),
        torch.tensor(mask),
        censored_visit=censored_visit,
    )
    assert found["nll"].model == pytest.approx(float(nll), rel=1e-9)
    fitted = visit_baselines(
        other["event_times"], other["event_indicators"], censored_visit=censored_visit
    )
    expected = fitted.nll(*outcomes)
    assert (found["nll"].constant, found["nll"].by_visit) == pytest.approx(expected)
    assert found["nll"].model < min(expected)
    in_days = r["total"], r["event_indicators"]
    options["visit_times"] = r["visit_days"]
    for s in (0.0, 200.0):
        for j, w in enumerate(HORIZONS):
            at = {"landmark": s, "horizon": w, **options}
            risk = r["risks"][:, j]
            assert found["auc", s, w].model == pytest.approx(landmark_auc(risk, *in_days, **at))
            assert found["auc", s, w].constant == 0.5
            assert found["brier", s, w].model == pytest.approx(brier(risk, *in_days, **at))
            curve = calibration(risk, *in_days, **at)
            assert found["ici", s, w].model == pytest.approx(curve.ici, abs=1e-6)
            assert found.calibrations[s, w].n == curve.n == found["ici", s, w].n
            ratio = curve.mean_observed / curve.mean_predicted
            assert found["observed/expected", s, w].model == pytest.approx(ratio)
            assert found["brier", s, w].model < found["brier", s, w].constant
        whole = integrated_brier(r["risks"], *in_days, landmark=s, horizons=HORIZONS, **options)
        assert found["integrated_brier", s, 365.0].model == pytest.approx(whole)
    by_days = day_baselines(
        other["days_to_end"], other["event_indicators"], other["lengths"], HORIZONS
    )
    constant = np.full(len(r["hazards"]), by_days.constant[1])
    at = {"landmark": 0, "horizon": 365, **options}
    assert found["brier", 0, 365].constant == pytest.approx(brier(constant, *in_days, **at))
    assert json.loads(json.dumps(found.to_dict()))["patients"] == 800
    assert {m["library"] for m in found.to_dict()["metrics"]} == {
        "ehrseq_fast (NumPy)",
        "scikit-learn",
    }
    table = found.table().splitlines()
    assert len(table) == 2 + 2 + 2 * (4 * len(HORIZONS) + 1)
    assert table[2].startswith("| negative log-likelihood per patient")
    assert len({len(line) for line in table}) == 1


def test_layouts_are_alike():
    r = records(200)
    expected = evaluate(**{name: r[name] for name in NAMES}, horizons_days=HORIZONS)
    batch = PackedVisits.from_lists(
        [[[1]] * n for n in r["lengths"]],
        event_times=r["event_times"],
        event_indicators=r["event_indicators"],
        visit_targets={name: r[name] for name in ("hazards", "risks", "days_to_end")},
    )

    def rows(part):
        return {name: PackedRows(part.visit_targets[name], part) for name in part.visit_targets}

    found = evaluate(**rows(batch), horizons_days=HORIZONS)
    assert found.to_dict() == expected.to_dict()
    parts = [rows(batch[:70]), rows(batch[70:])]
    found = evaluate(**{n: [p[n] for p in parts] for n in parts[0]}, horizons_days=HORIZONS)
    assert found.to_dict() == expected.to_dict()
    mask = np.arange(r["lengths"].max()) < r["lengths"][:, None]
    padded = {}
    for name in ("hazards", "risks", "days_to_end"):
        padded[name] = np.full((*mask.shape, *r[name].shape[1:]), np.nan)
        padded[name][mask] = r[name]
    found = evaluate(
        **{name: r[name] for name in ("event_times", "event_indicators", "lengths")},
        **padded,
        horizons_days=HORIZONS,
    )
    assert found.to_dict() == expected.to_dict()


def test_landmarks_are_counted_from_the_entry():
    r = records(300)
    entry = np.minimum(2, r["event_times"])
    found = evaluate(
        **{name: r[name] for name in NAMES},
        entry_times=entry,
        horizons_days=HORIZONS,
        landmarks_days=(0,),
    )
    at = np.cumsum(r["lengths"]) - r["lengths"] + entry
    auc = landmark_auc(
        r["risks"][at, 1], r["days_to_end"][at], r["event_indicators"], landmark=0, horizon=365
    )
    assert found["auc", 0, 365].model == pytest.approx(auc)
    assert found["auc", 0, 365].n == 300
    outcomes = r["event_times"], r["event_indicators"]
    c_td = concordance_td(r["hazards"], *outcomes, lengths=r["lengths"], entry_times=entry)
    assert found["c_td"].model == c_td


def test_hazards_alone():
    r = records(300)
    names = ("event_times", "event_indicators", "lengths", "hazards")
    found = evaluate(**{name: r[name] for name in names})
    assert [m.name for m in found.metrics] == ["nll", "c_td"]
    assert found["c_td"].constant is None
    with pytest.raises(KeyError):
        found["auc", 0, 90]
    found = evaluate(
        **{name: r[name] for name in (*names, "days_to_end")},
        horizons_days=HORIZONS,
        landmarks_days=(0, 365),
        train=train_of(records(300, seed=1)),
    )
    assert [m.name for m in found.metrics] == ["nll", "c_td", "auc", "auc", "auc", "auc"]
    assert found["auc", 365, 365].constant == 0.5
    assert found.calibrations == {}


def test_what_is_not_defined_has_a_reason():
    r = records(300)
    found = evaluate(
        **{name: r[name] for name in NAMES}, horizons_days=(90, 5000), landmarks_days=(0, 4000)
    )
    assert found["auc", 0, 5000].model is None
    assert "horizon: expected one that is observed" in found["auc", 0, 5000].reason
    assert found["brier", 4000, 90].reason == "nobody is at risk after day 4000"
    assert found["integrated_brier", 0, 5000].model is None
    assert found["brier", 0, 90].model is not None
    assert "nobody is at risk after day 4000." in found.table()
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_concordance_of_no_pair_is_none():
    """And not 0.5, which would be read as chance; nor is it counted in an interval."""
    r = records(60)
    options = {name: r[name] for name in ("event_times", "lengths", "hazards")}
    options |= {"bootstrap": 20, "progress": False}
    nobody = np.zeros(60, np.int64)
    for outcomes in ({"event_indicators": nobody}, {"event_types": nobody, "causes": ("a",)}):
        if "causes" in outcomes:
            options["hazards"] = r["hazards"][:, None]
        found = evaluate(**options, **outcomes)
        (c_td,) = (metric for metric in found.metrics if metric.name == "c_td")
        assert (c_td.model, c_td.interval) == (None, None)
        assert c_td.reason == NO_PAIR
        assert NO_PAIR in found.table()
    one = nobody.copy()
    one[r["event_times"].argmin()] = 1
    options["hazards"] = r["hazards"]
    pairs = evaluate(**options, event_indicators=one)["c_td"]  # a third of the samples lack it
    assert pairs.model is not None
    assert pairs.interval is None


def test_bootstrap_intervals():
    r = records(400)
    names = ("event_times", "event_indicators", "lengths", "hazards", "risks", "days_to_end")
    options = {"horizons_days": HORIZONS, "landmarks_days": (0,), "progress": False}
    options |= {name: r[name] for name in names}
    found = evaluate(**options, bootstrap=40, seed=3)
    again = evaluate(**options, bootstrap=40, seed=3)
    assert found.to_dict() == again.to_dict()
    assert found.bootstrap == {"samples": 40, "level": 0.95, "seed": 3}
    other = evaluate(**options, bootstrap=40, seed=4)
    assert other["c_td"].interval != found["c_td"].interval
    for metric in found.metrics:
        low, high = metric.interval
        assert low < high
        if metric.name != "ici":  # which is biased upwards by resampling
            assert low < metric.model < high, metric
    c_td = found["c_td"]
    assert 0.01 < c_td.interval[1] - c_td.interval[0] < 0.2
    assert "95 % interval" in found.table()
    # the mean's interval is that of its standard error
    mask = np.arange(r["lengths"].max()) < r["lengths"][:, None]
    padded = np.zeros(mask.shape)
    padded[mask] = r["hazards"]
    nll = discrete_time_survival_nll(
        torch.tensor(padded),
        torch.tensor(r["event_times"]),
        torch.tensor(r["event_indicators"]),
        torch.tensor(mask),
        reduction="none",
    )
    error = float(nll.std()) / np.sqrt(400)
    visits = {name: options[name] for name in (*names[:4], "progress")}
    low, high = evaluate(**visits, bootstrap=400)["nll"].interval
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.2)
    # three rows of each person say no more than one
    thrice = {name: np.tile(values, 3) for name, values in visits.items() if name != "progress"}
    groups = np.tile(np.arange(400) * 7 - 100, 3)
    del visits["progress"]
    once, of_persons, of_rows = (
        evaluate(**given, bootstrap=60, progress=False)["nll"].interval
        for given in (visits, {**thrice, "groups": groups}, thrice)
    )
    assert of_persons == pytest.approx(once, rel=1e-9)  # drawn alike
    assert np.diff(of_rows) < 0.8 * np.diff(of_persons)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hazards": None, "risks": None}, TypeError, "expected at least one of them, got None"),
        ({"event_times": None}, TypeError, "expected one per patient, got None"),
        ({"horizons_days": None}, TypeError, "horizons_days: expected with risks or landmarks"),
        ({"days_to_end": None}, TypeError, "days_to_end: expected with risks or landmarks"),
        ({"horizons_days": (90,)}, ValueError, "expected one for each of 2 risks, got 1"),
        ({"horizons_days": (365, 90)}, ValueError, "expected positive and ascending days"),
        ({"landmarks_days": (-1,)}, ValueError, "landmarks_days: expected numbers from 0 or"),
        ({"bootstrap": -1}, ValueError, "bootstrap: expected 0 to"),
        ({"groups": [0, 1]}, ValueError, r"groups: expected one per row, \[\d+\], got \[2\]"),
        ({"level": 1.0}, ValueError, r"level: expected a number in \(0, 1\), got 1.0"),
        ({"censored_visit": "no"}, ValueError, "censored_visit: expected one of"),
        ({"hazards": 2.0}, ValueError, r"hazards: expected probabilities in \[0, 1\], got 2 \(pat"),
        ({"risks": -0.5}, ValueError, r"risks: expected probabilities in \[0, 1\], got -0.5 \(pa"),
        ({"days_to_end": -1.0}, ValueError, r"days_to_end: expected finite days from 0, got -1"),
        ({"hazards": np.nan}, ValueError, r"hazards: expected numbers, got NaN \(patient 0, visit"),
    ],
)
def test_refuses(changes, error, message):
    r = records(100)
    for name, value in changes.items():
        if isinstance(value, float) and name in r:
            changes = {name: np.where(np.arange(len(r[name])) < 3, value, r[name].T).T}
    options = {name: r[name] for name in NAMES} | {"horizons_days": HORIZONS} | changes
    with pytest.raises(error, match=message):
        evaluate(**options)
    with pytest.raises(TypeError, match=r"train.lengths: expected with days_to_end"):
        evaluate(
            **{name: r[name] for name in NAMES},
            horizons_days=HORIZONS,
            train=TrainingOutcomes([0], [1], days_to_end=[3.0]),
        )


def test_refuses_days_since_the_start():
    r = records(100)
    options = {name: r[name] for name in NAMES} | {"horizons_days": HORIZONS}
    first = int((r["lengths"] > 1).argmax())
    message = rf"days_to_end: .* do not rise .* got 0 and then .* \(patient {first}, visit 1; "
    with pytest.raises(ValueError, match=message):
        evaluate(**options | {"days_to_end": r["visit_days"]})


def every_visit_by_loops(r, horizon, censored_visit):
    """AUC and Brier score of each visit as a landmark, pair by pair."""
    starts = np.cumsum(r["lengths"]) - r["lengths"]
    total, seen = r["days_to_end"][starts], r["event_indicators"] == 1
    rows = []
    for i, (start, length) in enumerate(zip(starts, r["lengths"], strict=True)):
        for t in range(length):
            since = r["days_to_end"][start + t]
            s = total[i] - since
            free = since >= 0 if censored_visit == "included" and not seen[i] else since > 0
            at_horizon = observed_chance(total, seen, s + horizon, censored_visit)
            if not free or s + horizon > total.max() or at_horizon <= 0:
                continue
            case = seen[i] and since <= horizon
            control = since > horizon
            if censored_visit == "included":
                control = control or (not seen[i] and since == horizon)
            after = observed_chance(total, seen, total[i], censored_visit) if case else at_horizon
            weight = observed_chance(total, seen, s, censored_visit) / after
            rows.append((r["risks"][start + t, 0], case, control, weight * (case or control)))
    risk, case, control, weight = (np.array(x, float) for x in zip(*rows, strict=True))
    i, j = np.flatnonzero(case), np.flatnonzero(control)
    above = (risk[i][:, None] > risk[j]) + 0.5 * (risk[i][:, None] == risk[j])
    pairs = weight[i][:, None] * weight[j]
    return (above * pairs).sum() / pairs.sum(), (weight * (case - risk) ** 2).mean(), len(rows)


@pytest.mark.parametrize("censored_visit", CONVENTIONS)
def test_every_visit_as_a_landmark(censored_visit):
    r = records(30)
    # whole numbers, so that times tie
    r["days_to_end"] = np.ceil(r["days_to_end"] / 30)
    r["risks"] = r["risks"].round(1)
    auc, error, n = every_visit_by_loops(r, 4, censored_visit)
    found = evaluate(
        **{name: r[name] for name in NAMES if name != "risks"},
        risks=r["risks"][:, :1],
        horizons_days=(4,),
        landmarks_days=("every visit",),
        censored_visit=censored_visit,
    )
    assert found["auc", "every visit", 4].model == pytest.approx(auc, abs=1e-12)
    assert found["brier", "every visit", 4].model == pytest.approx(error, abs=1e-12)
    assert found["brier", "every visit", 4].n == n
    assert "AUC, every visit + 4" in found.table()


def test_the_truth_of_every_visit():
    """Late visits have higher risks and less time left: one Ĝ of the times since each visit would
    be wrong."""
    rng = np.random.default_rng(3)
    n, gap, w = 20_000, 100.0, 365.0
    index = np.arange(12)
    # the rate rises from visit to visit
    rates = 0.0001 * np.exp(rng.normal(0, 0.7, (n, 1))) * 1.3**index
    edges = np.concatenate([np.zeros((n, 1)), (rates * gap).cumsum(1)], 1)
    wanted = rng.exponential(size=(n, 1))
    step = (edges <= wanted).sum(1) - 1
    last = np.minimum(step, 11)
    event = gap * last + (wanted[:, 0] - edges[np.arange(n), last]) / rates[np.arange(n), last]
    end = rng.uniform(0, 2500, n)
    total, seen = np.minimum(event, end), event <= end
    lengths = np.minimum(total // gap, 8).astype(int) + 1  # visits at 0, 100, ..., 800
    of = np.repeat(np.arange(n), lengths)
    visit = np.arange(len(of)) - np.repeat(lengths.cumsum() - lengths, lengths)
    ahead = np.arange(1, 4) + visit[:, None]
    cumulative = rates[of, visit] * gap + (rates[of[:, None], ahead][:, :2] * gap).sum(1)
    cumulative += rates[of, ahead[:, 2]] * (w - 3 * gap)
    risk = -np.expm1(-cumulative)
    found = evaluate(
        event_times=lengths - 1,
        event_indicators=seen,
        lengths=lengths,
        risks=risk[:, None],
        days_to_end=total[of] - gap * visit,
        horizons_days=(w,),
        landmarks_days=("every visit",),
    )
    case = event[of] <= gap * visit + w  # were nobody censored
    auc, error = roc_auc_score(case, risk), ((case - risk) ** 2).mean()
    assert found["auc", "every visit", w].model == pytest.approx(auc, abs=0.01)
    assert found["brier", "every visit", w].model == pytest.approx(error, abs=0.004)
    assert found["observed/expected", "every visit", w].model == pytest.approx(1, abs=0.05)
    assert found["ici", "every visit", w].model < 0.01
    # and it would be seen if it were wrong
    naive = brier(risk, total[of] - gap * visit, seen[of], landmark=0, horizon=w)
    assert abs(naive - error) > abs(found["brier", "every visit", w].model - error)


@pytest.mark.parametrize("censored_visit", ["excluded", "included"])
def test_the_loss_is_that_of_training_with_entry_times(censored_visit):
    rng = np.random.default_rng(11)
    lengths = rng.integers(1, 9, 200)
    hazards, seen = rng.uniform(0.01, 0.6, (200, 8)), rng.integers(0, 2, 200)
    times, entry = lengths - 1, rng.integers(0, lengths)
    assert (entry > 0).sum() > 50
    mask = np.arange(8) < lengths[:, None]
    expected = discrete_time_survival_nll(
        *map(torch.from_numpy, (hazards, times, seen, mask)),
        entry_times=torch.from_numpy(entry),
        censored_visit=censored_visit,
    )
    found = evaluate(
        hazards, times, seen, entry_times=entry, censored_visit=censored_visit, progress=False
    )
    assert found["nll"].model == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("digits", [1, 9])
@pytest.mark.parametrize("kind", ["float32", "float64", "negative", "zeros", "uint16"])
def test_risks_are_ordered_as_numpy_does_it(kind, digits):
    rng = np.random.default_rng(0)
    keys = rng.random(3000).round(digits).astype(np.float32).astype(np.float64)
    if kind == "float64":
        keys = keys / 3
    elif kind == "negative":
        keys = keys - 0.5
    elif kind == "zeros":
        keys = keys * rng.choice([-0.0, 0.0, 1.0], 3000)
    elif kind == "uint16":
        keys = rng.integers(0, 60_000, 3000).astype(np.uint16)
    assert (_stable_order(keys) == np.argsort(keys, kind="stable")).all()
