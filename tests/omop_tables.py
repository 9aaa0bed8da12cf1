"""Small OMOP databases for tests, what a store holds as plain Python, and the same by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS: Mapping[str, Mapping[str, str]] = {
    "condition_occurrence": {
        "person_id": "BIGINT",
        "condition_concept_id": "BIGINT",
        "condition_start_date": "DATE",
        "condition_start_datetime": "TIMESTAMP",
        "visit_occurrence_id": "BIGINT",
    },
    "measurement": {
        "person_id": "BIGINT",
        "measurement_concept_id": "BIGINT",
        "measurement_date": "DATE",
        "measurement_datetime": "TIMESTAMP",
        "visit_occurrence_id": "BIGINT",
        "value_as_number": "DOUBLE",
    },
    "person": {
        "person_id": "BIGINT",
        "gender_concept_id": "BIGINT",
        "race_concept_id": "BIGINT",
        "ethnicity_concept_id": "BIGINT",
        "year_of_birth": "INTEGER",
        "month_of_birth": "INTEGER",
        "day_of_birth": "INTEGER",
        "birth_datetime": "TIMESTAMP",
    },
    "observation_period": {
        "person_id": "BIGINT",
        "observation_period_start_date": "DATE",
        "observation_period_end_date": "DATE",
    },
    "death": {"person_id": "BIGINT", "death_date": "DATE", "death_datetime": "TIMESTAMP"},
    "visit_occurrence": {
        "person_id": "BIGINT",
        "visit_occurrence_id": "BIGINT",
        "visit_start_date": "DATE",
        "visit_start_datetime": "TIMESTAMP",
        "visit_end_date": "DATE",
    },
    "concept": {"concept_id": "BIGINT", "concept_name": "VARCHAR"},
}
READ = ("condition", "measurement")
Tables = Mapping[str, Sequence[Sequence[Any]]]


def fill(
    connection: Any,
    tables: Tables,
    *,
    types: Mapping[str, str] | None = None,
    schema: str = "main",
) -> Any:
    """Create those tables. Rows may be shorter than the table; ``types`` by "table.column"."""
    changed = dict(types or {})
    for table, rows in tables.items():
        columns = {
            column: changed.pop(f"{table}.{column}", dtype)
            for column, dtype in COLUMNS[table].items()
        }
        listed = ", ".join(f"{column} {dtype}" for column, dtype in columns.items())
        connection.execute(f"CREATE TABLE {schema}.{table} ({listed})")
        whole = [[*row, *[None] * (len(columns) - len(row))] for row in rows]
        marks = f"({', '.join('?' * len(columns))})"
        at_once = 200 if len(whole) > 20 else 1  # few rows may be of several types
        for first in range(0, len(whole), at_once):
            some = whole[first : first + at_once]
            connection.execute(
                f"INSERT INTO {schema}.{table} VALUES {', '.join([marks] * len(some))}",
                [value for row in some for value in row],
            )
    assert not changed, changed
    return connection


def database(path: Path, tables: Tables, **options: Any) -> Path:
    """A database file with those tables."""
    import duckdb

    with duckdb.connect(str(path)) as connection:
        fill(connection, tables, **options)
    return path


def random_tables(seed: int, persons: int = 12, rows: int = 60) -> dict[str, list[Any]]:
    """Tables with gaps of every kind, but no row that is refused or not simply read."""
    rng = np.random.default_rng(seed)

    def some(values, none=0.1):
        return None if rng.random() < none else values[rng.integers(len(values))]

    people = [*range(1, persons), 2**40]
    days = [date(2020, 1, 1) + timedelta(int(i)) for i in range(0, 40, 3)]
    visits = [
        (some(people, 0), i, some(days), datetime(2020, 1, 3, i % 24), some(days, 0.3))
        for i in range(rows // 3)
    ]

    def event():
        day = some(days)
        moment = datetime(2020, 1, int(rng.integers(1, 28)), int(rng.integers(24)))
        if day is not None and rng.random() < 0.7:
            moment = datetime(day.year, day.month, day.day, moment.hour)
        of_visit = some([visit[1] for visit in visits] + [999])
        concept = some([0, 40, 41, 42, 2**33])
        return (some(people), concept, day, some([moment], 0.3), of_visit)

    births = [(int(p), some([8507, 0]), some([8527]), some([0]), None, None, None) for p in people]
    tables = {
        "condition_occurrence": [event() for _ in range(rows)],
        "measurement": [(*event(), some([1.5, -2.25, 0.1, 7.0])) for _ in range(rows)],
        "person": [(*row, some([datetime(1950, 3, 4, 5)])) for row in births[: persons * 2 // 3]],
        "observation_period": [
            (p, begin, begin + timedelta(int(rng.integers(20))))
            for p in people
            for begin in rng.choice(days, rng.integers(3)).tolist()
        ],
        "death": [(some(people, 0), some(days), None) for _ in range(3)],
        "visit_occurrence": visits,
    }
    return {name: [row for row in given if row[0] is not None] for name, given in tables.items()}


def contents(store: Any) -> dict[int, dict[str, Any]]:
    """All that a store holds of each subject."""
    found = {}
    for p, subject in enumerate(store.subject_ids.tolist()):
        visits = []
        for v in range(store.patient_offsets[p], store.patient_offsets[p + 1]):
            entries = range(store.visit_offsets[v], store.visit_offsets[v + 1])
            codes = {store.codes_of[store.codes[i]]: _value(store.values, i) for i in entries}
            visits.append((store.visit_times[v].item(), codes))
        statics = range(store.static_offsets[p], store.static_offsets[p + 1])
        periods = range(store.period_offsets[p], store.period_offsets[p + 1])
        found[subject] = {
            "visits": visits,
            "ends": store.visit_ends[slice(*store.patient_offsets[p : p + 2])].tolist(),
            "static": sorted(store.codes_of[store.static_codes[i]] for i in statics),
            "birth": store.birth_times[p].item(),
            "death": store.death_times[p].item(),
            "periods": [
                (store.period_starts[i].item(), store.period_ends[i].item()) for i in periods
            ],
        }
    return found


def _value(values: Any, i: int) -> float | None:
    return None if values is None or np.isnan(values[i]) else float(values[i])


def by_hand(tables: Tables, visits: str | float, *, keep: bool = False) -> dict[int, Any]:
    """What a store of those tables has to hold, in plain Python; columns as in ``COLUMNS``."""
    rows = {
        name: [dict(zip(COLUMNS[name], [*row, *[None] * 9], strict=False)) for row in given]
        for name, given in tables.items()
    }
    events = []
    for name in ("condition_occurrence", "measurement"):
        kind = name.split("_", maxsplit=1)[0]
        start = "_start" if kind == "condition" else ""
        for row in rows.get(name, []):
            at = _instant(row[f"{kind}{start}_date"], row[f"{kind}{start}_datetime"])
            concept = row[f"{kind}_concept_id"]
            if row["person_id"] is not None and concept and at is not None:
                value = row.get("value_as_number")
                visit = row["visit_occurrence_id"]
                events.append((row["person_id"], at, concept, value, visit))
    people = {row["person_id"]: row for row in rows.get("person", [])}
    subjects = {person for person, *_ in events} | (people.keys() - {None})
    periods = _periods(rows.get("observation_period", []))
    starts: dict[tuple[int, int], datetime] = {}
    ends: dict[tuple[int, int], date] = {}
    for row in rows.get("visit_occurrence", []):
        at = _instant(row["visit_start_date"], row["visit_start_datetime"])
        if at is not None and row["visit_occurrence_id"] is not None:
            key = row["person_id"], row["visit_occurrence_id"]
            starts[key] = at
            ends[key] = max(row["visit_end_date"] or date.max, at.date())
    of_person: dict[int, list[Any]] = {}
    for person, at, concept, value, visit in events:
        key = person, visit
        inside = key in starts and at.date() <= ends[key]
        event = (at, concept, value, visit if inside else None)
        of_person.setdefault(person, []).append(event)
    found = {}
    for person in sorted(subjects):
        mine = of_person.get(person, [])
        if rows.get("observation_period") and not keep:
            mine = [
                event
                for event in mine
                if any(begin <= event[0] < end for begin, end in periods.get(person, []))
            ]
        row = people.get(person, dict.fromkeys(COLUMNS["person"]))
        deaths = [
            _instant(death["death_date"], death["death_datetime"])
            for death in rows.get("death", [])
            if death["person_id"] == person
        ]
        static = [row[f"{what}_concept_id"] for what in ("gender", "race", "ethnicity")]
        found_visits = _visits(person, mine, visits, starts)
        one = {
            "visits": [(start, codes) for start, _, codes in found_visits],
            "ends": [end for _, end, _ in found_visits],
            "static": sorted({str(concept) for concept in static if concept}),
            "birth": row["birth_datetime"],
            "death": min((death for death in deaths if death is not None), default=None),
            "periods": periods.get(person, []),
        }
        if any(one.values()):
            found[person] = one
    return found


def _instant(day: date | None, moment: datetime | None) -> datetime | None:
    if day is None:
        return moment
    if moment is not None and moment.date() == day:
        return moment
    return datetime(day.year, day.month, day.day)


def _periods(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[tuple[datetime, datetime]]]:
    days: dict[int, set[date]] = {}
    for row in rows:
        first, last = row["observation_period_start_date"], row["observation_period_end_date"]
        if None not in (row["person_id"], first, last):
            for i in range((last - first).days + 1):
                days.setdefault(row["person_id"], set()).add(first + timedelta(i))
    found: dict[int, list[tuple[datetime, datetime]]] = {}
    for person, observed in days.items():
        for day in sorted(observed):
            at, mine = _instant(day, None), found.setdefault(person, [])
            assert at is not None
            if mine and mine[-1][1] == at:
                mine[-1] = (mine[-1][0], at + timedelta(1))
            else:
                mine.append((at, at + timedelta(1)))
    return found


def _visits(
    person: int, events: list[Any], rule: str | float, starts: Mapping[Any, datetime]
) -> list[tuple[datetime, datetime, dict[str, float | None]]]:
    """Start, end and codes of each."""
    groups: dict[Any, list[Any]] = {}
    begin = None
    for event in sorted(events, key=lambda e: (e[0], e[1], -np.inf if e[2] is None else e[2])):
        at, visit = event[0], event[3]
        if rule == "day":
            key: Any = at.date()
        elif rule == "time":
            key = at
        elif rule == "visit_occurrence":
            key = ("visit", visit) if (person, visit) in starts else ("day", at.date())
        else:
            if begin is None or at - begin > timedelta(hours=float(rule)):
                begin = at
            key = begin
        groups.setdefault(key, []).append(event)
    found = []
    for key, group in groups.items():
        codes: dict[str, float | None] = {}
        for _, concept, value, _ in group:
            code = str(concept)
            codes[code] = codes.get(code) if value is None else float(np.float32(value))
        known = isinstance(key, tuple) and key[0] == "visit"
        start = starts[person, key[1]] if known else group[0][0]
        end = max(start, *(event[0] for event in group))
        found.append(((start, not known, key), start, end, codes))
    found.sort(key=lambda visit: visit[0])
    return [(start, end, dict(sorted(codes.items()))) for _, start, end, codes in found]
