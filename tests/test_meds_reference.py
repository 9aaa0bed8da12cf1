"""Random MEDS datasets, against a reading of them in plain Python, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="pip install 'ehrseq_fast[meds]'")
pq = pytest.importorskip("pyarrow.parquet")

from ehrseq_fast.data import read_meds, to_meds  # noqa: E402  (after what may be missing)
from ehrseq_fast.data.meds import shard  # noqa: E402
from ehrseq_fast.data.store import merge  # noqa: E402

HOUR = 3_600_000_000
SPECIAL = ("MEDS_BIRTH", "MEDS_DEATH", "OBSERVATION_PERIOD_START", "OBSERVATION_PERIOD_END")


def random_rows(rng, subjects):
    """(subject, time or None, code, value or None, visit or None), by subject and time."""
    rows = []
    for subject in rng.permutation(10**6)[:subjects].tolist():
        times = np.sort(rng.integers(-60, 60, rng.integers(1, 15))) * HOUR
        keys = rng.integers(0, 4, len(times)).tolist()
        for at, key in zip([None, None, *times.tolist()], [0, 0, *keys], strict=True):
            if at is None and rng.random() < 0.5:
                continue
            code = str(
                rng.choice([*"abcdefgh", *SPECIAL, "MEDS_DEATH//x"], p=[0.1] * 8 + [0.04] * 5)
            )
            value = float(rng.integers(0, 9)) if rng.random() < 0.5 else None
            rows.append((subject, at, code, value, None if rng.random() < 0.2 else key))
    return rows


def visit_of(rule, state, at, key):
    """Which visit of its subject an event is of, as anything that can be compared."""
    if rule == "day" or (rule == "visit_id" and key is None):
        return "day", at // (24 * HOUR)
    if rule == "time":
        return at
    if rule == "visit_id":
        return "key", key
    if state.get("first") is None or at - state["first"] > rule * HOUR:
        state["first"] = at
    return state["first"]


def read_plainly(rows, rule):
    """Of each subject: visits [[start, {code: value}, end]], statics, birth, death, periods."""
    found = {}
    for subject, at, code, value, key in rows:
        record = found.setdefault(
            subject,
            {"visits": {}, "static": {}, "birth": None, "death": None, "marks": {}, "s": {}},
        )
        name = code.split("//")[0]
        if name in SPECIAL:
            if at is None:
                continue
            if name in ("MEDS_BIRTH", "MEDS_DEATH"):
                which = "birth" if name == "MEDS_BIRTH" else "death"
                record[which] = at if record[which] is None else record[which]
            else:
                record["marks"].setdefault(name, []).append(at)
            continue
        if at is None:
            codes = record["static"]
        else:
            visit = visit_of(rule, record["s"], at, key)
            found_visit = record["visits"].setdefault(visit, [at, {}, at])
            found_visit[2] = at  # times do not fall
            codes = found_visit[1]
        codes[code] = value if value is not None else codes.get(code)
    for record in found.values():
        starts, ends = (record["marks"].get(name, []) for name in SPECIAL[2:])
        periods = []
        for start, end in sorted((s, e) for s, e in zip(starts, ends, strict=False) if e > s):
            if periods and start <= periods[-1][1]:
                periods[-1][1] = max(periods[-1][1], end)
            else:
                periods.append([start, end])
        record["periods"] = periods
    return found


def as_read(store):
    """A store in the same form."""

    def micros(time):
        return None if np.isnat(time) else int(time.astype(np.int64))

    def coded(codes, values, low, high):
        given = [math.nan] * (high - low) if values is None else values[low:high].tolist()
        names = [store.codes_of[code] for code in codes[low:high].tolist()]
        assert names == sorted(set(names))
        return dict(zip(names, (None if math.isnan(v) else v for v in given), strict=True))

    found = {}
    for p, subject in enumerate(store.subject_ids.tolist()):
        first, last = store.patient_offsets[p : p + 2]
        low, high = store.period_offsets[p : p + 2]
        found[subject] = {
            "visits": [
                [
                    micros(store.visit_times[v]),
                    coded(store.codes, store.values, *store.visit_offsets[v : v + 2]),
                    micros(store.visit_ends[v]),
                ]
                for v in range(first, last)
            ],
            "static": coded(
                store.static_codes, store.static_values, *store.static_offsets[p : p + 2]
            ),
            "birth": micros(store.birth_times[p]),
            "death": micros(store.death_times[p]),
            "periods": [
                [micros(store.period_starts[o]), micros(store.period_ends[o])]
                for o in range(low, high)
            ],
        }
    return found


@pytest.mark.parametrize("rule", ["day", "time", "visit_id", 5, 30.5])
@pytest.mark.parametrize("seed", range(3))
def test_random_datasets(tmp_path, monkeypatch, rule, seed):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 40)
    expected = read_plainly(rows, rule)
    folder = tmp_path / "meds"
    (folder / "data").mkdir(parents=True)
    subjects = list(dict.fromkeys(row[0] for row in rows))
    for number, some in enumerate(np.array_split(subjects, 3)):
        columns = list(zip(*(row for row in rows if row[0] in set(some.tolist())), strict=True))
        table = pa.table(
            {
                "subject_id": pa.array(columns[0], pa.int64()),
                "time": pa.array(columns[1], pa.int64()).cast(pa.timestamp("us")),
                "code": pa.array(columns[2]),
                "numeric_value": pa.array(columns[3], pa.float32()),
                "visit_id": pa.array(columns[4], pa.int64()),
            }
        )
        pq.write_table(table, folder / "data" / f"{number}.parquet", row_group_size=23)
    monkeypatch.setattr(shard, "BATCH", int(rng.integers(1, 60)))
    monkeypatch.setattr(merge, "PIECE", int(rng.integers(1, 60)))
    store = read_meds(folder, tmp_path / "store", visits=rule, split={"train": 1.0})
    found = as_read(store)
    assert list(found) == subjects
    for subject, record in expected.items():
        got = found[subject]
        for name in ("static", "birth", "death", "periods"):
            assert got[name] == record[name], (subject, name)
        visits = sorted(record["visits"].values(), key=lambda visit: visit[0])
        assert [visit[0] for visit in got["visits"]] == [visit[0] for visit in visits]

        def by_content(visit):
            return visit[0], visit[2], str(sorted(visit[1].items(), key=str))

        assert sorted(got["visits"], key=by_content) == sorted(visits, key=by_content)
    to_meds(store, tmp_path / "back", events_per_file=100)
    again = read_meds(tmp_path / "back", tmp_path / "again")
    assert again.header["content_sha256"] == store.header["content_sha256"]
