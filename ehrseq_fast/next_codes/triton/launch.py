"""The operator of the loss of a visit's codes in Triton: for each chunk of rows the products of
PyTorch and one launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...checks import accumulator
from ...operations import implemented_in_triton
from ...triton_support import interpreted, launch
from ..arguments import check
from ..chunks import by_chunks
from .kernel import next_codes_rows

BLOCK = 4096 if interpreted() else 1024  # classes at a time
CODES = 32


@implemented_in_triton("next_codes_bce")
def next_codes_bce(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    code_offsets: Tensor,
    pos_weight: Tensor | None,
    class_weight: Tensor | None,
    row_scale: Tensor | None,
    total: bool,
    sampled: bool,
    need_states: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(states, weight, bias, codes, code_offsets, pos_weight, class_weight, row_scale)
    wide = accumulator(states.dtype)
    weight = weight.to(wide)
    bias, pos_weight, class_weight, row_scale = (
        None if x is None else x.to(wide).contiguous()
        for x in (bias, pos_weight, class_weight, row_scale)
    )
    classes = len(weight)
    code_offsets = code_offsets.contiguous()
    distinct = _distinct(codes, code_offsets, classes, sampled)
    need_slopes = need_states or need_weight
    of_codes = weight.new_empty(len(codes) if need_slopes else 1)
    losses = weight.new_empty(len(states))

    def transform(buffer: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        launch(
            next_codes_rows,
            (end - begin,),
            buffer,
            losses,
            distinct,
            code_offsets,
            of_codes,
            pos_weight,
            class_weight,
            row_scale,
            begin,
            classes,
            SAMPLED=sampled,
            SLOPES=need_slopes,
            TERMS=17 if wide == torch.float64 else 8,
            CODES=CODES,
            BLOCK=min(BLOCK, triton.next_power_of_2(max(1, classes))),
        )
        return losses[begin:end], buffer[:-1].view(end - begin, classes)

    needs = (total, need_states, need_weight)
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        return by_chunks(states, weight, bias, row_scale, transform, *needs)


def _distinct(codes: Tensor, code_offsets: Tensor, classes: int, sampled: bool) -> Tensor:
    """int32 ``[n_codes]``: the codes of each row in rising order, in the places of that row; -1 for
    those that are no columns and for duplicates, ``classes`` for those outside the vocabulary."""
    outside = (codes < (-1 if sampled else 0)) | (codes >= classes)
    at = torch.arange(len(codes), device=codes.device, dtype=code_offsets.dtype)
    row = torch.searchsorted(code_offsets, at, right=True) - 1
    kinds = classes + 2  # with -1 and what is outside
    key = (row * kinds + torch.where(outside, classes, codes) + 1).sort().values
    distinct = (key % kinds - 1).to(torch.int32)
    distinct[1:].masked_fill_(key[1:] == key[:-1], -1)
    return distinct
