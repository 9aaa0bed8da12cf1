"""Batches of a store: packed from its files, mapped to the vocabulary, in any process."""

from __future__ import annotations

import gc
import pickle
import warnings
from itertools import chain

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ehrseq_fast.batch import PackedVisits
from ehrseq_fast.data import (
    EventRecords,
    EventStore,
    FirstEvent,
    PatientDataset,
    TokenBudgetSampler,
    Vocabulary,
    loader,
)
from ehrseq_fast.data.tasks import SameDayWarning
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM, ModelWithLoss

from .batch_cases import assert_same
from .task_cases import random_people, store_of

warnings.filterwarnings("ignore", category=SameDayWarning)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """200 patients, of whose codes the vocabulary knows the frequent ones."""
    people = random_people(np.random.default_rng(3), 200, codes="ABCDEFGHIX", fine=True)
    return store_of(tmp_path_factory.mktemp("store"), people, visit_rule=96, min_count=68)


@pytest.fixture(scope="module")
def outcomes(store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SameDayWarning)
        return FirstEvent("X", washout_days=2).apply(store)


def test_a_batch_holds_what_the_store_does(builder, store, outcomes):
    data = PatientDataset(store, outcomes, with_time_features=True, with_visits=True)
    rows = np.random.default_rng(0).integers(0, len(data), 40)
    batch = data.__getitems__(rows.tolist())
    patients, days, features, visits = [], [], [], []
    ends = np.append(0, np.cumsum(outcomes.n_visits))
    days_to_end = outcomes.days_to_end(store)
    for row in rows.tolist():
        first = int(store.patient_offsets[outcomes.patients[row]])
        seen = range(first, first + int(outcomes.n_visits[row]))
        entries = [store.codes[store.visit_offsets[v] : store.visit_offsets[v + 1]] for v in seen]
        patients.append([sorted({int(store.vocabulary[c]) for c in codes}) for codes in entries])
        days.append(days_to_end[ends[row] : ends[row + 1]].astype(np.float32))
        times = store.visit_times[seen.start : seen.stop].astype(np.int64) / 86_400e6
        since = np.diff(times, prepend=times[:1])
        features.append(np.stack([since, times - times[0], np.arange(len(times))], 1))
        visits.append(np.array(seen))
    expected = PackedVisits.from_lists(
        patients,
        vocab_size=store.vocab_size,
        event_times=outcomes.event_times[rows],
        event_indicators=outcomes.event_indicators[rows],
        visit_features=[values.astype(np.float32) for values in features],
        targets={
            "patient": outcomes.patients[rows],
            "entry_times": outcomes.entry_times[rows],
        },
        visit_targets={"days_to_end": days, "visit": visits},
    )
    assert 1 in batch.codes.tolist()
    assert sum(len(codes) for codes in chain(*patients)) < data.codes_per_item()[rows].sum(), (
        "none are merged"
    )
    torch.testing.assert_close(batch.visit_features, expected.visit_features)
    assert_same(batch.with_features(None), expected.with_features(None))
    assert data.collate(batch) is batch
    assert_same(data.collate([data[int(row)] for row in rows]), batch)


def test_a_batch_without_patients(builder, store, outcomes):
    data = PatientDataset(store, outcomes, with_time_features=True)
    batch = data.__getitems__([])
    assert (batch.n_patients, batch.n_visits, batch.n_codes) == (0, 0, 0)
    assert batch.visit_features.shape == (0, 3)
    assert batch.visit_targets["days_to_end"].shape == (0,)
    both = PackedVisits.cat([batch, data.__getitems__([3, 4])])
    assert_same(both, data.__getitems__([3, 4]))


def test_whole_records_without_a_task(store):
    data = PatientDataset(store, split="train")
    assert len(data) == len(set(data.patients.tolist()))
    assert set(data.patients.tolist()) <= set(store.patients_of("train").tolist())
    assert (data.visits_per_item() == np.diff(store.patient_offsets)[data.patients]).all()
    batch = data.__getitems__([0, 1])
    assert batch.event_times is None
    assert not batch.visit_targets
    chosen = PatientDataset(store, data.patients[:3])
    assert_same(chosen.__getitems__([0, 1]), batch)
    records = PatientDataset.of_records(store)
    assert_same(records.batch(data.patients[:2]), batch)
    nobody = int(np.flatnonzero(np.diff(store.patient_offsets) == 0)[0])
    with pytest.raises(ValueError, match="zero length"):
        records.batch([nobody])


