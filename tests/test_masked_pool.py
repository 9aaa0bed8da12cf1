"""masked_pool, and what both poolings of padded visits refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ehrseq_fast
from ehrseq_fast import masked_pool, use_backend, visit_mean_pool
from ehrseq_fast.visit_pool import reference

from .pool_cases import DTYPES, MODES, gradients, ragged_batch
from .tolerances import assert_close

pytestmark = pytest.mark.operation("visit_pool")


# ---------------------------------------------------------------------------------------------
# masked_pool


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(4, 6, 7, 8), (5, 3, 101), (2, 1), (0, 3, 4), (3, 0, 5), (1, 1, 1, 1)]
)
def test_masked_pool(backend, mode, dtype, shape):
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    mask = torch.rand(shape[:-1]) < 0.5
    dirty = torch.where(mask.unsqueeze(-1), values, float("nan")).requires_grad_()
    oracle = values.double().requires_grad_()
    for weights in (mask, mask.float() * 0.5, None):
        given_values = dirty if weights is not None else values.clone().requires_grad_()
        pooled = masked_pool(given_values, weights, mode=mode)
        expected = reference.masked_pool(oracle, weights, mode=mode)
        grad = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
        (actual_grad,) = torch.autograd.grad(pooled, given_values, grad)
        (expected_grad,) = torch.autograd.grad(expected, oracle, grad.double())
        assert pooled.dtype == actual_grad.dtype == dtype
        assert_close(pooled, expected, terms=8)
        assert_close(actual_grad, expected_grad, terms=8)


def test_masked_pool_agrees_with_visit_mean_pool(backend):
    codes, mask, weight = ragged_batch()
    embeddings = F.embedding(torch.where(mask, codes, 0), weight)
    for mode in MODES:
        torch.testing.assert_close(
            masked_pool(embeddings, mask, mode=mode),
            visit_mean_pool(codes, weight, mask, mode=mode),
        )


def test_inputs_are_left_as_they_were(backend):
    codes, mask, weight = ragged_batch()
    before = [tensor.clone() for tensor in (codes, mask, weight)]
    grad = torch.randn(4, 6, 8)
    grad_before = grad.clone()
    gradients(visit_mean_pool, codes, weight, mask, grad)
    assert all(map(torch.equal, before, (codes, mask, weight)))
    assert torch.equal(grad, grad_before)


def test_no_padded_embedding_is_ever_allocated(compiled):
    """[..., C, E] of this batch would be 410 MB; nothing that large may be asked for."""
    codes, mask, weight = ragged_batch(shape=(100, 80, 100), vocabulary=50, width=128)
    weight.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile, use_backend("cpu"):
        visit_mean_pool(codes, weight, mask).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 16 * 2**20


# ---------------------------------------------------------------------------------------------
# Bad input


def visit_codes(plus=0):
    return torch.tensor([[[1, 2, 0], [2, 0, 0]]]) + plus


def real():
    return visit_codes() != 0


def table():
    return torch.ones(3, 4)


BAD_INPUT = {
    "code too large": (
        lambda: visit_mean_pool(visit_codes(2), table(), real(), validate=True),
        IndexError,
        r"Found 3 codes outside .*: expected 0 <= code < 3\. The first is 3: codes\[0, 0, 0\]\.",
    ),
    "negative code": (
        lambda: visit_mean_pool(visit_codes(-2), table(), real(), validate=True),
        IndexError,
        r"Found 1 codes .* The first is -1: codes\[0, 0, 0\]\.",
    ),
    "code too large, int32, no mask": (
        lambda: visit_mean_pool(visit_codes(2).int(), table(), validate=True),
        IndexError,
        r"Found 3 codes",
    ),
    "padding_idx": (
        lambda: visit_mean_pool(visit_codes(), table(), padding_idx=3),
        IndexError,
        "padding_idx: expected -3 <= padding_idx < 3, got 3",
    ),
    "mask shape": (
        lambda: visit_mean_pool(visit_codes(), table(), real()[..., :2]),
        ValueError,
        r"mask: expected \[1, 2, 3\], the shape of codes, got \[1, 2, 2\]",
    ),
    "weight shape": (
        lambda: visit_mean_pool(visit_codes(), table()[0]),
        ValueError,
        r"weight: expected \[K, E\], got \[4\]",
    ),
    "codes without dimensions": (
        lambda: visit_mean_pool(torch.tensor(1), table()),
        ValueError,
        r"codes: expected \[..., C\]",
    ),
    "mode": (
        lambda: visit_mean_pool(visit_codes(), table(), mode="median"),
        ValueError,
        "mode: expected one of 'mean', 'sum', 'max', got 'median'",
    ),
    "mask that requires a gradient": (
        lambda: visit_mean_pool(visit_codes(), table(), real().float().requires_grad_()),
        ValueError,
        "mask: expected no requires_grad",
    ),
    "float codes": (
        lambda: visit_mean_pool(visit_codes().float(), table()),
        TypeError,
        "codes: expected int32 or int64, got torch.float32",
    ),
    "integer table": (
        lambda: visit_mean_pool(visit_codes(), table().long()),
        TypeError,
        "weight: expected float32, float64, bfloat16 or float16",
    ),
    "complex mask": (
        lambda: visit_mean_pool(visit_codes(), table(), real().to(torch.complex64)),
        TypeError,
        "mask: expected a bool or real",
    ),
    "devices": (
        lambda: visit_mean_pool(visit_codes(), table().to("meta")),
        ValueError,
        r"codes: expected on meta, where weight is, got (cpu|cuda:\d)",
    ),
    "masked_pool mode": (
        lambda: masked_pool(torch.ones(2, 3, 4), mode="attention"),
        ValueError,
        "mode: expected one of",
    ),
    "masked_pool shape": (
        lambda: masked_pool(torch.ones(2)),
        ValueError,
        r"embeddings: expected \[..., C, E\], got \[2\]",
    ),
    "masked_pool mask": (
        lambda: masked_pool(torch.ones(2, 3, 4), torch.ones(2, 4)),
        ValueError,
        r"mask: expected \[2, 3\], the shape of embeddings, without E, got \[2, 4\]",
    ),
    "masked_pool mask gradient": (
        lambda: masked_pool(torch.ones(2, 3, 4), torch.ones(2, 3, requires_grad=True)),
        ValueError,
        "mask: expected no requires_grad",
    ),
    "masked_pool dtype": (
        lambda: masked_pool(torch.ones(2, 3, 4).long()),
        TypeError,
        "embeddings: expected float32",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, name):
    call, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=message):
        call()


def test_a_backend_that_cannot_run_is_refused():
    with pytest.raises(
        RuntimeError, match="'abacus' was asked for, but cannot run: expected one of"
    ):
        use_backend("abacus").__enter__()
    assert ehrseq_fast.backend.requested() is None
