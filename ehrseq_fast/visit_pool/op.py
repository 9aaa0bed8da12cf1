"""Visit pooling: arguments checked, backend chosen, gradient attached."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..arrays import expect_tensor
from ..autograd import once, transformed, values_are_hidden
from ..backend import must_check_values, operators
from ..checks import expect_device, expect_floating, expect_option, refuse_codes_outside
from . import reference
from .operators import MODES

_CODE_DTYPES = (torch.int32, torch.int64)
# The kernels read these masks as they are; any other is converted once.
_MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float32,
    torch.float64,
)


def visit_mean_pool(
    codes: Tensor,
    weight: Tensor,
    visit_mask: Tensor | None = None,
    *,
    mode: str = "mean",
    padding_idx: int | None = None,
    sparse_grad: bool = False,
    validate: bool = False,
) -> Tensor:
    r"""Embed the medical codes of each visit and pool them, without ever holding ``[..., C, E]``.

    With mask :math:`m` and table :math:`W`, a visit is

    .. math:: \sum_c m_c W_{code_c} \,/\, \max(\sum_c m_c, 1)

    for ``mode="mean"``; ``"sum"`` leaves the division out and ``"max"`` takes the element-wise
    maximum over the codes whose mask is not zero. This is the ``embedding``, mask, ``sum`` and
    divide of the usual EHR models (the visit embedding of Choi et al., RETAIN, 2016, as a mean) in
    one pass over the real codes.

    A visit with no real code gives zeros in every mode. A padded slot is never read: it may hold
    any number. A code that a visit holds twice counts twice. A fractional mask is a weight. Sums
    run in float32 for 16-bit and 32-bit tables and in float64 for float64; results and gradients
    are the same bits on every run and for any number of threads.

    Args:
        codes: ``[..., C]`` int32 or int64, rows of ``weight``.
        weight: ``[K, E]`` float32, float64, bfloat16 or float16: the embedding table.
        visit_mask: ``[..., C]`` bool or numeric, 0 where a slot is padding. Without it every slot
            counts, padding too: codes equal to ``padding_idx`` are *not* left out of the mean.
        mode: ``"mean"``, ``"sum"`` or ``"max"``.
        padding_idx: this row of ``weight`` gets no gradient, as in ``torch.nn.Embedding``. It is
            not a mask. May be negative, counted from the end.
        sparse_grad: give ``weight`` a coalesced sparse gradient of the codes that occur. Their
            number is the size of that gradient, so on a GPU its computation waits for the device.
        validate: check the values of codes on a GPU too, which waits for the device. On the CPU
            they are always checked.

    Returns:
        ``[..., E]`` of ``weight``'s dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown mode, a mask that asks for a gradient.
        TypeError: codes that are not int32 or int64, a table that is not floating.
        IndexError: a real code, or ``padding_idx``, outside the vocabulary.

    Double backward is not supported by the kernels and raises ``RuntimeError``. Forward-mode
    differentiation and the transforms of ``torch.func`` (``grad``, ``jvp``, ``vmap``, ``hessian``)
    are computed by the reference, whatever the backend.

    Example:
        >>> import torch
        >>> from ehrseq_fast import visit_mean_pool
        >>> table = torch.tensor([[0.0, 0.0], [2.0, 4.0], [4.0, 0.0]])
        >>> codes = torch.tensor([[1, 2, 0], [2, 0, 0]])  # two visits of at most three codes
        >>> visit_mean_pool(codes, table, codes != 0)
        tensor([[3., 2.],
                [4., 0.]])
    """
    row = _check_table_arguments(codes, weight, visit_mask, mode, padding_idx)
    chosen = choose("visit_pool", weight, visit_mask)
    must_check = must_check_values(chosen, weight.device.type, validate)
    if must_check and not values_are_hidden(codes, visit_mask):
        refuse_codes_outside(codes, weight.shape[0], visit_mask)
    if chosen == "reference":
        return reference.visit_mean_pool(
            codes,
            weight,
            visit_mask,
            mode=mode,
            padding_idx=padding_idx,
            sparse_grad=sparse_grad,
        )
    visit_mask = _readable_mask(visit_mask)
    if torch.is_grad_enabled() and weight.requires_grad:
        return _VisitPool.apply(chosen, codes, weight, visit_mask, MODES[mode], row, sparse_grad)
    return operators(chosen).visit_pool.default(codes, weight, visit_mask, MODES[mode])[0]


def masked_pool(embeddings: Tensor, mask: Tensor | None = None, *, mode: str = "mean") -> Tensor:
    """Pool embeddings that already exist: :func:`visit_mean_pool` without the table.

    Args:
        embeddings: ``[..., C, E]`` float32, float64, bfloat16 or float16.
        mask: ``[..., C]`` bool or numeric, 0 where a slot is padding; without it every slot counts.
        mode: ``"mean"``, ``"sum"`` or ``"max"``.

    Returns:
        ``[..., E]``; zeros for a visit with no real slot. The gradient of a padded slot is zero,
        and what it holds (NaN, infinity) is never read.

    Raises:
        ValueError: shapes that do not fit, an unknown mode, a mask that asks for a gradient.
        TypeError: embeddings that are not floating.

    Derivatives are those of :func:`visit_mean_pool`.

    Example:
        >>> import torch
        >>> from ehrseq_fast import masked_pool
        >>> visit = torch.tensor([[1.0, 3.0], [5.0, 1.0], [float("nan"), 0.0]])
        >>> masked_pool(visit, torch.tensor([True, True, False]), mode="max")
        tensor([5., 3.])
    """
    expect_option("mode", mode, MODES)
    expect_floating("embeddings", embeddings)
    if embeddings.dim() < 2:
        raise ValueError(f"embeddings: expected [..., C, E], got {_shape(embeddings)}")
    _check_mask(mask, embeddings.shape[:-1], "embeddings, without E", embeddings.device)
    chosen = choose("masked_pool", embeddings, mask)
    if chosen == "reference":
        return reference.masked_pool(embeddings, mask, mode=mode)
    mask = _readable_mask(mask)
    if torch.is_grad_enabled() and embeddings.requires_grad:
        return _MaskedPool.apply(chosen, embeddings, mask, MODES[mode])
    return operators(chosen).masked_pool.default(embeddings, mask, MODES[mode])[0]


class _VisitPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, codes, weight, visit_mask, mode, padding_row, sparse_grad):
        pooled, arg_max = operators(chosen).visit_pool.default(codes, weight, visit_mask, mode)
        # of the table only the shape is used again: it may be changed before the backward pass
        ctx.save_for_backward(codes, visit_mask, arg_max)
        ctx.chosen, ctx.mode, ctx.vocabulary = chosen, mode, weight.shape[0]
        ctx.padding_row, ctx.sparse_grad = padding_row, sparse_grad
        return pooled

    @staticmethod
    def backward(ctx, grad):
        codes, visit_mask, arg_max = ctx.saved_tensors
        arguments = (grad, codes, ctx.vocabulary, visit_mask, arg_max, ctx.mode, ctx.padding_row)
        with torch.no_grad():
            if ctx.sparse_grad:
                code_ids, rows = operators(ctx.chosen).visit_pool_backward_sparse.default(
                    *arguments
                )
                gradient = sparse_rows(code_ids, rows, ctx.vocabulary)
            else:
                gradient = operators(ctx.chosen).visit_pool_backward.default(*arguments)
        (tied,) = once("visit_mean_pool", [gradient], [grad])
        return None, None, tied, None, None, None, None


class _MaskedPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, embeddings, mask, mode):
        pooled, arg_max = operators(chosen).masked_pool.default(embeddings, mask, mode)
        # only its shape is used again, so nothing of the input is kept alive
        ctx.save_for_backward(mask, arg_max)
        ctx.chosen, ctx.mode, ctx.n_slots = chosen, mode, embeddings.shape[-2]
        return pooled

    @staticmethod
    def backward(ctx, grad):
        mask, arg_max = ctx.saved_tensors
        with torch.no_grad():
            gradient = operators(ctx.chosen).masked_pool_backward.default(
                grad, mask, arg_max, ctx.n_slots, ctx.mode
            )
        (tied,) = once("masked_pool", [gradient], [grad])
        return None, tied, None, None


def sparse_rows(code_ids: Tensor, rows: Tensor, vocabulary: int) -> Tensor:
    """A sparse gradient that holds whole rows of the table, ids ascending and distinct."""
    return torch.sparse_coo_tensor(
        code_ids.unsqueeze(0),
        rows,
        (vocabulary, rows.shape[1]),
        is_coalesced=True,
        check_invariants=False,
    )


# ---------------------------------------------------------------------------------------------
# The choice of backend


def choose(operation: str, values: Tensor, *others: Tensor | None) -> str:
    """The backend for pooling ``values``; under a transform of ``torch.func`` or in forward-mode
    differentiation of any of these, ``reference``."""
    chosen = backend.choose(operation, values.device.type, values.dtype)
    return "reference" if transformed(values, *others) else chosen


# ---------------------------------------------------------------------------------------------
# Input validation


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_mask(mask: Tensor | None, shape: torch.Size, like: str, device: torch.device) -> None:
    if mask is None:
        return
    expect_tensor("mask", mask, "a tensor or None")
    if mask.shape != shape:
        raise ValueError(f"mask: expected {list(shape)}, the shape of {like}, got {_shape(mask)}")
    expect_device("mask", mask, device, like)
    if mask.is_complex():
        raise TypeError(f"mask: expected a bool or real dtype, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError(
            "mask: expected no requires_grad, as pooling has no gradient for it: pass mask.detach()"
        )


def _check_table_arguments(
    codes: Tensor, weight: Tensor, visit_mask: Tensor | None, mode: str, padding_idx: int | None
) -> int:
    """Check everything but values; the row that gets no gradient, as from :func:`padding_row`."""
    expect_option("mode", mode, MODES)
    expect_floating("weight", weight)
    check_codes(codes, visit_mask)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [K, E], got {_shape(weight)}")
    expect_device("codes", codes, weight.device, "weight")
    return padding_row(padding_idx, weight.shape[0])


def check_codes(codes: Tensor, mask: Tensor | None) -> None:
    """Check padded codes and their mask, all but values, where there is no table beside them."""
    expect_tensor("codes", codes)
    if codes.dtype not in _CODE_DTYPES:
        raise TypeError(f"codes: expected int32 or int64, got {codes.dtype}")
    if codes.dim() < 1:
        raise ValueError(f"codes: expected [..., C], got {_shape(codes)}")
    _check_mask(mask, codes.shape, "codes", codes.device)


def padding_row(padding_idx: int | None, vocabulary: int) -> int:
    """The row that gets no gradient, counted from the start; -1 where there is none."""
    if padding_idx is None:
        return -1
    if not -vocabulary <= padding_idx < vocabulary:
        raise IndexError(
            f"padding_idx: expected {-vocabulary} <= padding_idx < {vocabulary}, got {padding_idx}"
        )
    return padding_idx % vocabulary


def _readable_mask(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype in _MASK_DTYPES else mask.to(torch.float32)
