"""The operators of the embedding table's gradient in Triton, of padded and of packed batches.

Nothing here reads a value from the device, except where the size of a sparse gradient depends on
one.

Launches (tests/test_triton_visit_pool.py counts them): at most three when the index is given; for a
padded batch three more, and three for every eight bits of a code.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from ...operations import implemented_in_triton
from ...triton_support import launch
from . import kernels_index
from .arguments import (
    expect_index,
    expect_packed_gradient,
    expect_padded_gradient,
    expect_row,
    expect_together,
)
from .launch_index import Index, index_padded_codes
from .launch_sums import Rows, sum_codes
from .tiles import winners_of


@implemented_in_triton("packed_visit_pool_backward")
def packed_visit_pool_backward(
    grad: Tensor,
    code_offsets: Tensor,
    index_codes: Tensor,
    index_offsets: Tensor,
    index_visits: Tensor,
    vocabulary: int,
    arg_max: Tensor | None,
    mode: int,
    padding_idx: int,
) -> Tensor:
    """The operator ``packed_visit_pool_backward``."""
    expect_packed_gradient(grad, vocabulary, arg_max, mode, padding_idx)
    at = _packed_index(grad, code_offsets, index_codes, index_offsets, index_visits)
    rows = Rows(vocabulary, padding_idx)
    out = grad.new_empty((vocabulary, grad.shape[1]))
    return sum_codes(grad.contiguous(), winners_of(arg_max, mode), at, rows, out, mode)


@implemented_in_triton("packed_visit_pool_backward_sparse")
def packed_visit_pool_backward_sparse(
    grad: Tensor,
    code_offsets: Tensor,
    index_codes: Tensor,
    index_offsets: Tensor,
    index_visits: Tensor,
    vocabulary: int,
    arg_max: Tensor | None,
    mode: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``packed_visit_pool_backward_sparse``.

    With ``padding_idx``, whether the batch holds that code decides the size of the result: then the
    host waits for the device, once.
    """
    expect_packed_gradient(grad, vocabulary, arg_max, mode, padding_idx)
    at = _packed_index(grad, code_offsets, index_codes, index_offsets, index_visits)
    winners = winners_of(arg_max, mode)
    return sparse_rows_of(grad.contiguous(), winners, at, vocabulary, mode, padding_idx)


def _packed_index(
    grad: Tensor,
    code_offsets: Tensor,
    index_codes: Tensor,
    index_offsets: Tensor,
    index_visits: Tensor,
) -> Index:
    expect_together(grad, code_offsets, index_codes, index_offsets, index_visits)
    expect_row("code_offsets", code_offsets, grad.shape[0] + 1)
    expect_index(index_codes, index_offsets, index_visits)
    return Index(
        index_codes.contiguous(),
        index_offsets.contiguous(),
        index_visits.contiguous(),
        code_offsets=code_offsets.contiguous(),
    )


def sparse_rows_of(
    grad: Tensor, arg_max: Tensor | None, at: Index, vocabulary: int, mode: int, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """The gradient's rows for the codes of a packed batch's index, and those codes."""
    # a code outside the vocabulary has a row of zeros, whose number must still be one of the table
    code_ids = at.codes.clamp(0, max(vocabulary - 1, 0)).long()
    padding_segment = at.codes.shape[0]
    if padding_idx >= 0:
        padding_segment = _position_of(at.codes, padding_idx)
        code_ids = torch.cat([code_ids[:padding_segment], code_ids[padding_segment + 1 :]])
    rows = Rows(vocabulary, padding_idx, sparse=True, padding_segment=padding_segment)
    out = grad.new_empty((code_ids.shape[0], grad.shape[1]))
    return code_ids, sum_codes(grad, arg_max, at, rows, out, mode)


def _position_of(ascending: Tensor, wanted: int) -> int:
    """The position of ``wanted``; the length where it does not occur. Waits for the device."""
    places = torch.arange(ascending.shape[0], device=ascending.device)
    places = torch.where(ascending == wanted, places, ascending.shape[0])
    return int(places.min()) if ascending.shape[0] else 0


@implemented_in_triton("visit_pool_backward")
def visit_pool_backward(
    grad: Tensor,
    codes: Tensor,
    vocabulary: int,
    visit_mask: Tensor | None,
    arg_max: Tensor | None,
    mode: int,
    padding_idx: int,
) -> Tensor:
    """The operator ``visit_pool_backward``."""
    expect_padded_gradient(grad, codes, vocabulary, visit_mask, arg_max, mode, padding_idx)
    out = grad.new_empty((vocabulary, grad.shape[-1]))
    if not codes.numel():
        return out.zero_()
    at = index_padded_codes(codes, visit_mask, vocabulary, grad.dtype, mode, padding_idx)
    rows = Rows(vocabulary, padding_idx)
    return sum_codes(grad.contiguous(), winners_of(arg_max, mode), at, rows, out, mode)


@implemented_in_triton("visit_pool_backward_sparse")
def visit_pool_backward_sparse(
    grad: Tensor,
    codes: Tensor,
    vocabulary: int,
    visit_mask: Tensor | None,
    arg_max: Tensor | None,
    mode: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``visit_pool_backward_sparse``.

    The number of different codes is the size of the result: the host waits for it, once.
    """
    expect_padded_gradient(grad, codes, vocabulary, visit_mask, arg_max, mode, padding_idx)
    row_size = grad.shape[-1]
    if not codes.numel() or not vocabulary:
        return grad.new_empty((0,), dtype=torch.int64), grad.new_empty((0, row_size))
    at = index_padded_codes(codes, visit_mask, vocabulary, grad.dtype, mode, padding_idx)
    row_offsets = at.entries.new_empty((vocabulary + 1,))
    launch(
        kernels_index.find_rows,
        (triton.cdiv(vocabulary + 1, 256),),
        at.codes,
        at.count,
        row_offsets,
        vocabulary + 1,
        ROWS=256,
        num_warps=4,
    )
    code_ids = row_offsets.diff().nonzero().squeeze(1)
    offsets = torch.cat([row_offsets[:-1][code_ids], row_offsets[-1:]])
    at = replace(at, codes=code_ids.int(), offsets=offsets)
    rows = Rows(vocabulary, padding_idx, sparse=True, padding_segment=code_ids.shape[0])
    rows_out = grad.new_empty((code_ids.shape[0], row_size))
    winners = winners_of(arg_max, mode)
    return code_ids, sum_codes(grad.contiguous(), winners, at, rows, rows_out, mode)
