"""Every loss takes rows of a packed batch, alone, with their batch, and with rows beside them."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import ehrseq_fast as ef
from ehrseq_fast import PackedRows, PackedVisits, losses
from ehrseq_fast.models import losses as reference_losses

PATIENTS = [[[1], [2], [3]], [[4]], [[5], [6], [7], [8]], [[9], [10]]]


def batch():
    return PackedVisits.from_lists(
        PATIENTS,
        event_times=[2, 0, 1, 1],
        event_indicators=[1, 0, 1, 0],
        event_types=[2, 0, 1, 0],
        visit_targets={"days_to_end": [torch.arange(len(v), 0.0, -1) * 50 for v in PATIENTS]},
    )


def others(of):
    """The same visits with other outcomes."""
    return of.with_outcomes(
        event_times=[0, 0, 3, 0], event_indicators=[0, 1, 1, 1], event_types=[0, 1, 2, 1]
    )


def rows(of, *trailing):
    torch.manual_seed(0)
    return PackedRows(torch.rand(of.n_visits, *trailing, dtype=torch.float64) * 0.8 + 0.1, of)


# name: what is called, the rows' trailing shape, the outcomes that it takes
SEEN, TYPES = "event_indicators", "event_types"
OF_OUTCOMES = {
    "discrete_time_survival_nll": (ef.discrete_time_survival_nll, (), SEEN),
    "competing_risks_nll": (ef.competing_risks_nll, (3,), TYPES),
    "piecewise_hazard_nll": (ef.piecewise_hazard_nll, (), SEEN),
    "pmf_nll": (ef.pmf_nll, (), SEEN),
    "pmf_competing_risks_nll": (ef.pmf_competing_risks_nll, (3,), TYPES),
    "deephit_ranking_loss": (ef.deephit_ranking_loss, (), SEEN),
    "deephit_competing_ranking_loss": (ef.deephit_competing_ranking_loss, (3,), TYPES),
    "fixed_horizon_bce": (ef.fixed_horizon_bce, (), SEEN),
    "packed_survival_nll": (ef.packed_survival_nll, (), None),
    "packed_competing_risks_nll": (ef.packed_competing_risks_nll, (3,), None),
    "DiscreteTimeSurvivalLoss": (ef.DiscreteTimeSurvivalLoss(), (), SEEN),
    "CompetingRisksSurvivalLoss": (ef.CompetingRisksSurvivalLoss(), (3,), TYPES),
    "PiecewiseHazardLoss": (ef.PiecewiseHazardLoss(), (), SEEN),
    "PMFLoss": (ef.PMFLoss(), (), SEEN),
    "PMFCompetingRisksLoss": (ef.PMFCompetingRisksLoss(), (3,), TYPES),
    "DeepHitRankingLoss": (ef.DeepHitRankingLoss(), (3,), TYPES),
    "DeepHitLoss": (ef.DeepHitLoss(), (3,), TYPES),
}
OTHERS = {
    "visit_cross_entropy",
    "VisitCrossEntropyLoss",
    "next_codes_bce",
    "NextCodesLoss",
    "FixedHorizonProgressionLoss",
    "compute_masked_loss",
    "MultiTaskSurvivalLoss",  # of losses, not of predictions
    "PairwiseRankingLoss",  # of one score per patient
    "HybridSurvivalLoss",
}


def test_no_loss_is_left_out():
    names = {name for name in ef.__all__ if name.endswith(("_nll", "_loss", "_bce", "Loss"))}
    names |= {"visit_cross_entropy"}
    for module in (losses, reference_losses):
        for name, kind in vars(module).items():
            if name.endswith(("Loss", "_loss")) and not name.startswith("_"):
                assert inspect.isclass(kind) or inspect.isfunction(kind)
                names.add(name)
    assert names == OF_OUTCOMES.keys() | OTHERS


@pytest.mark.parametrize("name", OF_OUTCOMES)
def test_rows_with_the_outcomes_of_a_batch(name):
    function, trailing, kinds = OF_OUTCOMES[name]
    of = batch()
    ours = rows(of, *trailing)
    expected = function(ours)
    assert expected.isfinite()
    assert torch.equal(function(ours, of), expected)
    changed = others(of)
    with_others = function(PackedRows(ours.values, changed))
    assert not torch.isclose(with_others, expected)
    assert torch.equal(function(ours, changed), with_others)
    if kinds:
        padded = ours.to_padded()
        outcomes = {"event_times": changed.event_times, kinds: getattr(changed, kinds)}
        by_padding = function(padded, sequence_mask=ours.sequence_mask(), **outcomes)
        torch.testing.assert_close(by_padding, with_others)
        assert torch.equal(function(ours, **outcomes), with_others)
    ours.values.requires_grad_()
    (gradient,) = torch.autograd.grad(function(ours, changed), ours.values)
    (wanted,) = torch.autograd.grad(function(PackedRows(ours.values, changed)), ours.values)
    assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("name", OF_OUTCOMES)
def test_a_batch_of_other_visits_is_refused(name):
    function, trailing, kinds = OF_OUTCOMES[name]
    ours = rows(batch(), *trailing)
    with pytest.raises(ValueError, match=r"expected (the batch|that) of the PackedRows in"):
        function(ours, batch())
    if kinds:
        with pytest.raises(TypeError, match="event_times: expected a tensor beside a tensor of"):
            function(ours.to_padded(), ours.batch)


def test_models_and_losses_fit():
    model = ef.models.DiscreteTimeSurvivalLSTM(20, 4, 5).eval()
    of = batch()
    loss = ef.DiscreteTimeSurvivalLoss()(model(of), of)
    assert torch.equal(loss, model.loss(of))


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])


@pytest.mark.parametrize("loss", [ef.visit_cross_entropy, ef.VisitCrossEntropyLoss()])
def test_classes_of_visits(loss):
    ours = rows(batch(), 3)
    labels = PackedRows(LABELS, ours.batch)
    weight = PackedRows(LABELS / 2 + 0.5, ours.batch)
    expected = loss(ours, LABELS, visit_weight=weight.values)
    assert torch.equal(loss(ours, labels, visit_weight=weight), expected)
    next_ones = loss(ours, labels.shift(-1, fill=-100))
    mask = ours.sequence_mask()[:, 1:]
    criterion = nn.CrossEntropyLoss()
    wanted = criterion(ours.to_padded()[:, :-1][mask], labels.to_padded()[:, 1:][mask])
    torch.testing.assert_close(next_ones, wanted)
    with pytest.raises(ValueError, match="labels: expected rows of the same batch"):
        loss(ours, PackedRows(LABELS, batch()))
    with pytest.raises(TypeError, match="labels: expected a tensor, as the predictions are one"):
        loss(ours.to_padded(), labels)


@pytest.mark.parametrize("make", [lambda: ef.next_codes_bce, ef.NextCodesLoss])
def test_codes_of_next_visits(make):
    ours = rows(batch(), 5)
    layer = nn.Linear(5, 11).double()
    weight = PackedRows(LABELS.double(), ours.batch)
    loss = make()
    arguments = (layer,) if isinstance(loss, nn.Module) else (layer.weight, layer.bias)
    expected = loss(ours, *arguments, visit_weight=weight.values)
    assert torch.equal(loss(ours, *arguments, visit_weight=weight), expected)
    with pytest.raises(ValueError, match="visit_weight: expected rows of the same batch"):
        loss(ours, *arguments, visit_weight=PackedRows(weight.values, batch()))
    targets = ours.batch.next_visit_codes()
    wanted = nn.functional.binary_cross_entropy_with_logits(
        layer(ours.values[targets.rows]), multi_hot(targets, 11), reduction="sum"
    )
    found = loss(ours, *arguments)
    torch.testing.assert_close(found * len(targets.rows), wanted)


def multi_hot(targets, classes):
    dense = torch.zeros(len(targets.rows), classes, dtype=torch.float64)
    counts = targets.offsets.diff().long()
    dense[torch.arange(len(counts)).repeat_interleave(counts), targets.codes.long()] = 1
    return dense


def test_fixed_horizons():
    of = batch()
    ours = rows(of)
    by_visits = losses.FixedHorizonProgressionLoss(horizon_visits=2)
    changed = others(of)
    expected = by_visits(PackedRows(ours.values, changed))
    assert torch.equal(by_visits(ours, changed), expected)
    assert not torch.isclose(by_visits(ours, of), expected)
    by_days = losses.FixedHorizonProgressionLoss(horizon_days=120)
    assert torch.equal(by_days(ours, of), by_days(ours))
    # labels that are given
    labels, valid = PackedRows(LABELS > 0, of), PackedRows(LABELS != 1, of)
    mask = ours.sequence_mask()
    padded = by_days(ours.to_padded(), labels.to_padded(False), valid.to_padded(False))
    torch.testing.assert_close(by_days(ours, labels, valid), padded)
    torch.testing.assert_close(by_days(ours, labels.values, valid.values), padded)
    everywhere = by_days(ours.to_padded(), labels.to_padded(False), mask)
    torch.testing.assert_close(by_days(ours, labels), everywhere)
    with pytest.raises(ValueError, match="valid_mask: expected rows of the same batch"):
        by_days(ours, labels, PackedRows(valid.values, batch()))
    with pytest.raises(TypeError, match="labels: expected a tensor beside a tensor of logits"):
        by_visits(ours.to_padded(), of)
    times = PackedRows(of.time_of_row.double() * 30, of)
    ends = torch.tensor([70.0, 10.0, 95.0, 40.0])
    expected = ef.fixed_horizon_bce(ours, ends, horizon=45, visit_times=times.values)
    assert torch.equal(ef.fixed_horizon_bce(ours, ends, horizon=45, visit_times=times), expected)


@pytest.mark.parametrize("last", [(), (4,)])
def test_criteria_of_pytorch(last):
    of = batch()
    ours = rows(of, *last)
    labels = PackedRows((torch.arange(10.0).view(10, *[1] * len(last)) % 2).expand(10, *last), of)
    lengths = [len(visits) for visits in PATIENTS]
    criterion = nn.BCEWithLogitsLoss()
    expected = losses.compute_masked_loss(criterion, ours.to_padded(), labels.to_padded(), lengths)
    found = losses.compute_masked_loss(criterion, ours, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(losses.compute_masked_loss(criterion, ours, labels.values), expected)
    if last:
        classes = PackedRows(LABELS.int(), of)
        expected = nn.CrossEntropyLoss()(ours.values, LABELS)
        found = losses.compute_masked_loss(nn.CrossEntropyLoss(), ours, classes)
        torch.testing.assert_close(found, expected)


def test_criteria_and_lengths():
    ours = rows(batch())
    criterion = nn.BCEWithLogitsLoss()
    with pytest.raises(TypeError, match="lengths: expected None beside PackedRows"):
        losses.compute_masked_loss(criterion, ours, ours, [3, 1, 4, 2])
    with pytest.raises(TypeError, match="lengths: expected one per patient"):
        losses.compute_masked_loss(criterion, ours.to_padded(), ours.to_padded())
    with pytest.raises(TypeError, match="labels: expected a tensor, as the predictions are one"):
        losses.compute_masked_loss(criterion, ours.to_padded(), ours, [3, 1, 4, 2])
    with pytest.raises(ValueError, match=r"labels: expected the shape of predictions, \[10\]"):
        losses.compute_masked_loss(criterion, ours, torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"predictions: expected \[n_visits\] or \[n_visits, K\]"):
        losses.compute_masked_loss(criterion, rows(batch(), 2, 2), torch.ones(10, 2, 2))


def test_the_references_hybrid_loss():
    loss = reference_losses.HybridSurvivalLoss()
    of = batch()
    ours = rows(of)
    outcomes = of.event_times, of.event_indicators
    padded, _ = loss(ours.to_padded(), ours.sum(), *outcomes, ours.sequence_mask())
    for found, _ in (loss(ours, ours.sum()), loss(ours, ours.sum(), of)):
        torch.testing.assert_close(found, padded)
