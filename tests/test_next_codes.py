"""The loss of a visit's codes: the dense loss's numbers, targets, layouts, sampling, errors."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ehrseq_fast import NextCodesLoss, PackedRows, PackedVisits, next_codes_bce, use_backend
from ehrseq_fast import backend as backends
from ehrseq_fast.next_codes import chunks
from ehrseq_fast.next_codes.fused import Inputs
from ehrseq_fast.next_codes.sampling import draw, sampled_losses

from .tolerances import assert_matches

pytestmark = pytest.mark.operation("next_codes")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(0, 3, 5), (1, 1, 1), (6, 4, 40)]  # n_visits, H, K
LARGER = [(70, 17, 33), (41, 9, 300)]


class Given(NamedTuple):
    states: Tensor
    weight: Tensor
    bias: Tensor
    codes: Tensor
    offsets: Tensor
    pos_weight: Tensor
    class_weight: Tensor
    visit_weight: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.states, self.weight, self.bias]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.codes, self.offsets

    def of(self, dtype: torch.dtype) -> Given:
        return Given(*(x.to(dtype) if x.is_floating_point() else x for x in self))


def make(n_visits: int, width: int, classes: int, dtype=torch.float32, seed=0) -> Given:
    """Visits of 0 to 6 codes, some of them twice."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    counts = torch.randint(0, 7, (n_visits,), generator=generator)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    codes = torch.randint(0, classes, (int(offsets[-1]),), generator=generator)
    rows = (normal(n_visits, width), normal(classes, width), normal(classes))
    weights = (normal(classes).abs(), normal(classes).abs(), normal(n_visits).abs())
    return Given(*(x.to(dtype) for x in rows), codes, offsets, *(x.to(dtype) for x in weights))


def dense_targets(codes: Tensor, offsets: Tensor, classes: int) -> Tensor:
    targets = torch.zeros(len(offsets) - 1, classes, dtype=torch.float64)
    for visit, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        for code in codes[begin:end].tolist():
            targets[visit, code] = 1
    return targets


def dense(given: Given, weighted: bool, reduction: str = "none") -> Tensor:
    """By PyTorch's loss of dense targets."""
    classes = len(given.weight)
    losses = F.binary_cross_entropy_with_logits(
        F.linear(given.states, given.weight, given.bias),
        dense_targets(given.codes, given.offsets, classes).to(given.states.dtype),
        weight=given.class_weight if weighted else None,
        pos_weight=given.pos_weight if weighted else None,
        reduction="none",
    ).sum(1)
    if weighted:
        losses = losses * given.visit_weight
    return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]


def ours(given: Given, weighted: bool, reduction: str = "none", **options) -> Tensor:
    if weighted:
        options["pos_weight"], options["class_weight"] = given.pos_weight, given.class_weight
        options["visit_weight"] = given.visit_weight
    return next_codes_bce(*given.leaves, given.pair, reduction=reduction, **options)


def with_gradients(loss, given: Given, *arguments, **options):
    leaves = [x.detach().clone().requires_grad_() for x in given.leaves]
    value = loss(given._replace(**dict(zip(Given._fields, leaves, strict=False))), *arguments,
                 **options)  # fmt: skip
    weights = torch.arange(1.0, 1 + value.numel()).view(value.shape) / max(1, value.numel())
    gradients = torch.autograd.grad(value, leaves, weights.to(value.dtype))
    return value.detach(), *gradients


def check(given: Given, weighted: bool, reduction: str):
    got = with_gradients(ours, given, weighted, reduction)
    wide = with_gradients(dense, given.of(torch.float64), weighted, reduction)
    n_visits, width = given.states.shape
    classes = len(given.weight)
    assert got[0].dtype == (torch.float64 if given.states.dtype == torch.float64 else torch.float32)
    for mine, expected, leaf in zip(got[1:], wide[1:], given.leaves, strict=True):
        assert mine.dtype == leaf.dtype
        assert mine.shape == leaf.shape
        summed = max(1, n_visits) if leaf is not given.states else classes
        size = 8 * summed / (max(1, n_visits) if reduction == "mean" else 1)
        assert_matches(mine, expected, scale=size, terms=width)
    assert_matches(got[0], wide[0], scale=(wide[0].abs() + 1) * 4, terms=width)


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


