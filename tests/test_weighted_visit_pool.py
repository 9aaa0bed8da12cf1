"""packed_visit_pool with weights per code: every backend against the padded definition with a mask
that holds the weights, and the weights' gradient against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from ehrseq_fast import (
    PackedVisits,
    accelerate,
    packed_visit_pool,
    use_backend,
    visit_mean_pool,
)
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM, LSTMBaseline
from ehrseq_fast.visit_pool import codes_in_use, reference

from . import plain_models
from .batches import from_lists
from .conftest import is_emulated
from .tolerances import assert_close, assert_matches

pytestmark = pytest.mark.operation("visit_pool")

MODES = ("mean", "sum")
VOCABULARY = 11
# Empty visits, repeated codes, one code in every visit, weights that sum to less and more than 1.
PATIENTS = [[[3, 3, 1, 3], [], [5, 1]], [[1], [9, 1, 2, 2, 8, 1, 0]], [[1, 4]], [[], [1, 3, 7]]]


def weighted_batch(dtype=torch.float32, zeros=True):
    batch = from_lists(PATIENTS)
    weights = torch.randn(batch.n_codes, dtype=torch.float64) + 0.5
    if zeros:
        weights[::5] = 0
    return batch, weights.to(dtype)


def pooled_and_gradients(batch, table, weights, grad, **options):
    """The output, and the gradients of table and weights."""
    inputs = [table.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()]
    pooled = packed_visit_pool(batch, inputs[0], code_weights=inputs[1], **options)
    return pooled.detach(), *torch.autograd.grad(pooled, inputs, grad)


def by_formula(batch, table, weights, grad, mode):
    """In float64, visit by visit."""
    table, weights = (x.detach().double().requires_grad_() for x in (table, weights))
    offsets = batch.code_offsets.tolist()
    visits = []
    for begin, end in itertools.pairwise(offsets):
        rows, of_visit = table[batch.codes[begin:end].long()], weights[begin:end]
        total = (rows * of_visit.unsqueeze(-1)).sum(0)
        visits.append(total / of_visit.sum().clamp(min=1) if mode == "mean" else total)
    pooled = torch.stack(visits)
    return pooled.detach(), *torch.autograd.grad(pooled, [table, weights], grad.double())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 16, 101])
def test_against_float64(backend, mode, dtype, width):
    batch, weights = weighted_batch()
    table = torch.randn(VOCABULARY, width, dtype=torch.float64).to(dtype)
    grad = torch.randn(batch.n_visits, width, dtype=torch.float64).to(dtype)
    actual = pooled_and_gradients(batch, table, weights, grad, mode=mode)
    expected = by_formula(batch, table, weights, grad, mode)
    assert [x.dtype for x in actual] == [dtype, dtype, torch.float32]
    scale = 1 + weights.abs().max()
    assert_matches(actual[0], expected[0], scale=scale**2, terms=32)
    assert_matches(actual[1], expected[1], scale=scale**2, terms=32)
    # of a 16-bit table the mean is rounded before it is subtracted
    size = (grad.double().abs().sum(1) * 4 * scale)[batch.row_of_code]
    assert_matches(actual[2], expected[2], scale=size, terms=32, accumulated_in=dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_dtype(backend, mode, kind):
    batch, weights = weighted_batch(kind)
    table, grad = torch.randn(VOCABULARY, 4), torch.randn(batch.n_visits, 4)
    actual = pooled_and_gradients(batch, table, weights, grad, mode=mode)
    expected = pooled_and_gradients(batch, table, weights.float(), grad, mode=mode)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert actual[2].dtype == kind
    assert torch.equal(actual[2], expected[2].to(kind))


@pytest.mark.parametrize("mode", MODES)
def test_the_same_numbers_as_padded_with_a_fractional_mask(unemulated, mode):
    """Zeros, negative weights, NaN and infinity, in weights, in the table and in the gradient."""
    batch, weights = weighted_batch()
    table, grad = torch.randn(VOCABULARY, 5), torch.randn(batch.n_visits, 5)
    nan, inf = float("nan"), float("inf")
    cases = [
        (weights, table, grad),
        (weights.abs() / 100, table, grad),
        (-weights.abs(), table, grad),
        (torch.zeros_like(weights), table, grad),
        (torch.where(torch.arange(len(weights)) == 7, nan, weights), table, grad),
        (torch.where(torch.arange(len(weights)) == 7, inf, weights), table, grad),
        (weights, torch.where(torch.arange(VOCABULARY) == 3, nan, table.t()).t(), grad),
        (weights, torch.where(torch.arange(VOCABULARY) == 2, inf, table.t()).t(), grad),
        (weights, table, torch.where(torch.arange(batch.n_visits) == 1, nan, grad.t()).t()),
    ]
    for case, (code_weights, rows, incoming) in enumerate(cases):
        weighted = batch.with_code_weights(code_weights)
        codes, mask, _ = weighted.to_padded()
        padded, packed = (rows.clone().requires_grad_() for _ in range(2))
        expected = weighted.pack(visit_mean_pool(codes, padded, mask, mode=mode))
        actual = packed_visit_pool(weighted, packed, mode=mode)
        torch.testing.assert_close(actual, expected, equal_nan=True, msg=f"case {case}")
        expected.backward(incoming)
        actual.backward(incoming)
        torch.testing.assert_close(packed.grad, padded.grad, equal_nan=True, msg=f"case {case}")


@pytest.mark.parametrize("mode", MODES)
def test_what_has_no_weight_is_not_read_but_by_the_gradient_of_its_weight(backend, mode):
    batch = from_lists([[[1, 2], [1]]])
    table = torch.tensor([[0.0], [2.0], [float("nan")]])
    weights = torch.tensor([3.0, 0.0, 1.0])
    grad = torch.tensor([[float("inf")], [1.0]])
    pooled, of_table, _ = pooled_and_gradients(batch, table, weights, grad, mode=mode)
    assert pooled.tolist() == ([[2.0], [2.0]] if mode == "mean" else [[6.0], [2.0]])
    assert of_table[2].tolist() == [0.0]
    *_, of_weights = pooled_and_gradients(batch, table, weights, torch.ones(2, 1), mode=mode)
    assert of_weights.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("largest", [1e20, float("inf")])
def test_what_is_zero_over_its_total_is_no_weight_of_zero(backend, largest):
    batch = from_lists([[[1, 2, 3, 1], [1]]])
    weights = torch.tensor([1e-30, largest, 0.0, -1e-30, 1.0])
    grad = torch.tensor([[float("nan")], [1.0]])
    _, of_table, _ = pooled_and_gradients(batch, torch.ones(4, 1), weights, grad)
    assert of_table.isnan().squeeze(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_one_are_no_weights(backend, mode):
    batch = from_lists(PATIENTS)
    table, grad = torch.randn(VOCABULARY, 8), torch.randn(batch.n_visits, 8)
    ones = torch.ones(batch.n_codes)
    pooled, of_table, _ = pooled_and_gradients(batch, table, ones, grad, mode=mode)
    plain = table.clone().requires_grad_()
    expected = packed_visit_pool(batch, plain, mode=mode)
    expected.backward(grad)
    assert_close(pooled, expected.detach(), terms=4)
    assert_close(of_table, plain.grad, terms=8)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(backend, mode):
    """By the weights where they are zero too, and where they sum to less than 1."""
    batch, weights = weighted_batch(torch.float64)
    table = torch.randn(VOCABULARY, 2, dtype=torch.float64, requires_grad=True)

    def pool(table, weights):
        return packed_visit_pool(batch, table, mode=mode, code_weights=weights)

    for each in (weights, weights / 100):
        torch.autograd.gradcheck(
            pool, [table, each.detach().requires_grad_()], fast_mode=is_emulated(backend)
        )


def test_at_a_total_of_one_the_gradient_is_that_of_the_mean(backend):
    """As clamp's of the definition: a visit of one code is that code's row whatever its weight."""
    batch = from_lists([[[1]]])
    table = torch.tensor([[0.0], [2.0]])
    *_, gradient = pooled_and_gradients(batch, table, torch.ones(1), torch.ones(1, 1), mode="mean")
    assert gradient.tolist() == [0.0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_sparse_gradients_and_padding(backend, mode, padding_idx):
    batch, weights = weighted_batch()
    table, grad = torch.randn(40, 8), torch.randn(batch.n_visits, 8)
    options = {"mode": mode, "padding_idx": padding_idx}
    _, dense, of_weights = pooled_and_gradients(batch, table, weights, grad, **options)
    _, sparse, same = pooled_and_gradients(batch, table, weights, grad, sparse_grad=True, **options)
    assert sparse.is_sparse
    torch.testing.assert_close(sparse.to_dense(), dense)
    assert torch.equal(of_weights, same)
    if padding_idx is not None:
        assert (dense[padding_idx] == 0).all()
        plain = pooled_and_gradients(batch, table, weights, grad, mode=mode)
        assert torch.equal(plain[2], of_weights)


@pytest.mark.parametrize("wanted", ["table", "weights", "neither"])
def test_one_gradient_alone(backend, wanted):
    batch, weights = weighted_batch()
    table, grad = torch.randn(VOCABULARY, 8), torch.randn(batch.n_visits, 8)
    expected = pooled_and_gradients(batch, table, weights, grad)
    leaves = {"table": table.clone(), "weights": weights.clone()}
    if wanted != "neither":
        leaves[wanted].requires_grad_()
    pooled = packed_visit_pool(batch, leaves["table"], code_weights=leaves["weights"])
    assert torch.equal(pooled.detach(), expected[0])
    assert pooled.requires_grad == (wanted != "neither")
    if wanted != "neither":
        pooled.backward(grad)
        assert torch.equal(leaves[wanted].grad, expected[1 if wanted == "table" else 2])


def test_no_visit_and_no_code(backend):
    for patients in ([], [[[]]], [[[], []]]):
        batch = from_lists(patients)
        table = torch.randn(4, 3)
        grad = torch.ones(batch.n_visits, 3)
        results = pooled_and_gradients(batch, table, torch.ones(0), grad, mode="mean")
        assert results[0].shape == (batch.n_visits, 3)
        assert results[2].shape == (0,)
        assert all((result == 0).all() for result in results)


def test_second_derivatives(backend):
    batch, weights = weighted_batch(torch.float64)
    table = torch.randn(VOCABULARY, 2, dtype=torch.float64, requires_grad=True)
    weights.requires_grad_()

    def pool(table, weights):
        return packed_visit_pool(batch, table, code_weights=weights)

    if backend == "reference":
        torch.autograd.gradgradcheck(pool, [table, weights], fast_mode=True)
        return
    for leaf in (table, weights):
        (gradient,) = torch.autograd.grad(pool(table, weights).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(gradient.square().sum(), [table, weights], allow_unused=True)


def test_forward_mode_and_transforms(backend):
    batch, weights = weighted_batch(torch.float64)
    table = torch.randn(VOCABULARY, 2, dtype=torch.float64)
    directions = torch.randn_like(table), torch.randn_like(weights)

    def pool(table, weights):
        return packed_visit_pool(batch, table, code_weights=weights)

    _, forward = torch.func.jvp(pool, (table, weights), directions)
    step = 1e-6
    shifted = [
        pool(table + sign * step * directions[0], weights + sign * step * directions[1])
        for sign in (1, -1)
    ]
    torch.testing.assert_close(forward, (shifted[0] - shifted[1]) / (2 * step), atol=1e-7, rtol=0)
    several = torch.stack([weights, 2 * weights])
    mapped = torch.func.vmap(pool, in_dims=(None, 0))(table, several)
    torch.testing.assert_close(mapped, torch.stack([pool(table, each) for each in several]))
    jacobian = torch.func.jacrev(pool, argnums=1)(table, weights)
    torch.testing.assert_close(jacobian, torch.func.jacfwd(pool, argnums=1)(table, weights))


def test_compile(backend):
    torch._dynamo.reset()

    def pooled(batch, table, weights):
        return packed_visit_pool(batch, table, code_weights=weights).sin()

    compiler = "inductor" if backend == "cpu" else "aot_eager"
    whole = torch.compile(pooled, fullgraph=True, dynamic=True, backend=compiler)
    for repeats in (1, 2, 3):
        batch = from_lists(PATIENTS * repeats)
        weights = (torch.rand(batch.n_codes) * 2).requires_grad_()
        table = torch.randn(VOCABULARY, 4, requires_grad=True)
        for given in (batch, batch.with_code_weights(weights.detach())):
            inputs = [table, weights] if given is batch else [table]
            own = weights if given is batch else None
            actual = torch.autograd.grad(whole(given, table, own).sum(), inputs)
            expected = torch.autograd.grad(pooled(given, table, own).sum(), inputs)
            torch.testing.assert_close(actual, expected)


def test_codes_far_apart(backend):
    """Of a vocabulary much larger than the batch."""
    batch = from_lists([[[90_000, 5, 90_000], [5]], [[70_000]]])
    weights, grad = torch.rand(5), torch.randn(3, 2)
    table = torch.randn(100_000, 2)
    actual = pooled_and_gradients(batch, table, weights, grad, sparse_grad=True)
    expected = by_formula(batch, table, weights, grad, "mean")
    assert_close(actual[1].to_dense(), expected[1], terms=8)
    assert_close(actual[2], expected[2], terms=8)


def test_same_bits_on_every_run_and_for_any_number_of_threads(compiled):
    batch = PackedVisits.from_lists(PATIENTS * 200)
    weights = torch.rand(batch.n_codes)
    weights[::7] = 0
    table, grad = torch.randn(VOCABULARY, 33), torch.randn(batch.n_visits, 33)
    threads = torch.get_num_threads()
    try:
        with use_backend("cpu"):
            first = pooled_and_gradients(batch, table, weights, grad)
            for run in range(50):
                torch.set_num_threads(1 + run % 4)
                again = pooled_and_gradients(batch, table, weights, grad)
                assert all(map(torch.equal, first, again))
    finally:
        torch.set_num_threads(threads)


def test_the_batchs_weights_are_used(backend):
    batch, weights = weighted_batch()
    table = torch.randn(VOCABULARY, 4)
    expected = packed_visit_pool(batch, table, code_weights=weights)
    weighted = batch.with_code_weights(weights)
    assert torch.equal(packed_visit_pool(weighted, table), expected)
    rows = table[batch.index_codes.long()]
    assert torch.equal(packed_visit_pool(codes_in_use(weighted), rows), expected)
    other = packed_visit_pool(weighted, table, code_weights=2 * weights)
    assert torch.equal(other, packed_visit_pool(batch, table, code_weights=2 * weights))


@pytest.mark.parametrize(
    ("weights", "mode", "error", "message"),
    [
        (torch.ones(19), "max", ValueError, "expected none with mode='max'"),
        (torch.ones(19), "attention", ValueError, "expected none with mode='attention'"),
        (torch.ones(3), "mean", ValueError, r"\[n_codes\] = \[19\], got \[3\]"),
        (torch.ones(19, dtype=torch.int64), "mean", TypeError, "expected float32"),
        ([1.0] * 19, "mean", TypeError, "expected a tensor or None, got a list"),
    ],
)
def test_what_is_refused(weights, mode, error, message):
    batch = PackedVisits.from_lists(PATIENTS)
    scores = torch.ones(VOCABULARY) if mode == "attention" else None
    with pytest.raises(error, match=f"code_weights: .*{message}"):
        packed_visit_pool(
            batch, torch.ones(VOCABULARY, 2), mode=mode, scores=scores, code_weights=weights
        )


def models():
    survival = DiscreteTimeSurvivalLSTM(VOCABULARY, embedding_dim=4, hidden_dim=8)
    return [
        survival,
        LSTMBaseline(VOCABULARY, embedding_dim=4, hidden_dim=8, visit_aggregation="sum"),
    ]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("at", [0, 1])
def test_models_use_them(path, hooked, at):
    """On every path, and where the embedding or the encoder has to be called."""
    model = models()[at].eval()
    model.path = path
    batch, weights = weighted_batch()
    weights = weights.abs()
    if hooked:
        model.embedding.register_forward_hook(lambda module, inputs, output: 2 * output)

    def said(batch):
        output = model(batch)
        return output["logits"] if isinstance(output, dict) else output.values

    weighted = said(batch.with_code_weights(weights))
    assert not torch.allclose(weighted, said(batch))
    codes, mask, real = batch.with_code_weights(weights).to_padded()
    output = model(codes, mask, real)
    expected = output["logits"] if at else batch.pack(output)
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("aggregation", ["max", "attention", "mean"])
def test_a_visit_encoder_uses_them_or_refuses(path, hooked, aggregation):
    model = LSTMBaseline(
        VOCABULARY, embedding_dim=4, hidden_dim=8, visit_aggregation=aggregation
    ).eval()
    model.path = path
    batch, weights = weighted_batch()
    batch = batch.with_code_weights(weights.abs())
    if hooked:
        model.visit_encoder.register_forward_hook(lambda module, inputs, output: 2 * output)
    if aggregation == "mean":
        codes, mask, real = batch.to_padded()
        torch.testing.assert_close(model(batch)["logits"], model(codes, mask, real)["logits"])
    else:
        with pytest.raises(ValueError, match=f"code_weights: .*{aggregation}"):
            model(batch)


@pytest.mark.parametrize("aggregation", ["mean", "sum", "max", "attention"])
def test_accelerated_models_use_them_or_refuse(aggregation):
    model = plain_models.LSTMBaseline(
        VOCABULARY, embedding_dim=4, hidden_dim=8, visit_aggregation=aggregation
    ).eval()
    accelerate(model)
    batch, weights = weighted_batch()
    batch = batch.with_code_weights(weights.abs())
    if aggregation in ("max", "attention"):
        with pytest.raises(ValueError, match=f"code_weights: .*{aggregation}"):
            model(batch)
        return
    padded = model(*batch.to_padded())["logits"]
    torch.testing.assert_close(model(batch)["logits"], padded)
    assert not torch.allclose(model(batch.with_code_weights(None))["logits"], padded)


def test_the_reference_is_the_padded_definition():
    """So is the definition of these kernels that of the padded ones."""
    batch, weights = weighted_batch(torch.float64)
    table = torch.randn(VOCABULARY, 3, dtype=torch.float64)
    codes, mask, _ = batch.with_code_weights(weights).to_padded()
    for mode in MODES:
        padded = batch.pack(reference.visit_mean_pool(codes, table, mask, mode=mode))
        packed = reference.packed_visit_pool(
            batch.codes, batch.code_offsets, table, mode=mode, code_weights=weights
        )
        torch.testing.assert_close(packed, padded)
