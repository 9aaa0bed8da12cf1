"""Discrete-time survival models: the hazard of the event at each visit of a patient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..arrays import expect_tensor, integer
from ..batch import PackedVisits
from ..checks import accumulator
from ..rows import PackedRows
from ..survival_nll import packed_survival_nll
from .base import VisitSequenceModel
from .competing_risks import CompetingRisksSurvivalLSTM  # noqa: F401  (as in ehrsequencing)
from .head import hazard_head
from .recurrent import visit_layer
from .sequences import expect_batch

TIME_FEATURES = 3
# The largest hazard that survival is computed from, as the reference's log(1 - h + 1e-7) has it:
# a saturated sigmoid would make log(1 - h) infinite.
LARGEST_HAZARD = 1 - 1e-7


def survival_curve(hazards: Tensor | PackedRows) -> tuple[Any, Any]:
    """Survival ``S_t = Π_{k≤t} (1 − h_k)`` and cumulative hazard ``Σ_{k≤t} h_k``, over visits.

    ``hazards`` is ``[B, V]`` with zeros on padding, so both stay there at the value of the last
    real visit. 16-bit hazards are widened, and so are the results. Of
    :class:`~ehrseq_fast.PackedRows` both are packed rows.

    Raises:
        ValueError: for hazards of fewer dimensions.
        TypeError: for anything else.

    Example:
        >>> survival, cumulative = survival_curve(torch.tensor([[0.5, 0.5, 0.0]]))
        >>> survival
        tensor([[0.5000, 0.2500, 0.2500]])
        >>> cumulative
        tensor([[0.5000, 1.0000, 1.0000]])
    """
    if isinstance(hazards, PackedRows):
        batch = hazards.batch
        curves = survival_curve(hazards.to_padded())
        return PackedRows(batch.pack(curves[0]), batch), PackedRows(batch.pack(curves[1]), batch)
    expect_tensor("hazards", hazards, "a tensor [B, V] or PackedRows")
    if hazards.dim() < 2:
        raise ValueError(f"hazards: expected [B, V], got shape {list(hazards.shape)}")
    hazards = hazards.to(accumulator(hazards.dtype))
    survival = torch.log1p(-hazards.clamp(max=LARGEST_HAZARD)).cumsum(1).exp()
    return survival, hazards.cumsum(1)


class DiscreteTimeSurvivalLSTM(VisitSequenceModel):
    """Hazard of the event at each visit, ``h_t = P(T = t | T ≥ t)``, from the visits up to t.

    Codes of a visit are embedded and averaged, an LSTM runs over the visits, and a small network
    with a sigmoid maps each hidden state to a hazard. Constructor, ``state_dict`` and seeded
    initialisation are those of ``ehrsequencing.models.DiscreteTimeSurvivalLSTM``.

    Masks say what is padding, at two levels; the loss has a third say:

    * ``visit_mask`` ``[B, V, C]`` (codes): non-zero marks a real code. ``None`` counts every slot,
      padding too: a visit's mean is then taken over C slots, and depends on the padding.
    * ``sequence_mask`` ``[B, V]`` (visits): non-zero marks a real visit. Real visits come first.
      ``None`` takes every visit for real, and padded visits get hazards.
    * the loss (:class:`ehrseq_fast.DiscreteTimeSurvivalLoss`) takes ``sequence_mask`` again. It
      cannot tell a padded hazard from a real one without it.

    A visit without a real code is a visit like others; its vector is zero.

    On a GPU the fused and packed paths wait once per call for the sizes of padded tensors, and once
    more for a ``visit_mask`` that is not bool; with a :class:`~ehrseq_fast.PackedVisits` never.
    ``torch.compile`` breaks the graph there; with a :class:`~ehrseq_fast.PackedVisits` it makes one
    graph (``fullgraph=True``) on the fused path.

    Where this differs from the reference, whose results depend on padding or fail there: a NaN or
    an invalid code in a padded slot changes nothing (fused path); bidirectional hazards do not
    depend on the number of padded visits (fused and packed paths); survival stays constant over
    padding and finite at saturation; 16-bit models run, and masks of any dtype leave the output's
    dtype alone; non-contiguous inputs work; patients without a visit and masks with holes are
    refused.

    Args:
        vocab_size: number of codes; code 0 is padding and its embedding is not trained.
        embedding_dim: width E of a code's embedding.
        hidden_dim: width H of the LSTM state and of the hazard head.
        num_layers: LSTM layers.
        dropout: in the hazard head, and between LSTM layers where there are several.
        bidirectional: let the hazard at t see later visits too. Such a hazard is no forecast, and
            its likelihood is no likelihood; there for compatibility.
        cell: ``"lstm"``, or ``"gru"`` for a GRU in its place. The layer is ``model.lstm`` in both,
            and its part of the ``state_dict`` is that of ``nn.LSTM`` or ``nn.GRU``
            (``lstm.weight_ih_l0`` is ``[3H, E]`` with a GRU).
        path: ``"fused"`` computes real codes and visits only. ``"packed"`` (plain PyTorch: embed,
            mask, average, pack, LSTM, pad) and ``"padded"`` (plain PyTorch over all padded slots)
            are its oracle and baseline. A bidirectional LSTM on the padded path reads padding
            before the last real visit, as the reference does: there alone results depend on it;
            and ``scale_grad_by_freq`` of an embedding put in place counts padded slots there (and
            on the packed path), as ``nn.Embedding`` does: where they hold codes other than 0, these
            codes' gradients are smaller than on the fused path, which counts real codes alone.
            Also an attribute that may be set later.

    Example:
        >>> import torch
        >>> from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
        >>> _ = torch.manual_seed(0)
        >>> model = DiscreteTimeSurvivalLSTM(vocab_size=10, embedding_dim=4, hidden_dim=8)
        >>> visit_codes = torch.tensor([[[3, 5], [2, 0]], [[7, 0], [0, 0]]])
        >>> hazards = model(visit_codes, visit_codes != 0, (visit_codes != 0).any(2))
        >>> hazards.shape, hazards[1, 1].item()
        (torch.Size([2, 2]), 0.0)
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 128,
        hidden_dim: int = 256,
        num_layers: int = 1,
        dropout: float = 0.1,
        bidirectional: bool = False,
        *,
        cell: str = "lstm",
        path: str = "fused",
    ) -> None:
        super().__init__(path)
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.bidirectional = bidirectional

        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=0)
        self.lstm = visit_layer(
            cell, embedding_dim, hidden_dim, num_layers, dropout, bidirectional=bidirectional
        )
        width = 2 * hidden_dim if bidirectional else hidden_dim
        self.hazard_head = hazard_head(width, hidden_dim, dropout)

    def forward(
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
    ) -> Any:
        """Hazards ``[B, V]`` in (0, 1), in the model's dtype; exactly 0 on padding.

        Of a :class:`~ehrseq_fast.PackedVisits`, in place of all three arguments, they are
        :class:`~ehrseq_fast.PackedRows` ``[n_visits]``.

        Args:
            visit_codes: ``[B, V, C]`` int32 or int64, or a packed batch.
            visit_mask: ``[B, V, C]`` bool or numeric, or None; see the class.
            sequence_mask: ``[B, V]`` bool or numeric, or None; see the class.

        Raises:
            ValueError: for shapes that do not fit, patients without a visit, masks with holes.
            IndexError: for codes outside the vocabulary.
            TypeError: for codes that are not int32 or int64.
        """
        return self._hazards(visit_codes, visit_mask, sequence_mask)

    def _hazards(
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None,
        sequence_mask: Tensor | None,
        time_features: Tensor | None = None,
    ) -> Any:
        states = self._hidden_states(visit_codes, visit_mask, sequence_mask, time_features)
        return states.to_output(self._output(states.values))

    def _output(self, states: Tensor) -> Tensor:
        return self._apply_head(self.hazard_head, states).squeeze(-1)

    def loss(self, batch: PackedVisits, **options: Any) -> Tensor:
        """From codes to the negative log-likelihood of the batch's outcomes, nothing padded.

        Args:
            batch: patients with ``event_times`` and ``event_indicators``.
            options: for :func:`ehrseq_fast.packed_survival_nll` (``reduction``, ``sample_weight``,
                ``censored_visit``, ...).

        Raises:
            ValueError: if the batch has no outcomes.
            TypeError: for anything but a packed batch.
        """
        expect_batch(batch)
        return packed_survival_nll(self(batch).values, batch, **options)

    def predict_survival(
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
    ) -> Any:
        """Survival probabilities and cumulative hazards, ``[B, V]`` each (or packed rows).

        ``S_t = Π_{k≤t} (1 − h_k)`` and ``H_t = Σ_{k≤t} h_k``; over padding both keep the value of
        the patient's last real visit. float32 for a 16-bit model, else the model's dtype.
        Arguments and errors as in :meth:`forward`. Call ``model.eval()`` first: dropout is active
        in training mode.
        """
        return survival_curve(self(visit_codes, visit_mask, sequence_mask))


