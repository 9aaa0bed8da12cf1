"""Tasks: against a slow oracle over random stores, and the cases by hand."""

from __future__ import annotations

import datetime as dt
import warnings

import numpy as np
import pytest

from ehrseq_fast.data import (
    FirstEvent,
    PartWriter,
    PatientDataset,
    SubjectChunk,
    read_omop,
    write_store,
)
from ehrseq_fast.data.tasks import Attrition, SameDayWarning, chunks
from ehrseq_fast.training.data import horizon_hazards

from .task_cases import DAY, random_people, slow_rows, store_of, us

TASKS = {
    "defaults": {},
    "several codes and a prefix": {"codes": ["A"], "prefix": "X"},
    "washout": {"washout_days": 7},
    "gap": {"gap_days": 4},
    "allowed before": {"prior_outcome": "allow"},
    "allowed before, gap": {"prior_outcome": "allow", "gap_days": 3, "washout_days": 2},
    "time at risk": {"time_at_risk_days": 9},
    "least observation": {"min_observation_days": 8},
    "all windows": {
        "washout_days": 3,
        "gap_days": 2,
        "time_at_risk_days": 12,
        "min_observation_days": 5,
    },
    "to the last event": {"end_of_observation": "last_event"},
    "to the last event, windows": {
        "end_of_observation": "last_event",
        "washout_days": 4,
        "gap_days": 1,
        "min_observation_days": 3,
    },
    "death": {"codes": "death"},
    "death, allowed before": {"codes": "death", "prior_outcome": "allow", "gap_days": 9},
    "death, allowed before, observed": {
        "codes": "death",
        "prior_outcome": "allow",
        "index": "first_visit",
        "gap_days": 5,
        "min_observation_days": 3,
    },
    "death, windows": {"codes": "death", "gap_days": 2, "time_at_risk_days": 20},
    "death, to the last event": {"codes": "death", "end_of_observation": "last_event"},
    "first visit": {"index": "first_visit", "washout_days": 2},
    "first visit, windows": {
        "index": "first_visit",
        "gap_days": 1,
        "time_at_risk_days": 15,
        "min_observation_days": 10,
        "prior_outcome": "allow",
    },
}
RULES = {"day": "day", "time": "time", "hours": 30, "visits": "visit_id"}


