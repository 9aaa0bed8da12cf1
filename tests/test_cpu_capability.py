"""EHRSEQ_FAST_CPU_CAPABILITY: every variant of the CPU kernels gives the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ehrseq_fast import backend, masked_pool, packed_visit_pool, visit_mean_pool
from ehrseq_fast.backend import use_backend

from .batches import from_lists

VARIANTS = ("baseline", "avx2", "avx512")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDTHS = (1, 3, 4, 7, 16, 37, 64, 101, 200)
VOCABULARY = 23


def run(capability: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "EHRSEQ_FAST_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )


def special(values: torch.Tensor) -> torch.Tensor:
    """Ties, zeros of both signs, subnormal numbers, infinities and a NaN among the rest."""
    flat = values.view(-1)
    tiny = torch.finfo(values.dtype).tiny
    odd = torch.tensor([0.0, -0.0, tiny / 4, -tiny / 2, float("inf"), float("nan"), 1.0, 1.0])
    flat[::5][:8] = odd[: flat[::5].shape[0]].to(values.dtype)
    return values


def everything() -> list[torch.Tensor]:
    """Pooling in every layout, mode and dtype, with gradients."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 8, 9, generator=generator) < 0.5
    mask[0, 0] = False
    codes = torch.randint(0, VOCABULARY, mask.shape, generator=generator)
    batch = from_lists(
        [[visit[kept].tolist() for visit, kept in zip(*pair, strict=True)]
         for pair in zip(codes, mask, strict=True)]
    )  # fmt: skip
    weights = torch.rand(mask.shape, generator=generator) * mask
    results = []
    for dtype in DTYPES:
        for width in WIDTHS:
            table = special(torch.randn(VOCABULARY, width, generator=generator).to(dtype))
            table.requires_grad_()
            scores = torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_()
            embeddings = special(torch.randn(3, 8, 9, width, generator=generator).to(dtype))
            embeddings.requires_grad_()
            grad = torch.randn(3, 8, width, generator=generator).to(dtype)
            for mode in ("mean", "sum", "max"):
                for kept in (mask, weights):
                    pooled = visit_mean_pool(codes, table, kept, mode=mode)
                    results += [pooled, *torch.autograd.grad(pooled, table, grad)]
                    pooled = masked_pool(embeddings, kept, mode=mode)
                    results += [pooled, *torch.autograd.grad(pooled, embeddings, grad)]
                pooled = packed_visit_pool(batch, table, mode=mode)
                results += [pooled, *torch.autograd.grad(pooled, table, batch.pack(grad))]
            of_codes = special(torch.randn(batch.n_codes, generator=generator)).requires_grad_()
            for mode in ("mean", "sum"):
                pooled = packed_visit_pool(batch, table, mode=mode, code_weights=of_codes)
                results += [
                    pooled,
                    *torch.autograd.grad(pooled, [table, of_codes], batch.pack(grad)),
                ]
            pooled = packed_visit_pool(batch, table, mode="attention", scores=scores)
            results += [pooled, *torch.autograd.grad(pooled, [table, scores], batch.pack(grad))]
    table = torch.randn(VOCABULARY, 16, generator=generator).requires_grad_()
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64):
        kept = mask.to(dtype) * torch.randint(1, 5, mask.shape, generator=generator)
        if dtype.is_floating_point:
            kept = special(kept.to(dtype))
        pooled = visit_mean_pool(codes, table, kept.to(dtype))
        results += [pooled, *torch.autograd.grad(pooled, table, torch.ones(3, 8, 16))]
    return [result.detach() for result in results]


def save(path: str) -> None:
    """What a subprocess runs."""
    with use_backend("cpu"):
        torch.save((backend.cpu_capability(), everything()), path)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, NaN with any payload as one."""
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.nan, tensor).view(size)


def test_every_variant_gives_the_same_bits(compiled, tmp_path):
    """Also where a processor may fuse a multiplication with an addition, and another may not."""
    with use_backend("cpu"):
        expected = everything()
    best = backend.cpu_capability()
    order = ("baseline", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")
    for asked in VARIANTS:
        path = tmp_path / asked
        code = f"from tests.test_cpu_capability import save; save({str(path)!r})"
        done = run(asked, "-c", code)
        assert done.returncode == 0, done.stderr
        used, results = torch.load(path)
        assert used == min(asked, best, key=order.index)
        assert len(results) == len(expected)
        for ours, theirs in zip(results, expected, strict=True):
            assert torch.equal(bits(ours), bits(theirs))


def test_an_unknown_instruction_set_is_refused(compiled):
    code = """
import torch, ehrseq_fast
try:
    ehrseq_fast.visit_mean_pool(torch.tensor([[0]]), torch.ones(1, 1))
except ValueError as error:
    print(error)
"""
    said = run("sse9", "-c", code).stdout
    assert said == (
        "EHRSEQ_FAST_CPU_CAPABILITY: expected baseline, avx2, avx512, avx512_bf16, amx "
        "or amx_emulated, got 'sse9'\n"
    )


def test_info_says_which_is_in_use(compiled):
    assert "kernels for: baseline;" in run("baseline", "-m", "ehrseq_fast", "info").stdout
    said = run("sse9", "-m", "ehrseq_fast", "info").stdout
    assert "EHRSEQ_FAST_CPU_CAPABILITY: expected baseline" in said


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("width", WIDTHS)
def test_half_numbers_of_every_kind(compiled, mode, width):
    """Every float16 and bfloat16 there is goes through a kernel unchanged."""
    for dtype in (torch.float16, torch.bfloat16):
        count = 65536 // width * width
        every = torch.arange(count).to(torch.int16).view(dtype).view(-1, width)
        with use_backend("cpu"):
            pooled = visit_mean_pool(torch.arange(every.shape[0]).unsqueeze(1), every, mode=mode)
        assert torch.equal(pooled.isnan(), every.isnan())
        assert torch.equal(pooled.nan_to_num(1), every.nan_to_num(1))
