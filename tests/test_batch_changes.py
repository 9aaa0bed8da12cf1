"""A batch is immutable, its changed copies are right, and it can be trained on wherever it was
made."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from ehrseq_fast import packed_survival_nll, packed_visit_pool
from ehrseq_fast.batch import PackedVisits
from ehrseq_fast.batch.reference_checks import MOST

from .batch_cases import FIELDS, OUTCOMES, assert_holds, assert_same, full_batch, padded

PATIENTS = [[[1], [2, 2]], [[3]], [[], [4, 4], [1]]]
ATTRIBUTES = (*FIELDS, *OUTCOMES, "visit_features", "targets", "visit_targets", "vocab_size")


# Edits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ATTRIBUTES, "anything"])
def test_attributes_are_not_assigned_and_not_deleted(name):
    batch = full_batch(PATIENTS)
    with pytest.raises(AttributeError, match=f"immutable, so '{name}' cannot be set.*with_"):
        setattr(batch, name, getattr(batch, name, None))
    with pytest.raises(AttributeError, match="cannot be deleted"):
        delattr(batch, name)
    assert_same(batch, full_batch(PATIENTS))


@pytest.mark.parametrize("name", ["targets", "visit_targets"])
def test_targets_are_read_only(name):
    targets = getattr(full_batch(PATIENTS), name)
    key = next(iter(targets))
    for edit in (
        lambda: targets.update(x=1),
        lambda: targets.__setitem__("x", 1),
        lambda: targets.__delitem__(key),
        lambda: targets.pop(key),
        targets.clear,
        lambda: targets.setdefault("x", 1),
    ):
        with pytest.raises(TypeError, match=r"read-only.*with_outcomes"):
            edit()
    assert isinstance(targets, dict)
    assert list(targets) == [key]


USES = {
    "codes": lambda batch: batch.codes,
    "pooling": lambda batch: packed_visit_pool(batch, torch.ones(13, 2)),
    "loss": lambda batch: packed_survival_nll(torch.full((batch.n_visits,), 0.5), batch),
    "padded": lambda batch: batch.to_padded(),
    "pad": lambda batch: batch.pad(torch.zeros(batch.n_visits)),
    "slice": lambda batch: batch[:1],
    "cat": lambda batch: PackedVisits.cat([batch, batch]),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "to": lambda batch: batch.to("cpu"),
    "with_codes": lambda batch: batch.with_codes(),
    "with_outcomes": lambda batch: batch.with_outcomes(event_times=None),
    "with_features": lambda batch: batch.with_features(None),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", [*FIELDS, *OUTCOMES])
def test_a_change_in_place_is_noticed_at_the_next_use(use, name):
    batch = full_batch(PATIENTS)
    USES[use](batch)
    getattr(batch, name)[-1] += 1
    with pytest.raises(RuntimeError, match=r"changed in place.*with_outcomes.*with_codes"):
        USES[use](batch)


@pytest.mark.parametrize("way", ["numpy", "data"])
def test_offsets_changed_unnoticed_do_not_crash(way):
    """Interior offsets that fall would read and write out of bounds."""
    for value in (-5, 10**6):
        batch = full_batch(PATIENTS)
        if way == "numpy":
            batch.code_offsets.numpy()[2] = value
        else:
            batch.code_offsets.data[2] = value
        for use in ("padded", "slice", "cat", "with_codes"):
            with pytest.raises(ValueError, match="code_offsets: expected offsets that rise"):
                USES[use](batch)


def saved_and_loaded(batch):
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


MOVES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda batch: pickle.loads(pickle.dumps(batch)),
    "slice": lambda batch: batch[:],
    "cat": lambda batch: PackedVisits.cat([batch]),
    "to": lambda batch: batch.to("meta"),
    "file": saved_and_loaded,
}


@pytest.mark.parametrize("move", MOVES)
def test_changed_outcomes_and_codes_are_carried_along(move):
    batch = full_batch(PATIENTS)
    changed = (
        batch.with_outcomes(
            event_times=[0, 0, 0],
            event_indicators=None,
            targets={"weight": [1.0, 2.0, 3.0]},
            visit_targets={"row": np.arange(6)},
        )
        .with_codes(torch.full((7,), 5))
        .with_features(torch.ones(6, 1))
    )
    moved = MOVES[move](changed)
    assert moved.event_indicators is None
    assert moved.targets.keys() == {"weight"}
    assert moved.visit_targets.keys() == {"row"}
    if move == "to":
        assert moved.event_times.is_meta
        return
    assert_same(moved, changed)
    assert moved.event_times.tolist() == [0, 0, 0]
    assert moved.event_types.tolist() == [0, 1, 2]
    assert moved.codes.tolist() == [5] * 7
    assert moved.index_codes.tolist() == [5]
    assert batch.event_times.tolist() == [1, 0, 2]
    assert moved.visit_features.shape == (6, 1)


def test_a_file_of_a_batch_needs_no_permission():
    program = (
        "import io, sys, torch, ehrseq_fast\n"
        "print(torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True).codes.tolist())"
    )
    file = io.BytesIO()
    torch.save(full_batch(PATIENTS), file)
    run = subprocess.run(
        [sys.executable, "-c", program], input=file.getvalue(), capture_output=True, check=True
    )
    assert run.stdout.decode().strip() == str(full_batch(PATIENTS).codes.tolist())


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, (3, 3, 6, 70, 4, ())),
        (0, (3, 3, -6, 7, 4, ())),
        (1, torch.zeros(2, dtype=torch.int64)),
        (2, torch.zeros(2, dtype=torch.int64)),
        (2, torch.zeros(30)),
    ],
)
def test_a_file_with_buffers_of_other_sizes_is_refused(at, value):
    _, arguments = full_batch(PATIENTS).__reduce__()
    with pytest.raises((ValueError, RuntimeError), match="expected int64 of shape"):
        PackedVisits(*arguments[:at], value, *arguments[at + 1 :])


# Changed copies -----------------------------------------------------------------------------------


def test_new_codes_have_a_new_index(builder):
    batch = full_batch(PATIENTS)
    assert_same(batch.with_codes(), batch)
    assert_same(batch.with_codes(batch.codes), batch)
    assert_same(batch.with_codes(keep=torch.ones(7, dtype=torch.bool)), batch)
    masked = [[[1], [9, 9]], [[3]], [[], [4, 4], [1]]]
    assert_holds(batch.with_codes(torch.where(batch.codes == 2, 9, batch.codes)), masked)
    for keep in (batch.codes != 4, (batch.codes != 4).tolist(), (batch.codes != 4).numpy()):
        assert_holds(batch.with_codes(keep=keep), [[[1], [2, 2]], [[3]], [[], [], [1]]])
    flags = (batch.codes != 4).to(torch.uint8).mul(2).view(torch.bool)
    assert_holds(batch.with_codes(keep=flags), [[[1], [2, 2]], [[3]], [[], [], [1]]])
    nothing = batch.with_codes(keep=np.zeros(7, bool))
    assert_holds(nothing, [[[], []], [[]], [[], [], []]])
    assert packed_visit_pool(nothing, torch.ones(13, 2)).abs().sum() == 0
    assert nothing.targets["age"].tolist() == [0, 1, 2]
    both = batch.with_codes(np.arange(7), keep=batch.codes != 2)
    assert both.codes.tolist() == [c for c, old in enumerate(batch.codes.tolist()) if old != 2]


def test_gradients_follow_new_codes(unemulated):
    device = torch.get_default_device()
    table = torch.randn(13, 2, device=device, requires_grad=True)
    batch = full_batch(PATIENTS).to(device)
    changed = batch.with_codes(torch.where(batch.codes == 2, 9, batch.codes))
    packed_visit_pool(changed, table).sum().backward()
    rows = table.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == [1, 3, 4, 9]


BAD = {
    "codes of another number": (lambda b: b.with_codes([1]), ValueError, r"shape \[7\], got \[1\]"),
    "codes outside": (
        lambda b: b.with_codes([1, 2, 13, -1, 1, 1, 1]),
        IndexError,
        r"Found 2 codes outside the vocabulary: expected 0 <= code < 13\. The first is 13: codes\[",
    ),
    "float codes": (lambda b: b.with_codes(torch.ones(7)), TypeError, "expected integers"),
    "integers to keep": (lambda b: b.with_codes(keep=[1] * 7), TypeError, "expected booleans"),
    "tensor to keep": (lambda b: b.with_codes(keep=torch.ones(7)), TypeError, "expected booleans"),
    "keep of another number": (
        lambda b: b.with_codes(keep=[True]),
        ValueError,
        r"keep: expected shape \[7\], got \[1\]",
    ),
    "late event": (
        lambda b: b.with_outcomes(event_times=[2, 0, 0]),
        ValueError,
        "Found 1 event times outside their patient's visits",
    ),
    "indicators": (
        lambda b: b.with_outcomes(event_indicators=torch.tensor([0, 1, 2])),
        ValueError,
        "neither 0",
    ),
    "types": (lambda b: b.with_outcomes(event_types=[0, -1, 2]), ValueError, "negative"),
    "too few": (lambda b: b.with_outcomes(event_times=[0]), ValueError, "one per patient"),
    "targets": (lambda b: b.with_outcomes(targets={"x": [1]}), ValueError, "each of 3 patients"),
    "visit targets": (
        lambda b: b.with_outcomes(visit_targets={"x": [1]}),
        ValueError,
        "each of 6 visits",
    ),
    "features": (lambda b: b.with_features(torch.ones(6)), ValueError, r"shape \[6, F\]"),
    "integer features": (
        lambda b: b.with_features(torch.ones(6, 1).long()),
        TypeError,
        "a floating dtype",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_changes_are_refused(what):
    make, error, message = BAD[what]
    with pytest.raises(error, match=message):
        make(full_batch(PATIENTS))


def test_changed_copies_share_no_buffer():
    batch = full_batch(PATIENTS)
    for changed in (batch.with_codes(), batch.with_outcomes()):
        assert (
            changed.codes.untyped_storage().data_ptr() != batch.codes.untyped_storage().data_ptr()
        )


# Modes of torch -----------------------------------------------------------------------------------


def test_arguments_that_are_written_to_later_change_no_batch():
    codes = torch.tensor([[[1]], [[2]]])
    given = {
        "visit_features": torch.ones(2, 3),
        "targets": torch.ones(2),
        "visit_targets": torch.ones(2),
        "codes": torch.tensor([5, 6], dtype=torch.int32),
        "event_times": torch.tensor([0, 0]),
    }
    batch = PackedVisits.from_lists([[[1]], [[2]]])
    of_targets = {
        "targets": {"a": given["targets"]},
        "visit_targets": {"b": given["visit_targets"]},
    }
    flat = PackedVisits.from_flat(
        given["codes"], [0, 1, 2], [0, 1, 2], visit_features=given["visit_features"], **of_targets
    )
    padded = PackedVisits.from_padded(
        codes,
        visit_features=given["visit_features"][:, None],
        targets=of_targets["targets"],
        visit_targets={"b": given["visit_targets"][:, None]},
        event_times=given["event_times"],
    )
    changed = batch.with_outcomes(event_times=given["event_times"], **of_targets)
    changed = changed.with_codes(given["codes"]).with_features(given["visit_features"])
    for tensor in (codes, *given.values()):
        tensor.fill_(7)
    for made in (flat, padded, changed):
        assert made.visit_features.eq(1).all()
        assert made.targets["a"].eq(1).all()
        assert made.visit_targets["b"].eq(1).all()
    assert changed.codes.tolist() == flat.codes.tolist() == [5, 6]
    assert padded.codes.tolist() == [1, 2]
    assert changed.event_times.tolist() == padded.event_times.tolist() == [0, 0]


def test_new_features_have_gradients():
    features = torch.ones(2, 3, requires_grad=True)
    batch = PackedVisits.from_lists([[[1]], [[2]]]).with_features(features)
    batch.visit_features.mul(2).sum().backward()
    assert features.grad.eq(2).all()


def built_in_every_way():
    triple = padded(PATIENTS)
    batch = full_batch(PATIENTS)
    features = batch.pad(batch.visit_features)
    yield batch
    yield PackedVisits.from_padded(
        *triple,
        event_times=[0, 0, 0],
        event_indicators=[1, 0, 0],
        visit_features=features,
        targets={"age": torch.ones(3)},
    )
    yield batch[1:]
    yield PackedVisits.cat([batch, batch])
    yield batch.with_codes(keep=batch.codes != 4)
    yield batch.with_outcomes(event_times=[0, 0, 0])
    yield batch.with_features(torch.ones(6, 3))
    yield copy.deepcopy(batch)
    yield pickle.loads(pickle.dumps(batch))


def train_on(batch):
    table = torch.randn(13, 3, requires_grad=True)
    layer = torch.nn.Linear(6, 1)
    pooled = packed_visit_pool(batch, table)
    hazards = layer(torch.cat([pooled, batch.visit_features.float()], 1)).sigmoid().flatten()
    loss = packed_survival_nll(hazards, batch) + batch.pad(hazards).sum()
    loss = loss + batch.pack(batch.pad(hazards)).sum()
    loss.backward()
    assert table.grad.isfinite().all()


def test_a_batch_made_under_inference_mode_can_be_trained_on(builder):
    with torch.inference_mode():
        batches = list(built_in_every_way())
        for batch in batches:
            batch.pad(torch.zeros(batch.n_visits))
            batch.to_padded()
    for batch in batches:
        assert not any(getattr(batch, name).is_inference() for name in FIELDS)
        train_on(batch)


def test_a_batch_used_under_inference_mode_can_be_trained_on(builder):
    for batch in built_in_every_way():
        with torch.inference_mode():
            values = batch.pad(torch.zeros(batch.n_visits, 2))
            batch.pack(values)
            batch.to_padded()
            moved = batch.to("cpu")
        assert moved is batch
        train_on(batch)


def test_building_leaves_the_modes_as_they_are():
    with torch.inference_mode():
        full_batch(PATIENTS)[1:].to("meta")
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()


@pytest.fixture(params=["meta", "cpu"])
def default_device(request):
    torch.set_default_device(request.param)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_defaults_of_torch_change_nothing(builder, default_device, dtype):
    torch.set_default_device(None)
    with torch.device("cpu"):
        expected = list(built_in_every_way())
        codes, visit_mask, sequence_mask = padded(PATIENTS)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.set_default_device("meta")
        batch = full_batch_of_arrays()
        built = PackedVisits.from_padded(codes, visit_mask, sequence_mask, event_times=[0, 0, 0])
        changed = batch.with_codes(keep=np.arange(7) % 2 == 0).with_outcomes(event_times=[0, 0, 0])
        parts = [batch[1:], PackedVisits.cat([batch, batch]), changed, built, batch]
        triples = [part.to_padded() for part in parts]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    for part in parts:
        for name in (*FIELDS, "event_times"):
            assert getattr(part, name).device.type == "cpu", name
            assert not getattr(part, name).is_floating_point(), name
    assert all(not tensor.is_meta for triple in triples for tensor in triple)
    assert batch.visit_features.dtype == torch.float32
    assert batch.targets["age"].dtype == torch.float64
    assert built.codes.tolist() == expected[1].codes.tolist()
    assert parts[0].codes.tolist() == expected[2].codes.tolist()


def full_batch_of_arrays():
    return PackedVisits.from_lists(
        PATIENTS,
        vocab_size=13,
        event_times=[1, 0, 2],
        event_indicators=[0, 1, 0],
        visit_features=np.ones((6, 3), np.float32),
        targets={"age": [50.0, 60.0, 70.0]},
    )


def test_packing_on_a_device_ignores_the_default_device():
    from ehrseq_fast.batch.checks import mask_states
    from ehrseq_fast.batch.device import pack_on_device

    codes, visit_mask, sequence_mask = padded(PATIENTS)
    expected = PackedVisits.from_padded(codes, visit_mask, sequence_mask)
    torch.set_default_device("meta")
    try:
        packed = pack_on_device(
            codes, mask_states(visit_mask), mask_states(sequence_mask), None, None, (None,) * 3
        )
    finally:
        torch.set_default_device(None)
    assert_same(PackedVisits(*packed), expected)
    assert MOST == 2**31 - 2


@pytest.mark.filterwarnings("ignore")
def test_compiled_whole():
    batch = full_batch(PATIENTS)
    torch._dynamo.reset()

    def use(batch, values):
        padded = batch.pad(values) * 2
        return batch.pack(padded) + values[batch.last_rows].sum(0) + batch.targets["age"].sum()

    values = torch.randn(6, 2)
    compiled = torch.compile(use, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch, values), use(batch, values))
