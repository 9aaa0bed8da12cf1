"""MEDS patients whose hazards are known: what a model of their records can learn, and no more.

``python -m tests.generated_meds FOLDER --patients 20000 --seed 0`` writes a dataset and the true
hazards beside it (``FOLDER/true_hazards.npz``), and prints the loss that they have.

At every visit a patient has a hazard, from the codes up to that visit: codes of chronic conditions
raise or lower its logit from then on, an acute one raises it at that visit alone. The record ends
there with probability ``CENSORED``; else the next visit is the event's with the probability of the
hazard. All other codes say nothing. ``ehrseq-fast train`` with its defaults, trained on 16,000
patients, has a held-out loss 1.2 to 1.8 % above that of the true hazards (``docs/train.md``); a
constant one, 26 %.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

OUTCOME = "OUTCOME//MI"
BASELINE = -4.0  # a logit
CHRONIC = {"DX//CHRONIC_A": 2.0, "DX//CHRONIC_B": 1.2, "RX//PROTECTIVE": -1.5}
ACUTE = {"DX//ACUTE": 2.0}
OCCURS = 0.06  # each of these, at a visit
RECODED = 0.8  # a chronic one again, at each later visit
CENSORED = 0.04
MOST_VISITS = 100
NOISE = 40  # other codes
NOISE_MEAN = 1.0  # of them at a visit, besides one
SPLITS = {"train": 0.8, "tuning": 0.1, "held_out": 0.1}


@dataclass(frozen=True)
class Generated:
    """What is true of n patients, in the order of the dataset's shards.

    Attributes:
        subject_ids: int64 ``[n]``.
        splits: str ``[n]``.
        offsets: int64 ``[n + 1]``: the visits of each patient before the event's.
        hazards: float64: of each of these visits, from the codes up to it, that the next is the
            event's.
        events: uint8 ``[n]``: whether that of the last visit came true; else the record ends there.
    """

    subject_ids: np.ndarray
    splits: np.ndarray
    offsets: np.ndarray
    hazards: np.ndarray
    events: np.ndarray

    def losses(self) -> np.ndarray:
        """float64 ``[n]``: each patient's negative log-likelihood under the true hazards; the last
        visit of a record without event adds nothing."""
        last = self.offsets[1:] - 1
        of_visit = -np.log1p(-self.hazards)
        of_visit[last] = np.where(self.events == 1, -np.log(self.hazards[last]), 0.0)
        return np.add.reduceat(of_visit, self.offsets[:-1])

    def loss(self, split: str | None = None) -> float:
        """The mean over the patients of a split."""
        losses = self.losses()
        return float((losses if split is None else losses[self.splits == split]).mean())

    def constant_loss(self, split: str | None = None) -> float:
        """The loss of the best hazard that is the same at every visit: that of no signal."""
        chosen = np.ones(len(self.splits), bool) if split is None else self.splits == split
        at_risk = int((np.diff(self.offsets) - (self.events == 0))[chosen].sum())
        events = int(self.events[chosen].sum())
        rate = events / at_risk
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return float(entropy * at_risk / chosen.sum())


def write_generated_meds(
    folder: str | Path, patients: int, *, seed: int = 0, shards: int = 4
) -> Generated:
    """Write ``data/<split>/<n>.parquet`` and ``metadata``; ``shards`` of them for each split."""
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    visits = _draw_visits(rng, patients)
    ids = rng.choice(2**40, patients, replace=False).astype(np.int64)
    split = rng.choice(list(SPLITS), patients, p=list(SPLITS.values()))
    rows = _events(rng, patients, *visits[:3])
    order = []
    for name in sorted(SPLITS):  # as read_meds takes the shards
        chosen = np.flatnonzero(split == name)
        for number, of_shard in enumerate(np.array_split(chosen, shards)):
            path = folder / "data" / name / f"{number}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_shard(path, rows, of_shard, ids)
            order.append(of_shard)
    metadata = folder / "metadata"
    metadata.mkdir()
    pq.write_table(
        pa.table({"subject_id": ids, "split": split}), metadata / "subject_splits.parquet"
    )
    return _truth(np.concatenate(order), ids, split, *visits[3:])


def _draw_visits(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Events of visits (patient, visit, code) and, of the visits before the event's, (patient,
    hazard); and who has the event."""
    effects = np.array([*CHRONIC.values(), *ACUTE.values()])
    chronic = np.arange(len(effects)) < len(CHRONIC)
    seen = np.zeros((n, len(effects)), bool)
    active, events = np.arange(n), np.zeros(n, np.uint8)
    who, when, what, at_risk, hazards = [], [], [], [], []
    for visit in range(MOST_VISITS):
        known = seen[active] & chronic
        now = rng.random(known.shape) < np.where(known, RECODED, OCCURS)
        seen[active] = known | now
        hazard = 1 / (1 + np.exp(-(BASELINE + seen[active] @ effects)))
        row, effect = np.nonzero(now)
        noise = 1 + rng.poisson(NOISE_MEAN, len(active))
        who += [active[row], np.repeat(active, noise)]
        what += [NOISE + effect, (NOISE * rng.random(noise.sum()) ** 2).astype(np.int64)]
        when.append(np.full(len(row) + noise.sum(), visit))
        at_risk.append(active)
        hazards.append(hazard)
        goes_on = rng.random(len(active)) >= CENSORED
        event = goes_on & (rng.random(len(active)) < hazard)
        if visit == MOST_VISITS - 1:
            break
        events[active[event]] = 1
        who.append(active[event])
        what.append(np.full(event.sum(), NOISE + len(effects)))
        when.append(np.full(event.sum(), visit + 1))
        active = active[goes_on & ~event]
    return *map(np.concatenate, (who, when, what, at_risk, hazards)), events