def test_tiles_of_triton(monkeypatch):
    """More classes than a block has, and visits with more codes than are read at once."""
    if backends.why_not_loaded("triton") is not None:
        pytest.skip(str(backends.why_not_loaded("triton")))
    from ehrseq_fast.next_codes.triton import launch

    monkeypatch.setattr(launch, "BLOCK", 16)
    monkeypatch.setattr(launch, "CODES", 2)
    with torch.device(backends.kernels("triton").device), use_backend("triton"):
        check(make(5, 4, 40), True, "sum")


def test_the_raw_operator_in_triton():
    """A code outside the vocabulary makes its row NaN; nothing is indexed by it."""
    if backends.why_not_loaded("triton") is not None:
        pytest.skip(str(backends.why_not_loaded("triton")))
    operator = torch.ops.ehrseq_fast_triton.next_codes_bce.default
    with torch.device(backends.kernels("triton").device):
        given = make(4, 3, 10)
        codes, offsets = torch.tensor([1, 11, 3]).int(), torch.tensor([0, 1, 2, 3, 3]).int()
        too_wide = torch.ones(10, 4)
    last = (None, None, None, False, False, True, True)
    loss, grad_states, *_ = operator(*given.leaves, codes, offsets, *last)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert grad_states.isnan().any(1).tolist() == [False, True, False, False]
    for at, wrong, match in (
        (1, too_wide, r"weight: expected shape \[K, H\] = \[10, 3\], got \[10, 4\]"),
        (3, codes.long(), "codes: expected int32, got torch.int64"),
        (4, offsets[1:], r"code_offsets: expected shape .* = \[5\], got \[4\]"),
        (1, given.weight.double(), "weight: expected float64 where states are"),
    ):
        arguments = [*given.leaves, codes, offsets, *last]
        arguments[at] = wrong
        with pytest.raises(ValueError, match=match):
            operator(*arguments)


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


PATIENTS = [[[1], [0, 2, 2], []], [[2]], [[3, 1], [4]], [[], [1, 1], [0], [4, 3]]]


def by_visit(patients=PATIENTS, classes=5, width=3):
    batch = PackedVisits.from_lists(patients, vocab_size=classes)
    batch = batch.to(torch.get_default_device())
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    padded = torch.randn(len(patients), batch.max_visits, width, generator=generator)
    layer = torch.nn.Linear(width, classes)
    return batch, padded, layer


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
def test_layouts_and_which_visit(unemulated, next_visit):
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
    weights = torch.rand(mask.shape)
    weighted = next_codes_bce(
        dirty, *parameters, batch, next_visit=next_visit, visit_weight=weights, reduction="sum"
    )
    torch.testing.assert_close(weighted, (weights * expected).sum())


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


def test_same_bits_for_any_number_of_threads(compiled):
    given = make(700, 40, 500)
    threads = torch.get_num_threads()
    for reduction in ("none", "mean"):
        try:
            torch.set_num_threads(1)
            first = with_gradients(ours, given, True, reduction)
            torch.set_num_threads(2)
            again = [with_gradients(ours, given, True, reduction) for _ in range(3)]
        finally:
            torch.set_num_threads(threads)
        for second in again:
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operator_and_compile(compiled):
    given = make(5, 4, 30)
    offsets = given.offsets.int()
    operator = torch.ops.ehrseq_fast.next_codes_bce.default
    weights = (given.pos_weight, given.class_weight, given.visit_weight)
    arguments = (*given.leaves, given.codes.int(), offsets)
    torch.library.opcheck(operator, (*arguments, *weights, True, False, True, True))
    no_bias = (*arguments[:2], None, *arguments[3:])
    torch.library.opcheck(operator, (*no_bias, None, None, None, False, False, False, True))
    for reduction in ("mean", "none"):
        fast = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
        got = with_gradients(fast, given, True, reduction)
        expected = with_gradients(ours, given, True, reduction)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast(unemulated):
    """16-bit states beside parameters in float32 are not rounded again."""
    given = make(6, 4, 40)
    states = given.states.bfloat16()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = next_codes_bce(states, *given.leaves[1:], given.pair, reduction="none")
    assert got.dtype == torch.float32
    wide = given._replace(states=states).of(torch.float64)
    assert_matches(got, dense(wide, False), scale=100, terms=4)


