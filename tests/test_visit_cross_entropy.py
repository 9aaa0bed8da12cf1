"""Cross-entropy of one class per visit: PyTorch's numbers on the real rows, layouts, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    VisitCrossEntropyLoss,
    use_backend,
    visit_cross_entropy,
)
from ehrseq_fast.visit_cross_entropy import reference
from ehrseq_fast.visitwise import Visits

from .survival_cases import value_and_grad
from .tolerances import assert_matches

pytestmark = pytest.mark.operation("visit_cross_entropy")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ("mean", "sum", "none")


def draw(patients, slots, classes, dtype=torch.float32, scale=3.0, seed=0):
    """Logits, labels of which some are ignored, a mask, and weights of all kinds."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    lengths = torch.randint(0, slots + 1, (patients,), generator=generator)
    lengths[:1] = slots
    x = torch.randn(patients, slots, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, classes, (patients, slots), generator=generator)
    labels[torch.rand(patients, slots, generator=generator) < 0.1] = -100
    weights = {
        "class_weight": torch.rand(classes, generator=generator),
        "visit_weight": torch.rand(patients, slots, generator=generator),
        "sample_weight": torch.rand(patients, generator=generator),
    }
    return x.to(dtype), labels, torch.arange(slots) < lengths[:, None], weights


def packed_of(x, mask):
    batch = PackedVisits.from_lists([[[1]] * n for n in mask.sum(1).tolist()]).to(x.device)
    return PackedRows(batch.pack(x), batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_is_cross_entropy_of_the_real_rows(unemulated, reduction, weighted, smoothing):
    x, y, mask, weights = draw(23, 37, 5, torch.float64)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    given = {"weight": weights["class_weight"].double()} if weighted else {}
    ours = {"class_weight": given["weight"]} if weighted else {}
    value, grad = value_and_grad(visit_cross_entropy, x, y, mask, **ours, **options)
    leaf = x.clone().requires_grad_()
    wanted = F.cross_entropy(leaf[mask], y[mask], **given, **options)
    scale = torch.arange(1.0, value.numel() + 1, dtype=torch.float64).reshape(value.shape)
    torch.testing.assert_close(value[mask] if reduction == "none" else value, wanted.detach())
    (wanted_grad,) = torch.autograd.grad(
        wanted, leaf, scale[mask] if reduction == "none" else scale
    )
    torch.testing.assert_close(grad, wanted_grad)
    if reduction == "none":
        assert not value[~mask].any()
    assert not grad[~mask].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "reduction", "smoothing"),
    [
        ((1, 1, 1), "none", 0.1),
        ((9, 5, 2), "mean", 0.0),
        ((3, 70, 3), "mean", 0.1),
        ((5, 40, 8), "none", 0.0),
        ((3, 9, 130), "sum", 0.1),
        ((5, 40, 8), "sum", 0.0),
    ],
)
def test_agrees_with_the_reference(unemulated, shape, reduction, smoothing, dtype):
    x, y, mask, weights = draw(*shape, dtype)
    options = {"reduction": reduction, "label_smoothing": smoothing, **weights}
    value, grad = value_and_grad(visit_cross_entropy, x, y, mask, **options)
    wide, wide_grad = value_and_grad(
        reference.visit_cross_entropy, x.double(), y, Visits(mask), **options
    )
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    terms = shape[0] * shape[1] + shape[2]
    assert_matches(value, wide, scale=wide.abs() + 10, terms=terms)
    assert_matches(grad, wide_grad, scale=wide_grad.abs().max() + 1, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_every_kernel_agrees_with_the_reference(backend, layout, dtype):
    """Small, as some are emulated."""
    for shape, reduction, smoothing in (
        ((3, 5, 2), "mean", 0.0),
        ((9, 4, 70), "none", 0.1),
        ((4, 7, 5), "sum", 0.2),
        ((4, 7, 1), "mean", 0.2),
    ):
        x, y, mask, weights = draw(*shape, dtype, 20.0)
        mask[:, 0] = True
        options = {"reduction": reduction, "label_smoothing": smoothing, **weights}
        wide, wide_grad = value_and_grad(
            reference.visit_cross_entropy, x.double(), y, Visits(mask), **options
        )
        counts = mask & (y != -100)
        clean = torch.where(counts[..., None], x, torch.nan).detach()
        scale = torch.arange(1.0, wide.numel() + 1, dtype=torch.float64).reshape(wide.shape)
        if layout == "packed":
            rows = packed_of(clean, mask)
            batch = rows.batch
            options["visit_weight"] = batch.pack(weights["visit_weight"])
            leaf = rows.values.detach().clone().requires_grad_()
            value = visit_cross_entropy(PackedRows(leaf, batch), batch.pack(y), **options)
            wide_grad = batch.pack(wide_grad)
            if reduction == "none":
                wide, scale = batch.pack(wide), batch.pack(scale)
        else:
            leaf = clean.clone().requires_grad_()
            value = visit_cross_entropy(leaf, y, mask, **options)
        (grad,) = torch.autograd.grad(value, leaf, scale.to(value.dtype))
        terms = shape[1] + shape[2]
        assert_matches(value.detach(), wide, scale=wide.abs() + 40, terms=terms)
        assert_matches(grad, wide_grad, scale=wide_grad.abs().max() + 1, terms=terms)
        left_out = ~counts if layout == "padded" else batch.pack(~counts)
        assert not grad[left_out].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_are_finite_and_right(unemulated, dtype):
    x, y, mask, _ = draw(30, 6, 4, dtype, 1e4)
    value, grad = value_and_grad(visit_cross_entropy, x, y, mask, reduction="none")
    wide, wide_grad = value_and_grad(
        reference.visit_cross_entropy, x.double(), y, Visits(mask), reduction="none"
    )
    assert value.isfinite().all()
    assert_matches(value, wide, scale=wide.abs() + 1, terms=4)
    assert_matches(grad, wide_grad, scale=200, terms=4)


def test_small_losses_keep_their_digits(compiled):
    x = torch.tensor([[[30.0, 0.0, -1.0]]], dtype=torch.float64, requires_grad=True)
    loss = visit_cross_entropy(x, torch.tensor([[0]]))
    odds = math.exp(-30.0) + math.exp(-31.0)
    torch.testing.assert_close(loss.item(), odds, rtol=1e-2, atol=0)
    loss.backward()
    torch.testing.assert_close(x.grad[0, 0, 1].item(), math.exp(-30.0), rtol=1e-12, atol=0)


def test_small_losses_and_derivatives_of_labels_keep_their_digits(kernels):
    x = torch.tensor([[[15.0, 0.0, -1.0], [0.0, 15.0, -1.0]]], requires_grad=True)
    loss = visit_cross_entropy(x, torch.tensor([[0, 1]]), reduction="none")
    odds = math.exp(-15.0) + math.exp(-16.0)
    torch.testing.assert_close(loss, torch.full((1, 2), odds), rtol=1e-4, atol=0)
    loss.sum().backward()
    of_labels = torch.stack([x.grad[0, 0, 0], x.grad[0, 1, 1]])
    torch.testing.assert_close(of_labels, torch.full((2,), -odds), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_has_the_bits_of_padded(compiled, reduction, dtype):
    x, y, mask, weights = draw(150, 21, 6, dtype)
    mask[:, 0] = True  # a packed patient has a visit
    rows = packed_of(x, mask)
    batch = rows.batch
    options = {"reduction": reduction, **weights}
    value, grad = value_and_grad(visit_cross_entropy, x, y, mask, **options)
    values = rows.values.detach().clone().requires_grad_()
    options["visit_weight"] = batch.pack(weights["visit_weight"])
    packed = visit_cross_entropy(PackedRows(values, batch), batch.pack(y), **options)
    scale = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
    if reduction == "none":
        value, scale = batch.pack(value), batch.pack(scale)
    assert torch.equal(packed.detach(), value)
    (of_rows,) = torch.autograd.grad(packed, values, scale)
    assert torch.equal(of_rows, batch.pack(grad))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_does_not_count_is_never_read(unemulated, reduction):
    x, y, mask, weights = draw(30, 8, 4)
    options = {"reduction": reduction, "label_smoothing": 0.1, **weights}
    expected = value_and_grad(visit_cross_entropy, x, y, mask, **options)
    counts = mask & (y != -100)
    dirty = torch.where(counts[..., None], x, torch.nan)
    labels = torch.where(mask, y, 10**6)
    options["visit_weight"] = torch.where(mask, weights["visit_weight"], torch.nan)
    got = value_and_grad(visit_cross_entropy, dirty, labels, mask, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not got[1][~counts].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("classes", [3, 20])
def test_what_is_not_finite_is_seen(backend, classes, value):
    for at in (0, classes - 1):
        x, y = torch.zeros(2, 20, classes), torch.zeros(2, 20, dtype=torch.int64)
        x[1, 17, at] = value
        got, grad = value_and_grad(visit_cross_entropy, x, y, reduction="none")
        with use_backend("reference"):
            wanted, wanted_grad = value_and_grad(visit_cross_entropy, x, y, reduction="none")
        assert_matches(got, wanted.double(), scale=4)
        assert_matches(grad, wanted_grad.double(), scale=40, terms=classes)
        assert got[1, 17].isnan()
        assert int(got.isnan().sum()) == 1
    x[1, 17] = -torch.inf
    x[1, 17, 1] = 0
    got = visit_cross_entropy(x, y, reduction="none")
    assert got[1, 17] == torch.inf


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_gradient_of_nan_shows_where_the_derivative_is_zero(backend, reduction):
    """At every visit that counts, and at no other."""
    x = torch.tensor([[[200.0, 0.0], [200.0, 0.0]]]).requires_grad_()
    loss = visit_cross_entropy(x, torch.tensor([[0, -100]]), reduction=reduction)
    (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, torch.nan))
    assert grad.isnan().tolist() == [[[True, True], [False, False]]]


def test_no_visit_that_counts(backend):
    x, y = torch.randn(2, 3, 4, requires_grad=True), torch.full((2, 3), -100)
    assert visit_cross_entropy(x, y).isnan()  # as F.cross_entropy
    for reduction in ("sum", "none"):
        loss = visit_cross_entropy(x, y, reduction=reduction).sum()
        assert loss == 0
        assert not torch.autograd.grad(loss, x)[0].any()
    assert visit_cross_entropy(x[:0], y[:0], reduction="sum") == 0
    assert visit_cross_entropy(x[:, :0], y[:, :0], reduction="none").shape == (2, 0)


def test_derivatives(unemulated):
    x, y, mask, weights = draw(4, 3, 3, torch.float64, 1.0)
    x.requires_grad_()
    for reduction in ("mean", "none"):

        def run(x, reduction=reduction):
            return visit_cross_entropy(
                x, y, mask, **weights, label_smoothing=0.1, reduction=reduction
            )

        assert torch.autograd.gradcheck(run, x)
        assert torch.autograd.gradgradcheck(run, x)
        tangent = torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))[1]
        (grad,) = torch.autograd.grad(run(x).sum(), x)
        torch.testing.assert_close(tangent.sum(), grad.sum(), atol=1e-9, rtol=1e-7)
    many = torch.stack([x.detach(), -x.detach()])
    mapped = torch.func.vmap(run)(many)
    torch.testing.assert_close(mapped[1], run(-x.detach()))


