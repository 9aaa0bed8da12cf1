"""What all visit models share: visit vectors → LSTM over visits → hidden states, on three paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..arrays import expect_tensor, kind_of
from ..autograd import transformed, values_are_hidden
from ..batch import PackedVisits
from ..checks import expect_option, refuse_codes_outside
from ..compiling import let_trace
from ..rows import PackedRows, VisitState
from .head import called, hazards_of, run_network
from .pooling import plain_pool
from .reading import is_plain_embedding
from .recurrent import first_state, recurrent_layer, run, run_plain, untransformed
from .sequences import (
    check_padded_batch,
    check_sequence_mask,
    is_fractional,
    pack_padded_batch,
    real_lengths,
)
from .visit_vectors import pool_codes, pool_weighted_codes, vocabulary_of

PATHS = ("fused", "packed", "padded")

# of a code, as the batch builder names it
_PLACE = "patient {0[0]}, visit {0[1]}, code {0[2]}"


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of one batch, in the form that its path works on.

    Attributes:
        values: ``[n_visits, D]`` on the fused path, ``[B, V, D]`` on the others. A head works on
            the last dimension and need not know which.
        final: ``[B, D]``, the state after each patient's last real visit (both directions' ends for
            a bidirectional LSTM).
        to_output: converts anything computed from ``values`` to the form that the caller gets:
            ``[B, V, ...]`` with zeros on padding, or :class:`PackedRows` for a packed batch.
    """

    values: Tensor
    final: Tensor
    to_output: Callable[[Tensor], Any]