class DiscreteTimeSurvivalLSTMWithTime(DiscreteTimeSurvivalLSTM):
    """:class:`DiscreteTimeSurvivalLSTM` that also sees when each visit was.

    Three features per visit (time since the last visit, time since the first, index of the visit)
    go through a small network, and its output is appended to the visit vector. Masks, paths and
    differences from the reference are those of the base class. Unidirectional only.

    Args:
        vocab_size, embedding_dim, hidden_dim, num_layers, dropout, cell, path: as in the base
            class.
        time_encoding_dim: width of the encoded time features.
        time_features: how many features a visit has: any numbers of yours (lab values, days, age)
            may take the place of the three.

    Example:
        >>> import torch
        >>> from ehrseq_fast.models import DiscreteTimeSurvivalLSTMWithTime
        >>> model = DiscreteTimeSurvivalLSTMWithTime(10, embedding_dim=4, hidden_dim=8)
        >>> visit_codes = torch.tensor([[[3, 5], [2, 0]]])
        >>> months = torch.tensor([[[0.0, 0.0, 0.0], [6.0, 6.0, 1.0]]])
        >>> model(visit_codes, visit_codes != 0, torch.ones(1, 2), time_features=months).shape
        torch.Size([1, 2])
    """

    _n_visit_features = TIME_FEATURES

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 128,
        hidden_dim: int = 256,
        num_layers: int = 1,
        dropout: float = 0.1,
        time_encoding_dim: int = 16,
        *,
        time_features: int = TIME_FEATURES,
        cell: str = "lstm",
        path: str = "fused",
    ) -> None:
        super().__init__(
            vocab_size, embedding_dim, hidden_dim, num_layers, dropout, cell=cell, path=path
        )
        self._n_visit_features = integer("time_features", time_features, 1, 2**31 - 1)
        self.time_encoder = nn.Sequential(
            nn.Linear(self._n_visit_features, time_encoding_dim),
            nn.ReLU(),
            nn.Linear(time_encoding_dim, time_encoding_dim),
        )
        # The base class has built an LSTM already. Building a second one draws the random numbers
        # that the reference draws, so that one seed gives both packages the same weights.
        self.lstm = visit_layer(
            cell, embedding_dim + time_encoding_dim, hidden_dim, num_layers, dropout
        )

    def _lstm_input(self, vectors: Tensor, visit_features: Tensor | None) -> Tensor:
        width = self._n_visit_features
        if visit_features is None:
            visit_features = vectors.new_zeros(*vectors.shape[:-1], width)
        if visit_features.shape[-1] != width:
            meaning = " (time since the last visit, since the first, index)"
            raise ValueError(
                f"visit_features: expected {width} features"
                f"{meaning if width == TIME_FEATURES else ''}, got {visit_features.shape[-1]}"
            )
        encoded = self._apply_network(self.time_encoder, visit_features.to(vectors.dtype))
        return torch.cat([vectors, encoded.to(vectors.dtype)], dim=-1)

    def forward(  # type: ignore[override]  # the reference's signature has one argument more
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        time_features: Tensor | None = None,
    ) -> Any:
        """Hazards ``[B, V]``, exactly 0 on padding; of a packed batch, which must hold its own
        ``visit_features`` ``[n_visits, F]``, packed rows. F is 3, or the class's ``time_features``.

        Args:
            visit_codes, visit_mask, sequence_mask: as in the base class.
            time_features: ``[B, V, F]`` numeric: time since the last visit, time since the first,
                index of the visit, or what the model was trained with. Padded visits' features are
                not read on the fused path. None means zeros.

        Raises:
            ValueError: also for time features that are not ``[B, V, F]``, and a packed batch
                without them; else as the base class.
        """
        if time_features is not None:
            kind = f"a tensor [B, V, {self._n_visit_features}] or None"
            expect_tensor("time_features", time_features, kind)
        if time_features is not None and isinstance(visit_codes, Tensor):
            expected = (*visit_codes.shape[:2], self._n_visit_features)
            if time_features.shape != expected:
                raise ValueError(
                    f"time_features: expected [B, V, {expected[2]}] = {list(expected)} as "
                    f"visit_codes, got shape {list(time_features.shape)}"
                )
        return self._hazards(visit_codes, visit_mask, sequence_mask, time_features)

    def predict_survival(
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        time_features: Tensor | None = None,
    ) -> Any:
        """Survival probabilities and cumulative hazards, as the base class has them."""
        return survival_curve(self(visit_codes, visit_mask, sequence_mask, time_features))
