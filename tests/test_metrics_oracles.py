"""Metrics against scikit-survival and SurvivalEVAL, where those are right: of times without ties.

Both are under the GPL, and so no part of what this package needs, tests included: without them
these tests are skipped.
"""

from __future__ import annotations

import numpy as np
import pytest

from ehrseq_fast.metrics import (
    brier,
    calibration,
    concordance_td,
    incidence_curves,
    landmark_auc,
)

N, W = 600, 300.0


@pytest.fixture(scope="module")
def drawn():
    """Days, types 0 to 2, and the true incidences of both causes within W days."""
    rng = np.random.default_rng(8)
    rates = np.exp(rng.normal(-6.5, 1, (N, 2)))
    event, end = rng.exponential(1 / rates.sum(1)), rng.uniform(0, 900, N)
    days, seen = np.minimum(event, end), event <= end
    cause = 1 + (rng.random(N) > rates[:, 0] / rates.sum(1))
    shares = rates / rates.sum(1, keepdims=True)
    risks = -np.expm1(-rates.sum(1, keepdims=True) * W) * shares
    return days, np.where(seen, cause, 0), risks


@pytest.fixture(scope="module")
def sksurv():
    return pytest.importorskip(
        "sksurv", reason="scikit-survival is an oracle, and is not installed"
    )


@pytest.fixture(scope="module")
def survival_eval():
    return pytest.importorskip(
        "SurvivalEVAL", reason="SurvivalEVAL is an oracle, and is not installed"
    )


def test_scikit_survivals_auc_and_brier_score(drawn, sksurv):
    assert sksurv
    from sksurv.metrics import brier_score, cumulative_dynamic_auc
    from sksurv.util import Surv

    days, types, risks = drawn
    outcome, risk = Surv.from_arrays(types > 0, days), risks.sum(1)
    options = {"landmark": 0, "horizon": W}
    auc, _ = cumulative_dynamic_auc(outcome, outcome, risk, [W])
    assert landmark_auc(risk, days, types > 0, **options) == pytest.approx(auc[0], abs=1e-9)
    _, score = brier_score(outcome, outcome, 1 - risk[:, None], [W])
    assert brier(risk, days, types > 0, **options) == pytest.approx(score[0], abs=1e-9)


def test_scikit_survivals_cumulative_incidence(sksurv):
    """Ties of events are none for Aalen and Johansen; censorings are moved."""
    assert sksurv
    from sksurv.nonparametric import cumulative_incidence_competing_risks

    rng = np.random.default_rng(2)
    times, types = rng.integers(0, 8, 400), rng.integers(0, 3, 400)
    for censored_visit, shift in (("included", 0.5), ("excluded", -0.5)):
        found = incidence_curves(
            np.full((400, 8, 2), 0.1), times, types, censored_visit=censored_visit
        )
        moved = np.where(types > 0, times, times + shift) + 1.0
        when, incidence = cumulative_incidence_competing_risks(types, moved)
        place = np.searchsorted(when, np.array(found.visits) + 1.2, "right") - 1
        np.testing.assert_allclose(found.observed, incidence[1:, place], atol=1e-12)


def test_survival_evals_auc_and_brier_score(drawn, survival_eval):
    days, types, risks = drawn
    options = {"landmark": 0, "horizon": W}
    seen = (types > 0).astype(int)
    risk = risks.sum(1)
    train = {"train_event_times": days, "train_event_indicators": seen}
    auc = survival_eval.auc(1 - risk, days, seen, W, days, seen, "IPCW")
    assert landmark_auc(risk, days, seen, **options) == pytest.approx(auc, abs=1e-9)
    score = survival_eval.brier_multiple_points(
        1 - risk[:, None], days, seen, target_times=np.array([W]), **train
    )
    assert brier(risk, days, seen, **options) == pytest.approx(score[0], abs=1e-9)


def test_survival_evals_auc_and_brier_score_of_a_cause(drawn, survival_eval):
    days, types, risks = drawn
    for cause in (1, 2):
        risk, of = risks[:, cause - 1], {"event_types": types, "cause": cause}
        options = {"landmark": 0, "horizon": W, **of}
        auc = survival_eval.auc_cr_per_event(
            risk, days, types, W, days, types, "IPCW", event_of_interest=cause
        )
        assert landmark_auc(risk, days, **options) == pytest.approx(auc, abs=1e-9)
        score = survival_eval.brier_multiple_points_cr_per_event(
            risk[:, None], days, types, days, types, np.array([W]), event_of_interest=cause
        )
        assert brier(risk, days, **options) == pytest.approx(score[0], abs=1e-9)


def test_survival_evals_concordance(survival_eval):
    """Risks that change; times without ties, so that each visit has one event at most."""
    rng = np.random.default_rng(3)
    times, seen = rng.permutation(150), rng.random(150) < 0.5
    risk = rng.normal(size=(150, 150))
    anchors = times[np.flatnonzero(seen)]
    found = survival_eval.concordance_time_dependent(risk[:, anchors], times, seen.astype(int))
    assert concordance_td(risk, times, seen) == pytest.approx(found[0], abs=1e-12)


def test_survival_evals_calibration(drawn, survival_eval):
    """Theirs is another smoother, a Cox regression of the whole follow-up."""
    days, types, risks = drawn
    seen, risk = (types > 0).astype(int), risks.sum(1)
    for predicted in (risk, risk**1.5, risk**0.6):
        ours = calibration(predicted, days, seen, landmark=0, horizon=W)
        theirs = survival_eval.integrated_calibration_index(predicted, days, seen, W)
        assert ours.ici == pytest.approx(theirs["ICI"], abs=0.002)
