"""Simulated patients with two competing events and known hazards, and metrics pair by pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .metric_cases import censor, observed_chance


@dataclass
class Competing:
    """``event`` and ``cause`` ``[B]`` are visit and cause of the event were nobody censored,
    ``times`` and ``types`` what is known of it; ``hazards`` ``[B, V, 2]`` are the true ones."""

    event: np.ndarray
    cause: np.ndarray
    times: np.ndarray
    types: np.ndarray
    hazards: np.ndarray

    @property
    def lengths(self):
        return self.times + 1


def simulate_competing(n, share, censored_visit, seed=0, *, changing, visits=40):
    """Hazards that are drawn anew at each visit, or that are the patient's own; about this share
    is censored."""
    rng = np.random.default_rng(seed)
    shape = (n, visits if changing else 1)
    weights = np.exp(np.stack([rng.normal(-2.6, 0.9, shape), rng.normal(-3.2, 1.1, shape)], -1))
    hazards = np.broadcast_to(weights / (1 + weights.sum(-1, keepdims=True)), (n, visits, 2))
    total = hazards.sum(-1)
    happens = rng.random((n, visits)) < total
    happens[:, -1] = True
    event = happens.argmax(1)
    at = hazards[np.arange(n), event]
    cause = 1 + (rng.random(n) > at[:, 0] / at.sum(1))
    times, seen = censor(event, rng, censored_visit, share)
    return Competing(event, cause, times, np.where(seen, cause, 0), hazards)


def concordance_pairs_of_cause(risk, times, types, cause, censored_visit, entry=None):
    """The cause-specific C_td over all pairs; ``risk`` ``[B, V]``."""
    pairs = score = 0.0
    for i in np.flatnonzero(types == cause):
        t = times[i]
        for j in range(len(times)):
            at_risk = times[j] > t or (
                censored_visit == "included" and times[j] == t and types[j] == 0
            )
            if j == i or not at_risk or (entry is not None and entry[j] > t):
                continue
            pairs += 1
            score += 1.0 if risk[i][t] > risk[j][t] else 0.5 if risk[i][t] == risk[j][t] else 0.0
    return score / pairs if pairs else 0.5


def landmark_pairs_of_cause(score, times, types, cause, landmark, horizon, censored_visit):
    """AUC over all pairs and the Brier score of a cause's incidence, patient by patient."""
    since, known = np.asarray(times, float) - landmark, types > 0
    free = since >= 0 if censored_visit == "included" else since > 0
    at_risk = np.where(known, since > 0, free)
    score, since, types, known = (x[at_risk] for x in (score, since, types, known))
    weight, case = np.zeros(len(since)), np.zeros(len(since), bool)
    for i in range(len(since)):
        if known[i] and since[i] <= horizon:
            weight[i] = 1 / observed_chance(since, known, since[i], censored_visit)
            case[i] = types[i] == cause
        elif since[i] > horizon or (censored_visit == "included" and since[i] == horizon):
            weight[i] = 1 / observed_chance(since, known, horizon, censored_visit)
    above = pairs = 0.0
    for i in np.flatnonzero(case):
        for j in np.flatnonzero(~case & (weight > 0)):
            pairs += weight[i] * weight[j]
            above += weight[i] * weight[j] * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
    return above / pairs if pairs else None, (weight * (case - score) ** 2).mean()


def incidences_by_loops(times, types, censored_visit, size, n_causes, entry=None):
    """``[V, K]``: Σ S(u−) d_k / n by its definition."""
    entry = np.zeros(len(times), int) if entry is None else entry
    found, survival, sums = [], 1.0, np.zeros(n_causes)
    for visit in range(size):
        stays = (types > 0) | (censored_visit == "included")
        at_risk = ((times > visit) | ((times == visit) & stays)) & (entry <= visit)
        events = np.array([((times == visit) & (types == k + 1)).sum() for k in range(n_causes)])
        if at_risk.any():
            sums = sums + survival * events / at_risk.sum()
            survival *= 1 - events.sum() / at_risk.sum()
        found.append(sums)
    return np.array(found)
