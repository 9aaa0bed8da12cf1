"""Simulated patients with known hazards, and metrics pair by pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONVENTIONS = ("excluded", "included")


@dataclass
class Patients:
    """``event`` ``[B]`` is the visit of the event were nobody censored, ``times`` and ``seen`` what
    is known of it; ``hazard`` ``[B, V]`` is what a perfect model says."""

    event: np.ndarray
    times: np.ndarray
    seen: np.ndarray
    hazard: np.ndarray

    @property
    def lengths(self):
        return self.times + 1


def censor(event, rng, censored_visit, share):
    """Times and indicators under independent censoring that leaves about this share unseen."""
    low, high = 1e-4, 0.9999
    for _ in range(30):  # the rate of geometric censoring, by bisection
        rate = (low + high) / 2
        end = rng.geometric(rate, len(event)) - 1
        unseen = end <= event if censored_visit == "excluded" else end < event
        low, high = (low, rate) if unseen.mean() > share else (rate, high)
    return np.where(unseen, end, event), ~unseen


def simulate(n, share, censored_visit, seed=0, *, changing, visits=400):
    """Hazards per visit that are drawn anew at each visit, or that are the patient's own."""
    rng = np.random.default_rng(seed)
    shape = (n, 60) if changing else (n, 1)
    hazard = 1 / (1 + np.exp(2.6 - 1.2 * rng.normal(size=shape)))
    if changing:
        happens = rng.random(shape) < hazard
        happens[:, -1] = True
        event = happens.argmax(1)
    else:
        event = np.minimum(rng.geometric(hazard[:, 0]) - 1, visits)
    times, seen = censor(event, rng, censored_visit, share)
    return Patients(event, times, seen, hazard)


def concordance_pairs(risk, times, seen, censored_visit="excluded", entry=None):
    """C_td over all pairs, in float64."""
    pairs = score = 0.0
    for i in np.flatnonzero(seen):
        t = times[i]
        for j in range(len(times)):
            at_risk = times[j] > t or (
                censored_visit == "included" and times[j] == t and not seen[j]
            )
            if j == i or not at_risk or (entry is not None and entry[j] > t):
                continue
            pairs += 1
            score += 1.0 if risk[i][t] > risk[j][t] else 0.5 if risk[i][t] == risk[j][t] else 0.0
    return score / pairs if pairs else 0.5


def observed_chance(times, seen, at, censored_visit):
    """Ĝ by its definition: a loop over censored times, shifted by half a visit."""
    shift = 0.5 if censored_visit == "included" else -0.5
    moved = np.where(seen, times, times + shift).astype(float)
    chance = 1.0
    for c in np.unique(moved[~seen]):
        if c < at:
            chance *= 1 - ((moved == c) & ~seen).sum() / (moved >= c).sum()
    return chance


def landmark_pairs(score, times, seen, landmark, horizon, censored_visit):
    """Uno's AUC over all pairs and the Brier score, patient by patient; ``score`` ``[B]``."""
    since = np.asarray(times, float) - landmark
    free = since >= 0 if censored_visit == "included" else since > 0
    at_risk = np.where(seen, since > 0, free)
    score, since, seen = score[at_risk], since[at_risk], seen[at_risk]
    case = seen & (since <= horizon)
    control = since > horizon
    if censored_visit == "included":
        control = control | (~seen & (since == horizon))
    weight = np.zeros(len(since))
    for i in np.flatnonzero(case):
        weight[i] = 1 / observed_chance(since, seen, since[i], censored_visit)
    weight[control] = 1 / observed_chance(since, seen, horizon, censored_visit)
    above = pairs = 0.0
    for i in np.flatnonzero(case):
        for j in np.flatnonzero(control):
            pairs += weight[i] * weight[j]
            above += weight[i] * weight[j] * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
    error = (weight * (case - score) ** 2).mean()
    return above / pairs if pairs else None, error