def test_another_models_codes(store):
    code_map = np.arange(store.n_codes)[::-1] + 1
    data = PatientDataset.of_records(store, code_map=code_map, vocab_size=store.n_codes + 1)
    patient = int(np.argmax(np.diff(store.patient_offsets)))
    visit = int(store.patient_offsets[patient])
    codes = store.codes[store.visit_offsets[visit] : store.visit_offsets[visit + 1]]
    batch = data[patient]
    assert batch.codes[: len(codes)].tolist() == sorted(code_map[codes].tolist())
    with pytest.raises(IndexError, match=f"code_map: expected 1 <= code < 3, got {store.n_codes}"):
        PatientDataset.of_records(store, code_map=code_map, vocab_size=3)
    with pytest.raises(ValueError, match="code_map: expected one code for each of"):
        PatientDataset.of_records(store, code_map=code_map[1:], vocab_size=99)


def test_days_with_fractions_and_whole_ones_are_those_of_records(tmp_path):
    people = random_people(np.random.default_rng(8), 30, with_periods=False)
    store = store_of(tmp_path, people)
    data = PatientDataset(store, with_time_features=True)
    whole = store.visit_times.astype("M8[D]")
    some = np.diff(store.patient_offsets) > 0
    offsets = np.append(store.patient_offsets[:-1][some], store.n_visits)
    records = EventRecords(
        codes=store.vocabulary[store.codes],
        visit_offsets=store.visit_offsets,
        patient_offsets=offsets,
        visit_days=whole,
        person_ids=store.subject_ids[some],
        event_times=np.diff(offsets) - 1,
        event_indicators=np.zeros(int(some.sum()), np.uint8),
        vocabulary=Vocabulary(np.arange(store.vocab_size), ("",) * store.vocab_size),
    )
    theirs = PatientDataset(records, with_time_features=True)
    assert_same(
        data.batch(range(len(data))),
        theirs.batch(range(len(data))).with_outcomes(
            event_times=None,
            event_indicators=None,
            targets={"patient": np.flatnonzero(some)},
        ),
    )
    assert theirs.visits_per_item().tolist() == data.visits_per_item().tolist()
    assert theirs.codes_per_item().tolist() == data.codes_per_item().tolist()


def test_padded_batches(store, outcomes):
    data = PatientDataset(store, outcomes, with_time_features=True)
    batch = data.__getitems__([1, 2, 5])
    padded = data.collate_padded(batch)
    codes, _, visits = batch.to_padded()
    assert torch.equal(padded.visit_codes, codes)
    assert torch.equal(padded.sequence_mask, visits)
    assert torch.equal(padded.event_times, batch.event_times)
    assert padded.time_features.shape == (*visits.shape, 3)
    with pytest.raises(ValueError, match="with_time_features=True and a task"):
        PatientDataset(store, outcomes).collate_padded(batch.with_features(None))


def test_what_is_refused(store, outcomes, tmp_path):
    data = PatientDataset(store, outcomes)
    for bad in (-len(data) - 1, len(data)):
        with pytest.raises(IndexError, match=f"expected one of {len(data)} items, got {bad}"):
            data[bad]
    with pytest.raises(IndexError, match=rf"\[0, {len(data)}\), got -1 \(1 outside\)"):
        data.__getitems__([0, -1])
    with pytest.raises(ValueError, match="split: expected None beside outcomes"):
        PatientDataset(store, outcomes, "train")
    with pytest.raises(TypeError, match="expected an EventStore or EventRecords, got a list"):
        PatientDataset([1, 2])
    with pytest.raises(TypeError, match="task: expected none beside patients"):
        PatientDataset(store, outcomes, task=outcomes)
    other = store_of(tmp_path, random_people(np.random.default_rng(4), 200))
    with pytest.raises(ValueError, match="outcomes: expected those of the store"):
        PatientDataset(other, outcomes)


