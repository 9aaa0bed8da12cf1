"""The loss of a visit's codes from some of the classes it does not have, drawn at random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import transformed
from ..checks import accumulator
from .fused import Inputs, losses
from .reference import places


def draw(
    classes: int, count: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """int64 ``[count]``: different classes, each as likely as any other."""
    where = device if generator is None else generator.device
    return torch.randperm(classes, generator=generator, device=where)[:count].to(device)


def sampled_losses(chosen: str, inputs: Inputs, columns: Tensor) -> Tensor:
    """``[n_visits]``: the terms of the visit's codes, and K / m times those of the m ``columns``
    that are none of them: each of the others is a column with probability m / K."""
    classes = len(inputs.weight)
    column_of_code = torch.full((classes,), -1, dtype=torch.int32, device=columns.device)
    numbers = torch.arange(len(columns), dtype=torch.int32, device=columns.device)
    column_of_code = column_of_code.index_copy(0, columns, numbers)

    def of_columns(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.index_select(0, columns)

    some = inputs._replace(
        weight=inputs.weight.index_select(0, columns),
        bias=of_columns(inputs.bias),
        codes=column_of_code.index_select(0, inputs.codes.long()),
        pos_weight=None,
        class_weight=of_columns(inputs.class_weight),
        row_scale=None,
    )
    negatives = losses(chosen, some, total=False, sampled=True)
    return negatives * (classes / len(columns)) + _positives(inputs)


def _positives(inputs: Inputs) -> Tensor:
    """``[n_visits]``: the terms of each visit's codes, a duplicate once."""
    classes, n_rows = len(inputs.weight), len(inputs.states)
    wide = accumulator(inputs.states.dtype)
    if not n_rows:  # as where no patient has a next visit
        return inputs.states.new_zeros(0, dtype=wide)
    key = places(inputs.codes, inputs.code_offsets, classes, False).sort().values
    counts = key < n_rows * classes  # not of codes that no row has, which come last
    counts[1:] &= key[1:] != key[:-1]
    key = key.clamp(max=max(0, n_rows * classes - 1))
    row, code = key // max(1, classes), key % max(1, classes)
    # F.embedding: its gradient is summed in one order on every device
    rows, columns = F.embedding(row, inputs.states), F.embedding(code, inputs.weight)
    z = (rows.to(wide) * columns.to(wide)).sum(1)
    if inputs.bias is not None:
        z = z + F.embedding(code, inputs.bias[:, None])[:, 0]
    terms = -F.logsigmoid(z)
    for factor in (inputs.pos_weight, inputs.class_weight):
        if factor is not None:
            terms = terms * factor.to(wide)[code]
    terms = torch.where(counts, terms, 0)
    if transformed(terms):
        return terms.new_zeros(n_rows).index_add(0, row, terms)
    lengths = inputs.code_offsets.diff().long()
    lengths = torch.cat([lengths, len(key) - lengths.sum(0, keepdim=True)])
    return torch.segment_reduce(terms, "sum", lengths=lengths, unsafe=True, initial=0)[:-1]