# Sampling -----------------------------------------------------------------------------------------


def test_the_mean_over_all_samples_is_the_exact_loss(unemulated):
    given = make(7, 3, 5, torch.float64)
    leaves = [x.clone().requires_grad_() for x in given.leaves]
    weights = (given.pos_weight, given.class_weight, None)
    inputs = Inputs(*leaves, given.codes.int(), given.offsets.int(), *weights)
    samples = list(itertools.combinations(range(5), 2))
    losses = [sampled_losses(unemulated, inputs, torch.tensor(sample)) for sample in samples]
    found = torch.stack(losses).mean(0)
    exact = ours(given._replace(**dict(zip(Given._fields, leaves, strict=False))), True)
    exact = exact / given.visit_weight
    torch.testing.assert_close(found, exact)
    assert not torch.allclose(losses[0], losses[1])
    incoming = torch.rand(7, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, incoming), torch.autograd.grad(exact, leaves, incoming)
    )


def test_all_classes_sampled_are_the_exact_loss(unemulated):
    given = make(20, 6, 33)
    for reduction in ("none", "mean", "sum"):
        got = with_gradients(ours, given, True, reduction, n_negatives=33)
        expected = with_gradients(ours, given, True, reduction)
        for mine, other in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    batch, padded, layer = by_visit()
    parameters = (padded, layer.weight, layer.bias, batch)
    options = {"next_visit": True, "reduction": "none"}
    torch.testing.assert_close(
        next_codes_bce(*parameters, n_negatives=5, **options),
        next_codes_bce(*parameters, **options),
    )


def test_samples_are_the_generators_and_uniform():
    given = make(20, 6, 33)
    one, two = (
        ours(given, False, n_negatives=5, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(one, two)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw(9, 4, torch.device("cpu"), generator) for _ in range(3000)])
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    counts = drawn.flatten().bincount(minlength=9)
    assert ((counts - 3000 * 4 / 9).abs() < 5 * (3000 * 4 / 9 * 5 / 9) ** 0.5).all()


