"""What the losses whose terms are visits share: which visits there are, padded or packed, and what
is refused of labels and weights. ``csrc/common/survival/faults.h`` refuses the same in the same
words."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import transformed
from .checks import REAL
from .rows import PackedRows
from .rows.beside import ROWS, fields_of
from .survival_nll.checks import check_companion, check_mask, refuse_mask


class Visits(NamedTuple):
    """The layout of a loss's visits: padded ``[B, V]`` with or without a mask, or the rows of a
    packed batch, where visit ``t`` of patient ``p`` is ``row_starts[t] + unsorted_indices[p]``."""

    sequence_mask: Tensor | None = None
    row_starts: Tensor | None = None
    unsorted_indices: Tensor | None = None
    last_rows: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.row_starts is not None

    def times(self, like: Tensor) -> Tensor:
        """The index of each visit among its patient's, ``[1, V]`` or ``[n_visits]``."""
        if self.row_starts is None:
            return torch.arange(like.shape[1], device=like.device)[None]
        rows = torch.arange(like.shape[0], device=like.device)
        return torch.searchsorted(self.row_starts, rows, right=True) - 1

    def of_patients(self, values: Tensor, like: Tensor) -> Tensor:
        """Numbers ``[B]`` of patients at their visits: ``[B, 1]`` or ``[n_visits]``."""
        if self.row_starts is None:
            return values[:, None]
        assert self.unsorted_indices is not None
        rows = torch.arange(like.shape[0], device=like.device)
        ranks = rows - self.row_starts[self.times(like)]
        return values[self.unsorted_indices.argsort()[ranks]]

    def real(self, like: Tensor) -> Tensor:
        """Which slots are visits, of the shape of labels ``like``."""
        if self.sequence_mask is None:
            return torch.ones(like.shape, dtype=torch.bool, device=like.device)
        return self.sequence_mask != 0

    def padded(self, values: Tensor) -> Tensor:
        """Values of all visits as ``[B, V]``; zeros where there is no visit."""
        if self.row_starts is None:
            return torch.where(self.real(values), values, 0)
        assert self.unsorted_indices is not None
        ranks = self.unsorted_indices[:, None]
        exists = ranks < self.row_starts.diff()
        return torch.where(exists, values[torch.where(exists, self.row_starts[:-1] + ranks, 0)], 0)


def layout_of(
    logits: Tensor | PackedRows, sequence_mask: Tensor | None
) -> tuple[Tensor, Visits, int | None]:
    """The logits as a tensor, their visits, and how many patients packed ones have."""
    if not isinstance(logits, PackedRows):
        return logits, Visits(sequence_mask), None
    refuse_mask(sequence_mask)
    batch = logits.batch
    visits = Visits(None, *fields_of(batch, *ROWS))
    return logits.values, visits, len(batch)


def check_companions(
    logits: Tensor,
    visits: Visits,
    patients: int,
    visit_weight: Tensor | None,
    sample_weight: Tensor | None,
) -> None:
    """Refuse a mask or weights whose kind, dtype, shape or device does not fit ``logits``."""
    numeric = (REAL, "a bool or numeric")
    if visits.sequence_mask is not None:
        check_of_visits(logits, visits, "sequence_mask", visits.sequence_mask, *numeric)
    if visit_weight is not None:
        check_of_visits(logits, visits, "visit_weight", visit_weight, *numeric)
    if sample_weight is not None:
        check_companion(logits, "logits", (patients,), "sample_weight", sample_weight, *numeric)
    refuse_learned(logits, visit_weight=visit_weight, sample_weight=sample_weight)


def check_of_visits(
    logits: Tensor,
    visits: Visits,
    name: str,
    tensor: Tensor,
    dtypes: frozenset[torch.dtype],
    kind: str,
) -> None:
    """Refuse anything but one number per visit, of these dtypes."""
    dims = ("n_visits",) if visits.packed else ("B", "V")
    shape = tuple(logits.shape[: len(dims)])
    check_companion(logits, "logits", shape, name, tensor, dtypes, kind, dims)


def refuse_learned(logits: Tensor, **weights: Tensor | None) -> None:
    """Refuse weights that require a gradient, which a kernel does not give."""
    for name, weight in weights.items():
        learns = weight is not None and weight.requires_grad and torch.is_grad_enabled()
        if learns and not transformed(logits, weight):
            raise ValueError(
                f"{name}: expected no requires_grad, as the loss has a gradient for logits alone; "
                'detach it, or weight the result of reduction="none" yourself'
            )


def check_weights(
    visits: Visits, visit_weight: Tensor | None, sample_weight: Tensor | None
) -> None:
    """Refuse weights below 0. Reads values. A NaN or an infinity is to reach the result."""
    if visit_weight is not None:
        rule = "visit_weight must not be negative"
        refuse_visits(visits, visit_weight < 0, visit_weight, rule)
    if sample_weight is not None:
        refuse_patients(sample_weight < 0, sample_weight, "sample_weight must not be negative")


def check_visits(visits: Visits) -> None:
    """Refuse a malformed mask. Reads values."""
    if visits.sequence_mask is not None:
        check_mask(visits.sequence_mask)


def refuse_visits(visits: Visits, wrong: Tensor, values: Tensor, rule: str) -> None:
    """``ValueError`` where ``wrong`` holds at a visit: the first, of the first patient."""
    at_visits = visits.padded(wrong)
    if not bool(at_visits.any()):
        return
    patient, visit = at_visits.nonzero()[0].tolist()
    value = visits.padded(values)[patient, visit].item()
    raise ValueError(
        f"{rule}: patient {patient} has {value:g} at visit {visit} "
        f"(visits at fault: {int(at_visits.sum())})"
    )


def refuse_patients(wrong: Tensor, values: Tensor, rule: str) -> None:
    """``ValueError`` where ``wrong`` holds of a patient, for the first one."""
    if not bool(wrong.any()):
        return
    patient = int(wrong.int().argmax())
    raise ValueError(
        f"{rule}: patient {patient} has {values[patient].item():g} "
        f"(patients at fault: {int(wrong.sum())})"
    )
