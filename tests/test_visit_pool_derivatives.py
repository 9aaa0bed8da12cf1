"""Derivatives of every kind of the poolings, and what a training loop does between the passes:
right on every backend, or refused with the way that works."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from ehrseq_fast import masked_pool, packed_visit_pool, use_backend, visit_mean_pool

from .batches import from_lists
from .checkpointed import checkpoint

pytestmark = pytest.mark.operation("visit_pool")

VISITS = [[0, 1, 1], [], [2, 3], [4]]
CODES = [[0, 1, 1], [0, 0, 0], [2, 3, 0], [4, 0, 0]]
MASK = [[1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 0, 0]]
MODES = ("mean", "sum", "max")
POOLS = [(layout, mode) for layout in ("padded", "packed", "masked") for mode in MODES] + [
    ("packed", "attention")
]


def pool_of(layout, mode):
    """A function of the table (6 codes, 2 columns) and of the scores, to ``[visits, 2]``."""
    codes = torch.tensor(CODES)
    mask = torch.tensor(MASK, dtype=torch.bool)
    batch = from_lists([[visit] for visit in VISITS])

    def pool(table, scores):
        if layout == "padded":
            return visit_mean_pool(codes, table, mask, mode=mode)
        if layout == "masked":
            return masked_pool(table[codes], mask, mode=mode)
        given = {"scores": scores} if mode == "attention" else {}
        return packed_visit_pool(batch, table, mode=mode, **given)

    return pool


def inputs(dtype=torch.float64):
    return torch.randn(6, 2, dtype=dtype), torch.randn(6, dtype=dtype)


def by_reference(layout, mode):
    """The same, computed by the reference and differentiated by PyTorch."""

    def pool(table, scores):
        with use_backend("reference"):
            return pool_of(layout, mode)(table, scores)

    return pool


@pytest.mark.parametrize(("layout", "mode"), POOLS)
def test_transforms(backend, layout, mode):
    pool = pool_of(layout, mode)
    table, scores = inputs()
    leaves = [x.clone().requires_grad_() for x in (table, scores)]
    rows = torch.stack([
        torch.cat([
            torch.zeros(n) if g is None else g.flatten()
            for g, n in zip(
                torch.autograd.grad(out, leaves, retain_graph=True, allow_unused=True),
                (12, 6),
                strict=True,
            )
        ])
        for out in pool(*leaves).flatten()
    ])  # fmt: skip
    for jacobian in (jacfwd, jacrev):
        of_table, of_scores = jacobian(pool, argnums=(0, 1))(table, scores)
        actual = torch.cat([of_table.reshape(8, 12), of_scores.reshape(8, 6)], 1)
        torch.testing.assert_close(actual, rows)
    tangents = inputs()
    expected = (rows @ torch.cat([tangents[0].flatten(), tangents[1]])).view(4, 2)
    value, tangent = jvp(pool, (table, scores), tangents)
    torch.testing.assert_close(value, pool(table, scores))
    torch.testing.assert_close(tangent, expected)
    _, pullback = vjp(pool, table, scores)
    torch.testing.assert_close(pullback(torch.ones(4, 2).double())[0].flatten(), rows.sum(0)[:12])

    def loss(table, scores):
        return pool(table, scores).square().sum()

    total = grad(loss, argnums=(0, 1))(table, scores)
    plain = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
    torch.testing.assert_close(total[0], plain[0])
    torch.testing.assert_close(total[1], torch.zeros(6).double() if plain[1] is None else plain[1])


@pytest.mark.parametrize(("layout", "mode"), POOLS)
def test_vmap_and_second_derivatives(backend, layout, mode):
    pool = pool_of(layout, mode)
    tables, scores = torch.randn(3, 6, 2).double(), torch.randn(3, 6).double()
    batched = vmap(pool)(tables, scores)
    one_by_one = [pool(t, s) for t, s in zip(tables, scores, strict=True)]
    torch.testing.assert_close(batched, torch.stack(one_by_one))

    def loss(table, scores):
        return pool(table, scores).pow(3).sum()

    def by_hand(table, scores):
        return by_reference(layout, mode)(table, scores).pow(3).sum()

    table, score = tables[0], scores[0]
    second = hessian(loss)(table, score)
    double = torch.autograd.functional.hessian(lambda t: by_hand(t, score), table)
    torch.testing.assert_close(second, double)
    per_sample = vmap(grad(loss))(tables, scores)
    torch.testing.assert_close(per_sample[0], grad(loss)(table, score))


@pytest.mark.parametrize(("layout", "mode"), POOLS)
def test_forward_mode_without_a_transform(backend, layout, mode):
    """A dual number without ``requires_grad`` went straight to the operator: a tangent of zero."""
    pool, (table, scores) = pool_of(layout, mode), inputs()
    tangents = inputs()
    expected = jvp(pool, (table, scores), tangents)[1]
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(*pair) for pair in zip((table, scores), tangents, strict=True)]
        tangent = forward_ad.unpack_dual(pool(*dual)).tangent
    torch.testing.assert_close(tangent, expected)


def test_per_sample_gradients(backend):
    codes = torch.tensor(CODES)
    mask = torch.tensor(MASK, dtype=torch.bool)
    table, _ = inputs()

    def loss(table, codes, mask):
        return visit_mean_pool(codes, table, mask, mode="max").square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(table, codes, mask)
    for i in range(4):
        leaf = table.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, codes[i : i + 1], mask[i : i + 1]), leaf)
        torch.testing.assert_close(per_sample[i], expected)


def test_functional_call_of_a_module_that_pools(backend):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(6, 2, padding_idx=0)

        def forward(self, codes, mask):
            table = self.embedding.weight
            padding_idx = self.embedding.padding_idx
            return visit_mean_pool(codes, table, mask, padding_idx=padding_idx)

    model, codes = Model(), torch.tensor(CODES)
    parameters = {"embedding.weight": torch.randn(6, 2)}

    def loss(parameters):
        return functional_call(model, parameters, (codes, codes != 0)).square().sum()

    actual = grad(loss)(parameters)["embedding.weight"]
    leaf = parameters["embedding.weight"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss({"embedding.weight": leaf}), leaf)
    torch.testing.assert_close(actual, expected)
    assert (actual[0] == 0).all()


@pytest.mark.parametrize(("layout", "mode"), POOLS)
def test_many_gradients_at_once(backend, layout, mode):
    """``is_grads_batched`` runs a backward pass under vmap."""
    pool, (table, scores) = pool_of(layout, mode), inputs()
    table.requires_grad_()
    pooled = pool(table, scores)
    incoming = torch.randn(3, *pooled.shape).double()
    together = torch.autograd.grad(
        pooled, table, incoming, is_grads_batched=True, retain_graph=True
    )[0]
    for one, expected in zip(incoming, together, strict=True):
        (alone,) = torch.autograd.grad(pooled, table, one, retain_graph=True)
        torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("layout", "mode"), POOLS)
def test_activation_checkpointing(backend, layout, mode, use_reentrant):
    pool = pool_of(layout, mode)
    leaves = [x.requires_grad_() for x in inputs(torch.float32)]
    kept = pool(*leaves).square().sum()
    expected = torch.autograd.grad(kept, leaves, allow_unused=True)
    again = checkpoint(pool, *leaves, use_reentrant=use_reentrant).square().sum()
    again.backward()
    for leaf, wanted in zip(leaves, expected, strict=True):
        assert (leaf.grad is None) == (wanted is None)
        assert wanted is None or torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("layout", "mode"), [p for p in POOLS if p[0] != "masked"])
def test_a_step_between_the_passes(backend, layout, mode, sparse):
    """F.embedding's backward reads no value of its table, which an optimizer may have changed.
    Attention's does, and says so."""
    codes, batch = torch.tensor(CODES), from_lists([[visit] for visit in VISITS])
    table = torch.nn.Parameter(torch.randn(6, 2))
    scores = torch.nn.Parameter(torch.randn(6))
    optimizer = torch.optim.SGD([table, scores], lr=0.1)

    def pooled():
        if layout == "padded":
            return visit_mean_pool(codes, table, codes > 0, mode=mode, sparse_grad=sparse)
        if mode == "attention":
            return packed_visit_pool(batch, table, mode=mode, scores=scores)
        return packed_visit_pool(batch, table, mode=mode, sparse_grad=sparse)

    (expected,) = torch.autograd.grad(pooled().sum(), table)
    late = pooled().sum()
    F.embedding(codes, table).sum().backward()
    optimizer.step()
    table.grad = None
    if mode == "attention" and backend != "reference":  # which keeps the rows
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()
        return
    late.backward()
    torch.testing.assert_close(table.grad.to_dense(), expected.to_dense())