class VisitSequenceModel(nn.Module):
    """Base of the models: an embedding of codes, and an LSTM or GRU (``lstm``) over visit vectors.

    Subclasses build ``embedding`` and ``lstm`` in their own order (which seeded initialisation
    shows), and may override how a visit becomes a vector and what else the LSTM sees of it.
    """

    embedding: nn.Embedding
    lstm: nn.RNNBase
    _n_visit_features = 0

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @property
    def path(self) -> str:
        """How the forward pass is computed: ``"fused"``, ``"packed"`` or ``"padded"``."""
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        expect_option("path", path, PATHS)
        self._path = path

    # What a subclass may override

    def _pool_rows(self, batch: PackedVisits) -> Tensor:
        """A packed batch → visit vectors ``[n_visits, E]``."""
        return pool_codes(self.embedding, batch, "mean")

    def _pool_weighted_rows(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Codes ``[n_visits, C]`` and their weights → visit vectors ``[n_visits, E]``."""
        return pool_weighted_codes(self.embedding, codes, mask, "mean")

    def _visit_vectors(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Codes ``[B, V, C]`` → visit vectors ``[B, V, E]``, in plain PyTorch."""
        return plain_pool(self.embedding(codes), mask, "mean")

    def _pooling_mode(self) -> str | None:
        """How codes of a visit are pooled: ``"mean"``, ``"sum"``, ...; None where that is up to a
        module that was put in."""
        return "mean"

    def _lstm_input(self, vectors: Tensor, visit_features: Tensor | None) -> Tensor:
        """Visit vectors ``[..., E]`` and what else is known of the visits → LSTM input."""
        return vectors

    def _output(self, states: Tensor) -> Any:
        """What the model says of patients whose last states are ``[B, H]``."""
        raise NotImplementedError

    def _apply_head(self, head: nn.Module, states: Tensor) -> Tensor:
        """A hazard head of states; on the packed and padded paths in plain PyTorch."""
        return hazards_of(head, states) if self.path == "fused" else called(head, states)

    def _apply_network(self, network: nn.Module, rows: Tensor) -> Tensor:
        """Likewise a Linear, or several with activations between them."""
        return run_network(network, rows) if self.path == "fused" else called(network, rows)

    # Whole records

    def _vocabulary(self) -> int | None:
        """What codes are checked against before the embedding is read. None where it is called:
        then it is the embedding that says which codes it takes."""
        return vocabulary_of(self.embedding) if is_plain_embedding(self.embedding) else None

    def _hidden_states(
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None,
        sequence_mask: Tensor | None,
        visit_features: Tensor | None = None,
    ) -> HiddenStates:
        if isinstance(visit_codes, PackedVisits):
            if visit_mask is not None or sequence_mask is not None or visit_features is not None:
                raise ValueError(
                    "masks and features: expected none beside a PackedVisits, which holds its own"
                )
            return self._run_batch(visit_codes)
        check_padded_batch(visit_codes, visit_mask, sequence_mask)
        if values_are_hidden(visit_codes, visit_mask, sequence_mask):
            raise RuntimeError(
                "visits are packed by the values of codes and masks, which torch.func.vmap hides: "
                "pass all patients as one batch; for gradients by patient, compute the loss of "
                "batch[i] for each i (vmap over weights works)"
            )
        if self.path == "fused":
            if torch.compiler.is_exporting():
                raise RuntimeError(
                    'path="fused" packs visits by the values of the masks, and cannot be exported: '
                    'set model.path = "padded"'
                )
            return self._run_fused(visit_codes, visit_mask, sequence_mask, visit_features)
        run = self._run_packed if self.path == "packed" else self._run_padded
        try:
            return run(visit_codes, visit_mask, sequence_mask, visit_features)
        except IndexError as error:
            vocab_size = vocabulary_of(self.embedding)
            if vocab_size is not None:
                try:
                    refuse_codes_outside(visit_codes, vocab_size, place=_PLACE)
                except IndexError as outside:
                    raise outside from error
            raise
        except RuntimeError as error:
            if not transformed(*self.parameters()):
                raise
            raise untransformed(self.lstm, self.path, error) from error

    def _run_batch(self, batch: PackedVisits) -> HiddenStates:
        if batch.n_patients == 0:
            raise ValueError("batch: expected at least one patient, got none")
        if batch.code_weights is not None and self._pooling_mode() in ("max", "attention"):
            raise ValueError(
                f"code_weights: expected none with visits pooled by {self._pooling_mode()}, which "
                "has no use for them: pass batch.with_code_weights(None)"
            )
        self._check_features(batch)
        let_trace(self, "lstm")

        def packed(values: Tensor) -> PackedRows:
            return PackedRows(values, batch)

        if self.path == "fused":
            return self._run_rows(batch, self._pool_rows(batch), batch.visit_features, packed)
        features = None if batch.visit_features is None else batch.pad(batch.visit_features)
        states = self._hidden_states(*batch.to_padded(), features)
        return HiddenStates(batch.pack(states.values), states.final, packed)

    def _check_features(self, batch: PackedVisits) -> None:
        """Refuse a batch whose visit features the model would not see, or that lacks them."""
        given = batch.visit_features
        width = self._n_visit_features
        name = type(self).__name__
        if given is None and width:
            raise ValueError(
                f"batch.visit_features: expected [n_visits, {width}], which {name} reads, got "
                "None; batch.with_features(features) adds them"
            )
        if given is not None and type(self)._lstm_input is VisitSequenceModel._lstm_input:
            raise ValueError(
                f"batch.visit_features: expected None, as {name} reads none, got "
                f"{list(given.shape)}; batch.with_features(None) leaves them out"
            )

    def _run_fused(
        self,
        visit_codes: Tensor,
        visit_mask: Tensor | None,
        sequence_mask: Tensor | None,
        visit_features: Tensor | None,
    ) -> HiddenStates:
        fractional = is_fractional(visit_mask)
        batch = pack_padded_batch(
            visit_codes,
            (visit_mask != 0) if visit_mask is not None and fractional else visit_mask,
            sequence_mask,
            self._vocabulary(),
        )
        if visit_mask is not None and fractional:
            vectors = self._pool_weighted_rows(batch.pack(visit_codes), batch.pack(visit_mask))
        else:
            vectors = self._pool_rows(batch)
        features = None if visit_features is None else batch.pack(visit_features)
        n_visits = visit_codes.shape[1]
        return self._run_rows(
            batch, vectors, features, lambda values: batch.pad(values, total_length=n_visits)
        )

    def _run_rows(
        self,
        batch: PackedVisits,
        vectors: Tensor,
        visit_features: Tensor | None,
        to_output: Callable[[Tensor], Any],
    ) -> HiddenStates:
        sequence = batch.as_packed_sequence(self._lstm_input(vectors, visit_features))
        states = self._run_layer(sequence)
        ends = states.index_select(0, batch.last_rows)
        if recurrent_layer(self.lstm).bidirectional:
            first_rows = states.index_select(0, batch.unsorted_indices)
            ends = _of_both_directions(ends, first_rows)
        return HiddenStates(states, ends, to_output)

    def _run_layer(self, sequence: PackedSequence) -> Tensor:
        if torch.compiler.is_compiling():  # a graph may break in the layer, but not within a try
            return run(self.lstm, sequence)[0].data
        try:
            return run(self.lstm, sequence)[0].data
        except RuntimeError as error:
            of_pytorch = type(recurrent_layer(self.lstm)) in (nn.LSTM, nn.GRU, nn.RNN)
            if not of_pytorch or not transformed(sequence.data, *self.parameters()):
                raise
            raise untransformed(self.lstm, self.path, error) from error

    def _run_packed(
        self,
        visit_codes: Tensor,
        visit_mask: Tensor | None,
        sequence_mask: Tensor | None,
        visit_features: Tensor | None,
    ) -> HiddenStates:
        patients, visits = visit_codes.shape[:2]
        if sequence_mask is None:
            lengths = torch.full((patients,), visits, device="cpu")
        else:
            lengths = real_lengths(sequence_mask)
        vectors = self._lstm_input(self._visit_vectors(visit_codes, visit_mask), visit_features)
        packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        states, _ = run_plain(self.lstm, packed)
        padded, _ = pad_packed_sequence(states, batch_first=True, total_length=visits)
        ends = self._ends(padded, lengths.to(padded.device) - 1)
        return HiddenStates(padded, ends, times_mask(sequence_mask))

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
        states, _ = run_plain(self.lstm, vectors)
        if sequence_mask is None:
            last_visit = torch.full((states.shape[0],), states.shape[1] - 1, device=states.device)
        else:
            last_visit = (sequence_mask != 0).sum(1) - 1
        return HiddenStates(states, self._ends(states, last_visit), times_mask(sequence_mask))

    def _ends(self, states: Tensor, last_visit: Tensor) -> Tensor:
        """Outputs ``[B, V, D]`` at each patient's end: of both directions, where there are two.

        Taken from the layer's outputs on every path, and not from its final states: a hook or a
        wrapper may change the outputs alone."""
        ends = states[torch.arange(states.shape[0], device=states.device), last_visit]
        if recurrent_layer(self.lstm).bidirectional:
            ends = _of_both_directions(ends, states[:, 0])
        return ends

    def _loss_divisor(self, batch: PackedVisits, **options: Any) -> Tensor:
        """What the mean of ``loss`` divides by: a float64 scalar, on the batch's device."""
        return torch.tensor(float(len(batch)), dtype=torch.float64, device=batch.device)

    # Records that grow

    def start(self, n_patients: int = 1) -> VisitState:
        """The state of patients with no visit yet, for :meth:`step`.

        Raises:
            ValueError: for a bidirectional model, whose states depend on visits still to come.

        Example:
            >>> import torch
            >>> from ehrseq_fast import PackedVisits
            >>> from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
            >>> model = DiscreteTimeSurvivalLSTM(10, embedding_dim=4, hidden_dim=8).eval()
            >>> state = model.start()
            >>> for visit in ([3, 5], [2]):
            ...     hazard, state = model.step(state, visit)
            >>> whole = model(PackedVisits.from_lists([[[3, 5], [2]]]))
            >>> torch.allclose(hazard, whole.last(), atol=1e-6)
            True
        """
        h, c = first_state(self.lstm, n_patients)
        return VisitState(h, c, 0)

    @torch.no_grad()
    def step(
        self,
        state: VisitState,
        visit: Iterable[int] | Iterable[Sequence[int]],
        visit_features: Tensor | None = None,
    ) -> tuple[Any, VisitState]:
        """One more visit of each patient, at the cost of one LSTM step; no gradient.

        Equal to the whole forward pass on the record so far. Call ``model.eval()`` first: dropout
        is active in training mode.

        Args:
            state: from :meth:`start` or from the last step; it is left as it is.
            visit: the codes of the new visit for one patient, or one list of codes per patient.
            visit_features: ``[B, F]``, for a model that takes features of visits.

        Returns:
            What the model says after that visit (a survival model: hazards ``[B]``, with competing
            risks ``[B, K]``; :class:`LSTMBaseline`: its dictionary), and the new state.

        Raises:
            ValueError: for another number of patients than ``state`` has, or features that do not
                fit.
            IndexError: for codes outside the vocabulary.
            TypeError: for anything but a state, codes and a tensor.
        """
        if not isinstance(state, VisitState):
            raise TypeError(f"state: expected a VisitState of model.start(), got {kind_of(state)}")
        if not isinstance(visit, Iterable):
            raise TypeError(f"visit: expected a list of codes, got {kind_of(visit)}")
        # an iterator can be read once
        given: Any = visit if isinstance(visit, Sized) else list(visit)
        if visit_features is not None:
            expect_tensor("visit_features", visit_features, "a tensor [B, F] or None")
        patients = state.h.shape[1]
        is_one_visit = all(np.ndim(code) == 0 for code in given)
        visits = [given] if is_one_visit and patients == 1 else given
        if len(visits) != patients:
            raise ValueError(
                f"visit: expected one for each of the {patients} patients of state, got "
                f"{len(visits)}"
            )
        batch = PackedVisits.from_lists(
            [[codes] for codes in visits], vocab_size=self._vocabulary()
        ).to(state.h.device)
        if visit_features is not None:
            expected = [patients, self._n_visit_features]
            if not self._n_visit_features or list(visit_features.shape) != expected:
                raise ValueError(
                    f"visit_features: expected "
                    f"{f'[B, F] = {expected}' if self._n_visit_features else 'None'}, got shape "
                    f"{list(visit_features.shape)}"
                )
        vectors = self._lstm_input(self._pool_rows(batch), visit_features)
        sequence = PackedSequence(vectors, batch.batch_sizes)
        before = state.h if state.c is None else (state.h, state.c)
        outputs, final = run(self.lstm, sequence, before)
        h, c = final if isinstance(final, tuple) else (final, None)
        return self._output(outputs.data), VisitState(h, c, state.n_visits + 1)


def _of_both_directions(last: Tensor, first: Tensor) -> Tensor:
    """The forward direction ends at a patient's last visit, the reverse one at the first."""
    width = last.shape[1] // 2
    return torch.cat([last[:, :width], first[:, width:]], dim=1)


def times_mask(sequence_mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Zeros on padding, ``[B, V, ...]``, whatever it holds; nothing to do without a mask."""

    def masked(padded: Tensor) -> Tensor:
        if sequence_mask is None:
            return padded
        padding = sequence_mask == 0
        return padded.masked_fill(padding.reshape(*padding.shape, *[1] * (padded.dim() - 2)), 0)

    return masked
