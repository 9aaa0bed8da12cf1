"""What is given in place of a tensor, a batch or a mapping is taken or refused by its name: NumPy
arrays, lists, numbers, packed rows, complex numbers, NaN in masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    masked_pool,
    packed_survival_nll,
    packed_visit_pool,
    visit_mean_pool,
)
from ehrseq_fast.arrays import as_array, integers, longs, whole
from ehrseq_fast.losses import (
    FixedHorizonProgressionLoss,
    MultiTaskSurvivalLoss,
    compute_masked_loss,
)
from ehrseq_fast.metrics import concordance_index
from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    LSTMBaseline,
    ModelWithLoss,
    VisitEncoder,
)
from ehrseq_fast.models.survival_lstm import survival_curve

MERGES = 2**53 + 1  # a float64 makes 2**53 of it
CODES = torch.tensor([[[3, 5], [2, 0]]])
MASK = CODES != 0
ONES = torch.ones(1, 2)
MODELS = {
    "survival": lambda: DiscreteTimeSurvivalLSTM(10, 4, 8),
    "time": lambda: DiscreteTimeSurvivalLSTMWithTime(10, 4, 8),
    "competing": lambda: CompetingRisksSurvivalLSTM(10, 2, 4, 8),
    "baseline": lambda: LSTMBaseline(10, 4, 8, visit_aggregation="attention"),
}


def two_patients():
    return PackedVisits.from_lists([[[1]], [[2], [3]]], event_times=[0, 1], event_indicators=[1, 0])


MIXED = {
    "beside a fraction": [MERGES, 0.5],
    "beside a whole float": [1.0, -MERGES],
    "nested": [[MERGES, 1], [0.5, 2]],
    "a NumPy scalar": [np.int64(MERGES), 0.5],
    "an array": [np.array([MERGES]), np.array([0.5])],
    "a tensor": [torch.tensor([MERGES]), torch.tensor([0.5])],
    "unsigned beside signed": [np.uint64(2**64 - 1), np.int64(-1)],
    "the largest": [np.int64(2**63 - 1), 0.5],
    "complex": [MERGES, 1j],
}


@pytest.mark.parametrize("what", MIXED)
def test_integers_that_floats_beside_them_would_change(what):
    with pytest.raises(ValueError, match=r"times: expected integers .*represents, .*got -?\d{16}"):
        as_array("times", MIXED[what])


def test_integers_that_stay_beside_floats():
    assert as_array("x", [2**53, 0.5, -(2**60), np.int8(3)]).tolist() == [2**53, 0.5, -(2**60), 3]
    assert as_array("x", [np.arange(3), np.ones(3)]).tolist() == [[0, 1, 2], [1, 1, 1]]
    assert longs("x", [MERGES, 1]).tolist() == [*integers("x", [MERGES]).tolist(), 1]
    assert whole("x", [3, 1.0]).tolist() == [3, 1]


@pytest.mark.parametrize("name", ["targets", "visit_targets"])
def test_targets_that_floats_would_change(name):
    patients = [[[1]], [[2]]]
    with pytest.raises(ValueError, match=rf"^{name}\['a'\].*got {MERGES}"):
        PackedVisits.from_lists(patients, **{name: {"a": [[MERGES], [0.5]]}})
    if name == "visit_targets":
        for first, second in (
            (np.array([MERGES]), np.array([0.5])),
            (torch.tensor([MERGES]), np.array([0.5])),
            (torch.tensor([257]), torch.tensor([0.5], dtype=torch.bfloat16)),
            (torch.tensor([2**24 + 1]), torch.tensor([0.5])),
            (torch.tensor([2**63 - 1]), torch.tensor([0.5j])),
        ):
            with pytest.raises(ValueError, match=r"\['a'\], patient 0: expected integers that"):
                PackedVisits.from_lists(patients, visit_targets={"a": [first, second]})
        kept = PackedVisits.from_lists(
            patients, visit_targets={"a": [torch.tensor([256]), torch.tensor([0.5])]}
        )
        assert kept.visit_targets["a"].tolist() == [256, 0.5]


@pytest.mark.parametrize("name", ["targets", "visit_targets"])
@pytest.mark.parametrize(
    ("given", "found"),
    [(3, "an int"), ([1], "a list"), (torch.ones(1), r"a tensor of shape \[1\]")],
)
def test_targets_are_mappings(name, given, found):
    for build in (
        lambda **options: PackedVisits.from_lists([[[1]]], **options),
        lambda **options: PackedVisits.from_flat([1], [0, 1], [0, 1], **options),
        lambda **options: PackedVisits.from_padded(CODES, **options),
        lambda **options: PackedVisits.from_lists([[[1]]]).with_outcomes(**options),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a mapping .*got {found}"):
            build(**{name: given})


@pytest.mark.parametrize("path", ["fused", "packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_models_take_tensors_and_packed_batches(name, path):
    model = MODELS[name]()
    model.path = path
    for given, found in (
        (CODES.numpy(), r"got a NumPy array of int64 \(torch\.from_numpy"),
        (CODES.tolist(), r"got a list \(PackedVisits\.from_lists"),
        (None, "got None"),
        (PackedRows(torch.ones(3), two_patients()), "got an object of type PackedRows"),
    ):
        with pytest.raises(TypeError, match=f"visit_codes: expected a tensor.*{found}"):
            model(given)
    with pytest.raises(TypeError, match="visit_mask: expected a tensor or None, got a NumPy array"):
        model(CODES, MASK.numpy())
    with pytest.raises(TypeError, match="sequence_mask: expected a tensor or None, got a list"):
        model(CODES, MASK, [[1, 1]])
    for call in (model.loss, ModelWithLoss(model)):
        for given in (CODES, CODES.numpy(), [[[1]]], None):
            with pytest.raises(TypeError, match="batch: expected a PackedVisits with its outcomes"):
                call(given)


def test_other_arguments_of_models():
    model = MODELS["time"]()
    with pytest.raises(TypeError, match=r"time_features: expected a tensor .* a NumPy array"):
        model(CODES, MASK, None, np.zeros((1, 2, 3), np.float32))
    with pytest.raises(TypeError, match=r"state: expected a VisitState .*, got an int"):
        model.step(3, [1])
    with pytest.raises(TypeError, match=r"visit: expected a list of codes, got an int"):
        model.step(model.start(), 1)
    with pytest.raises(TypeError, match=r"visit_features: expected a tensor .* a NumPy array"):
        model.step(model.start(), [1], np.zeros((1, 3)))
    encoder = VisitEncoder(4)
    with pytest.raises(TypeError, match="visit_embeddings: expected a tensor, got a NumPy array"):
        encoder(np.zeros((1, 2, 4)))
    with pytest.raises(TypeError, match="visit_mask: expected a tensor or None, got a NumPy array"):
        encoder(torch.zeros(1, 2, 4), np.ones((1, 2)))


def test_operations_take_tensors_and_batches():
    batch, table = two_patients(), torch.ones(10, 2)
    for call, message in (
        (lambda: visit_mean_pool(CODES.numpy(), table), "codes: expected a tensor, got a NumPy"),
        (lambda: visit_mean_pool(CODES, table.numpy()), "weight: expected a tensor, got a NumPy"),
        (lambda: visit_mean_pool(CODES, table, MASK.numpy()), "mask: expected a tensor or None"),
        (lambda: masked_pool(np.zeros((1, 2, 3))), "embeddings: expected a tensor"),
        (lambda: packed_visit_pool(CODES, table), "batch: expected a PackedVisits, got a tensor"),
        (lambda: packed_visit_pool(batch, table.numpy()), "weight: expected a tensor"),
        (
            lambda: packed_visit_pool(batch, table, mode="attention", scores=np.ones(10)),
            "scores: expected a tensor",
        ),
        (lambda: packed_survival_nll(torch.zeros(3), CODES), "batch: expected a PackedVisits, got"),
        (lambda: batch.pad(np.zeros(3)), "values: expected a tensor"),
        (lambda: batch.pack(PackedRows(torch.ones(3), batch)), r"padded.*rows\.to_padded\(\)"),
        (lambda: PackedVisits.cat([batch, CODES]), "batches: expected PackedVisits, .*, at 1"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_survival_curves_of_packed_rows():
    batch = two_patients()
    rows = PackedRows(torch.tensor([0.5, 0.25, 0.5]), batch)
    survival, cumulative = survival_curve(rows)
    expected = survival_curve(rows.to_padded())
    assert torch.equal(survival.values, batch.pack(expected[0]))
    assert torch.equal(cumulative.values, batch.pack(expected[1]))
    with pytest.raises(TypeError, match=r"hazards: expected a tensor .* a NumPy array"):
        survival_curve(rows.numpy())
    with pytest.raises(ValueError, match=r"hazards: expected \[B, V\], got shape \[3\]"):
        survival_curve(rows.values)


def test_losses_of_tasks():
    rows = PackedRows(torch.ones(3), two_patients())
    loss = MultiTaskSurvivalLoss({"a": 1.0, "b": 2.0})
    for given, message in (
        ({"a": rows}, r"task_losses\['a'\]: expected a tensor.*got an object of type PackedRows"),
        ({"a": torch.ones(()), "b": 0.5}, r"task_losses\['b'\]: expected a tensor.*got a float"),
        ([torch.ones(())], "task_losses: expected a mapping of names to losses, got a list"),
    ):
        with pytest.raises(TypeError, match=message):
            loss(given)
    with pytest.raises(ValueError, match=r"losses of one shape, got \[\[2\], \[3\]\]"):
        loss({"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(TypeError, match="task_weights: expected a mapping"):
        MultiTaskSurvivalLoss(3)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fixed_horizon_shows_masks_that_are_not_finite_and_refuses_negative_ones(dtype):
    loss = FixedHorizonProgressionLoss()
    for value in (NAN, INF):
        mask = torch.tensor([[1, value]], dtype=dtype)
        assert not loss(torch.zeros(1, 2), ONES, mask).isfinite()
    mask = torch.tensor([[1, -INF]], dtype=dtype)
    with pytest.raises(ValueError, match=r"valid_mask.*found 1 others.*is -inf at .*\[0, 1\]"):
        loss(torch.zeros(1, 2), ONES, mask)


def test_padded_losses_take_tensors_of_real_numbers():
    loss, criterion = FixedHorizonProgressionLoss(), torch.nn.BCEWithLogitsLoss()
    zeros = torch.zeros(1, 2)
    for call, message in (
        (lambda: loss(zeros.numpy(), ONES, ONES), "logits: expected a tensor, got a NumPy array"),
        (lambda: loss(zeros, ONES.numpy(), ONES), "labels: expected a tensor, got a NumPy array"),
        (lambda: loss(zeros, ONES, [[1, 1]]), "valid_mask: expected a tensor, got a list"),
        (lambda: loss(zeros, ONES + 0j, ONES), "labels: expected real numbers, got torch.complex"),
        (lambda: loss(zeros, ONES, ONES + 0j), "valid_mask: expected real numbers"),
        # the loss would be cut off to an integer
        (
            lambda: loss(zeros.long(), ONES, ONES),
            "logits: expected a floating dtype, got torch.int",
        ),
        (lambda: compute_masked_loss(criterion, zeros.numpy(), ONES, [2]), "predictions: expected"),
        (lambda: compute_masked_loss(criterion, zeros, ONES.numpy(), [2]), "labels: expected a"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_concordance_index_refuses_what_has_no_order():
    pytest.importorskip("lifelines", reason="pip install 'ehrseq_fast[metrics]'")
    hazards, times, events = [[0.9, 0.5], [0.1, 0.1]], [0, 1], [1, 0]
    for convert in (np.array, torch.tensor):
        with pytest.raises(ValueError, match=r"sequence_mask: .*got NaN \(patient 1; 1 in all\)"):
            concordance_index(hazards, times, events, convert([[1, 1], [1, NAN]]))
        for at, name in enumerate(("hazards", "event_times", "event_indicators", "sequence_mask")):
            arguments = [convert(x) for x in (hazards, times, events, [[1, 1], [1, 1]])]
            arguments[at] = arguments[at] * 1j
            with pytest.raises(TypeError, match=f"{name}: expected real numbers, got .*complex"):
                concordance_index(*arguments)
    with pytest.raises(TypeError, match=r"event_times: expected real numbers, got datetime64\[D\]"):
        concordance_index(hazards, np.array(["2020", "2021"], "M8[D]"), events)
    assert concordance_index(hazards, times, events, [[1, 0], [1, 1]]) == 1.0
