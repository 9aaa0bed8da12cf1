"""The definition of the cross-entropy of one class per visit, in plain PyTorch.

Differentiable by autograd; 16 bits are computed in float32. Inputs are taken as they are: ``op.py``
checks them. What does not count is replaced before anything is computed of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator
from ..visitwise import Visits


def visit_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    visits: Visits,
    *,
    class_weight: Tensor | None = None,
    visit_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Σ w_n c_y (-log softmax(x_n)_y) over visits n with a label y, divided by Σ w_n c_y for the
    mean. ``logits`` are ``[..., K]``, ``labels`` ``[...]``."""
    dtype = accumulator(logits.dtype)
    classes = logits.shape[-1]
    labels = labels.long()  # uint8 would be compared with -100 as with 156
    counts = visits.real(labels) & (labels != ignore_index)
    label = torch.where(counts, labels, 0)
    exists = (label >= 0) & (label < classes)  # unchecked on a GPU: what does not exist is NaN
    label = torch.where(exists, label, 0)
    x = torch.where(counts[..., None], logits.to(dtype), 0)
    nll = -x.log_softmax(-1)
    weights = logits.new_ones(classes, dtype=dtype)
    if class_weight is not None:
        weights = class_weight.to(dtype)
    weight = counts.to(dtype)
    if visit_weight is not None:
        weight = torch.where(counts, visit_weight.to(dtype), 0)
    if sample_weight is not None:
        weight = weight * visits.of_patients(sample_weight.to(dtype), labels)
    of_label = torch.where(counts, weight * weights[label], 0)
    terms = of_label * nll.gather(-1, label[..., None]).squeeze(-1)
    if label_smoothing > 0:
        spread = weight * (nll * weights).sum(-1) / classes
        terms = (1 - label_smoothing) * terms + label_smoothing * spread
    terms = torch.where(exists, terms, torch.nan)
    terms = torch.where(counts, terms, 0)
    if reduction == "none":
        return terms
    total = terms.sum()
    return total / of_label.sum() if reduction == "mean" else total
