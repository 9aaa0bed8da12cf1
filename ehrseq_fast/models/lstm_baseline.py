"""Patient-level prediction: encode each visit, run an LSTM over them, predict from its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arrays import expect_tensor
from ..backend import use_backend, validate_on_device
from ..batch import PackedVisits
from ..checks import expect_option
from ..visit_pool import codes_in_use, masked_pool, packed_visit_pool
from .base import VisitSequenceModel
from .head import called, run_network
from .pooling import attend, plain_pool
from .reading import are_plain, is_plain, is_plain_embedding, readable
from .recurrent import visit_layer
from .sequences import expect_batch
from .visit_vectors import (
    embed,
    embed_real,
    padded_embeddings,
    pool_codes,
    pool_rows,
    pool_weighted_codes,
)

AGGREGATIONS = ("mean", "sum", "max", "attention")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "binary_classification": nn.Sigmoid,
    "multi_class": lambda: nn.Softmax(dim=-1),
    "regression": nn.Identity,
}
_ATTENTION = (nn.Linear, nn.Tanh, nn.Linear)
SIZES: dict[str, dict[str, Any]] = {
    "small": {"embedding_dim": 128, "hidden_dim": 256, "num_layers": 1, "dropout": 0.3},
    "medium": {"embedding_dim": 256, "hidden_dim": 512, "num_layers": 2, "dropout": 0.3},
    "large": {"embedding_dim": 512, "hidden_dim": 1024, "num_layers": 3, "dropout": 0.4},
}


@readable
class VisitEncoder(nn.Module):
    """A visit's code embeddings → one vector, by mean, sum, maximum or learned attention.

    Constructor and ``state_dict`` (``attention.{0,2}.*`` for attention) are those of
    ``ehrsequencing.models.VisitEncoder``. A visit without a real code gives zeros in all four (the
    reference gives −inf for max and NaN for attention), and nothing in a padded slot matters.

    Args:
        embedding_dim: width E of a code's embedding.
        aggregation: ``"mean"``, ``"sum"``, ``"max"`` or ``"attention"``: a two-layer network scores
            each code, and the visit is the mean under the softmax of the scores.
        dropout: on the visit vector, in training mode.

    Raises:
        ValueError: for another aggregation.

    Example:
        >>> import torch
        >>> from ehrseq_fast.models import VisitEncoder
        >>> encoder = VisitEncoder(embedding_dim=2, aggregation="max").eval()
        >>> embeddings = torch.tensor([[[1.0, 4.0], [3.0, 2.0], [9.0, 9.0]]])
        >>> encoder(embeddings, torch.tensor([[1, 1, 0]]))
        tensor([[3., 4.]])
    """

    def __init__(self, embedding_dim: int, aggregation: str = "mean", dropout: float = 0.1) -> None:
        super().__init__()
        expect_option("aggregation", aggregation, AGGREGATIONS)
        self.embedding_dim = embedding_dim
        self.aggregation = aggregation
        self.dropout = nn.Dropout(dropout)
        if aggregation == "attention":
            self.attention = nn.Sequential(
                nn.Linear(embedding_dim, embedding_dim // 2),
                nn.Tanh(),
                nn.Linear(embedding_dim // 2, 1),
            )

    def _scores(self, embeddings: Tensor) -> Tensor:
        return called(self.attention, embeddings)

    def forward(self, visit_embeddings: Tensor, visit_mask: Tensor | None = None) -> Tensor:
        """``[..., C, E]`` → ``[..., E]``.

        Args:
            visit_embeddings: ``[..., C, E]``, floating; ``[B, C, E]`` in the reference.
            visit_mask: ``[..., C]`` bool or numeric, non-zero for real codes. None counts every
                slot, padding too.

        Raises:
            ValueError: for shapes that do not fit.
            TypeError: for anything but tensors.
        """
        expect_tensor("visit_embeddings", visit_embeddings)
        if visit_mask is not None:
            expect_tensor("visit_mask", visit_mask, "a tensor or None")
        if visit_embeddings.dim() < 2 or visit_embeddings.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"visit_embeddings: expected [..., C, {self.embedding_dim}], "
                f"got shape {list(visit_embeddings.shape)}"
            )
        if visit_mask is not None and visit_mask.shape != visit_embeddings.shape[:-1]:
            raise ValueError(
                f"visit_mask: expected [..., C] = {list(visit_embeddings.shape[:-1])} as "
                f"visit_embeddings, got shape {list(visit_mask.shape)}"
            )
        if self.aggregation == "attention":
            vectors = attend(visit_embeddings, visit_mask, self._scores)
        else:
            vectors = masked_pool(visit_embeddings, visit_mask, mode=self.aggregation)
        return self.dropout(vectors)

    def encode_batch(self, batch: PackedVisits, embedding: nn.Module) -> Tensor:
        """A packed batch → ``[n_visits, E]``, the same numbers with no ``[N, C, E]`` in between."""
        if self.aggregation != "attention":
            return self.dropout(pool_codes(embedding, batch, self.aggregation))
        if is_plain_embedding(embedding) and are_plain(self.attention, _ATTENTION):
            # A score depends on the code alone, so each code in use is scored once. The rows in use
            # alone: another code's row may hold anything, and 0 · NaN is NaN.
            table = embed(embedding, batch.index_codes)
            scores = run_network(self.attention, table).squeeze(-1).to(table.dtype)
            vectors = packed_visit_pool(codes_in_use(batch), table, mode="attention", scores=scores)
        else:
            rows = embed(embedding, batch.codes)
            scores = self._scores(rows).squeeze(-1).to(rows.dtype)
            vectors = pool_rows(batch, rows, "attention", scores)
        return self.dropout(vectors)

    def encode_weighted(self, codes: Tensor, mask: Tensor, embedding: nn.Module) -> Tensor:
        """Codes ``[N, C]`` with fractional weights → ``[N, E]``."""
        if self.aggregation == "attention":
            return self.encode_plain(embed_real(embedding, codes, mask), mask)
        return self.dropout(pool_weighted_codes(embedding, codes, mask, self.aggregation))

    def encode_plain(self, visit_embeddings: Tensor, visit_mask: Tensor | None = None) -> Tensor:
        """:meth:`forward` in plain PyTorch operations alone, for the packed and padded paths."""
        if self.aggregation == "attention":
            vectors = attend(visit_embeddings, visit_mask, self._scores)
        else:
            vectors = plain_pool(visit_embeddings, visit_mask, self.aggregation)
        return self.dropout(vectors)


class LSTMBaseline(VisitSequenceModel):
    """One prediction per patient from the LSTM's state after the last real visit.

    Constructor, ``state_dict`` and seeded initialisation are those of
    ``ehrsequencing.models.LSTMBaseline``.

    Masks say what is padding, at two levels:

    * ``visit_mask`` ``[B, V, C]`` (codes): non-zero marks a real code. Without it every slot
      counts, padding too: the visit vector then depends on how far visits were padded.
    * ``sequence_mask`` ``[B, V]`` (visits): non-zero marks a real visit; real visits come first.
      Without it every visit counts, and the prediction is made from the last padded slot.

    A loss on the predictions needs no mask; one on ``hidden_states`` does (a third level, see
    :func:`ehrseq_fast.losses.compute_masked_loss`).

    Where this differs from the reference: empty visits give zeros also for max and attention;
    padded slots cannot spread NaN (fused path); ``hidden_states`` keep the input's V visits, zeros
    on padding; non-contiguous inputs work; 16-bit models run; ``predict`` leaves the model in the
    mode that it found; unknown tasks and aggregations, patients without a visit and masks with
    holes are refused.

    Args:
        vocab_size: number of codes.
        embedding_dim, hidden_dim, num_layers, bidirectional: widths and shape of the LSTM.
        dropout: on visit vectors, on the final state, and between LSTM layers.
        visit_aggregation: ``"mean"``, ``"sum"``, ``"max"`` or ``"attention"``.
        output_dim: number of outputs O.
        task: ``"binary_classification"`` (sigmoid), ``"multi_class"`` (softmax), ``"regression"``.
        padding_idx: the code whose embedding is not trained. It is not a mask.
        cell: ``"lstm"`` or ``"gru"``, as in
            :class:`~ehrseq_fast.models.DiscreteTimeSurvivalLSTM`.
        path: ``"fused"``, ``"packed"`` or ``"padded"``, as in
            :class:`~ehrseq_fast.models.DiscreteTimeSurvivalLSTM`. With dropout active the paths
            draw different random numbers; in ``eval()`` they agree.

    Raises:
        ValueError: for another task, aggregation, cell or path.

    Example:
        >>> import torch
        >>> from ehrseq_fast.models import LSTMBaseline
        >>> model = LSTMBaseline(vocab_size=10, embedding_dim=4, hidden_dim=8).eval()
        >>> visit_codes = torch.tensor([[[3, 5], [2, 0]], [[7, 0], [0, 0]]])
        >>> visit_mask = visit_codes != 0
        >>> out = model(visit_codes, visit_mask, visit_mask.any(2), return_hidden=True)
        >>> {name: tuple(tensor.shape) for name, tensor in out.items()}
        {'logits': (2, 1), 'predictions': (2, 1), 'hidden_states': (2, 2, 8)}
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 128,
        hidden_dim: int = 256,
        num_layers: int = 2,
        dropout: float = 0.3,
        bidirectional: bool = False,
        visit_aggregation: str = "mean",
        output_dim: int = 1,
        task: str = "binary_classification",
        padding_idx: int = 0,
        *,
        cell: str = "lstm",
        path: str = "fused",
    ) -> None:
        super().__init__(path)
        expect_option("task", task, ACTIVATIONS)
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.task = task
        self.output_dim = output_dim

        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=padding_idx)
        self.visit_encoder = VisitEncoder(embedding_dim, visit_aggregation, dropout)
        self.lstm = visit_layer(
            cell, embedding_dim, hidden_dim, num_layers, dropout, bidirectional=bidirectional
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * hidden_dim if bidirectional else hidden_dim, output_dim)
        self.activation = ACTIVATIONS[task]()

    # A visit encoder that has hooks or was replaced is called on padded visits.

    def _pool_rows(self, batch: PackedVisits) -> Tensor:
        if is_plain(self.visit_encoder, VisitEncoder):
            return self.visit_encoder.encode_batch(batch, self.embedding)
        return self.visit_encoder(*padded_embeddings(self.embedding, batch))

    def _pooling_mode(self) -> str | None:
        return getattr(self.visit_encoder, "aggregation", None)

    def _pool_weighted_rows(self, codes: Tensor, mask: Tensor) -> Tensor:
        if is_plain(self.visit_encoder, VisitEncoder):
            return self.visit_encoder.encode_weighted(codes, mask, self.embedding)
        return self.visit_encoder(embed_real(self.embedding, codes, mask), mask)

    def _visit_vectors(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        embeddings = self.embedding(codes)
        if is_plain(self.visit_encoder, VisitEncoder):
            return self.visit_encoder.encode_plain(embeddings, mask)
        flat = None if mask is None else mask.flatten(0, 1)
        with use_backend("reference"):
            vectors = self.visit_encoder(embeddings.flatten(0, 1), flat)
        return vectors.unflatten(0, codes.shape[:2])

    def forward(
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        return_hidden: bool = False,
    ) -> dict[str, Any]:
        """Predictions for a batch of patients.

        Args:
            visit_codes: ``[B, V, C]`` int32 or int64, or a :class:`~ehrseq_fast.PackedVisits` in
                place of all three.
            visit_mask: ``[B, V, C]`` bool or numeric, or None; see the class.
            sequence_mask: ``[B, V]`` bool or numeric, or None; see the class.
            return_hidden: also return the LSTM's states.

        Returns:
            ``logits`` ``[B, O]``, ``predictions`` ``[B, O]`` (after the task's activation) and,
            asked for, ``hidden_states`` ``[B, V, H]`` (2H if bidirectional), zeros on padding;
            of a packed batch :class:`~ehrseq_fast.PackedRows` ``[n_visits, H]``. Under autocast
            on the CPU states keep the model's dtype, logits have autocast's, on every path.

        Raises:
            ValueError: for shapes that do not fit, patients without a visit, masks with holes.
            IndexError: for codes outside the vocabulary.
            TypeError: for codes that are not int32 or int64.
        """
        states = self._hidden_states(visit_codes, visit_mask, sequence_mask)
        output = self._output(states.final)
        if return_hidden:
            output["hidden_states"] = states.to_output(states.values)
        return output

    def _output(self, states: Tensor) -> dict[str, Any]:
        logits = self._apply_network(self.fc, self.dropout(states))
        return {"logits": logits, "predictions": self.activation(logits)}

    def loss(self, batch: PackedVisits, target: str = "labels", **options: Any) -> Tensor:
        """From codes to the task's loss, nothing padded.

        Binary cross-entropy of logits, cross-entropy or squared error, by the model's task, of
        ``batch.targets[target]``: ``[B]`` or ``[B, O]``, class indices ``[B]`` for multi_class.

        Args:
            batch: patients with that target.
            target: its name.
            options: for the torch function (``reduction``, ``weight``, ``pos_weight``, ...).

        Raises:
            KeyError: if the batch has no such target.
            ValueError: if its shape does not fit.
            TypeError: for anything but a packed batch.
        """
        expect_batch(batch)
        if target not in batch.targets:
            raise KeyError(f"target: expected one of {sorted(batch.targets)}, got {target!r}")
        wanted = batch.targets[target]
        logits = self(batch)["logits"]
        if self.task == "multi_class":
            if wanted.shape != logits.shape[:1]:
                raise ValueError(
                    f"target {target!r}: expected [B] = {[len(batch)]} class indices, "
                    f"got shape {list(wanted.shape)}"
                )
            return F.cross_entropy(logits, _class_indices(wanted, target), **options)
        if wanted.numel() != logits.numel() or len(wanted) != len(batch):
            raise ValueError(
                f"target {target!r}: expected [B, O] = {list(logits.shape)}, "
                f"got shape {list(wanted.shape)}"
            )
        wanted = wanted.to(logits.dtype).reshape(logits.shape)
        if self.task == "binary_classification":
            return F.binary_cross_entropy_with_logits(logits, wanted, **options)
        return F.mse_loss(logits, wanted, **options)

    def _loss_divisor(self, batch: PackedVisits, target: str = "labels", **options: Any) -> Tensor:
        wanted = batch.targets.get(target)
        if wanted is None or self.task != "multi_class":
            elements = 1 if self.task == "multi_class" else self.output_dim
            return elements * super()._loss_divisor(batch)
        counted = wanted != options.get("ignore_index", -100)
        weight = options.get("weight")
        if weight is None:
            return counted.sum(dtype=torch.float64)
        weights = weight.double().index_select(0, wanted.masked_fill(~counted, 0).long())
        return weights.masked_fill(~counted, 0).sum()

    def get_embeddings(self, codes: Tensor) -> Tensor:
        """Embeddings of codes, ``[...]`` → ``[..., E]``."""
        return self.embedding(codes)

    @torch.no_grad()
    def predict(
        self,
        visit_codes: Tensor | PackedVisits,
        visit_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
    ) -> Tensor:
        """``predictions`` ``[B, O]``, with no dropout and no gradient; else as :meth:`forward`."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            return self(visit_codes, visit_mask, sequence_mask)["predictions"]
        finally:
            for module in training:  # others may have been frozen in a model that is trained
                module.training = True


def _class_indices(labels: Tensor, target: str) -> Tensor:
    """Labels as integers; floating-point ones are taken where that changes none."""
    indices = labels.long()
    exact = not labels.is_floating_point() or torch.compiler.is_compiling()
    if not exact and (labels.device.type == "cpu" or validate_on_device()):
        changed = indices != labels
        if changed.any():
            patient = int(changed.int().argmax())
            raise ValueError(
                f"target {target!r}: expected class indices, got {float(labels[patient])} for "
                f"patient {patient}"
            )
    return indices


def create_lstm_baseline(
    vocab_size: int,
    task: str = "binary_classification",
    output_dim: int | None = None,
    model_size: str = "small",
    *,
    path: str = "fused",
) -> LSTMBaseline:
    """An :class:`LSTMBaseline` of a preset size.

    Args:
        vocab_size: number of codes.
        task: as in :class:`LSTMBaseline`.
        output_dim: number of outputs; 1 if not given, but needed for ``"multi_class"``.
        model_size: embedding width, state width, layers, dropout: ``"small"`` (128, 256, 1, 0.3),
            ``"medium"`` (256, 512, 2, 0.3), ``"large"`` (512, 1024, 3, 0.4).
        path: as in :class:`LSTMBaseline`.

    Raises:
        ValueError: for another size or task, or ``"multi_class"`` without ``output_dim``.

    Example:
        >>> from ehrseq_fast.models import create_lstm_baseline
        >>> create_lstm_baseline(50, "multi_class", output_dim=4).fc
        Linear(in_features=256, out_features=4, bias=True)
    """
    expect_option("model_size", model_size, SIZES)
    if output_dim is None:
        if task == "multi_class":
            raise ValueError("output_dim: expected a number with task 'multi_class', got None")
        output_dim = 1
    return LSTMBaseline(
        vocab_size, **SIZES[model_size], output_dim=output_dim, task=task, path=path
    )
