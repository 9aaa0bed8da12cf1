"""What the raw operators in Triton may be called with: as ``csrc/visit_pool/arguments.h`` says it
of the compiled ones. Values in memory are checked by the kernels, which read nothing out of bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import FLOATING, accumulator
from .tiles import MAX, MEAN, SUM

_MASKS = frozenset(
    {torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64}
)
_MOST = 2**31 - 1


def expect(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    expect(tensor.shape == torch.Size(shape), name, f"shape {list(shape)}", list(tensor.shape))


def expect_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    names = " or ".join(str(dtype) for dtype in dtypes)
    expect(tensor.dtype in dtypes, name, names, tensor.dtype)


def expect_together(*tensors: Tensor | None) -> None:
    devices = {tensor.device for tensor in tensors if tensor is not None}
    expect(len(devices) == 1, "tensors", "all tensors of a call on one device", devices)


def expect_mode(mode: int) -> None:
    expect(MEAN <= mode <= MAX, "mode", f"{MEAN}..{MAX}", mode)


def expect_floating(name: str, tensor: Tensor) -> None:
    expect(tensor.dtype in FLOATING, name, "float32, float64, bfloat16 or float16", tensor.dtype)


def expect_table(weight: Tensor) -> None:
    expect(weight.dim() == 2, "weight", "shape [K, E]", list(weight.shape))
    expect_floating("weight", weight)


def expect_padding(padding_idx: int, vocabulary: int) -> None:
    expect(0 <= vocabulary <= _MOST, "vocabulary", "0..2^31-1", vocabulary)
    if not -1 <= padding_idx < vocabulary:
        raise IndexError(
            f"padding_idx: expected -1 (none) or one of {vocabulary} codes, got {padding_idx}"
        )


def expect_mask(mask: Tensor | None, shape: Sequence[int]) -> None:
    if mask is not None:
        expect_shape("mask", mask, shape)
        expect_dtype("mask", mask, *sorted(_MASKS, key=str))


def expect_padded_codes(codes: Tensor, mask: Tensor | None) -> None:
    expect(codes.dim() >= 1, "codes", "shape [..., C]", list(codes.shape))
    expect_dtype("codes", codes, torch.int32, torch.int64)
    expect_mask(mask, codes.shape)


def expect_gradient(grad: Tensor, visits: Sequence[int], arg_max: Tensor | None, mode: int) -> None:
    expect_mode(mode)
    expect_floating("grad", grad)
    expect(
        grad.dim() >= 1 and grad.shape[:-1] == torch.Size(visits),
        "grad",
        f"shape [{', '.join(map(str, (*visits, 'E')))}]",
        list(grad.shape),
    )
    if mode == MAX:
        if arg_max is None:
            raise ValueError("arg_max: expected a tensor in mode max, got None")
        expect_shape("arg_max", arg_max, grad.shape)
        expect_dtype("arg_max", arg_max, torch.int32)


def expect_row(name: str, tensor: Tensor, size: int | None = None) -> None:
    expect_dtype(name, tensor, torch.int32)
    expect(tensor.dim() == 1, name, "one dimension", list(tensor.shape))
    if size is not None:
        expect_shape(name, tensor, (size,))


def expect_packed_codes(codes: Tensor, code_offsets: Tensor) -> None:
    expect_row("codes", codes)
    expect_row("code_offsets", code_offsets)
    expect(len(code_offsets) > 0, "code_offsets", "one more than there are visits", [0])


def expect_index(codes: Tensor, offsets: Tensor, visits: Tensor) -> None:
    expect_row("index_codes", codes)
    expect_row("index_offsets", offsets, codes.shape[0] + 1)
    expect_row("index_visits", visits)


def expect_scores(scores: Tensor, weight: Tensor) -> None:
    expect_shape("scores", scores, weight.shape[:1])
    expect_dtype("scores", scores, weight.dtype)


def expect_weighted_mode(mode: int) -> None:
    expect(mode in (MEAN, SUM), "mode", f"{MEAN}..{SUM}", mode)


def expect_code_weights(code_weights: Tensor, codes: Tensor, weight: Tensor) -> None:
    expect_shape("code_weights", code_weights, codes.shape)
    expect_dtype("code_weights", code_weights, accumulator(weight.dtype))


def expect_totals(totals: Tensor | None, n_visits: int, weight: Tensor, mode: int) -> None:
    if mode == MEAN:
        if totals is None:
            raise ValueError("totals: expected a tensor in mode mean, got None")
        expect_shape("totals", totals, (n_visits,))
        expect_dtype("totals", totals, accumulator(weight.dtype))


def expect_padded_gradient(
    grad: Tensor,
    codes: Tensor,
    vocabulary: int,
    visit_mask: Tensor | None,
    arg_max: Tensor | None,
    mode: int,
    padding_idx: int,
) -> None:
    expect_together(grad, codes, visit_mask, arg_max)
    expect_padded_codes(codes, visit_mask)
    expect_padding(padding_idx, vocabulary)
    expect_gradient(grad, codes.shape[:-1], arg_max, mode)


def expect_packed_gradient(
    grad: Tensor, vocabulary: int, arg_max: Tensor | None, mode: int, padding_idx: int
) -> None:
    expect_together(grad, arg_max)
    expect_padding(padding_idx, vocabulary)
    expect(grad.dim() == 2, "grad", "shape [n_visits, E]", list(grad.shape))
    expect_gradient(grad, grad.shape[:1], arg_max, mode)


def expect_attention_gradient(
    grad: Tensor, pooled: Tensor, highest: Tensor, inverse: Tensor, weight: Tensor, scores: Tensor
) -> None:
    expect_together(grad, pooled, highest, inverse, weight, scores)
    expect_table(weight)
    expect_scores(scores, weight)
    expect(grad.dim() == 2, "grad", "shape [n_visits, E]", list(grad.shape))
    expect_shape("grad", grad, (grad.shape[0], weight.shape[1]))
    expect_shape("pooled", pooled, grad.shape)
    expect_shape("highest", highest, grad.shape[:1])
    expect_shape("inverse", inverse, grad.shape[:1])
    expect_dtype("grad", grad, weight.dtype)
    expect_dtype("pooled", pooled, weight.dtype)
    expect_dtype("highest", highest, torch.float64)
    expect_dtype("inverse", inverse, torch.float64)
