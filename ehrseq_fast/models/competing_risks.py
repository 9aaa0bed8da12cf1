"""Discrete-time survival with several events of which only the first is seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch import PackedVisits
from ..survival_nll import packed_competing_risks_nll
from .base import VisitSequenceModel
from .recurrent import visit_layer
from .sequences import expect_batch
from .survival_lstm import hazard_head


class CompetingRisksSurvivalLSTM(VisitSequenceModel):
    """Cause-specific hazard of each of K events at each visit, from the visits up to it.

    One embedding and one LSTM, and a hazard head per event. Constructor, ``state_dict`` and seeded
    initialisation are those of ``ehrsequencing.models.CompetingRisksSurvivalLSTM``.

    Masks are those of :class:`DiscreteTimeSurvivalLSTM`: ``visit_mask`` for codes,
    ``sequence_mask`` for visits, and ``sequence_mask`` again in the loss
    (:class:`ehrseq_fast.CompetingRisksSurvivalLoss`). What is said there of missing masks, of paths
    and of differences from the reference holds here.

    The K hazards are independent sigmoids, as in the reference, and may sum above 1 at a visit; to
    have them sum below 1, train logits with ``competing_risks_nll(..., link="softmax")``.

    Args:
        vocab_size: number of codes; code 0 is padding.
        num_event_types: number K of competing events.
        embedding_dim, hidden_dim, num_layers, dropout, cell, path: as in
            :class:`DiscreteTimeSurvivalLSTM`.

    Example:
        >>> import torch
        >>> from ehrseq_fast.models import CompetingRisksSurvivalLSTM
        >>> model = CompetingRisksSurvivalLSTM(10, num_event_types=3, embedding_dim=4, hidden_dim=8)
        >>> visit_codes = torch.tensor([[[3, 5], [2, 0]]])
        >>> model(visit_codes, visit_codes != 0, torch.ones(1, 2)).shape
        torch.Size([1, 2, 3])
    """

    def __init__(
        self,
        vocab_size: int,
        num_event_types: int,
        embedding_dim: int = 128,
        hidden_dim: int = 256,
        num_layers: int = 1,
        dropout: float = 0.1,
        *,
        cell: str = "lstm",
        path: str = "fused",
    ) -> None:
        super().__init__(path)
        if num_event_types < 1:
            raise ValueError(f"num_event_types: expected at least 1, got {num_event_types}")
        self.num_event_types = num_event_types
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=0)
        self.lstm = visit_layer(cell, embedding_dim, hidden_dim, num_layers, dropout)
        self.hazard_heads = nn.ModuleList(
            hazard_head(hidden_dim, hidden_dim, dropout) for _ in range(num_event_types)
        )

    def forward(
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
    ) -> Any:
        """Cause-specific hazards ``[B, V, K]`` in (0, 1); exactly 0 on padding.

        Of a :class:`~ehrseq_fast.PackedVisits` they are :class:`~ehrseq_fast.PackedRows`
        ``[n_visits, K]``. Arguments and errors as in :meth:`DiscreteTimeSurvivalLSTM.forward`.
        """
        states = self._hidden_states(visit_codes, visit_mask, sequence_mask)
        return states.to_output(self._output(states.values))

    def _output(self, states: Tensor) -> Tensor:
        return torch.cat([self._apply_head(head, states) for head in self.hazard_heads], dim=-1)

    def loss(self, batch: PackedVisits, **options: Any) -> Tensor:
        """From codes to the negative log-likelihood of the batch's outcomes, nothing padded.

        Args:
            batch: patients with ``event_times`` and ``event_types``.
            options: for :func:`ehrseq_fast.packed_competing_risks_nll`.

        Raises:
            ValueError: if the batch has no outcomes.
            TypeError: for anything but a packed batch.
        """
        expect_batch(batch)
        return packed_competing_risks_nll(self(batch).values, batch, **options)
