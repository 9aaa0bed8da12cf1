"""``torch.export`` of models on packed batches: a program that serves batches of every size."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.export  # not part of `import torch`
from torch import Tensor, nn
from torch.fx.experimental import _config as _symbols
from torch.utils import _pytree

from .arrays import kind_of
from .batch import PackedVisits
from .batch.layout import INTS, LONGS, Layout
from .rows import PackedRows

#: The tensors of a batch that say which visits and codes it holds.
STRUCTURE = (*INTS, *LONGS, "batch_sizes", "lengths")
#: Those that a batch may lack.
OPTIONAL = ("visit_features", "code_weights")


def batch_tensors(batch: PackedVisits) -> dict[str, Tensor]:
    """The tensors of a batch that a model reads, by name: what a program of :func:`export_model`
    takes. Outcomes and targets, which no prediction may depend on, are not among them.

    Example:
        >>> from ehrseq_fast import PackedVisits
        >>> from ehrseq_fast.exporting import batch_tensors
        >>> batch_tensors(PackedVisits.from_lists([[[4]], [[1, 2], [3]]]))["batch_sizes"]
        tensor([2, 1])
    """
    if not isinstance(batch, PackedVisits):
        raise TypeError(f"batch: expected a PackedVisits, got {kind_of(batch)}")
    tensors = {name: getattr(batch, name) for name in (*STRUCTURE, *OPTIONAL)}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def export_model(model: nn.Module, batch: PackedVisits) -> torch.export.ExportedProgram:
    """``torch.export`` of ``model`` on packed batches, on the fused path, for inference.

    The numbers of patients, visits, codes and distinct codes, and the longest record, are dynamic:
    the program serves every batch with at least one patient. It takes
    ``batch_tensors(batch)``, and gives the model's output with the values of
    :class:`~ehrseq_fast.PackedRows` in their place, rows in the order of the batch. It can be saved
    with ``torch.export.save``, and loaded where ``ehrseq_fast`` was imported, for its operators.

    The program computes on the device of ``batch`` with the backend that was chosen while it was
    made; a batch given to it must have what ``batch`` has of ``visit_features`` and
    ``code_weights``, and in the same dtypes. Recurrent layers are exported on the CPU, by the
    compiled kernels; PyTorch's own, which take their place elsewhere, are not, on packed sequences.

    Args:
        model: a model of :mod:`ehrseq_fast.models`, one that
            :func:`~ehrseq_fast.accelerate` accelerated, or one of your own that takes a
            :class:`~ehrseq_fast.PackedVisits`; in ``eval()``.
        batch: any batch, as an example; it should hold at least two patients, one of them with two
            visits.

    Raises:
        ValueError: for a model in training mode, whose dropout would be part of the program.
        TypeError: for anything but a module and a packed batch.
        RuntimeError: torch.export's, for a model that decides by the values of tensors.

    Example:
        >>> import io, torch
        >>> from ehrseq_fast import PackedVisits
        >>> from ehrseq_fast.exporting import batch_tensors, export_model
        >>> from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
        >>> model = DiscreteTimeSurvivalLSTM(10, embedding_dim=4, hidden_dim=8).eval()
        >>> program = export_model(model, PackedVisits.from_lists([[[4]], [[1, 2], [3]]]))
        >>> file = io.BytesIO()
        >>> torch.export.save(program, file)
        >>> _ = file.seek(0)
        >>> loaded = torch.export.load(file).module()
        >>> batch = PackedVisits.from_lists([[[5, 6], [7]], [[2]], [[1, 3]]])
        >>> torch.allclose(loaded(batch_tensors(batch)), model(batch).values, atol=1e-6)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {kind_of(model)}")
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected one in eval(), got one in training mode")
    # views of one buffer in two dtypes, which a program could not be saved with as its example
    tensors = {name: tensor.detach().clone() for name, tensor in batch_tensors(batch).items()}
    dynamic = {name: {0: torch.export.Dim.DYNAMIC} for name in tensors}
    with torch.no_grad(), _one_is_any_size():
        return torch.export.export(
            _OfTensors(model, batch.vocab_size), (tensors,), dynamic_shapes=(dynamic,), strict=False
        )


def _one_is_any_size() -> contextlib.AbstractContextManager[Any]:
    """Sizes of 1 are not told from others in the block, as ``torch.onnx.export`` has it too."""
    config: Any = _symbols
    return config.patch(backed_size_oblivious=True)


class _OfTensors(nn.Module):
    """A model of packed batches as one of their tensors."""

    def __init__(self, model: nn.Module, vocab_size: int | None) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.eval()

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        output = self.model(_batch_of(tensors, self.vocab_size))
        return _pytree.tree_map(
            lambda leaf: leaf.values if isinstance(leaf, PackedRows) else leaf,
            output,
            is_leaf=lambda value: isinstance(value, PackedRows),
        )


def _batch_of(tensors: Mapping[str, Tensor], vocab_size: int | None) -> PackedVisits:
    """A batch of tensors that are traced, without the buffers that hold an ordinary one's."""
    views = {name: tensors[name] for name in STRUCTURE}
    layout = Layout(
        views["lengths"].shape[0],
        views["batch_sizes"].shape[0],
        views["code_offsets"].shape[0] - 1,
        views["codes"].shape[0],
        views["index_codes"].shape[0],
        (),
    )
    host, fields = views["batch_sizes"], views["codes"]
    batch = object.__new__(PackedVisits)
    for name, value in (
        ("_layout", layout),
        ("_host", host),
        ("_fields", fields),
        ("_views", views),
        ("_versions", (host._version, fields._version)),
        ("vocab_size", vocab_size),
        ("visit_features", tensors.get("visit_features")),
        ("code_weights", tensors.get("code_weights")),
        ("targets", {}),
        ("visit_targets", {}),
    ):
        object.__setattr__(batch, name, value)
    return batch
