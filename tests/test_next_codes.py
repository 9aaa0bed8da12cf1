"""The loss of a visit's codes: the dense loss's numbers, layouts, derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ehrseq_fast import PackedRows, next_codes_bce
from ehrseq_fast.next_codes import chunks, reference

from .next_codes_cases import PATIENTS, Given, by_visit, check, dense, make, ours, with_gradients
from .tolerances import assert_matches

pytestmark = pytest.mark.operation("next_codes")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(0, 3, 5), (1, 1, 1), (6, 4, 40)]  # n_visits, H, K
LARGER = [(70, 17, 33), (41, 9, 300)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_dense_loss(backend, shape, dtype):
    given = make(*shape, dtype)
    check(given, True, "none")
    check(given, False, "sum")
    if shape[0]:
        check(given, True, "mean")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGER)
def test_larger_ones_agree_with_the_dense_loss(unemulated, shape, dtype):
    given = make(*shape, dtype)
    check(given, True, "none")
    check(given, False, "sum")


def test_chunks_agree_with_the_dense_loss(monkeypatch):
    """Of a few rows each, as on the host, and with all codes looked through, as on a GPU."""
    given = make(41, 9, 300, torch.float64)
    monkeypatch.setattr(chunks, "_LOGITS_AT_ONCE", {"cpu": 2000})
    expected = with_gradients(dense, given, True)
    scale = torch.arange(1.0, 42) / 41
    rest = (given.pos_weight, given.class_weight, scale * given.visit_weight)
    first = given.offsets[5]
    for bounds in (True, False):
        if not bounds:
            monkeypatch.setattr(chunks, "_bounds", lambda offsets: None)
        for skipped in (0, 5):  # codes before the first row's belong to none
            states, offsets = given.states[skipped:], given.offsets[skipped:]
            assert skipped == 0 or (offsets[0] == first and first > 0)
            scales = (*rest[:2], rest[2][skipped:])
            got = chunks.next_codes_bce(
                states, *given.leaves[1:], given.codes, offsets, *scales, False, False, True, True
            )
            losses = expected[0] / given.visit_weight
            torch.testing.assert_close(got[0], losses[skipped:])
            torch.testing.assert_close(got[1], expected[1][skipped:])
            if not skipped:
                torch.testing.assert_close(got[2:], expected[2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_logits_of_any_size(backend, scale, dtype):
    given = make(12, 4, 50, dtype)
    given = given._replace(bias=(torch.linspace(-scale, scale, 50)).to(dtype))
    got = with_gradients(ours, given, False, "none")
    wide = with_gradients(dense, given.of(torch.float64), False, "none")
    assert all(x.isfinite().all() for x in got)
    assert_matches(got[0], wide[0], scale=wide[0].abs() + 4, terms=4)


def test_small_losses_keep_their_digits(backend):
    given = make(3, 2, 20, torch.float32)._replace(
        bias=torch.full((20,), -15.0), codes=torch.zeros(0, dtype=torch.int64),
        offsets=torch.zeros(4, dtype=torch.int64),
    )  # fmt: skip
    given = given._replace(states=given.states * 0)
    expected = 20 * torch.exp(torch.tensor(-15.0, dtype=torch.float64)).log1p()
    torch.testing.assert_close(ours(given, False).double(), expected.expand(3), rtol=1e-6, atol=0)


def expected_by_visit(padded, layer, next_visit):
    """[B, V], 0 where a visit does not count."""
    losses = padded.new_zeros(padded.shape[:2])
    for patient, visits in enumerate(PATIENTS):
        wanted = visits[1:] if next_visit else visits
        for time, codes in enumerate(wanted):
            targets = torch.zeros(5)
            targets[sorted(set(codes))] = 1
            losses[patient, time] = F.binary_cross_entropy_with_logits(
                layer(padded[patient, time]), targets, reduction="sum"
            )
    return losses


@pytest.mark.parametrize("next_visit", [True, False])
def test_layouts_and_which_visit(unemulated, next_visit, monkeypatch):
    monkeypatch.setenv("EHRSEQ_FAST_VALIDATE", "1")  # a GPU's values are checked on request
    batch, padded, layer = by_visit()
    expected = expected_by_visit(padded, layer, next_visit)
    lengths = torch.tensor([len(visits) for visits in PATIENTS])
    mask = torch.arange(batch.max_visits) < lengths[:, None]
    parameters = (layer.weight, layer.bias)
    dirty = torch.where(mask[:, :, None], padded, torch.nan).requires_grad_()
    rows = PackedRows(batch.pack(padded).requires_grad_(), batch)
    options = {"next_visit": next_visit, "reduction": "none"}
    of_padded = next_codes_bce(dirty, *parameters, batch, mask, **options)
    torch.testing.assert_close(of_padded, expected)
    of_rows = next_codes_bce(rows, *parameters, batch, **options)
    assert torch.equal(of_rows, batch.pack(of_padded))
    assert torch.equal(of_rows, next_codes_bce(rows.values, *parameters, batch, **options))
    default = {"reduction": "none"} if next_visit else options
    assert torch.equal(of_rows, next_codes_bce(rows, *parameters, **default))
    gradients = torch.autograd.grad(of_padded.sum(), [dirty, *parameters])
    again = torch.autograd.grad(of_rows.sum(), [rows.values, *parameters])
    assert torch.equal(batch.pack(gradients[0]), again[0])
    assert not gradients[0][~mask].any()
    assert all(torch.equal(a, b) for a, b in zip(gradients[1:], again[1:], strict=True))
    count = batch.n_visits - len(batch) * next_visit
    mean = next_codes_bce(rows, *parameters, batch, next_visit=next_visit)
    torch.testing.assert_close(mean, of_rows.sum() / count)
    weights = torch.where(mask, torch.rand(mask.shape), -1.0)  # padding may hold anything
    options = {"next_visit": next_visit, "reduction": "sum"}
    weighted = next_codes_bce(dirty, *parameters, batch, visit_weight=weights, **options)
    torch.testing.assert_close(weighted, (weights * expected).sum())
    weights[mask.nonzero()[0].tolist()[0], 0] = -0.5
    with pytest.raises(
        ValueError, match=r"visit_weight: expected at least 0, got -0.5 at \[0, 0\]"
    ):
        next_codes_bce(dirty, *parameters, batch, visit_weight=weights, **options)


def test_codes_and_offsets_with_padded_states(unemulated):
    batch, padded, layer = by_visit()
    flat = [codes for visits in PATIENTS for codes in visits]
    counts = torch.tensor([len(codes) for codes in flat])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    codes = torch.tensor([code for codes in flat for code in codes])
    lengths = torch.tensor([len(visits) for visits in PATIENTS])
    mask = torch.arange(batch.max_visits) < lengths[:, None]
    parameters = (layer.weight, layer.bias)
    dirty = torch.where(mask[:, :, None], padded, torch.nan)
    for kind in (torch.int32, torch.int64):
        got = next_codes_bce(
            dirty, *parameters, (codes.to(kind), offsets), mask.to(kind), reduction="none"
        )
        expected = next_codes_bce(padded, *parameters, batch, next_visit=False, reduction="none")
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(backend, value):
    """In the loss and in all gradients where the dense loss has it."""
    for which, at in (("states", (2, 1)), ("weight", (7, 1)), ("bias", (7,))):
        given = make(6, 4, 40)
        getattr(given, which)[at] = value
        got = with_gradients(ours, given, False)
        wide = with_gradients(dense, given.of(torch.float64), False)
        for mine, expected in zip(got, wide, strict=True):
            assert torch.equal(mine.isnan(), expected.isnan())
        seen = ~got[0].isfinite()
        assert seen.all() if which != "states" else seen.nonzero().tolist() == [[2]]
        assert not ours(given, False, "mean").isfinite()
        summed = with_gradients(ours, given, False, "sum")
        wide = with_gradients(dense, given.of(torch.float64), False, "sum")
        for mine, expected in zip(summed, wide, strict=True):
            assert torch.equal(mine.isfinite(), expected.isfinite())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_show(backend, value):
    """Wherever they multiply: a ``pos_weight`` at the visits that have the code."""
    for which, at, rows in (("pos_weight", 7, [3]), ("class_weight", 7, list(range(6))),
                            ("visit_weight", 2, [2])):  # fmt: skip
        given = make(6, 4, 40)
        given.codes[:] = torch.where(given.codes == 7, 8, given.codes)
        given.codes[given.offsets[3]] = 7
        getattr(given, which)[at] = value
        got = with_gradients(ours, given, True)
        wide = with_gradients(defined, given.of(torch.float64))
        for mine, expected in zip(got, wide, strict=True):
            assert torch.equal(mine.isfinite(), expected.isfinite())
        assert (~got[0].isfinite()).nonzero().flatten().tolist() == rows
        assert not got[3].isfinite().all()
        for reduction in ("sum", "mean"):
            summed = with_gradients(ours, given, True, reduction)
            for mine, expected in zip(summed[1:], wide[1:], strict=True):
                assert torch.equal(mine.isfinite(), expected.isfinite())
            assert not summed[0].isfinite()


def defined(given):
    """By the definition, dense."""
    losses = reference.next_codes(*given.leaves, *given.pair, given.pos_weight, given.class_weight)
    return losses * given.visit_weight


def test_derivatives(unemulated):
    given = make(4, 3, 6, torch.float64)
    leaves = [x.clone().requires_grad_() for x in given.leaves]
    rest = {"pos_weight": given.pos_weight, "class_weight": given.class_weight}

    for reduction in ("none", "sum"):

        def run(*leaves, reduction=reduction):
            return next_codes_bce(*leaves, given.pair, reduction=reduction, **rest)

        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)
        expected = torch.autograd.grad(run(*leaves).sum(), leaves)
        found = torch.func.grad(lambda *leaves: run(*leaves).sum(), (0, 1, 2))(*given.leaves)
        torch.testing.assert_close(found, expected)
        tangents = torch.func.jvp(run, tuple(given.leaves), tuple(given.leaves))[1]
        along = sum((x * g).sum() for x, g in zip(given.leaves, expected, strict=True))
        torch.testing.assert_close(tangents.sum(), along)
    batched = torch.func.vmap(run, (0, None, None))(torch.stack(leaves[:1] * 2), *leaves[1:])
    torch.testing.assert_close(batched, run(*leaves).expand(2))


def test_needed_gradients_alone(unemulated):
    given = make(6, 4, 40)
    expected = with_gradients(ours, given, False)[1:]
    for reduction in ("none", "sum"):
        expected = with_gradients(ours, given, False, reduction)[1:]
        for which in range(3):
            leaves = [x.clone() for x in given.leaves]
            leaves[which].requires_grad_()
            value = ours(given._replace(**dict(zip(Given._fields, leaves, strict=False))), False,
                         reduction)  # fmt: skip
            weights = torch.arange(1.0, 1 + value.numel()).view(value.shape) / value.numel()
            (grad,) = torch.autograd.grad(value, leaves[which], weights, retain_graph=True)
            assert torch.equal(grad, expected[which])
            (again,) = torch.autograd.grad(value, leaves[which], weights)
            assert torch.equal(again, grad)
            assert again.data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("grad", ["stride 0", "strided"])
def test_strides(unemulated, grad):
    given = make(12, 5, 30)
    transposed = given._replace(
        states=given.states.t().contiguous().t(), weight=given.weight.t().contiguous().t()
    )
    leaves = [x.requires_grad_() for x in transposed.leaves]
    incoming = torch.tensor(2.0).expand(12) if grad == "stride 0" else torch.rand(24)[::2]
    got = torch.autograd.grad(ours(transposed, False), leaves, incoming)
    wide = given.of(torch.float64)
    others = [x.requires_grad_() for x in wide.leaves]
    expected = torch.autograd.grad(dense(wide, False), others, incoming.double())
    for mine, other in zip(got, expected, strict=True):
        assert_matches(mine, other, scale=30, terms=5)
