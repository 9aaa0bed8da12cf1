"""Pooling and its gradients against the formulas written out with loops over Python's floats: of
the reference, and of every backend, with ties, zeros, infinities and NaN among the numbers."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ehrseq_fast import masked_pool, packed_visit_pool, visit_mean_pool

from .batches import from_lists
from .conftest import is_emulated

pytestmark = pytest.mark.operation("visit_pool")

MODES = ("mean", "sum", "max")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Few and small, so that there are ties and every sum is exact in 16 bits.
PLAIN = (0.0, -0.0, 1.0, 1.0, 2.0, -2.0, 0.5)
ODD = (*PLAIN, math.inf, -math.inf, math.nan, math.nan)
WHERE = ("nowhere", "table", "mask", "grad", "scores", "everywhere")


# ---------------------------------------------------------------------------------------------
# The formulas. A visit is a list of (row, weight): its real slots.


def mean_by_hand(visit, rows, width, mode):
    pooled = [0.0] * width
    for row, weight in visit:
        for e in range(width):
            pooled[e] += weight * rows[row][e]
    if mode == "mean":
        scale = divisor(visit)
        pooled = [value / scale for value in pooled]
    return pooled


def divisor(visit):
    total = sum(weight for _, weight in visit)
    return 1.0 if total < 1 else total  # a NaN stays one


def mean_gradient_by_hand(visit, grad, mode, into):
    scale = divisor(visit) if mode == "mean" else 1.0
    for row, weight in visit:
        for e, g in enumerate(grad):
            into[row][e] += g / scale * weight


def winner_by_hand(visit, rows, e):
    """The row of the first of the largest; NaN is larger than any."""
    best = None
    for row, _ in visit:
        value = rows[row][e]
        held = None if best is None else rows[best][e]
        if held is None or value > held or (math.isnan(value) and not math.isnan(held)):
            best = row
    return best


def attention_by_hand(visit, scores):
    """torch.softmax of the visit's scores."""
    values = [scores[row] for row, _ in visit]
    if not values:
        return []
    highest = math.nan if any(map(math.isnan, values)) else max(values)
    exponentials = [math.exp(value - highest) for value in values]
    total = sum(exponentials)
    return [exponential / total for exponential in exponentials]


def by_hand(visits, rows, grads, mode, scores=None):
    """Pooled visits, the gradient of the rows, and that of the scores."""
    width = len(grads[0])
    of_rows = [[0.0] * width for _ in rows]
    of_scores = [0.0] * len(rows)
    pooled = []
    for visit, grad in zip(visits, grads, strict=True):
        if mode == "max":
            winners = [winner_by_hand(visit, rows, e) for e in range(width)]
            pooled.append([0.0 if w is None else rows[w][e] for e, w in enumerate(winners)])
            for e, winner in enumerate(winners):
                if winner is not None:
                    of_rows[winner][e] += grad[e]
        elif mode == "attention":
            shares = attention_by_hand(visit, scores)
            weighed = [(row, share) for (row, _), share in zip(visit, shares, strict=True)]
            pooled.append(mean_by_hand(weighed, rows, width, "sum"))
            mean_gradient_by_hand(weighed, grad, "sum", of_rows)
            of_shares = [
                sum(g * value for g, value in zip(grad, rows[row], strict=True)) for row, _ in visit
            ]
            common = sum(a * d for a, d in zip(shares, of_shares, strict=True))
            for (row, _), share, of_share in zip(visit, shares, of_shares, strict=True):
                of_scores[row] += share * (of_share - common)
        else:
            pooled.append(mean_by_hand(visit, rows, width, mode))
            mean_gradient_by_hand(visit, grad, mode, of_rows)
    return pooled, of_rows, of_scores


# ---------------------------------------------------------------------------------------------
# Cases


