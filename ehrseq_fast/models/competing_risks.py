"""Discrete-time survival with several events of which only the first is seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..arrays import ArrayLike
from ..batch import PackedVisits
from ..checks import accumulator, expect_option
from ..survival_nll import packed_competing_risks_nll
from .base import VisitSequenceModel
from .head import called, hazard_head, logits_of
from .recurrent import visit_layer
from .sequences import expect_batch

LINKS = ("sigmoid", "softmax")


class CompetingRisksSurvivalLSTM(VisitSequenceModel):
    """Cause-specific hazard of each of K events at each visit, from the visits up to it.

    One embedding and one LSTM, and a hazard head per event. Constructor, ``state_dict`` and seeded
    initialisation are those of ``ehrsequencing.models.CompetingRisksSurvivalLSTM``.

    Masks are those of :class:`DiscreteTimeSurvivalLSTM`: ``visit_mask`` for codes,
    ``sequence_mask`` for visits, and ``sequence_mask`` again in the loss
    (:class:`ehrseq_fast.CompetingRisksSurvivalLoss`). What is said there of missing masks, of paths
    and of differences from the reference holds here.

    With ``link="sigmoid"`` the K hazards are independent, as in the reference, and may sum above 1
    at a visit, where there is no cumulative incidence. With ``"softmax"`` they are the
    probabilities of classes 1 to K beside that of no event, whose logit is 0, so that they sum to
    less than 1; the loss is then that of ``competing_risks_nll(link="softmax")``.

    Args:
        vocab_size: number of codes; code 0 is padding.
        num_event_types: number K of competing events.
        embedding_dim, hidden_dim, num_layers, dropout, cell, path: as in
            :class:`DiscreteTimeSurvivalLSTM`.
        link: ``"sigmoid"`` or ``"softmax"``; the weights are the same.

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
        link: str = "sigmoid",
    ) -> None:
        super().__init__(path)
        expect_option("link", link, LINKS)
        if num_event_types < 1:
            raise ValueError(f"num_event_types: expected at least 1, got {num_event_types}")
        self.num_event_types = num_event_types
        self.link = link
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=0)
        self.lstm = visit_layer(cell, embedding_dim, hidden_dim, num_layers, dropout)
        heads = [hazard_head(hidden_dim, hidden_dim, dropout) for _ in range(num_event_types)]
        if link == "softmax":  # of logits
            heads = [nn.Sequential(*list(head)[:-1]) for head in heads]
        self.hazard_heads = nn.ModuleList(heads)

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

    def extra_repr(self) -> str:
        return "" if self.link == "sigmoid" else f"link={self.link!r}"

    def _output(self, states: Tensor) -> Tensor:
        if self.link == "softmax":
            logits = self._class_logits(states)
            return logits.softmax(-1, accumulator(logits.dtype))[..., 1:].to(logits.dtype)
        return torch.cat([self._apply_head(head, states) for head in self.hazard_heads], dim=-1)

    def _class_logits(self, states: Tensor) -> Tensor:
        """``[..., K + 1]``, class 0 for no event."""
        apply = logits_of if self.path == "fused" else called
        found = torch.cat([apply(head, states) for head in self.hazard_heads], dim=-1)
        return torch.cat([torch.zeros_like(found[..., :1]), found], dim=-1)

    def loss(self, batch: PackedVisits, **options: Any) -> Tensor:
        """From codes to the negative log-likelihood of the batch's outcomes, nothing padded.

        Args:
            batch: patients with ``event_times`` and ``event_types``.
            options: for :func:`ehrseq_fast.packed_competing_risks_nll`; the link is the model's.

        Raises:
            ValueError: if the batch has no outcomes.
            TypeError: for anything but a packed batch.
        """
        expect_batch(batch)
        if self.link == "softmax":
            logits = self._class_logits(self._hidden_states(batch, None, None).values)
            return packed_competing_risks_nll(
                logits, batch, from_logits=True, link="softmax", **options
            )
        return packed_competing_risks_nll(self(batch).values, batch, **options)

    @torch.no_grad()
    def set_base_hazards(self, hazards: ArrayLike | Tensor) -> None:
        """Let the heads' last biases say these hazards, from which training then starts: the
        observed ones (:func:`~ehrseq_fast.metrics.cause_baselines`), and not 0.5.

        Args:
            hazards: K in (0, 1), with a sum below 1 for ``link="softmax"``.

        Raises:
            ValueError: for another number of hazards, and such as are not of these.

        Example:
            >>> from ehrseq_fast.models import CompetingRisksSurvivalLSTM
            >>> model = CompetingRisksSurvivalLSTM(10, 2, 4, 8, link="softmax")
            >>> model.set_base_hazards([0.2, 0.3])
            >>> [round(head[3].bias.exp().item() / 2, 4) for head in model.hazard_heads]
            [0.2, 0.3]
        """
        given = torch.as_tensor(hazards, dtype=torch.float64, device="cpu")
        if given.shape != (self.num_event_types,):
            raise ValueError(
                f"hazards: expected {self.num_event_types} of them, got {list(given.shape)}"
            )
        total = float(given.sum()) if self.link == "softmax" else 0.0
        if not (bool(((given > 0) & (given < 1)).all()) and total < 1):
            below = ", with a sum below 1" if self.link == "softmax" else ""
            raise ValueError(f"hazards: expected hazards in (0, 1){below}, got {given.tolist()}")
        rest = 1 - given.sum() if self.link == "softmax" else 1 - given
        for head, logit in zip(self.hazard_heads, (given / rest).log(), strict=True):
            bias: Any = head[3].bias  # type: ignore[index]
            bias.fill_(logit.item())
