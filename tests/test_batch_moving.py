"""Batches that move: pickled, pinned, to another device or process."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from ehrseq_fast.batch import PackedVisits

from .batch_cases import (
    FIELDS,
    OUTCOMES,
    assert_holds,
    assert_same,
    flat,
    full_batch,
    padded,
)


def test_pickling_carries_everything(builder):
    batch = full_batch([[[1], [2]], [[3]], [[], [4, 4]]])
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        assert_same(pickle.loads(pickle.dumps(batch, protocol)), batch)


def test_moving_to_where_it_is_gives_itself():
    batch = full_batch([[[1], [2]], [[3]]])
    assert batch.to("cpu") is batch
    assert batch.to(torch.device("cpu"), non_blocking=True) is batch
    assert not batch.is_pinned()
    assert repr(batch) == (
        "PackedVisits(patients=2, visits=3, codes=3, distinct_codes=3, max_visits=2, device=cpu)"
    )


@pytest.mark.parametrize(
    "move",
    [
        lambda batch: batch.to(torch.float64),
        lambda batch: batch.to(dtype=torch.float64),
        lambda batch: batch.to("cpu", dtype=torch.float64),
        lambda batch: batch.to(torch.ones(1, dtype=torch.float64)),
    ],
)
def test_a_batch_has_no_dtype(move):
    batch = PackedVisits.from_lists([[[1]]], visit_features=torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"PackedVisits.to: expected a device, got .*has no dtype"):
        move(batch)
    wide = batch.with_features(batch.visit_features.to(torch.float64))  # as the error says
    assert wide.visit_features.dtype == torch.float64


def test_moving_leaves_host_fields_on_the_host():
    moved = full_batch([[[1], [2]], [[3]]]).to("meta")
    for name in (*FIELDS, *OUTCOMES, "visit_features"):
        expected = "cpu" if name in ("batch_sizes", "lengths") else "meta"
        assert getattr(moved, name).device.type == expected, name
    assert moved.targets["age"].is_meta
    assert moved.visit_targets["cost"].is_meta


def test_pinning_reaches_every_tensor_that_a_device_needs(monkeypatch):
    """The loader's own pinning calls ours; page-locking itself is tested where there is a GPU."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda t: pinned.append(t.clone()) or pinned[-1]
    )
    batch = full_batch([[[1], [2]], [[3]]])
    copy = pin_memory({"batch": batch})["batch"]
    assert_same(copy, batch)
    memory = {tensor.untyped_storage().data_ptr() for tensor in pinned}
    for name in (*FIELDS, *OUTCOMES, "visit_features"):
        if name not in ("batch_sizes", "lengths"):
            assert getattr(copy, name).untyped_storage().data_ptr() in memory, name
    assert copy.targets["age"].data_ptr() in memory
    assert copy.visit_targets["cost"].data_ptr() in memory


class FlatDataset(Dataset):
    """What a user writes: flat arrays on disk, opened where they are read."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, patients):
        codes, visits, people, times = (
            np.load(self.folder / f"{name}.npy", mmap_mode="r")
            for name in ("codes", "visit_offsets", "patient_offsets", "event_times")
        )
        return PackedVisits.from_flat(codes, visits, people, patients, event_times=times)

    def __len__(self):
        return len(np.load(self.folder / "event_times.npy", mmap_mode="r"))


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_data_loader_workers(tmp_path, start_method):
    random = np.random.default_rng(0)
    patients = [
        [random.integers(0, 50, random.integers(0, 4)).tolist() for _ in range(1 + p % 5)]
        for p in range(30)
    ]
    for name, array in zip(("codes", "visit_offsets", "patient_offsets"), flat(patients)):  # noqa: B905
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "event_times.npy", np.array([len(visits) - 1 for visits in patients]))
    dataset = FlatDataset(tmp_path)
    loader = DataLoader(
        dataset,
        sampler=BatchSampler(SequentialSampler(dataset), 8, drop_last=False),
        batch_size=None,
        num_workers=2 if start_method == "fork" else 1,
        multiprocessing_context=start_method,
        pin_memory=torch.cuda.is_available(),
    )
    batches = list(loader)
    assert [len(batch) for batch in batches] == [8, 8, 8, 6]
    for i, batch in enumerate(batches):
        assert_holds(batch, patients[8 * i : 8 * i + 8])
        assert batch.event_times.tolist() == [len(v) - 1 for v in patients[8 * i : 8 * i + 8]]
        assert batch.is_pinned() == torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_pinned_batches_move_without_a_wait():
    batch = full_batch([[[1], [2]], [[3]], [[], [4, 4]]])
    pinned = batch.pin_memory()
    assert pinned.is_pinned()
    assert_same(pinned, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = pinned.to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moved.codes.is_cuda
    assert not moved.lengths.is_cuda
    assert_same(moved.to("cpu"), batch)
    assert_same(moved[1:].to("cpu"), batch[1:])
    assert_same(PackedVisits.cat([moved, moved]).to("cpu"), PackedVisits.cat([batch, batch]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="counting waits needs a CUDA device")
@pytest.mark.parametrize("with_lengths", [True, False])
def test_padded_tensors_on_a_gpu_cost_one_wait(with_lengths):
    patients = [[[1], [2]], [[3]], [[], [4, 4]]]
    triple = [tensor.cuda() for tensor in padded(patients, 1, 1)]
    lengths = [2, 1, 2] if with_lengths else None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            batch = PackedVisits.from_padded(*triple, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1
    assert batch.codes.is_cuda
    assert_holds(batch.to("cpu"), patients)
