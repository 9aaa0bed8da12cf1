"""Ragged padded batches for visit pooling, and the comparison with its definition."""

from __future__ import annotations

import torch

from ehrseq_fast import visit_mean_pool
from ehrseq_fast.visit_pool import reference

from .tolerances import assert_close

MODES = ("mean", "sum", "max")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ragged_batch(shape=(4, 6, 7), vocabulary=23, width=8, dtype=torch.float32, seed=0):
    """Codes with empty visits, full visits, repeated codes and garbage in the padded slots."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    codes = torch.randint(0, vocabulary, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.4
    if mask.numel():
        rows = mask.view(-1, shape[-1])
        rows[0] = False
        rows[-1] = True
        codes.view(-1, shape[-1])[-1] = vocabulary - 1  # one code, in every slot
    codes = torch.where(mask, codes, 10**9)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    return codes, mask, weight.to(dtype)


def gradients(pool, codes, weight, mask, grad, **options):
    weight = weight.detach().clone().requires_grad_()
    pooled = pool(codes, weight, mask, **options)
    pooled.backward(grad)
    return pooled.detach(), weight.grad


def check_against_definition(codes, weight, mask, terms=None, **options):
    terms = terms or max(codes.numel(), 1)
    shape = (*codes.shape[:-1], weight.shape[1])
    grad = torch.randn(shape, dtype=torch.float64).to(weight.dtype)
    pooled, weight_grad = gradients(visit_mean_pool, codes, weight, mask, grad, **options)
    expected, expected_grad = gradients(
        reference.visit_mean_pool, codes, weight.double(), mask, grad.double(), **options
    )
    assert pooled.dtype == weight_grad.dtype == weight.dtype
    assert_close(pooled, expected, terms=codes.shape[-1] + 1)
    assert_close(weight_grad, expected_grad, terms=terms)