class Case:
    """Numbers of one kind or the other, for the three layouts."""

    def __init__(self, seed, odd, dtype, width=3, vocabulary=5, weighted=True):
        draw = random.Random(f"{seed} {odd}")

        def numbers(kind, *shape):
            if not shape:
                return draw.choice(ODD if odd in (kind, "everywhere") else PLAIN)
            return [numbers(kind, *shape[1:]) for _ in range(shape[0])]

        self.codes = [[draw.randrange(vocabulary) for _ in range(4)] for _ in range(6)]
        self.codes[5] = [draw.randrange(vocabulary)] * 4  # one code four times
        kept = [[draw.random() < 0.6 for _ in range(4)] for _ in range(6)]
        kept[0] = [False] * 4
        mask = numbers("mask", 6, 4) if weighted else kept
        self.mask = [
            [m if k else 0 for m, k in zip(*pair, strict=True)]
            for pair in zip(mask, kept, strict=True)
        ]
        self.table = numbers("table", vocabulary, width)
        self.embeddings = numbers("table", 24, width)
        self.grads = numbers("grad", 6, width)
        self.scores = numbers("scores", vocabulary)
        self.dtype = dtype
        self.weighted = weighted

    def visits(self, rows_of):
        """(row, weight) of the real slots, where a slot's row is as given."""
        return [
            [(rows_of(v, c), float(m)) for c, m in enumerate(masks) if m != 0]
            for v, masks in enumerate(self.mask)
        ]

    def tensor(self, values, **options):
        return torch.tensor(values, dtype=torch.float64).to(self.dtype).requires_grad_(**options)

    def mask_tensor(self):
        return torch.tensor(self.mask, dtype=torch.float64 if self.weighted else torch.bool)


def agree(actual, expected, terms="values"):
    """The same infinities and NaN in the same places; ``terms="finite"``: what is not finite is so
    in both, as an infinity that a formula adds up in another order may be a NaN."""
    actual = actual.detach().double()
    expected = torch.tensor(expected, dtype=torch.float64).reshape(actual.shape)
    if terms == "finite":
        finite = expected.isfinite()
        assert torch.equal(actual.isfinite(), finite), (actual, expected)
        actual, expected = actual[finite], expected[finite]
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=2e-2, atol=2e-2)