@pytest.mark.parametrize("grad", ["stride 0", "strided"])
def test_gradients_of_any_strides(unemulated, grad):
    x, y, mask, _ = draw(12, 5, 3)
    x = x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    y = y.t().contiguous().t()
    loss = visit_cross_entropy(x, y, mask, reduction="none")
    given = torch.tensor(2.0).expand(12, 5) if grad == "stride 0" else torch.randn(5, 24).t()[::2]
    (got,) = torch.autograd.grad(loss, x, given)
    wide = x.detach().double().requires_grad_()
    expected = reference.visit_cross_entropy(wide, y, Visits(mask), reduction="none")
    (wanted,) = torch.autograd.grad(expected, wide, given.double())
    assert_matches(got, wanted, scale=4, terms=5)


def test_same_bits_for_any_number_of_threads_and_every_time(compiled):
    x, y, mask, weights = draw(1500, 40, 7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = value_and_grad(visit_cross_entropy, x, y, mask, **weights)
        torch.set_num_threads(2)
        again = [value_and_grad(visit_cross_entropy, x, y, mask, **weights) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    for second in again:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operator_and_compile(compiled):
    x, y, mask, weights = draw(5, 4, 3)
    operator = torch.ops.ehrseq_fast.visit_cross_entropy.default
    none = [None] * 3
    torch.library.opcheck(operator, (x, y, mask, *none, *none, -100, 0.0, 0, True))
    mask[:, 0] = True
    rows = packed_of(x, mask)
    batch = rows.batch
    layout = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
    given = (weights["class_weight"], None, weights["sample_weight"])
    torch.library.opcheck(
        operator, (rows.values, batch.pack(y), None, *layout, *given, -100, 0.1, 1, False)
    )
    for reduction in ("mean", "none"):
        fast = torch.compile(
            lambda x, reduction=reduction: visit_cross_entropy(
                x, y, mask, **weights, reduction=reduction
            ),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        got = value_and_grad(fast, x)
        expected = value_and_grad(visit_cross_entropy, x, y, mask, **weights, reduction=reduction)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_and_masks_of_any_dtype(unemulated, dtype):
    x, y, mask, _ = draw(7, 20, 4)
    y = y.clamp(min=0)
    expected = visit_cross_entropy(x, y, mask)
    assert torch.equal(visit_cross_entropy(x, y.to(dtype), mask.to(dtype)), expected)
    ignored = visit_cross_entropy(x, y.to(dtype), mask, ignore_index=2)
    wanted = visit_cross_entropy(x, torch.where(y == 2, -100, y), mask)
    assert torch.equal(ignored, wanted)


def test_a_label_that_is_the_ignored_one_in_uint8(unemulated):
    x, y = torch.zeros(1, 1, 200), torch.tensor([[156]])  # -100 in 8 bits
    expected = visit_cross_entropy(x, y)
    assert expected.isfinite()
    assert torch.equal(visit_cross_entropy(x, y.to(torch.uint8)), expected)


BAD = [
    ({"logits": torch.zeros(2, 3)}, ValueError, r"logits: expected shape \[B, V, K\], got"),
    ({"logits": torch.zeros(2, 3, 4).int()}, TypeError, "logits: expected a floating-point"),
    ({"logits": torch.zeros(2, 3, 0)}, ValueError, "logits: expected at least one class"),
    ({"labels": torch.zeros(2, 3)}, TypeError, "labels: expected an integer dtype"),
    ({"labels": torch.zeros(2, 2).long()}, ValueError, r"labels: expected shape \[B, V\] = \[2,"),
    (
        {"labels": torch.tensor([[0, 1, 9], [4, -1, 0]])},
        ValueError,
        r"a class 0\.\.3 or -100 \(ignored\): patient 1 has 4 at visit 0 \(visits at fault: 2\)",
    ),
    (
        {"sequence_mask": torch.tensor([[1, 0, 1]] * 2)},
        ValueError,
        "patient 0 has 1 at visit 2, after a 0",
    ),
    ({"sequence_mask": torch.tensor([[1, 2, 0]] * 2)}, ValueError, "patient 0 has 2 at visit 1"),
    ({"class_weight": torch.ones(3)}, ValueError, r"class_weight: expected shape \[K\] = \[4\]"),
    (
        {"class_weight": torch.tensor([1.0, torch.nan, -2, 1])},
        ValueError,
        "class_weight: expected weights of at least 0, got -2 for class 2",
    ),
    (
        {"visit_weight": torch.tensor([[1.0, 1, -1], [1, -3, 1]])},
        ValueError,
        r"visit_weight must not be negative: patient 1 has -3 at visit 1 \(visits at",
    ),
    (
        {"sample_weight": torch.tensor([1.0, -2])},
        ValueError,
        r"sample_weight must not be negative: patient 1 has -2 \(patients at fault: 1\)",
    ),
    ({"sample_weight": torch.ones(3)}, ValueError, r"sample_weight: expected shape \[B\] = \[2\]"),
    ({"sample_weight": torch.ones(2).requires_grad_()}, ValueError, "expected no requires_grad"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a number in \[0, 1\]"),
    ({"reduction": "max"}, ValueError, "reduction: expected one of"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD)
def test_errors(unemulated, change, error, match):
    given = {
        "logits": torch.zeros(2, 3, 4),
        "labels": torch.tensor([[0, 3, 99], [1, 2, -100]]),
        "sequence_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        **change,
    }
    device = torch.get_default_device()
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    for reduction in ("mean", "sum"):  # the mean reads labels and weights once more
        with pytest.raises(error, match=match):
            visit_cross_entropy(**{"reduction": reduction, **moved}, validate=True)


def test_errors_of_packed_rows_name_patients_and_visits(unemulated):
    batch = PackedVisits.from_lists([[[1]], [[1]] * 3, [[1]] * 2]).to(torch.get_default_device())
    rows = PackedRows(torch.zeros(6, 3), batch)
    labels = batch.pack(torch.tensor([[0, 0, 0], [1, 2, 5], [0, 7, 0]]))
    with pytest.raises(ValueError, match=r"patient 1 has 5 at visit 2 \(visits at fault: 2\)"):
        visit_cross_entropy(rows, labels, validate=True)
    with pytest.raises(ValueError, match=r"labels: expected shape \[n_visits\] = \[6\]"):
        visit_cross_entropy(rows, labels[:5])
    with pytest.raises(ValueError, match="sequence_mask: expected None"):
        visit_cross_entropy(rows, labels, torch.ones(3, 3))


def test_module():
    x, y, mask, weights = draw(7, 5, 3)
    module = VisitCrossEntropyLoss(
        weights["class_weight"], ignore_index=1, label_smoothing=0.1, reduction="sum"
    )
    labels = y.clamp(min=0)
    options = {"class_weight": weights["class_weight"], "ignore_index": 1, "label_smoothing": 0.1}
    wanted = visit_cross_entropy(x, labels, mask, reduction="sum", **options)
    assert torch.equal(module(x, labels, mask), wanted)
    assert "ignore_index=1" in repr(module)
    assert module.double().class_weight.dtype == torch.float64