@pytest.mark.parametrize(("layout", "mode"), POOLS)
def test_results_share_no_memory(backend, layout, mode):
    """Of one slot a visit, a sum is the slot itself: a copy of it all the same."""
    table, scores = inputs(torch.float32)
    codes, batch = torch.tensor([[3]]), from_lists([[[3]]])
    leaves = [table.requires_grad_(), scores.requires_grad_()]
    if layout == "padded":
        pooled = visit_mean_pool(codes, table, mode=mode)
    elif layout == "masked":
        leaves[0] = embeddings = table[:1].unsqueeze(0).detach().requires_grad_()
        pooled = masked_pool(embeddings, mode=mode)
    else:
        given = {"scores": scores} if mode == "attention" else {}
        pooled = packed_visit_pool(batch, table, mode=mode, **given)
    incoming = torch.ones_like(pooled)
    gradients = torch.autograd.grad(pooled, leaves, incoming, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(pooled, leaves, incoming, allow_unused=True)
    tensors = [t for t in (*leaves, pooled, incoming, *gradients, *again) if t is not None]
    places = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    assert len(set(places)) == len(places)


def test_the_usual_hessian_is_refused(kernels):
    """It differentiates a backward pass again; the error names the way."""
    table = inputs()[0]
    pool = pool_of("padded", "mean")
    with pytest.raises(RuntimeError, match=r"use_backend\(.reference.\)"):
        torch.autograd.functional.hessian(lambda t: pool(t, None).square().sum(), table)


def test_sparse_gradients_of_sixteen_bits(backend):
    for dtype in (torch.float16,) if backend == "triton" else (torch.float16, torch.bfloat16):
        table = torch.randn(6, 2).to(dtype).requires_grad_()
        codes = torch.tensor(CODES)
        batch = from_lists([[visit] for visit in VISITS])
        for pooled in (
            visit_mean_pool(codes, table, sparse_grad=True),
            packed_visit_pool(batch, table, sparse_grad=True),
        ):
            dense = pooled.float().sum()
            (gradient,) = torch.autograd.grad(dense, table)
            assert gradient.is_sparse
            assert gradient.dtype == dtype
            assert gradient.to_dense().float().sum() > 0
