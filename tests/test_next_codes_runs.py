"""The loss of a visit's codes: samples, threads, operators, compile, errors, and what only one
backend does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ehrseq_fast import NextCodesLoss, PackedRows, PackedVisits, next_codes_bce, use_backend
from ehrseq_fast import backend as backends
from ehrseq_fast.next_codes.fused import Inputs
from ehrseq_fast.next_codes.sampling import draw, sampled_losses
from ehrseq_fast.triton_support import watching_launches

from .checkpointed import checkpoint
from .next_codes_cases import PATIENTS, Given, by_visit, check, dense, make, ours, with_gradients
from .tolerances import assert_matches

pytestmark = pytest.mark.operation("next_codes")


def test_tiles_of_triton(monkeypatch):
    """More classes than a block has, and visits with more codes than are read at once."""
    if backends.why_not_loaded("triton") is not None:
        pytest.skip(str(backends.why_not_loaded("triton")))
    from ehrseq_fast.next_codes.triton import launch

    monkeypatch.setattr(launch, "BLOCK", 16)
    monkeypatch.setattr(launch, "CODES", 2)
    with torch.device(backends.kernels("triton").device), use_backend("triton"):
        check(make(5, 4, 40), True, "sum")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(backend, reduction):
    given = make(3, 4, 10)

    def checkpointed(leaves, *arguments):
        def run(*tensors):
            return ours(leaves._replace(states=tensors[0]), *arguments)

        return checkpoint(run, leaves.states, use_reentrant=False)

    expected, actual = (
        with_gradients(loss, given, True, reduction) for loss in (ours, checkpointed)
    )
    torch.testing.assert_close(actual, expected)


def test_the_bias_may_change_before_the_backward_pass(kernels):
    """As that of ``nn.Linear``; not before the gradient is differentiated."""
    given = make(3, 4, 10)
    leaves = [x.requires_grad_() for x in given.leaves]
    loss = ours(given, True, "sum")
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.no_grad():
        leaves[2].add_(1)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.parametrize(("reduction", "backward"), [("sum", 0), ("none", 1)])
def test_launches_of_triton(reduction, backward):
    """One a chunk; of a sum the gradients are computed along with it."""
    if backends.why_not_loaded("triton") is not None:
        pytest.skip(str(backends.why_not_loaded("triton")))
    with torch.device(backends.kernels("triton").device), use_backend("triton"):
        given = make(3, 4, 10)
        states = given.states.requires_grad_()
        with watching_launches() as launches:
            loss = ours(given._replace(states=states), False, reduction).sum()
        assert [launch.name for launch in launches] == ["next_codes_rows"]
        with watching_launches() as launches:
            loss.backward()
        assert len(launches) == backward


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


def test_no_visit_has_a_next_one(unemulated):
    """Sampled as exact: a batch of single visits has losses, and no loss."""
    batch = PackedVisits.from_lists([[[1]], [[0, 2]], [[]]])
    layer = torch.nn.Linear(4, 5)
    states = torch.randn(3, 4, requires_grad=True)
    for n_negatives in (None, 2):
        expected = {
            "none": torch.zeros(3),
            "sum": torch.tensor(0.0),
            "mean": torch.tensor(torch.nan),
        }
        for reduction, value in expected.items():
            options = {"reduction": reduction, "n_negatives": n_negatives}
            rows = PackedRows(states, batch)
            found = next_codes_bce(rows, layer.weight, layer.bias, **options)
            torch.testing.assert_close(found, value, equal_nan=True)
            if reduction != "mean":
                (grad,) = torch.autograd.grad(found.sum(), states)
                assert torch.equal(grad, torch.zeros(3, 4))


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
    with pytest.raises(ValueError, match=r"sequence_mask: expected shape \[B, V\] of states"):
        next_codes_bce(batch.pack(padded), layer.weight, None, batch, torch.ones(batch.n_visits))
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