def _events(
    rng: np.random.Generator, n: int, who: np.ndarray, when: np.ndarray, what: np.ndarray
) -> dict[str, np.ndarray]:
    """All rows, by patient and time: those of visits, births, and one without a time."""
    gaps = 7 + rng.exponential(40, (n, MOST_VISITS + 1)).astype(np.int64)
    days = np.cumsum(gaps, axis=1) + 14_600  # from 2010 on
    day = 86_400_000_000
    times = days[who, when] * day + rng.integers(6, 18, len(who)) * (day // 24)
    births = (days[:, 0] - rng.integers(30 * 365, 80 * 365, n)) * day
    codes = np.array(
        [
            *(f"NOISE//{i:03d}" for i in range(NOISE)),
            *CHRONIC,
            *ACUTE,
            OUTCOME,
            "MEDS_BIRTH",
            "SEX//F",
            "SEX//M",
        ]
    )
    everyone = np.arange(n)
    birth, sex = len(codes) - 3, len(codes) - 2 + rng.integers(0, 2, n)
    who = np.concatenate([everyone, everyone, who])
    times = np.concatenate([np.full(n, np.iinfo(np.int64).min), births, times])
    what = np.concatenate([sex, np.full(n, birth), what])
    order = np.lexsort((times, who))
    values = np.where((what < NOISE // 10), rng.normal(100, 15, len(what)), np.nan)
    return {
        "who": who[order],
        "time": times[order].view("M8[us]"),
        "code": codes[what[order]],
        "value": values[order].astype(np.float32),
    }


def _write_shard(
    path: Path, rows: dict[str, np.ndarray], patients: np.ndarray, ids: np.ndarray
) -> None:
    at = np.flatnonzero(np.isin(rows["who"], patients))
    value = rows["value"][at]
    table = pa.table(
        {
            "subject_id": ids[rows["who"][at]],
            "time": pa.array(rows["time"][at]),
            "code": pa.array(rows["code"][at]).cast(pa.string()),
            "numeric_value": pa.array(value, mask=np.isnan(value)),
        }
    )
    pq.write_table(table, path)


def _truth(
    order: np.ndarray,
    ids: np.ndarray,
    split: np.ndarray,
    at_risk: np.ndarray,
    hazards: np.ndarray,
    events: np.ndarray,
) -> Generated:
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    by_patient = np.argsort(place[at_risk], kind="stable")  # visits come in order
    offsets = np.append(0, np.cumsum(np.bincount(place[at_risk], minlength=len(order))))
    return Generated(ids[order], split[order], offsets, hazards[by_patient], events[order])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    generated = write_generated_meds(given.folder, given.patients, seed=given.seed)
    np.savez(given.folder / "true_hazards.npz", **vars(generated))
    for name in SPLITS:
        print(
            f"{name}: loss of the true hazards {generated.loss(name):.4f}, of a constant one "
            f"{generated.constant_loss(name):.4f}"
        )


if __name__ == "__main__":
    main()
