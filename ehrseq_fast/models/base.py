"""What all visit models share: visit vectors → LSTM over visits → hidden states, on three paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..visit_pool import visit_mean_pool
from .pooling import plain_pool
from .sequences import (
    PackedOrder,
    check_padded_batch,
    check_sequence_mask,
    describe_code_outside_vocabulary,
    real_code_slots,
    real_lengths,
)

PATHS = ("fused", "packed", "padded")


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of one batch, in the form that its path works on.

    Attributes:
        values: ``[n_visits, D]`` on the fused path, ``[B, V, D]`` on the others. A head works on
            the last dimension and need not know which.
        final: ``[B, D]``, the state after each patient's last real visit (both directions' ends for
            a bidirectional LSTM).
        to_padded: brings anything computed from ``values`` to ``[B, V, ...]``, zeros on padding.
    """

    values: Tensor
    final: Tensor
    to_padded: Callable[[Tensor], Tensor]


class VisitSequenceModel(nn.Module):
    """Base of the models: an embedding of codes, and an LSTM over visit vectors.

    Subclasses build ``embedding`` and ``lstm`` in their own order (which seeded initialisation
    shows), and may override how a visit becomes a vector and what else the LSTM sees of it.
    """

    embedding: nn.Embedding
    lstm: nn.LSTM

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @property
    def path(self) -> str:
        """How the forward pass is computed: ``"fused"``, ``"packed"`` or ``"padded"``."""
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        if path not in PATHS:
            raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
        self._path = path

    def _visit_rows(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Codes ``[n_visits, C]`` of real visits → visit vectors ``[n_visits, E]``."""
        return visit_mean_pool(
            codes,
            self.embedding.weight,
            mask,
            padding_idx=self.embedding.padding_idx,
            sparse_grad=self.embedding.sparse,
        )

    def _visit_vectors(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Codes ``[B, V, C]`` → visit vectors ``[B, V, E]``, in plain PyTorch."""
        return plain_pool(self.embedding(codes), mask, "mean")

    def _lstm_input(self, vectors: Tensor, visit_features: Tensor | None) -> Tensor:
        """Visit vectors ``[..., E]`` and what else is known of the visits → LSTM input."""
        return vectors

    def _hidden_states(
        self,
        visit_codes: Tensor,
        visit_mask: Tensor | None,
        sequence_mask: Tensor | None,
        visit_features: Tensor | None = None,
    ) -> HiddenStates:
        check_padded_batch(visit_codes, visit_mask, sequence_mask)
        run = {"fused": self._run_fused, "packed": self._run_packed, "padded": self._run_padded}
        try:
            return run[self.path](visit_codes, visit_mask, sequence_mask, visit_features)
        except IndexError as error:
            looked_up = None
            if self.path == "fused":
                looked_up = real_code_slots(visit_codes, visit_mask, sequence_mask)
            message = describe_code_outside_vocabulary(
                visit_codes, looked_up, self.embedding.num_embeddings
            )
            if message is None:
                raise
            raise IndexError(message) from error

    def _run_fused(
        self,
        visit_codes: Tensor,
        visit_mask: Tensor | None,
        sequence_mask: Tensor | None,
        visit_features: Tensor | None,
    ) -> HiddenStates:
        order = PackedOrder.of(visit_codes, sequence_mask)
        vectors = self._visit_rows(
            order.gather(visit_codes), None if visit_mask is None else order.gather(visit_mask)
        )
        if visit_features is not None:
            visit_features = order.gather(visit_features)
        states, (h_n, _) = self.lstm(order.pack(self._lstm_input(vectors, visit_features)))
        return HiddenStates(states.data, self._last_layer(h_n), order.scatter)

    def _run_packed(
        self,
        visit_codes: Tensor,
        visit_mask: Tensor | None,
        sequence_mask: Tensor | None,
        visit_features: Tensor | None,
    ) -> HiddenStates:
        patients, visits = visit_codes.shape[:2]
        if sequence_mask is None:
            lengths = torch.full((patients,), visits)
        else:
            lengths = real_lengths(sequence_mask)
        vectors = self._lstm_input(self._visit_vectors(visit_codes, visit_mask), visit_features)
        packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        states, (h_n, _) = self.lstm(packed)
        padded, _ = pad_packed_sequence(states, batch_first=True, total_length=visits)
        return HiddenStates(padded, self._last_layer(h_n), times_mask(sequence_mask))

    def _run_padded(
        self,
        visit_codes: Tensor,
        visit_mask: Tensor | None,
        sequence_mask: Tensor | None,
        visit_features: Tensor | None,
    ) -> HiddenStates:
        if sequence_mask is not None:
            check_sequence_mask(sequence_mask)
        vectors = self._lstm_input(self._visit_vectors(visit_codes, visit_mask), visit_features)
        states, (h_n, _) = self.lstm(vectors)
        if sequence_mask is None:
            return HiddenStates(states, self._last_layer(h_n), times_mask(None))
        last_visit = (sequence_mask != 0).sum(1) - 1
        forward_end = states[torch.arange(len(states), device=states.device), last_visit]
        if self.lstm.bidirectional:
            width = self.lstm.hidden_size
            final = torch.cat([forward_end[:, :width], states[:, 0, width:]], dim=1)
        else:
            final = forward_end
        return HiddenStates(states, final, times_mask(sequence_mask))

    def _last_layer(self, h_n: Tensor) -> Tensor:
        """``[layers * directions, B, H]`` → ``[B, H]``, or ``[B, 2H]`` for both directions."""
        if self.lstm.bidirectional:
            return torch.cat([h_n[-2], h_n[-1]], dim=1)
        return h_n[-1]


def times_mask(sequence_mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Multiply ``[B, V, ...]`` by the mask, keeping its dtype; nothing to do without a mask."""

    def masked(padded: Tensor) -> Tensor:
        if sequence_mask is None:
            return padded
        real = (sequence_mask != 0).to(padded.dtype)
        return padded * real.reshape(*real.shape, *[1] * (padded.dim() - 2))

    return masked


def lstm_dropout(dropout: float, num_layers: int) -> float:
    """Dropout between LSTM layers, where there is more than one."""
    return dropout if num_layers > 1 else 0.0
