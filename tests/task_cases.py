"""Stores for the tests of tasks, and a task applied slowly, one patient at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ehrseq_fast.data import PartWriter, SubjectChunk, write_store

DAY = 86_400_000_000
FIRST_DAY = 18_000  # 2019-04-14


def us(day, hour=0.0):
    """Microseconds of a day counted from FIRST_DAY."""
    return (FIRST_DAY + day) * DAY + round(hour * 3600e6)


def times(values):
    return np.array(values, np.int64).view("M8[us]")


NAT = np.iinfo(np.int64).min


def store_of(folder, people, *, visit_rule="day", **options):
    """A store of ``{subject: {"events": [(us, code)], "death": us, "periods": [(us, us)]}}``.

    An event's time may be None (static); of the rule visit_id it is ``(us, code, visit)``.
    """
    events = [(row, *event) for row, p in enumerate(people.values()) for event in p["events"]]
    periods = [(row, *x) for row, p in enumerate(people.values()) for x in p.get("periods", ())]
    keyed = visit_rule == "visit_id"
    part = PartWriter(f"{folder}/part", visit_rule=visit_rule)
    part.add(
        SubjectChunk(
            subject_ids=np.array(list(people), np.int64),
            event_subject=np.array([e[0] for e in events], np.int64),
            event_times=times([NAT if e[1] is None else e[1] for e in events]),
            event_codes=[e[2] for e in events],
            event_visits=np.array([e[3] for e in events], np.int64) if keyed else None,
            death_times=times([p.get("death") or NAT for p in people.values()]),
            period_subject=np.array([x[0] for x in periods], np.int64),
            period_starts=times([x[1] for x in periods]),
            period_ends=times([x[2] for x in periods]),
        )
    )
    part.finish()
    return write_store(f"{folder}/store", [f"{folder}/part"], source={"kind": "test"}, **options)


def random_people(rng, n, *, codes="ABCDX", with_periods=True, fine=False, ids=None):
    """Short, crowded records: ties, people without visits, several periods, deaths anywhere."""
    people = {}
    for subject in range(100, 100 + n) if ids is None else ids:
        days = rng.integers(0, 40, rng.integers(0, 9))
        hours = rng.integers(0, 24, len(days)) if fine else np.zeros(len(days))
        chance = np.array([3.0] * (len(codes) - 1) + [1.0])
        names = rng.choice(list(codes), len(days), p=chance / chance.sum())
        events = [(us(int(d), h), str(c)) for d, h, c in zip(days, hours, names, strict=True)]
        if rng.random() < 0.2:
            events.append((None, "STATIC"))
        person = {"events": events}
        if rng.random() < 0.3:
            person["death"] = us(int(rng.integers(5, 45)), 10 if fine else 0)
        if with_periods and rng.random() < 0.9:
            cuts = np.sort(rng.choice(np.arange(-10, 50), 2 * rng.integers(1, 4), replace=False))
            person["periods"] = [(us(int(a)), us(int(b))) for a, b in cuts.reshape(-1, 2)]
        people[subject] = person
    return people


@dataclass
class Row:
    """One row of the outcomes, as the slow way finds it."""

    patient: int
    n_visits: int
    entry: int
    event: int
    index_time: int
    risk_start: int
    end_time: int
    cause: int = 0


def slow_rows(task, store, split=None, dates=None):
    """The study population of a task, and the persons each rule leaves, patient by patient.

    ``dates``: ``{patient: [(us, whole_day)]}``, where the task has index dates.
    """
    outcomes = [None if task.is_death else store.matching(task.codes, task.prefix)]
    for _, codes in task.competing or ():
        outcomes.append(None if codes == "death" else store.matching(codes))
    rows, left = [], {}

    def leave(rule, patient):
        left.setdefault(rule, set()).add(patient)

    for p in store.patients_of(split).tolist():
        leave("start", p)
        person = Person(store, p, outcomes)
        if not person.visits:
            continue
        leave("visit", p)
        for index in indices(task, person, dates):
            row = slow_row(task, person, *index, lambda rule, p=p: leave(rule, p))
            if row is not None:
                rows.append(row)
    return rows, {rule: len(who) for rule, who in left.items()}


class Person:
    """One patient's record in plain Python."""

    def __init__(self, store, p, outcomes):
        self.p = p
        begin, end = store.patient_offsets[p : p + 2].tolist()
        self.ends = store.visit_ends[begin:end].view(np.int64).tolist()
        self.visits = store.visit_times[begin:end].view(np.int64).tolist()
        death = int(store.death_times[p : p + 1].view(np.int64)[0])
        self.death = None if death == NAT else death
        a, b = store.period_offsets[p : p + 2].tolist()
        self.periods = [
            (int(s), int(e))
            for s, e in zip(
                store.period_starts[a:b].view(np.int64),
                store.period_ends[a:b].view(np.int64),
                strict=True,
            )
        ]
        self.has_periods = len(store.period_starts) > 0
        self.dies = [outcome is None for outcome in outcomes]
        found = []
        for cause, outcome in enumerate(outcomes, 1):
            if outcome is None:
                found += [] if self.death is None else [(self.death, cause)]
                continue
            for v in range(begin, end):
                codes = store.codes[store.visit_offsets[v] : store.visit_offsets[v + 1]]
                if any(outcome[c] for c in codes.tolist()):
                    found.append((self.visits[v - begin], cause))
        # those of one day in the order of the outcomes
        found.sort(key=lambda each: (each[0] // DAY, each[1], each[0]))
        self.outcomes = [time for time, _ in found]
        self.causes = [cause for _, cause in found]

    def last_seen(self, visit):
        """When the last code of the visits up to this one was recorded."""
        return max(self.ends[: visit + 1])

    def last_seen_day(self, visit):
        return self.last_seen(visit) // DAY


def observations(task, person):
    """(first day, last day, the instant it ends) of each observation."""
    if person.has_periods and task.end_of_observation != "last_event":
        return [(s // DAY, (e - 1) // DAY, e) for s, e in person.periods]
    last = max(person.ends) if person.death is None else person.death
    return [(person.visits[0] // DAY, last // DAY, last)]


def indices(task, person, dates):
    """(index time, whole day, observation) of each possible index."""
    spans = observations(task, person)
    if dates is not None:
        for time, whole in sorted(dates.get(person.p, ())):
            for span in spans:
                if span[0] <= time // DAY <= span[1]:
                    yield time, whole, span
        return
    washout = task.washout_days if task.index == "each_visit" else 0
    for span in spans:
        for time in person.visits:
            if span[0] + washout <= time // DAY <= span[1]:
                yield time, False, span
                return


def slow_row(task, person, time, whole, span, leave):  # noqa: PLR0911
    first_day, last_day, until = span
    visits, days = person.visits, [v // DAY for v in person.visits]
    index_day = time // DAY
    leave("index")
    each = task.index == "each_visit"
    if not each and index_day - first_day < task.washout_days:
        return None
    leave("washout")
    if each:
        at = visits.index(time)
    else:
        if task.prediction_day == "excluded":
            seen = [v for v in range(len(visits)) if person.last_seen_day(v) < index_day]
        elif task.index == "first_visit":
            seen = [v for v in range(len(visits)) if visits[v] <= time]
        elif whole:
            seen = [v for v in range(len(visits)) if person.last_seen_day(v) <= index_day]
        else:
            seen = [v for v in range(len(visits)) if person.last_seen(v) <= time]
        if not seen:
            return None
        at = seen[-1]
    leave("seen")
    index_day = max(index_day, person.last_seen_day(at))
    death_day = None if person.death is None else person.death // DAY
    if death_day is not None and death_day < index_day:
        return None
    leave("alive")
    risk = index_day + task.gap_days
    if task.prior_outcome == "exclude" and any(o // DAY <= risk for o in person.outcomes):
        return None
    if any(person.dies) and death_day is not None and death_day <= risk:
        return None
    leave("prior")
    last, ends = last_day, [until]
    if death_day is not None:
        ends.append(person.death)
        if person.dies != [True]:
            last = min(last, death_day)
    if task.time_at_risk_days is not None:
        last = min(last, risk + task.time_at_risk_days)
        ends.append((risk + task.time_at_risk_days + 1) * DAY)
    if last < risk:
        return None
    leave("risk")
    inside = [k for k, o in enumerate(person.outcomes) if risk < o // DAY <= last]
    events = [person.outcomes[k] for k in inside]
    if not events and last - risk < task.min_observation_days:
        return None
    leave("observed")
    if each:
        entry = max(v for v in range(len(visits)) if person.last_seen_day(v) <= risk)
        if events:
            kept = [v for v in range(len(visits)) if person.last_seen_day(v) < events[0] // DAY]
        else:
            kept = [v for v in range(len(visits)) if days[v] <= last]
        n = len(kept)
    else:
        entry, n = at, at + 1
    end = events[0] if events else min(ends)
    risk_start = time + (risk - time // DAY) * DAY
    end = max(end, visits[n - 1], time)
    cause = person.causes[inside[0]] if events else 0
    return Row(person.p, n, entry, bool(events), time, risk_start, end, cause)
