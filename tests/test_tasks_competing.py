"""Tasks with competing outcomes: against the slow oracle, and cases by hand."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from ehrseq_fast.data import FirstEvent, PatientDataset, write_labels
from ehrseq_fast.data.tasks import SameDayWarning, chunks

from .task_cases import slow_rows, store_of, us
from .test_tasks import RULES, applied, check, stores

__all__ = ["stores"]  # a fixture

TASKS = {
    "another code": {"competing": "A"},
    "death": {"competing": "death"},
    "two more": {"competing": {"death": "death", "AB": ["A", "B"]}},
    "death first": {"codes": "death", "competing": {"X": "X"}},
    "allowed before": {"competing": ["A", "death"], "prior_outcome": "allow", "gap_days": 2},
    "death first, allowed before": {
        "codes": "death",
        "competing": ["A"],
        "prior_outcome": "allow",
        "index": "first_visit",
    },
    "windows": {
        "competing": {"A": "A", "death": "death"},
        "gap_days": 1,
        "time_at_risk_days": 15,
        "min_observation_days": 3,
        "washout_days": 2,
    },
    "to the last event": {"competing": "death", "end_of_observation": "last_event"},
}


@pytest.mark.parametrize("settings", TASKS.values(), ids=list(TASKS))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("periods", [True, False])
def test_as_one_patient_at_a_time(stores, settings, rule, periods, monkeypatch):
    monkeypatch.setattr(chunks, "MOST_VISITS", 20)  # several chunks
    monkeypatch.setattr(chunks, "MOST_CODES", 7)
    store = stores[rule, periods]
    task = FirstEvent(**{"codes": "X", **settings})
    outcomes = applied(task, store)
    assert len(outcomes), "the case tests nothing"
    expected = slow_rows(task, store)
    check(outcomes, expected, store)
    assert outcomes.event_types.tolist() == [row.cause for row in expected[0]]
    assert outcomes.event_types.dtype == np.uint8
    assert (outcomes.event_indicators == (outcomes.event_types > 0)).all()
    assert sum(outcomes.events_by_cause().values()) == outcomes.attrition.events
    assert FirstEvent.from_dict(json.loads(json.dumps(task.to_dict()))) == task
    some = outcomes.select(np.arange(0, len(outcomes), 2))
    assert some.event_types.tolist() == outcomes.event_types[::2].tolist()


def test_each_cause_occurs_in_the_random_stores(stores):
    found = applied(
        FirstEvent("X", competing={"death": "death", "AB": ["A", "B"]}), stores["day", True]
    )
    assert min(found.events_by_cause().values()) > 0


def people():
    return {
        1: {"events": [(us(0), "A"), (us(5), "X"), (us(9), "Y")]},
        2: {"events": [(us(0), "A"), (us(5), "Y"), (us(9), "X")]},
        3: {"events": [(us(0), "A"), (us(2), "A")], "death": us(20)},
        4: {"events": [(us(0), "A"), (us(5, 3), "Y"), (us(5, 9), "X")]},  # on one day
        5: {"events": [(us(0), "A"), (us(5), "X")], "death": us(5)},
        6: {"events": [(us(0), "Y"), (us(5), "X")]},  # had one before
        7: {"events": [(us(0), "A"), (us(8), "A")]},
    }


def test_the_first_of_all_counts(tmp_path):
    store = store_of(tmp_path, people(), visit_rule="time")
    task = FirstEvent("X", competing={"Y": "Y", "death": "death"})
    with pytest.warns(SameDayWarning, match="2 outcomes share their day with another of those"):
        found = task.apply(store)
    assert store.subject_ids[found.patients].tolist() == [1, 2, 3, 4, 5, 7]
    assert found.event_types.tolist() == [1, 2, 3, 1, 1, 0]
    assert found.causes == ("X", "Y", "death")
    assert found.events_by_cause() == {"X": 3, "Y": 1, "death": 1}
    assert "of them the first: 3 X, 1 Y, 1 death" in str(found)
    # the day's order is unknown: that of the first named cause counts
    assert found.end_times[3] == np.datetime64(us(5, 9), "us")
    batch = PatientDataset(store, found).batch(np.arange(len(found)))
    assert batch.event_types.tolist() == [1, 2, 3, 1, 1, 0]
    assert batch.event_indicators.tolist() == [1, 1, 1, 1, 1, 0]


def test_label_files_hold_one_outcome(stores, tmp_path):
    store = stores["day", True]
    found = applied(FirstEvent("X", competing="A"), store)
    with pytest.raises(ValueError, match=r"expected those of one outcome, .* got those of 2 that"):
        write_labels(found, store, tmp_path / "labels.parquet")


def test_without_competing_outcomes_there_are_no_types(tmp_path):
    store = store_of(tmp_path, people(), visit_rule="time")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = FirstEvent("X").apply(store)
    assert found.event_types is None
    assert found.causes == ()
    assert found.events_by_cause() == {}
    assert PatientDataset(store, found).batch([0]).event_types is None
    assert "competing" not in FirstEvent("X").to_dict()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"competing": {}}, ValueError, "competing: expected 1 to 100 outcomes of other names"),
        ({"competing": {"X": "Y"}}, ValueError, r"other names than 'X' .* got \['X'\]"),
        ({"competing": ["X"]}, ValueError, r"got \['X'\]"),
        ({"competing": ["Y", "Y"]}, ValueError, r"got \['Y', 'Y'\]"),
        ({"competing": {"a": "death", "b": "death"}}, ValueError, "expected death once"),
        ({"codes": "death", "competing": {"a": "death"}}, ValueError, "expected death once"),
        ({"competing": {"a": []}}, ValueError, "codes: expected at least one code, got none"),
        ({"competing": {"a": None}}, ValueError, "competing: expected codes of 'a', got none"),
        ({"competing": {"a": 1.5}}, TypeError, "codes: expected codes or 'death', got float"),
        ({"competing": 1.5}, TypeError, "competing: expected codes or a mapping of names"),
    ],
)
def test_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        FirstEvent(**{"codes": "X"} | settings)


def test_codes_are_refused(tmp_path):
    store = store_of(tmp_path, people(), visit_rule="time")
    with pytest.raises(ValueError, match=r"different codes .* got 'X' as 'X' and 'both'"):
        FirstEvent("X", competing={"both": ["X", "Y"]}).apply(store)
    with pytest.raises(LookupError, match="Z"):
        FirstEvent("X", competing="Z").apply(store)
    alive = store_of(tmp_path / "alive", {1: {"events": [(us(0), "A"), (us(1), "X")]}})
    with pytest.raises(ValueError, match="records no deaths"):
        FirstEvent("X", competing="death").apply(alive)
    static = store_of(tmp_path / "s", {1: {"events": [(us(0), "X"), (us(1), "X"), (None, "Y")]}})
    with pytest.raises(ValueError, match="got Y: it is recorded 1 times, always without a time"):
        FirstEvent("X", competing="Y").apply(static)