def test_sampled_derivatives(unemulated):
    given = make(4, 3, 6, torch.float64)

    def run(*leaves):
        generator = torch.Generator(torch.get_default_device()).manual_seed(0)
        return next_codes_bce(*leaves, given.pair, n_negatives=3, generator=generator)

    leaves = [x.clone().requires_grad_() for x in given.leaves]
    assert torch.autograd.gradcheck(run, leaves)
    (grad,) = torch.autograd.grad(run(*leaves), leaves[0], create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(grad.sum(), leaves[1])


# Edges and errors ---------------------------------------------------------------------------------


def test_no_patients_and_no_next_visits(backend):
    layer = torch.nn.Linear(3, 5)
    for patients in ([], [[[1]], [[2, 3]]]):
        batch = PackedVisits.from_lists(patients).to(torch.get_default_device())
        states = torch.full((batch.n_visits, 3), torch.nan, requires_grad=True)
        rows = PackedRows(states, batch)
        assert next_codes_bce(rows, layer.weight, layer.bias).isnan()
        total = next_codes_bce(rows, layer.weight, layer.bias, reduction="sum")
        assert total == 0
        gradients = torch.autograd.grad(total, [states, layer.weight])
        assert not any(x.any() for x in gradients)
        losses = next_codes_bce(rows, layer.weight, layer.bias, reduction="none")
        assert torch.equal(losses, torch.zeros(batch.n_visits))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"states": torch.ones(3)}, ValueError, r"states: expected \[n_visits, H\] or"),
        ({"states": torch.ones(3, 2).int()}, TypeError, "states: expected float32"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"weight: expected \[K, H=2\]"),
        ({"weight": torch.ones(5, 2).double()}, TypeError, "weight: expected float64 where"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: expected \[K=5\], got \[4\]"),
        ({"targets": None}, TypeError, "targets: expected a PackedVisits or a pair"),
        ({"targets": [[1], [2], [3]]}, TypeError, "targets: expected a PackedVisits or a pair"),
        ({"next_visit": True}, ValueError, "next_visit: expected False, as targets"),
        (
            {"targets": (torch.tensor([0, 7]), torch.tensor([0, 1, 1, 2]))},
            IndexError,
            "Found 1 codes outside the vocabulary: expected 0 <= code < 5. The first is 7: visit 2",
        ),
        (
            {"targets": (torch.tensor([0, -1]), torch.tensor([0, 2, 2, 2]))},
            IndexError,
            "The first is -1: visit 0",
        ),
        (
            {"targets": (torch.tensor([0, 1]), torch.tensor([0, 1, 1]))},
            ValueError,
            "offsets: expected one more than the 3 visits",
        ),
        (
            {"targets": (torch.tensor([0, 1]), torch.tensor([0, 2, 1, 2]))},
            ValueError,
            "offsets: expected to rise from 0 to the 2 codes",
        ),
        ({"targets": (torch.ones(2), torch.zeros(4).int())}, TypeError, "targets, codes: expected"),
        ({"pos_weight": torch.tensor([1.0, 1, -1, 1, 1])}, ValueError, "got -1 .code 2"),
        ({"class_weight": torch.ones(5, requires_grad=True)}, ValueError, "no requires_grad"),
        ({"visit_weight": torch.tensor([1.0, -2, 1])}, ValueError, r"got -2 at \[1\]"),
        ({"visit_weight": torch.ones(2)}, ValueError, r"one per visit, \[3\], got \[2\]"),
        ({"n_negatives": 6}, ValueError, "n_negatives"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of"),
        ({"sequence_mask": torch.ones(3, 1)}, ValueError, "sequence_mask: expected shape"),
    ],
)
def test_errors(unemulated, change, error, match):
    given = {
        "states": torch.ones(3, 2),
        "weight": torch.ones(5, 2),
        "targets": (torch.tensor([0, 4]), torch.tensor([0, 1, 1, 2])),
    }

    def moved(value):
        if isinstance(value, Tensor):
            return value.to(torch.get_default_device()).requires_grad_(value.requires_grad)
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    with pytest.raises(error, match=match):
        next_codes_bce(**{k: moved(v) for k, v in {**given, **change}.items()}, validate=True)


def test_errors_name_the_patient(compiled):
    batch, padded, layer = by_visit()
    weight = torch.ones(3, 3)
    for given in (padded, PackedRows(batch.pack(padded), batch)):
        with pytest.raises(IndexError, match=r"codes outside.*is 4: patient 2, visit 1\."):
            next_codes_bce(given, weight, None, batch, next_visit=True)
    mask = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"sequence_mask: .*\(patient 0, of 3 visits\)"):
        next_codes_bce(padded, layer.weight, None, batch, mask)
    other = PackedVisits.from_lists([PATIENTS[i] for i in (2, 1, 0, 3)])
    with pytest.raises(ValueError, match=r"targets: .*patient 0: expected 3, got 2"):
        next_codes_bce(PackedRows(batch.pack(padded), batch), layer.weight, None, other)
    operator = torch.ops.ehrseq_fast.next_codes_bce.default
    codes, offsets = torch.tensor([1, 9]).int(), torch.tensor([0, 1, 2]).int()
    arguments = (torch.ones(2, 3), layer.weight.detach(), None, codes, offsets)
    with pytest.raises(IndexError, match=r"The first is 9: codes\[1\], of visit 1\."):
        operator(*arguments, None, None, None, True, False, True, True)


def test_module():
    batch, padded, layer = by_visit()
    pos_weight = torch.rand(5)
    module = NextCodesLoss(pos_weight=pos_weight, reduction="sum")
    rows = PackedRows(batch.pack(padded), batch)
    expected = next_codes_bce(
        rows, layer.weight, layer.bias, pos_weight=pos_weight, reduction="sum"
    )
    assert torch.equal(module(rows, layer), expected)
    assert "sum" in repr(module)
    assert set(module.state_dict()) == {"pos_weight"}
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"layer: expected an nn\.Linear that nothing watches"):
        module(rows, layer)