def people_of(rule, seed, n=60, **options):
    rng = np.random.default_rng(seed)
    people = random_people(rng, n, fine=rule != "day", **options)
    if rule == "visit_id":
        for person in people.values():
            person["events"] = [(*e, int(rng.integers(5))) for e in person["events"]]
    return people


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A random store of each visit rule, with and without observation periods."""
    made = {}
    for name, rule in RULES.items():
        for periods in (True, False):
            folder = tmp_path_factory.mktemp(name)
            people = people_of(rule, len(made), with_periods=periods)
            made[name, periods] = store_of(folder, people, visit_rule=rule)
    return made


def applied(task, store, split=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SameDayWarning)
        warnings.filterwarnings("ignore", "nobody is left after the rule", UserWarning)
        return task.apply(store, split)


def check(outcomes, expected, store):
    rows, left = expected
    assert outcomes.patients.tolist() == [row.patient for row in rows]
    assert outcomes.index_times.view(np.int64).tolist() == [row.index_time for row in rows]
    assert outcomes.event_indicators.tolist() == [row.event for row in rows]
    assert outcomes.n_visits.tolist() == [row.n_visits for row in rows]
    assert outcomes.entry_times.tolist() == [row.entry for row in rows]
    assert outcomes.event_times.tolist() == [row.n_visits - 1 for row in rows]
    assert outcomes.risk_starts.view(np.int64).tolist() == [row.risk_start for row in rows]
    assert outcomes.end_times.view(np.int64).tolist() == [row.end_time for row in rows]
    assert (outcomes.entry_times <= outcomes.event_times).all()
    persons = [rule.persons for rule in outcomes.attrition.rules]
    assert persons == sorted(persons, reverse=True)
    assert persons[0] == left["start"]
    assert persons[1] == left.get("visit", 0)
    assert persons[-1] == left.get("observed", 0) == len(set(outcomes.patients.tolist()))
    assert outcomes.attrition.rules[-1].predictions == len(rows)
    assert outcomes.attrition.events == sum(row.event for row in rows)
    assert sum(outcomes.censored_by.values()) == sum(not row.event for row in rows)
    assert (outcomes.days_to_end(store) >= 0).all()


@pytest.mark.parametrize("settings", TASKS.values(), ids=list(TASKS))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("periods", [True, False])
def test_as_one_patient_at_a_time(stores, settings, rule, periods, monkeypatch):
    monkeypatch.setattr(chunks, "MOST_VISITS", 20)  # several chunks
    monkeypatch.setattr(chunks, "MOST_CODES", 7)
    store = stores[rule, periods]
    task = FirstEvent(**{"codes": "X", **settings})
    outcomes = applied(task, store)
    # the first event of a record has nothing before it
    nobody = not periods and task.index == "first_visit" and task.washout_days > 0
    assert len(outcomes) or nobody, "the case tests nothing"
    check(outcomes, slow_rows(task, store), store)
    check(applied(task, store, "train"), slow_rows(task, store, "train"), store)


@pytest.mark.parametrize("day", ["included", "excluded"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("periods", [True, False])
def test_dates_as_one_patient_at_a_time(stores, day, rule, periods):
    store = stores[rule, periods]
    rng = np.random.default_rng(5)
    dates, slow = {}, {}
    for patient, subject in enumerate(store.subject_ids.tolist()):
        if rng.random() < 0.8:
            n, whole = int(rng.integers(0, 40)), rng.random() < 0.5
            time = us(n, 0 if whole else 11.5)
            date = np.datetime64(time, "us").astype(dt.datetime)
            dates[subject] = date.date() if whole else date
            slow[patient] = [(time, whole)]
    task = FirstEvent("X", index=dates | {-5: "2020-01-01"}, prediction_day=day, gap_days=1)
    outcomes = applied(task, store)
    assert len(outcomes), "the case tests nothing"
    check(outcomes, slow_rows(task, store, dates=slow), store)
    assert outcomes.left_out["index dates of persons who are not in the store"] == 1
    assert FirstEvent.from_dict(task.to_dict()) == task


def test_one_date_per_patient(stores):
    store = stores["day", True]
    dates = np.full(store.n_patients, us(20) // DAY, np.int64).view("M8[D]")
    dates[::3] = np.datetime64("NaT")
    task = FirstEvent("X", index=dates)
    slow = {p: [(us(20), True)] for p in range(store.n_patients) if p % 3}
    check(applied(task, store), slow_rows(task, store, dates=slow), store)
    assert FirstEvent.from_dict(task.to_dict()) == task
    with pytest.raises(ValueError, match="index: expected one date for each of 60 patients"):
        FirstEvent("X", index=dates[1:]).apply(store)


@pytest.mark.parametrize("settings", TASKS.values(), ids=list(TASKS))
@pytest.mark.parametrize("rule", ["day", "time", "hours"])
def test_nothing_of_the_outcomes_day_is_seen(tmp_path, settings, rule):
    people = people_of(RULES[rule], 11)
    store = store_of(tmp_path, people, visit_rule=RULES[rule])
    task = FirstEvent(**{"codes": "X", **settings})
    outcomes = applied(task, store)
    row, visit = outcomes.visits(store)
    for r in np.flatnonzero(outcomes.event_indicators).tolist():
        outcome_day = outcomes.end_times[r].astype("M8[D]").astype(int)
        begin = store.visit_times[visit[row == r]].view(np.int64)
        assert (begin // DAY < outcome_day).all()
        # the events themselves, whose times the store does not hold
        person = people[int(store.subject_ids[outcomes.patients[r]])]
        seen_until = begin[-1] + (30 * DAY // 24 if rule == "hours" else 0)
        if rule == "day":
            seen_until = (begin[-1] // DAY + 1) * DAY - 1
        late = [
            time
            for time, _ in person["events"]
            if time is not None and begin[-1] <= time <= seen_until and time // DAY >= outcome_day
        ]
        assert not late


def person(*events, **more):
    return {"events": [(us(day), code) for day, code in events], **more}


def of_one(folder, one, other=None, **settings):
    """The outcomes of one person; another one has the outcome, so that it occurs."""
    other = person((0, "A"), (9, "X")) if other is None else other
    store = store_of(folder, {1: one, 2: other})
    outcomes = applied(FirstEvent(**{"codes": "X", **settings}), store)
    return outcomes.select(outcomes.patients == 0), outcomes


def values(outcomes):
    return [
        array.tolist()
        for array in (
            outcomes.n_visits,
            outcomes.entry_times,
            outcomes.event_times,
            outcomes.event_indicators,
        )
    ]


def test_a_hazard_belongs_to_the_visit_before_the_event(tmp_path):
    one, whole = of_one(tmp_path, person((0, "A"), (3, "B"), (8, "X"), (8, "A"), (9, "A")))
    assert values(one) == [[2], [0], [1], [1]]
    assert one.end_times.view(np.int64).tolist() == [us(8)]
    assert "observed from the first to the last event" in " ".join(whole.warnings)


def test_a_death_ends_observation_and_later_events_are_not_used(tmp_path):
    dead = person((0, "A"), (4, "A"), (6, "A"), (8, "X"), death=us(6, 5))
    one, whole = of_one(tmp_path, dead)
    assert values(one) == [[3], [0], [2], [0]]
    assert one.end_times.view(np.int64).tolist() == [us(6, 5)]
    assert whole.censored_by == {"death": 1}
    assert whole.left_out == {"outcomes after the end of observation or of the time at risk": 1}


def test_an_outcome_on_the_day_of_death_counts(tmp_path):
    one, _ = of_one(tmp_path, person((0, "A"), (6, "X"), death=us(6)))
    assert values(one) == [[1], [0], [0], [1]]


def test_death_needs_no_visit(tmp_path):
    one, _ = of_one(tmp_path, person((0, "A"), (4, "A"), (6, "A"), death=us(6)), codes="death")
    assert values(one) == [[2], [0], [1], [1]]  # what was recorded on the day of death is cut
    assert one.end_times.view(np.int64).tolist() == [us(6)]


def test_a_death_after_the_observation_period_is_not_seen(tmp_path):
    one = person((0, "A"), (4, "A"), death=us(20), periods=[(us(0), us(10))])
    other = person((0, "A"), death=us(5), periods=[(us(0), us(10))])
    one, _ = of_one(tmp_path, one, other, codes="death")
    assert values(one) == [[2], [0], [1], [0]]
    assert one.end_times.view(np.int64).tolist() == [us(10)]


@pytest.mark.parametrize(
    ("settings", "rtol"),
    [
        ({}, 0.1),
        ({"gap_days": 90}, 0.1),
        ({"washout_days": 365}, 0.1),
        ({"index": "first_visit"}, 0.25),
        ({"index": "first_visit", "gap_days": 90}, 0.25),
        ({"index": np.datetime64("2001-12-01")}, 0.25),
        ({"index": np.datetime64("2001-12-01"), "gap_days": 30}, 0.25),
    ],
    ids=str,
)
def test_days_to_the_end_hold_no_time_without_risk(constant_hazard, settings, rtol):
    """With one hazard at all times the risks must be its own, whatever the index and the gap."""
    store, rate = constant_hazard
    if isinstance(settings.get("index"), np.datetime64):
        settings = {**settings, "index": np.full(store.n_patients, settings["index"])}
    outcomes = applied(FirstEvent("X", **settings), store)
    horizons = np.array([30, 90, 365])
    risks = -np.expm1(np.log1p(-horizon_hazards(outcomes, store, (30, 90, 365))).cumsum())
    np.testing.assert_allclose(risks, -np.expm1(-rate * horizons), rtol=rtol)
    batch = PatientDataset(store, outcomes).batch(np.arange(50))
    expected = outcomes.select(np.arange(50)).days_to_end(store)
    padded = batch.pad(batch.visit_targets["days_to_end"], fill=-1).numpy()
    np.testing.assert_allclose(padded[padded >= 0], expected, rtol=1e-6)


@pytest.fixture(scope="module")
def constant_hazard(tmp_path_factory):
    """5,000 persons with visits at random, and X at a rate of 0.001 a day from the first visit."""
    rng = np.random.default_rng(8)
    n, rate = 5_000, 0.001
    start = np.datetime64("2000-01-01", "us")
    event, end = rng.exponential(1 / rate, n), rng.uniform(1000, 3000, n)
    gaps = rng.exponential(120, (n, 100))
    at = np.concatenate([np.zeros((n, 1)), gaps.cumsum(1)], 1)
    person, visit = np.nonzero(at < end[:, None])
    with_event = np.flatnonzero(event < end)
    days = np.concatenate([at[person, visit], event[with_event]])
    whose = np.concatenate([person, with_event])

    def time(days):
        return start + (days * DAY).astype("m8[us]")

    chunk = SubjectChunk(
        subject_ids=np.arange(n),
        event_subject=whose,
        event_times=time(days),
        event_codes=np.repeat(["V", "X"], [len(person), len(with_event)]).tolist(),
        period_subject=np.arange(n),
        period_starts=time(np.zeros(n)),
        period_ends=time(end),
    )
    folder = tmp_path_factory.mktemp("constant")
    part = PartWriter(folder / "part", visit_rule="time")
    part.add(chunk)
    part.finish()
    return write_store(folder / "store", [folder / "part"], source={}), rate


def test_a_rule_that_removes_everybody_is_told(stores):
    with pytest.warns(UserWarning, match="nobody is left after the rule '999 days observed"):
        outcomes = FirstEvent("X", index="first_visit", washout_days=999).apply(stores["day", True])
    assert len(outcomes) == 0


def test_a_gap_delays_the_entry_to_the_visit_whose_interval_holds_it(tmp_path):
    one, _ = of_one(tmp_path, person((0, "A"), (3, "A"), (5, "A"), (9, "A"), (12, "X")), gap_days=6)
    assert values(one) == [[4], [2], [3], [1]]  # the window begins on day 7, between 5 and 9


def test_the_time_at_risk_censors(tmp_path):
    one, whole = of_one(
        tmp_path, person((0, "A"), (3, "A"), (5, "A"), (9, "X")), time_at_risk_days=5
    )
    assert values(one) == [[3], [0], [2], [0]]
    assert one.end_times.view(np.int64).tolist() == [us(6)]
    assert whole.censored_by == {"the end of the time at risk": 2}


def test_who_has_the_event_needs_no_least_observation(tmp_path):
    one, whole = of_one(
        tmp_path, person((0, "A"), (3, "X")), person((0, "A"), (6, "A")), min_observation_days=30
    )
    assert values(one) == [[1], [0], [0], [1]]
    assert len(whole) == 1


@pytest.mark.parametrize("kind", ["mapping", "series", "some in a series"])
def test_dates_of_persons_in_any_order(tmp_path, kind):
    rng = np.random.default_rng(3)
    ids = (rng.permutation(60) * 7 - 100).tolist()
    store = store_of(tmp_path, random_people(rng, 60, ids=ids))
    assert store.subject_ids.tolist() == ids
    days = dict(zip(sorted(ids), rng.integers(10, 20, 60).tolist(), strict=True))
    if kind == "some in a series":
        del days[ids[0]]
    dates = {subject: np.datetime64(us(day), "us") for subject, day in days.items()}
    if kind != "mapping":
        dates = pytest.importorskip("pandas").Series(dates)  # as of groupby
    slow = {at: [(us(days[i]), False)] for at, i in enumerate(ids) if i in days}
    task = FirstEvent("X", index=dates, end_of_observation="last_event")
    check(applied(task, store), slow_rows(task, store, dates=slow), store)


def test_nobody_with_the_outcome_is_told(tmp_path):
    _, whole = of_one(tmp_path, person((0, "A"), (9, "A")), person((0, "X")))
    assert "nobody who is left has the outcome in the time at risk" in whole.warnings


def test_a_split_without_anybody(tmp_path):
    store = store_of(tmp_path, {1: person((0, "A"), (9, "X"))})
    name = next(name for name in store.split_names if not len(store.patients_of(name)))
    outcomes = applied(FirstEvent("X"), store, name)
    assert len(outcomes) == 0
    assert {rule.persons for rule in outcomes.attrition.rules} == {0}


def test_ties_are_counted_and_warned_of(tmp_path):
    people = {
        1: {"events": [(us(0, 8), "A"), (us(3, 8), "B"), (us(3, 9), "X")]},
        2: {"events": [(us(0, 8), "A"), (us(0, 9), "X")]},
        3: {"events": [(us(0, 8), "A"), (us(4, 9), "X")]},
    }
    store = store_of(tmp_path, people, visit_rule="time")
    with pytest.warns(SameDayWarning, match="1 outcomes on the index day itself are removed"):
        outcomes = FirstEvent("X").apply(store)
    assert values(outcomes) == [[1, 1], [0, 0], [0, 0], [1, 1]]
    texts = " ".join(outcomes.warnings)
    assert "1 outcomes share their day with other visits" in texts


def test_the_attrition_table(tmp_path):
    periods = [(us(-30), us(50))]
    people = {
        1: person((0, "A"), (9, "X"), periods=periods),
        2: person((0, "A"), (9, "A"), periods=periods),
        3: person((0, "X"), (9, "A"), periods=periods),
        4: person((-20, "X"), (-10, "A"), (3, "A"), periods=periods),
        5: person((0, "A")),
        6: {"events": [(None, "STATIC")], "periods": periods},
    }
    store = store_of(tmp_path, people)
    outcomes = applied(FirstEvent("X", washout_days=15), store)
    table = outcomes.attrition
    assert [tuple(rule)[:3] for rule in table.rules] == [
        ("persons in the store", 6, 3),
        ("with a visit", 5, 3),
        ("with a visit in an observation period", 4, 3),
        ("with a visit after 15 days of observation", 4, 3),
        ("alive at the index", 4, 3),
        ("no outcome before the index day", 3, 2),
        ("no outcome on the index day", 2, 1),
        ("observed until the risk window", 2, 1),
    ]
    assert table.events == 1
    assert Attrition.from_dict(table.to_dict()) == table
    assert "| with a visit | 5 | 1 | 3 |" in table.to_markdown()
    assert "outcomes in the time at risk: 1" in str(outcomes)


REFUSED = {
    "no outcome": ({"codes": None}, ValueError, "expected codes, a prefix or 'death', got none"),
    "no codes": ({"codes": []}, ValueError, "codes: expected at least one code"),
    "a float": ({"codes": 1.5}, TypeError, "codes: expected codes or 'death', got float"),
    "an index": ({"index": "last"}, ValueError, "index: expected one of 'each_visit'"),
    "index": ({"index": np.arange(3)}, TypeError, "index: expected 'each_visit'"),
    "a moving date": ({"index": {1: "today"}}, ValueError, r"index\[1\]: expected a date"),
    "a year": ({"index": {1: "2020"}}, ValueError, r"index\[1\]: expected a date"),
    "a date": ({"index": {1: "soon"}}, ValueError, r"index\[1\]: expected a date, got 'soon'"),
    "fewer dates than persons": (
        {"index": {"subject_id": [1, 2], "time": ["2020-01-01"]}},
        ValueError,
        "index: expected one time for each of 2 subject ids, got 1",
    ),
    "washout": ({"washout_days": -1}, ValueError, "washout_days: expected 0 to"),
    "no time at risk": ({"time_at_risk_days": 0}, ValueError, "time_at_risk_days: expected 1"),
    "too long": (
        {"time_at_risk_days": 5, "min_observation_days": 6},
        ValueError,
        "min_observation_days: expected at most time_at_risk_days=5, got 6",
    ),
    "prior": ({"prior_outcome": "keep"}, ValueError, "prior_outcome: expected one of"),
    "end": ({"end_of_observation": "death"}, ValueError, "end_of_observation: expected one of"),
    "day": ({"prediction_day": "excluded"}, ValueError, "with index='each_visit'"),
}


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED.values(), ids=list(REFUSED))
def test_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        FirstEvent(**{"codes": "X", **settings})


def test_settings_by_name():
    task = FirstEvent(["X", 5], prefix=("A", "B"), gap_days=3)
    assert task.to_dict() == {"codes": ["X", 5], "prefix": ["A", "B"], "gap_days": 3}
    assert FirstEvent.from_dict(task.to_dict()) == task
    assert hash(task) == hash(FirstEvent.from_dict(task.to_dict()))
    assert task.name == "X, 5, A* and 1 more"
    with pytest.raises(ValueError, match=r"task: expected settings of codes, .*, got code"):
        FirstEvent.from_dict({"code": "X"})


def test_an_outcome_that_never_occurs(tmp_path):
    people = {1: {"events": [(us(0), "MI//acute"), (None, "SEX//F")]}}
    store = store_of(tmp_path, people)
    with pytest.raises(LookupError, match="MI//acute"):
        FirstEvent("MI//acuta").apply(store)
    with pytest.raises(ValueError, match="SEX//F: it is recorded 1 times, always without a time"):
        FirstEvent("SEX//F").apply(store)
    with pytest.raises(ValueError, match="records no deaths"):
        FirstEvent("death").apply(store)
    with pytest.raises(ValueError, match=r"no observation periods, expected 'last_event' or None"):
        FirstEvent("MI//acute", end_of_observation="period").apply(store)
    with pytest.raises(ValueError, match="split: expected one of"):
        FirstEvent("MI//acute").apply(store, "test")


def test_the_numbers_of_the_omop_readers_own_outcome(tmp_path):
    duckdb = pytest.importorskip("duckdb", reason="pip install 'ehrseq_fast[omop]'")
    rng = np.random.default_rng(6)
    people = {
        subject: {"events": [(us(int(d)), str(c)) for d, c in rng.integers(1, 15, (n, 2))]}
        for subject, n in enumerate(rng.integers(1, 12, 300).tolist())
    }
    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE condition_occurrence "
        "(person_id BIGINT, condition_concept_id BIGINT, condition_start_date DATE)"
    )
    rows = [
        (subject, int(code), np.datetime64(time, "us").astype("M8[D]").item())
        for subject, person in people.items()
        for time, code in person["events"]
    ]
    connection.executemany("INSERT INTO condition_occurrence VALUES (?, ?, ?)", rows)
    records = read_omop(connection, outcome_concept_id=7, tables=["condition"])
    store = store_of(tmp_path, people)
    outcomes = applied(FirstEvent(7, end_of_observation="last_event"), store)
    assert store.subject_ids[outcomes.patients].tolist() == records.person_ids.tolist()
    assert outcomes.event_times.tolist() == records.event_times.tolist()
    assert outcomes.event_indicators.tolist() == records.event_indicators.tolist()
    assert outcomes.n_visits.tolist() == records.visits_per_patient.tolist()
    removed = records.left_out["persons with the event in their first visit"]
    assert store.n_patients - len(outcomes) == removed > 0
