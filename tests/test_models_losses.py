"""The names and places of ``ehrsequencing``, and the losses that are at those places alone."""

from __future__ import annotations

import pytest
import torch

import ehrseq_fast
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM, LSTMBaseline

# Names of the public package ----------------------------------------------------------------------


def test_the_public_packages_import_paths():
    """A search and replace of the package's name is enough for its LSTM models and losses."""
    from ehrseq_fast.models import (
        DiscreteTimeSurvivalLoss,
        HybridSurvivalLoss,
        PairwiseRankingLoss,
        VisitEncoder,
        concordance_index,
        create_lstm_baseline,
        losses,
        lstm_baseline,
        survival_lstm,
    )

    assert losses.DiscreteTimeSurvivalLoss is DiscreteTimeSurvivalLoss
    assert DiscreteTimeSurvivalLoss is ehrseq_fast.DiscreteTimeSurvivalLoss
    assert losses.HybridSurvivalLoss is HybridSurvivalLoss
    assert losses.PairwiseRankingLoss is PairwiseRankingLoss
    assert losses.FixedHorizonProgressionLoss is ehrseq_fast.losses.FixedHorizonProgressionLoss
    assert losses.MultiTaskSurvivalLoss is ehrseq_fast.losses.MultiTaskSurvivalLoss
    assert losses.concordance_index is concordance_index is ehrseq_fast.metrics.concordance_index
    assert survival_lstm.DiscreteTimeSurvivalLSTM is DiscreteTimeSurvivalLSTM
    names = ("DiscreteTimeSurvivalLSTMWithTime", "CompetingRisksSurvivalLSTM")
    for name in names:
        assert getattr(survival_lstm, name) is getattr(ehrseq_fast.models, name)
    assert lstm_baseline.LSTMBaseline is LSTMBaseline
    assert lstm_baseline.VisitEncoder is VisitEncoder
    assert lstm_baseline.create_lstm_baseline is create_lstm_baseline
    with pytest.raises(AttributeError, match="has no attribute 'BEHRT'"):
        _ = ehrseq_fast.models.BEHRT


def ranking_by_loops(risks, times, seen, margin):
    pairs = [
        max(0.0, margin - (float(risks[i]) - float(risks[j])))
        for i in range(len(risks))
        for j in range(len(risks))
        if i != j and seen[i] and times[i] <= times[j]
    ]
    return sum(pairs) / len(pairs) if pairs else 0.0


def test_pairwise_and_hybrid_losses():
    from ehrseq_fast.models.losses import HybridSurvivalLoss, PairwiseRankingLoss

    hazards = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    times, seen = torch.tensor([0, 3, 2, 2, 1, 3]), torch.tensor([1, 0, 1, 1, 0, 1])
    risks, mask = hazards.sum(1), torch.ones(6, 4)
    rank = PairwiseRankingLoss(margin=0.2)(risks, times, seen)
    expected = ranking_by_loops(risks.detach(), times, seen, 0.2)
    assert float(rank.detach()) == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda r: PairwiseRankingLoss(0.2)(r, times, seen), (risks,))
    nothing = PairwiseRankingLoss()(risks, times, torch.zeros(6))
    assert float(nothing.detach()) == 0
    nothing.backward(retain_graph=True)
    loss, parts = HybridSurvivalLoss(2.0, 3.0, margin=0.2)(hazards, risks, times, seen, mask)
    nll = ehrseq_fast.discrete_time_survival_nll(hazards, times, seen, mask)
    torch.testing.assert_close(loss, 2 * nll + 3 * rank)
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(
        {"total": float(loss.detach()), "nll": float(nll.detach()), "rank": float(rank.detach())}
    )
    with pytest.raises(ValueError, match=r"event_times: expected \[B\]"):
        PairwiseRankingLoss()(risks, times[:3], seen)