def seeds(backend, many):
    return range(1 if is_emulated(backend) else many)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("odd", [w for w in WHERE if w != "scores"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded(backend, mode, odd, dtype):
    for seed in seeds(backend, 6):
        case = Case(seed, odd, dtype, weighted=seed % 2 == 0)
        table, grad = case.tensor(case.table), case.tensor(case.grads, requires_grad=False)
        codes = torch.tensor(case.codes)
        for sparse in (False, True):
            pooled = visit_mean_pool(
                codes, table, case.mask_tensor(), mode=mode, sparse_grad=sparse
            )
            (gradient,) = torch.autograd.grad(pooled, table, grad)
            expected, of_rows, _ = by_hand(
                case.visits(lambda v, c, of=case.codes: of[v][c]), case.table, case.grads, mode
            )
            assert gradient.dtype == pooled.dtype == dtype
            agree(pooled, expected)
            agree(gradient.to_dense(), of_rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("odd", [w for w in WHERE if w != "scores"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_pool(backend, mode, odd, dtype):
    for seed in seeds(backend, 6):
        case = Case(seed, odd, dtype, weighted=seed % 2 == 0)
        values = case.tensor(case.embeddings)
        grad = case.tensor(case.grads, requires_grad=False)
        pooled = masked_pool(values.view(6, 4, -1), case.mask_tensor(), mode=mode)
        (gradient,) = torch.autograd.grad(pooled, values, grad)
        visits = case.visits(lambda v, c: 4 * v + c)
        expected, of_rows, _ = by_hand(visits, case.embeddings, case.grads, mode)
        agree(pooled, expected)
        agree(gradient, of_rows)


@pytest.mark.parametrize("mode", [*MODES, "attention"])
@pytest.mark.parametrize("odd", [w for w in WHERE if w != "mask"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(backend, mode, odd, dtype):
    for seed in seeds(backend, 6):
        case = Case(seed, odd, dtype, weighted=False)
        table, scores = case.tensor(case.table), case.tensor(case.scores)
        visits = case.visits(lambda v, c, of=case.codes: of[v][c])
        batch = from_lists([[[row for row, _ in visit]] for visit in visits])
        order = batch.sorted_indices.tolist()
        grads = [case.grads[patient] for patient in order]
        grad = case.tensor(grads, requires_grad=False)
        visits = [[(row, 1.0) for row, _ in visits[patient]] for patient in order]
        expected, of_rows, of_scores = by_hand(visits, case.table, grads, mode, case.scores)
        given = {"scores": scores} if mode == "attention" else {}
        pooled = packed_visit_pool(batch, table, mode=mode, **given)
        gradient, *of = torch.autograd.grad(pooled, [table, *given.values()], grad)
        agree(pooled, expected)
        agree(gradient, of_rows)
        if of:
            agree(of[0], of_scores, terms="finite")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scores",
    [
        ["lowest", "lowest"],
        ["highest", "highest", "highest"],
        [-1e4] * 4,
        [3e4, 3e4 - 16],
        ["highest", "lowest"],
        [math.inf, 1.0],
        [-math.inf, 1.0, 1.0],
        [-math.inf, -math.inf],
        [math.nan, 1.0],
        [0.0, 1000.0, 1000.0],
    ],
    ids=str,
)
def test_attention_sums_to_one(backend, dtype, scores):
    """A softmax, however large its scores: their logarithm's sum is not added to them."""
    limits = torch.finfo(dtype)
    numbers = {"lowest": limits.min, "highest": limits.max}
    values = torch.tensor([numbers.get(s, s) for s in scores], dtype=torch.float64).to(dtype)
    n = len(scores)
    batch = from_lists([[list(range(n)), []]])
    table = torch.eye(n, dtype=dtype).requires_grad_()  # what is pooled are the weights
    values.requires_grad_()
    pooled = packed_visit_pool(batch, table, mode="attention", scores=values)
    share = torch.softmax(values.detach().double(), 0)
    (row,) = (r for r in range(batch.n_visits) if batch.code_offsets.diff()[r] == n)
    torch.testing.assert_close(
        pooled[row].double(), share, equal_nan=True, rtol=4 * limits.eps, atol=4 * limits.eps
    )
    total = pooled[row].detach().double().sum()
    assert total.isnan() == share.isnan().any()
    assert total.isnan() or abs(total - 1) < 8 * limits.eps
    weight_grad, score_grad = torch.autograd.grad(pooled[row].sum(), [table, values])
    if not share.isnan().any():
        torch.testing.assert_close(
            weight_grad.double(), share.unsqueeze(1).expand(n, n), rtol=4 * limits.eps, atol=1e-3
        )
        assert (score_grad.double().abs() < 0.1).all()  # of a sum that is always one
    else:
        assert weight_grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [-1e16, 1e30])
def test_attention_of_equal_large_scores(backend, dtype, size):
    table = torch.ones(4, 1, dtype=dtype)
    batch = from_lists([[[0, 1, 2, 3]]])
    scores = torch.full((4,), size, dtype=dtype)
    assert packed_visit_pool(batch, table, mode="attention", scores=scores).item() == 1


def test_reference_gradient_of_a_maximum_of_zero(backend):
    """The largest value is 0, and is one of a row's: all of the gradient is that row's."""
    table = torch.tensor([[0.0], [-1.0], [0.0]]).requires_grad_()
    packed = packed_visit_pool(from_lists([[[0, 1]], [[2, 0]]]), table, mode="max")
    (gradient,) = torch.autograd.grad(packed.sum(), table)
    assert gradient.flatten().tolist() == [1, 0, 1]
    lowest = torch.full((2, 2, 1), -math.inf).requires_grad_()
    mask = torch.tensor([[False, True], [True, True]])
    (gradient,) = torch.autograd.grad(masked_pool(lowest, mask, mode="max").sum(), lowest)
    assert gradient.flatten().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_slots", [1, 7, 8, 9, 64, 70])
def test_any_byte_but_zero_is_true(backend, mode, n_slots):
    """torch reads a bool tensor's byte as True unless it is 0; flags viewed as bool hold others."""
    codes = torch.randint(0, 9, (5, n_slots))
    flags = torch.tensor([0, 2, 0, 128, 255, 1, 0, 64], dtype=torch.uint8)
    flags = flags[torch.randint(0, 8, codes.shape)]
    odd, usual = flags.view(torch.bool), flags != 0
    table = torch.randn(9, 4, requires_grad=True)
    embeddings = torch.randn(5, n_slots, 4, requires_grad=True)

    def results(mask):
        pooled = visit_mean_pool(codes, table, mask, mode=mode)
        existing = masked_pool(embeddings, mask, mode=mode)
        total = pooled.square().sum() + existing.square().sum()
        return pooled, existing, *torch.autograd.grad(total, [table, embeddings])

    assert all(map(torch.equal, results(odd), results(usual)))
