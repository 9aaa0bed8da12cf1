"""From a store and a task to its study population, vectorised over chunks of patients."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .attrition import Funnel
from .chunks import DAY_US, NEVER, Chunk, chunks
from .dates import IndexDates
from .index import (
    Rows,
    first_visits,
    from_last_seen_day,
    n_open_visits,
    on_dates,
    with_seen_visits,
)
from .outcomes import Outcomes, SameDayWarning, within_visits
from .search import as_times, at_or, first_not_below
from .settings import Settings

if TYPE_CHECKING:
    from ..store import EventStore

Ints = NDArray[np.int64]
ENDS = ("the end of observation", "death", "the end of the time at risk")
BY_OBSERVATION, BY_DEATH, BY_WINDOW = range(len(ENDS))


def study_population(task: Settings, store: EventStore, split: str | None) -> Outcomes:
    """See :meth:`~.first_event.FirstEvent.apply`."""
    population = Population(task, store, split)
    for chunk in chunks(store, population.of_code, population.death):
        population.add(chunk)
    return population.outcomes()


class Population:
    """The study population as it grows, chunk by chunk."""

    def __init__(self, task: Settings, store: EventStore, split: str | None) -> None:
        self.task, self.store, self.split = task, store, split
        self.selected = None if split is None else np.asarray(store.patients_of(split))
        self.of_code, self.death = _outcomes(task, store)
        self.by_period = _by_period(task, store)
        self.dates = task.index if isinstance(task.index, IndexDates) else None
        self.date_rows = None if self.dates is None else self.dates.rows(store.subject_ids)
        self.each_visit = isinstance(task.index, str) and task.index == "each_visit"
        self.funnel = Funnel()
        self.counts: Counter[str] = Counter()
        self.parts: list[tuple[Ints, ...]] = []
        self.events_in_store = np.zeros(1 + max(1, len(task.causes)), np.int64)

    def add(self, chunk: Chunk) -> None:
        """Put a chunk's patients through the rules, in the order of the attrition table."""
        size = len(self.events_in_store)
        self.events_in_store += np.bincount(chunk.event_causes, minlength=size)
        task = self.task
        rows = self._index(chunk, self._patients(chunk))
        if task.washout_days and not self.each_visit:
            observed = rows.index_day - rows.first_day
            name = f"{task.washout_days} days observed before the index"
            rows = self._rule(chunk, name, rows, observed >= task.washout_days)
        if not self.each_visit:
            include_day = task.prediction_day == "included"
            rows = with_seen_visits(chunk, rows, self.dates, include_day)
            self._count(chunk, "with a visit to predict from", rows.patient)
        rows = from_last_seen_day(chunk, rows)
        alive = chunk.death_days[rows.patient] >= rows.index_day
        rows = self._rule(chunk, "alive at the index", rows, alive)
        rows = self._without_prior_outcome(chunk, rows)
        days_at_risk, event = self._at_risk(chunk, rows)
        self._count_later_outcomes(chunk, rows, event)
        begun = days_at_risk >= 0
        rows, event = self._rule(chunk, "observed until the risk window", rows, begun), event[begun]
        if least := task.min_observation_days:
            kept = (event >= 0) | (days_at_risk[begun] >= least)
            name = f"{least} days at risk, or the outcome"
            rows, event = self._rule(chunk, name, rows, kept), event[kept]
        self._finish(chunk, rows, event)

    def outcomes(self) -> Outcomes:
        """All chunks together.

        Raises:
            ValueError: an outcome that nobody in the store has.
        """
        task = self.task
        if not self.events_in_store[1:].all():
            raise ValueError(self._never(int(self.events_in_store[1:].argmin()) + 1))
        columns = [np.concatenate(column) for column in zip(*self.parts, strict=True)]
        patients, n_visits, entries, types, index_times, risk_starts, end_times, ends = columns
        indicators = (types > 0).astype(np.int64)
        censored = np.bincount(ends[indicators == 0], minlength=len(ENDS)).tolist()
        notes = self._notes()
        attrition = self.funnel.table(int(indicators.sum()))
        if not len(patients) and attrition.rules[0].persons:
            last = next(rule.name for rule in attrition.rules if not rule.persons)
            notes.append(f"nobody is left after the rule {last!r}")
            warnings.warn(notes[-1], UserWarning, stacklevel=4)
        elif len(patients) and not indicators.any():
            notes.append("nobody who is left has the outcome in the time at risk")
        ties = [text for text in notes if text.startswith("same day")]
        if ties:
            warnings.warn("; ".join(ties), SameDayWarning, stacklevel=4)
        unknown = 0 if self.date_rows is None else self.date_rows[3]
        left_out = {
            "index dates of persons who are not in the store": unknown,
            "outcomes after the end of observation or of the time at risk": self.counts["late"],
        }
        return Outcomes(
            patients=patients,
            n_visits=n_visits,
            entry_times=entries,
            event_times=n_visits - 1,
            event_indicators=indicators.astype(np.uint8),
            index_times=as_times(index_times),
            risk_starts=as_times(risk_starts),
            end_times=as_times(end_times),
            attrition=attrition,
            each_visit=self.each_visit,
            warnings=tuple(notes),
            left_out={what: number for what, number in left_out.items() if number},
            censored_by={
                what: number for what, number in zip(ENDS, censored, strict=True) if number
            },
            store_sha256=self.store.header.get("content_sha256"),
            causes=task.causes,
            event_types=types.astype(np.uint8) if task.causes else None,
        )

    def _patients(self, chunk: Chunk) -> Ints:
        """Those of the split who have a visit."""
        whose = np.arange(chunk.n_patients)
        if self.selected is not None:
            ends = np.searchsorted(self.selected, [chunk.first, chunk.first + chunk.n_patients])
            whose = self.selected[ends[0] : ends[1]] - chunk.first
        of = "the store" if self.split is None else f"split {self.split!r}"
        self._count(chunk, f"persons in {of}", whose)
        whose = whose[chunk.visits[whose + 1] > chunk.visits[whose]]
        self._count(chunk, "with a visit", whose)
        return whose

    def _index(self, chunk: Chunk, whose: Ints) -> Rows:
        if self.date_rows is not None:
            patient, times, numbers, _ = self.date_rows
            begin, end = np.searchsorted(patient, [chunk.first, chunk.first + chunk.n_patients])
            wanted = np.zeros(chunk.n_patients, bool)
            wanted[whose] = True
            chosen = np.flatnonzero(wanted[patient[begin:end] - chunk.first]) + begin
            self._count(chunk, "with an index date", patient[chosen] - chunk.first)
            rows = on_dates(
                chunk,
                patient[chosen] - chunk.first,
                times[chosen],
                numbers[chosen],
                self.by_period,
            )
            name = (
                "index in an observation period"
                if self.by_period
                else "index between the first and the last event"
            )
            self._count(chunk, name, rows.patient)
            return rows
        rows = first_visits(chunk, whose, self.by_period, 0)
        if self.by_period:
            self._count(chunk, "with a visit in an observation period", rows.patient)
        if self.each_visit and (days := self.task.washout_days):
            rows = first_visits(chunk, whose, self.by_period, days)
            self._count(chunk, f"with a visit after {days} days of observation", rows.patient)
        return rows

    def _rule(self, chunk: Chunk, name: str, rows: Rows, kept: NDArray[np.bool_]) -> Rows:
        rows = rows.keep(kept)
        self._count(chunk, name, rows.patient)
        return rows

    def _count(self, chunk: Chunk, name: str, patients: Ints) -> None:
        persons = patients[np.append(True, patients[1:] != patients[:-1])[: len(patients)]]
        outcomes = int(np.count_nonzero(chunk.events[persons + 1] > chunk.events[persons]))
        self.funnel.add(name, len(persons), outcomes, len(patients))

    def _without_prior_outcome(self, chunk: Chunk, rows: Rows) -> Rows:
        def outcome_between(first: int, last: int) -> NDArray[np.bool_]:
            """Who has an outcome on these days, counted from the index day."""
            _, day = _first_event(chunk, rows, rows.index_day + first)
            return day <= rows.index_day + last

        exclude = self.task.prior_outcome == "exclude"
        if exclude:
            before = _first_event(chunk, rows, -NEVER)[1] < rows.index_day
            rows = self._rule(chunk, "no outcome before the index day", rows, ~before)
        tied = outcome_between(0, 0)
        self.counts["tied with the index"] += int(np.count_nonzero(tied))
        if exclude:
            rows = self._rule(chunk, "no outcome on the index day", rows, ~tied)
        if exclude and (gap := self.task.gap_days):
            in_gap = outcome_between(1, gap)
            rows = self._rule(chunk, f"no outcome in the gap of {gap} days", rows, ~in_gap)
        if self.death and not exclude:  # the dead are at risk of nothing
            begins = rows.index_day + self.task.gap_days
            alive = chunk.death_days[rows.patient] > begins
            rows = self._rule(chunk, "alive when the risk window begins", rows, alive)
        return rows

    def _at_risk(self, chunk: Chunk, rows: Rows) -> tuple[Ints, Ints]:
        """Days of the risk window that are observed, and which event is in it, or -1."""
        risk, limit = rows.index_day + self.task.gap_days, self._last_day(chunk, rows)
        event, day = _first_event(chunk, rows, risk + 1)
        return limit - risk, np.where(day <= limit, event, -1)

    def _last_day(self, chunk: Chunk, rows: Rows) -> Ints:
        """The last day on which an outcome counts."""
        last = rows.last_day
        if self.of_code is not None:  # else the outcome is death alone
            last = np.minimum(last, chunk.death_days[rows.patient])
        if self.task.time_at_risk_days is not None:
            last = np.minimum(last, self._window_end(rows))
        return last

    def _window_end(self, rows: Rows) -> Ints:
        assert self.task.time_at_risk_days is not None
        return rows.index_day + self.task.gap_days + self.task.time_at_risk_days

    def _count_later_outcomes(self, chunk: Chunk, rows: Rows, event: Ints) -> None:
        _, day = _first_event(chunk, rows, rows.index_day + self.task.gap_days + 1)
        self.counts["late"] += int(np.count_nonzero((event < 0) & (day < NEVER)))

    def _finish(self, chunk: Chunk, rows: Rows, event: Ints) -> None:
        """Add the rows as outcomes: the visits that are seen, and what ends the observation."""
        first = chunk.visits[rows.patient]
        limit = self._last_day(chunk, rows)
        is_event = event >= 0
        event_day = at_or(chunk.event_days, event, is_event, NEVER)
        types = at_or(chunk.event_causes, event, is_event, 0)
        self._count_tied_causes(chunk, rows, event_day, types)
        entry, end = rows.index_visit, rows.index_visit + 1
        risk = rows.index_day + self.task.gap_days
        if self.each_visit:
            last = chunk.visits[rows.patient + 1]
            entry = first_not_below(chunk.last_days, rows.index_visit, last, risk + 1) - 1
            before_event = first_not_below(chunk.last_days, entry, last, event_day)
            observed = first_not_below(chunk.visit_days, entry, last, limit + 1)
            end = np.where(is_event, before_event, observed)
            next_day = first_not_below(chunk.visit_days, end, last, event_day + 1)
            own_visits = types != self.death  # death needs none
            tied = is_event & (next_day - end > own_visits)
            self.counts["tied with a visit"] += int(np.count_nonzero(tied))
        elif self.dates is not None:
            self.counts["within a visit"] += n_open_visits(chunk, rows)
        end_time, ended_by = self._censoring(chunk, rows, limit)
        end_time = np.where(is_event, at_or(chunk.event_times, event, is_event, 0), end_time)
        end_time = np.maximum(end_time, np.maximum(chunk.visit_times[end - 1], rows.index_time))
        self.parts.append(
            (
                rows.patient + chunk.first,
                end - first,
                entry - first,
                types,
                rows.index_time,
                rows.index_time + (risk - rows.index_time // DAY_US) * DAY_US,
                end_time,
                ended_by,
            )
        )

    def _count_tied_causes(self, chunk: Chunk, rows: Rows, event_day: Ints, types: Ints) -> None:
        """Events on whose day another of competing outcomes is."""
        if not self.task.causes:
            return
        begins, ends = chunk.events[rows.patient], chunk.events[rows.patient + 1]
        last = first_not_below(chunk.event_days, begins, ends, event_day + 1) - 1
        of_last = at_or(chunk.event_causes, last, types > 0, 0)
        self.counts["tied causes"] += int(np.count_nonzero(of_last != types))

    def _censoring(self, chunk: Chunk, rows: Rows, limit: Ints) -> tuple[Ints, Ints]:
        """When and by what the observation of those without the event ends."""
        until = rows.observed_until
        ended_by = np.full(len(rows), BY_OBSERVATION)
        if self.task.time_at_risk_days is not None:
            window = self._window_end(rows)
            until = np.minimum(until, (window + 1) * DAY_US)
            ended_by[window == limit] = BY_WINDOW
        death_day = chunk.death_days[rows.patient]
        dead = death_day < NEVER
        until = np.where(dead, np.minimum(until, chunk.death_times[rows.patient]), until)
        ended_by[death_day == limit] = BY_DEATH
        return until, ended_by

    def _notes(self) -> list[str]:
        counts = self.counts
        notes = []
        if tied := counts["tied with the index"]:
            what = "removed" if self.task.prior_outcome == "exclude" else "not counted"
            notes.append(f"same day: {tied:,} outcomes on the index day itself are {what}")
        if tied := counts["tied with a visit"]:
            notes.append(
                f"same day: {tied:,} outcomes share their day with other visits, or with a stay "
                "that is not over, which are not seen"
            )
        if tied := counts["tied causes"]:
            notes.append(
                f"same day: {tied:,} outcomes share their day with another of those that compete; "
                "the first in the task's order counts"
            )
        if within := counts["within a visit"]:
            notes.append(within_visits(within))
        if self.task.end_of_observation is None and not self.by_period:
            notes.append(
                "this store has no observation periods: persons are observed from the first to the "
                "last event of their record, or to their death, however long after it"
            )
        return notes

    def _never(self, cause: int) -> str:
        """What is wrong with an outcome that nobody in the store has."""
        task, store = self.task, self.store
        if cause == self.death:
            return f"outcome: the store {store.path} records no deaths, got codes='death'"
        assert self.of_code is not None
        static = int(np.count_nonzero(self.of_code[np.asarray(store.static_codes)] == cause))
        found = (
            f"it is recorded {static:,} times, always without a time" if static else "nobody has it"
        )
        name = task.causes[cause - 1] if task.causes else task.name
        return (
            f"outcome: expected a code that visits of the store {store.path} hold, got "
            f"{name}: {found}"
        )


def _first_event(chunk: Chunk, rows: Rows, from_day: Ints | int) -> tuple[Ints, Ints]:
    """Which event is each row's first on ``from_day`` or later, and its day (``NEVER``: none)."""
    begins, ends = chunk.events[rows.patient], chunk.events[rows.patient + 1]
    event = first_not_below(chunk.event_days, begins, ends, from_day)
    return event, at_or(chunk.event_days, event, event < ends, NEVER)


def _by_period(task: Settings, store: EventStore) -> bool:
    there = len(store.period_starts) > 0
    if task.end_of_observation == "period" and not there:
        raise ValueError(
            f"end_of_observation: the store {store.path} has no observation periods, expected "
            "'last_event' or None, got 'period'"
        )
    return there and task.end_of_observation != "last_event"


def _outcomes(task: Settings, store: EventStore) -> tuple[NDArray[np.uint8] | None, int]:
    """Which outcome each code of the dictionary is, or None where none is; and which death is.

    Raises:
        LookupError: a code that the dictionary lacks.
        ValueError: a code of two outcomes.
    """
    if task.is_death and task.competing is None:
        return None, 1
    death = int(task.is_death)
    of_code = np.zeros(len(store.codes_of), np.uint8)
    if not task.is_death:
        of_code[store.matching(task.codes, task.prefix)] = 1
    for number, (name, codes) in enumerate(task.competing or (), 2):
        if codes == "death":
            death = number
            continue
        matching = store.matching(codes)
        if (both := matching & (of_code > 0)).any():
            code = store.codes_of[int(both.argmax())]
            first = task.causes[of_code[both.argmax()] - 1]
            raise ValueError(
                f"competing: expected different codes of each outcome, got {code!r} as {first!r} "
                f"and {name!r}"
            )
        of_code[matching] = number
    return of_code, death