def test_files_that_changed_are_noticed(tmp_path):
    people = random_people(np.random.default_rng(4), 40)
    store = store_of(tmp_path, people)
    data = PatientDataset(store)
    batch = data.batch(range(len(data)))
    path = store.path / "codes.npy"
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.int32(99).tobytes()
    path.write_bytes(raw)  # the same file, under the map
    with pytest.raises(IndexError, match=r"codes outside the dictionary.*The first is 99: patient"):
        data.batch(range(len(data)))
    path.write_bytes(raw[:-8])
    with pytest.raises(ValueError, match="codes: the memory-mapped file was truncated"):
        data.batch([0])
    assert batch.n_patients == len(data)


def test_a_data_set_is_pickled_by_the_path_of_its_store(store, outcomes):
    data = PatientDataset(store, outcomes)
    pickled = pickle.dumps(data)
    assert len(pickled) < 20_000 + 80 * len(data)
    copy = pickle.loads(pickled)
    assert isinstance(copy.records, EventStore)
    assert_same(copy.batch([4, 2]), data.batch([4, 2]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(
    ("workers", "start_method"), [(0, None), (2, "fork"), (4, "fork"), (4, "spawn")]
)
def test_workers_give_the_same_batches_and_resume(store, outcomes, workers, start_method):
    data = PatientDataset(store, outcomes)
    sampler = TokenBudgetSampler(data, visits_per_batch=15, seed=2)
    expected = [[data.batch(items) for items in sampler]]
    sampler.set_epoch(1)
    expected.append([data.batch(items) for items in sampler])
    batches = loader(data, sampler, workers=workers, start_method=start_method)
    assert batches.persistent_workers == (workers > 0)
    state = torch.get_rng_state()
    for epoch, position in ((0, 0), (1, 0), (1, 3), (0, 5)):
        sampler.set_epoch(epoch)
        sampler.set_position(position)
        found = list(batches)
        assert len(found) == len(batches) == len(expected[epoch]) - position
        for mine, other in zip(found, expected[epoch][position:], strict=True):
            assert_same(mine, other)
    assert torch.equal(torch.get_rng_state(), state), "a run's dropout would differ with resuming"


def test_a_share_without_patients_passes_through_a_loader(store, outcomes):
    data = PatientDataset(store, outcomes.select([0]))
    sampler = TokenBudgetSampler(data, visits_per_batch=60, world_size=2, rank=1)
    assert [batch.n_patients for batch in loader(data, sampler)] == [0]


def gradients_of_shares(rank, store_path, rendezvous, results):
    """One of two processes: the gradient of each batch of an epoch, by its share."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SameDayWarning)
        data = PatientDataset(EventStore(store_path), FirstEvent("X"))
    sampler = TokenBudgetSampler(data, visits_per_batch=4, rank=rank, world_size=2)
    model = survival_model(data.records)
    ddp = DistributedDataParallel(ModelWithLoss(model, across_processes=True))
    found, nobody = [], 0
    for batch in loader(data, sampler):
        ddp.zero_grad()
        ddp(batch).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        nobody += batch.n_patients == 0
    torch.save((found, nobody), f"{results}/{rank}")
    dist.destroy_process_group()


def survival_model(store):
    torch.manual_seed(0)
    return DiscreteTimeSurvivalLSTM(store.vocab_size, embedding_dim=4, hidden_dim=4, dropout=0.0)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    store = store_of(tmp_path, random_people(np.random.default_rng(9), 40))
    arguments = (str(store.path), str(tmp_path / "rendezvous"), str(tmp_path))
    torch.multiprocessing.spawn(gradients_of_shares, arguments, nprocs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SameDayWarning)
        data = PatientDataset(store, FirstEvent("X"))
    model = survival_model(store)
    expected = []
    for batch in loader(data, TokenBudgetSampler(data, visits_per_batch=4)):
        model.zero_grad()
        model.loss(batch).backward()
        expected.append([parameter.grad.clone() for parameter in model.parameters()])
    shares = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    assert shares[0][1] + shares[1][1] > 0, "every process had somebody in every batch"
    for found, _ in shares:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def anonymous_memory():
    """KiB of this process that are no files'."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_memory_does_not_grow(store, outcomes):
    data = PatientDataset(store, outcomes, with_time_features=True)
    sampler = TokenBudgetSampler(data, visits_per_batch=300)

    def run(n):
        done = 0
        while done < n:
            sampler.set_epoch(done)
            for batch in loader(data, sampler):
                done += batch.n_patients > 0
        gc.collect()

    run(300)
    before = anonymous_memory()
    run(1000)
    assert anonymous_memory() - before < 1024
