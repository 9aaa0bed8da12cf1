"""Pooling of a real batch, forward and backward: plain PyTorch, ``F.embedding_bag``, and ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ehrseq_fast import PackedVisits
from ehrseq_fast.data import PaddedBatch
from ehrseq_fast.visit_pool import packed_visit_pool, reference, visit_mean_pool

from .timing import Plan, Samples, interleaved
from .workloads import eunomia_records, packed_real_batch, real_batch

REFERENCE = "plain PyTorch, padded"
BAG_REAL = "F.embedding_bag, real visits"
BAG_ALL = "F.embedding_bag, all slots"
BAG_PADDED = "F.embedding_bag, from padded"
OURS_PADDED = "ehrseq_fast, padded"
OURS = "ehrseq_fast, packed"

Pass = Callable[[], tuple[Tensor, Tensor]]


def measure(repeats: int = 15, *, batch_size: int = 256, embedding_dim: int = 128) -> Samples:
    """Seconds of each variant, ``repeats`` of them (three times as many of the quick ones).

    ``F.embedding_bag`` is measured three times. *From padded* it does the same job as the others:
    padded codes in, flattened on the way, padded visits out. In *all slots* and *real visits* the
    flat codes and offsets are given to it ready made; of the *real visits* alone it also returns
    less, ``[n_visits, E]``, which is what an LSTM over packed visits takes, and what *packed*
    returns from a batch that is packed already.

    Raises:
        AssertionError: if the variants' outputs or weight gradients are not the same.
    """
    records = eunomia_records()
    batch = real_batch(records, batch_size)
    packed = packed_real_batch(records, batch_size)
    torch.manual_seed(0)
    weight = torch.randn(len(records.vocabulary), embedding_dim, requires_grad=True)
    passes = variants(batch, packed, weight)
    check_equal(passes, batch, packed)
    planned = Plan(repeats, {name: 1 if name == REFERENCE else 3 for name in passes})
    return interleaved(passes, planned)


def variants(batch: PaddedBatch, packed: PackedVisits, weight: Tensor) -> dict[str, Pass]:
    """Each gives the pooled visits and, for one incoming gradient, the gradient of ``weight``."""
    codes, code_mask, visit_mask = batch.visit_codes, batch.visit_mask, batch.sequence_mask
    gradient = torch.randn(*codes.shape[:2], weight.shape[1]) * visit_mask.unsqueeze(-1)
    real_gradient = gradient[visit_mask]
    flat_codes = codes[code_mask]
    all_offsets, real_offsets = bag_offsets(code_mask), bag_offsets(code_mask[visit_mask])

    def forward_backward(forward: Callable[[], Tensor], incoming: Tensor) -> Pass:
        def once() -> tuple[Tensor, Tensor]:
            pooled = forward()
            (weight_gradient,) = torch.autograd.grad(pooled, weight, incoming)
            return pooled.detach(), weight_gradient

        return once

    def bags(offsets: Tensor) -> Tensor:
        return F.embedding_bag(flat_codes, weight, offsets, mode="mean")

    def flattened() -> Tensor:
        return F.embedding_bag(codes[code_mask], weight, bag_offsets(code_mask), mode="mean")

    return {
        REFERENCE: forward_backward(
            lambda: reference.visit_mean_pool(codes, weight, code_mask), gradient
        ),
        BAG_PADDED: forward_backward(flattened, gradient.flatten(0, 1)),
        BAG_ALL: forward_backward(lambda: bags(all_offsets), gradient.flatten(0, 1)),
        BAG_REAL: forward_backward(lambda: bags(real_offsets), real_gradient),
        OURS_PADDED: forward_backward(lambda: visit_mean_pool(codes, weight, code_mask), gradient),
        OURS: forward_backward(lambda: packed_visit_pool(packed, weight), packed.pack(gradient)),
    }


def bag_offsets(code_mask: Tensor) -> Tensor:
    """Where each visit's codes begin among the flat ones; int64, one per row of ``[..., C]``."""
    counts = code_mask.sum(-1).flatten()
    return counts.cumsum(0) - counts


def check_equal(passes: dict[str, Pass], batch: PaddedBatch, packed: PackedVisits) -> None:
    """Compare every variant's output and weight gradient with the reference's."""
    expected, expected_gradient = passes[REFERENCE]()
    for name, once in passes.items():
        pooled, gradient = once()
        wanted = expected
        if name == BAG_REAL:
            wanted = expected[batch.sequence_mask]
        elif name == OURS:
            wanted = packed.pack(expected)
        torch.testing.assert_close(pooled.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)
        scale = float(expected_gradient.abs().max())
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5 * scale)
