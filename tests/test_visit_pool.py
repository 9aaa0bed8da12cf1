"""visit_mean_pool and masked_pool: every backend against the definition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ehrseq_fast import masked_pool, use_backend, visit_mean_pool
from ehrseq_fast.backend import operators
from ehrseq_fast.visit_pool import reference

from .conftest import RUNNABLE, is_emulated
from .poison import poison_allocator
from .pool_cases import DTYPES, MODES, check_against_definition, gradients, ragged_batch

pytestmark = pytest.mark.operation("visit_pool")


def test_reference_is_the_formula():
    codes, mask, weight = ragged_batch(dtype=torch.float64)
    for mode, (b, v) in itertools.product(MODES, itertools.product(range(4), range(6))):
        rows = [weight[codes[b, v, c]] for c in range(7) if mask[b, v, c]]
        expected = torch.zeros(8, dtype=torch.float64)
        if rows:
            stack = torch.stack(rows)
            expected = stack.amax(0) if mode == "max" else stack.sum(0)
            expected = expected / len(rows) if mode == "mean" else expected
        actual = reference.visit_mean_pool(codes, weight, mask, mode=mode)[b, v]
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 5, 16, 64, 101, 128])
def test_forward_and_backward(backend, mode, dtype, width):
    codes, mask, weight = ragged_batch(width=width, dtype=dtype)
    check_against_definition(codes, weight, mask, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (2, 1, 5), (7, 3), (9,)]
)
def test_shapes(backend, mode, shape):
    codes, mask, weight = ragged_batch(shape=shape)
    check_against_definition(codes, weight, mask, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("code_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "mask_dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ],
)
def test_code_and_mask_dtypes(backend, mode, code_dtype, mask_dtype):
    codes, mask, weight = ragged_batch()
    check_against_definition(codes.to(code_dtype), weight, mask.to(mask_dtype), mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_mask_every_slot_counts(backend, mode):
    codes = torch.randint(0, 5, (3, 4, 6))
    weight = torch.randn(5, 8)
    check_against_definition(codes, weight, None, mode=mode)
    full = torch.ones_like(codes, dtype=torch.bool)
    everything = visit_mean_pool(codes, weight, full, mode=mode)
    torch.testing.assert_close(visit_mean_pool(codes, weight, mode=mode), everything)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("row", ["zeros", "NaN", "numbers"])
def test_codes_of_padding_without_a_mask(backend, mode, padding_idx, row):
    """Nearly all slots hold one code, as where visits are padded; kernels may leave it out where it
    changes nothing, and the numbers are the same bits as with a mask that keeps every slot."""
    codes = torch.where(torch.rand(70, 5) < 0.2, torch.randint(0, 5, (70, 5)), 3)
    codes[4], codes[-1] = 3, torch.tensor([1, 3, 3, 3, 3])
    weight = torch.randn(5, 32)
    weight[3] = {"zeros": torch.tensor([0.0, -0.0] * 16), "NaN": float("nan")}.get(row, weight[3])
    full = torch.ones_like(codes, dtype=torch.bool)
    options = {"mode": mode, "padding_idx": padding_idx}
    grad = torch.randn(70, 32)
    for batch in (codes, codes.int(), codes.flip(0)):
        without = gradients(visit_mean_pool, batch, weight, None, grad, **options)
        masked = gradients(visit_mean_pool, batch, weight, full, grad, **options)
        for ours, theirs in zip(without, masked, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("mask_dtype", "values"),
    [
        (torch.uint8, [0, 1, 128]),
        (torch.int32, [0, -1, 1 << 16, 1 << 30]),
        (torch.int64, [0, -1, 1 << 31, 1 << 32]),  # of the last, the lower half is 0
        (torch.float32, [0.0, -0.0, 0.25, -2.0, float("nan")]),
        (torch.float64, [0.0, -0.0, 2.0**-40, -2.0, float("nan")]),
    ],
)
def test_which_numbers_of_a_mask_are_zero(backend, mode, mask_dtype, values):
    """One slot in ten holds one of the numbers, wherever a kernel's vectors begin and end."""
    shape = (13, 47)
    drawn = torch.tensor(values, dtype=mask_dtype)[torch.randint(len(values), shape)]
    mask = torch.where(torch.rand(shape) < 0.1, drawn, 0)
    mask[-1, -1], mask[0, 0] = values[-1], values[1]
    codes = torch.where(mask == 0, -1, torch.randint(0, 5, shape))
    weight = torch.randn(5, 8)
    pooled, grad = gradients(visit_mean_pool, codes, weight, mask, torch.ones(13, 8), mode=mode)
    expected, expected_grad = gradients(
        reference.visit_mean_pool, codes, weight.double(), mask, torch.ones(13, 8), mode=mode
    )
    scale = float(mask.double().nan_to_num().abs().max()) if mode == "sum" else 1.0
    for ours, theirs in ((pooled, expected), (grad, expected_grad)):
        close = {"rtol": 1e-4, "atol": 1e-4 * scale, "equal_nan": True}
        torch.testing.assert_close(ours.double(), theirs.double(), **close)


def test_fractional_masks_are_weights(backend):
    codes, mask, weight = ragged_batch(dtype=torch.float64)
    weights = torch.rand(mask.shape, dtype=torch.float64) * 3 * mask
    for mode in MODES:
        check_against_definition(codes, weight, weights, mode=mode)
    expected = (weights[0, 3] @ weight[codes[0, 3].clamp(max=22)]) / weights[0, 3].sum().clamp(
        min=1
    )
    torch.testing.assert_close(visit_mean_pool(codes, weight, weights)[0, 3], expected)


def test_repeated_codes_count_as_often_as_they_occur(backend):
    weight = torch.eye(4).requires_grad_()
    pooled = visit_mean_pool(torch.tensor([[1, 1, 1, 2]]), weight)
    torch.testing.assert_close(pooled, torch.tensor([[0.0, 0.75, 0.25, 0.0]]))
    pooled.sum().backward()
    torch.testing.assert_close(weight.grad[:, 0], torch.tensor([0.0, 0.75, 0.25, 0.0]))


@pytest.mark.parametrize("mode", MODES)
def test_one_code_everywhere(backend, mode):
    """The kernels sum such a code in pieces, and lose less to rounding than one long sum does."""
    codes = torch.full((10, 50, 3) if is_emulated(backend) else (50, 60, 3), 7)
    mask = torch.rand(codes.shape) < 0.7
    terms = codes.numel() if backend == "reference" else 256
    check_against_definition(codes, torch.randn(11, 5), mask, terms=terms, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_padding_idx_gets_no_gradient_and_is_no_mask(backend, mode):
    codes = torch.randint(0, 4, (5, 6, 4))
    weight = torch.randn(4, 8)
    for padding_idx in (0, -1):
        check_against_definition(codes, weight, None, mode=mode, padding_idx=padding_idx)
    table = weight.clone().requires_grad_()
    visit_mean_pool(codes, table, padding_idx=2).sum().backward()
    assert (table.grad[2] == 0).all()
    assert (table.grad[1] != 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_no_code_names_get_zeros(backend, mode):
    codes = torch.full((2, 3, 4), 5)
    weight = torch.randn(9, 16, requires_grad=True)
    poison_allocator((9, 16), (2, 3, 16))
    visit_mean_pool(codes, weight, mode=mode).sum().backward()
    assert (weight.grad[torch.arange(9) != 5] == 0).all()
    assert (weight.grad[5] != 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_never_read(backend, mode):
    """NaN in a row that only padded slots name, or in fresh memory, changes nothing."""
    codes, mask, weight = ragged_batch()
    real = torch.where(mask, codes, 0)
    clean = gradients(visit_mean_pool, real, weight, mask, torch.ones(4, 6, 8), mode=mode)
    poisoned_row = torch.cat([weight, torch.full((1, 8), float("nan"))])
    poison_allocator((4, 6, 8), (24, 8))
    for garbage in (23, -1, 2**40):
        dirty = torch.where(mask, codes, garbage)
        pooled, grad = gradients(
            visit_mean_pool, dirty, poisoned_row, mask, torch.ones(4, 6, 8), mode=mode
        )
        assert torch.equal(pooled, clean[0])
        assert torch.equal(grad[:23], clean[1])
        assert (grad[23] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_a_real_code_shows(backend, mode):
    weight = torch.randn(3, 4)
    weight[1, 2] = float("nan")
    pooled = visit_mean_pool(torch.tensor([[0, 1], [1, 0], [2, 2]]), weight, mode=mode)
    assert pooled[:2, 2].isnan().all()
    assert not pooled[2].isnan().any()


def test_empty_visits_are_zeros_in_every_mode(backend):
    codes, mask, weight = ragged_batch()
    poison_allocator((4, 6, 8))
    for mode in MODES:
        pooled = visit_mean_pool(codes, weight, torch.zeros_like(mask), mode=mode)
        assert (pooled == 0).all()
        assert (visit_mean_pool(codes, weight, mask, mode=mode)[0, 0] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_non_contiguous_inputs(backend, mode):
    codes, mask, weight = ragged_batch()
    expected = visit_mean_pool(codes, weight, mask, mode=mode)
    strided = visit_mean_pool(
        codes.transpose(0, 1).contiguous().transpose(0, 1),
        weight.t().contiguous().t(),
        mask.transpose(0, 2).contiguous().transpose(0, 2),
        mode=mode,
    )
    assert torch.equal(expected, strided)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_any_stride(backend, mode):
    codes, mask, weight = ragged_batch()
    dense = torch.ones(4, 6, 8)
    expected = gradients(visit_mean_pool, codes, weight, mask, dense, mode=mode)[1]
    stride_zero = torch.ones(()).expand(4, 6, 8)
    assert torch.equal(
        gradients(visit_mean_pool, codes, weight, mask, stride_zero, mode=mode)[1], expected
    )
    transposed = torch.randn(8, 6, 4).permute(2, 1, 0)
    expected = gradients(visit_mean_pool, codes, weight, mask, transposed.contiguous(), mode=mode)[
        1
    ]
    assert torch.equal(
        gradients(visit_mean_pool, codes, weight, mask, transposed, mode=mode)[1], expected
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_sparse_gradient_is_the_dense_one(backend, mode, padding_idx):
    codes, mask, weight = ragged_batch(vocabulary=40)
    grad = torch.randn(4, 6, 8)
    options = {"mode": mode, "padding_idx": padding_idx}
    dense = gradients(visit_mean_pool, codes, weight, mask, grad, **options)[1]
    table = weight.clone().requires_grad_()
    pooled = visit_mean_pool(codes, table, mask, sparse_grad=True, **options)
    (sparse,) = torch.autograd.grad(pooled, table, grad)
    assert sparse.is_sparse
    if backend != "reference":
        assert sparse.is_coalesced()
        ids = sparse.indices()[0]
        assert (ids.diff() > 0).all()
        occurring = codes[mask].unique()
        assert torch.equal(ids, occurring[occurring != (-1 if padding_idx is None else 1)])
    torch.testing.assert_close(sparse.to_dense(), dense)


def test_sparse_gradient_trains(backend):
    codes, mask, weight = ragged_batch()
    table = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.SparseAdam([table], lr=0.1)
    visit_mean_pool(codes, table, mask, sparse_grad=True).square().sum().backward()
    optimizer.step()
    absent = torch.ones(23, dtype=torch.bool)
    absent[codes[mask]] = False
    assert torch.equal(table[absent], weight[absent])
    assert not torch.equal(table[~absent], weight[~absent])


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(backend, mode):
    codes, mask, weight = ragged_batch(shape=(2, 3, 4), vocabulary=5, width=3, dtype=torch.float64)
    weight.requires_grad_()
    weights = torch.rand(mask.shape, dtype=torch.float64) * mask
    for kept in (mask,) if mode == "max" else (mask, weights):
        torch.autograd.gradcheck(
            lambda w, kept=kept: visit_mean_pool(codes, w, kept, mode=mode),
            (weight,),
            fast_mode=is_emulated(backend),
        )


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_masked_pool(backend, mode):
    mask = torch.rand(2, 3, 4) < 0.6
    embeddings = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x: masked_pool(x, mask, mode=mode), (embeddings,), fast_mode=is_emulated(backend)
    )


def test_double_backward_is_refused(kernels):
    codes, mask, weight = ragged_batch()
    weight.requires_grad_()
    embeddings = torch.randn(4, 6, 7, 8, requires_grad=True)
    for source, pool in (
        (weight, lambda: visit_mean_pool(codes, weight, mask)),
        (embeddings, lambda: masked_pool(embeddings, mask)),
    ):
        (grad,) = torch.autograd.grad(pool().square().sum(), source, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(grad.sum(), source)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_opcheck(kernels, mode):
    ops = operators(kernels)
    codes, mask, weight = ragged_batch()
    tests = (
        "test_schema",
        "test_faketensor",
        "test_autograd_registration",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(ops.visit_pool, (codes, weight, mask, mode), test_utils=tests)
    arg_max = ops.visit_pool(codes, weight, mask, mode)[1]
    arguments = (torch.randn(4, 6, 8), codes, 23, mask, arg_max, mode, -1)
    torch.library.opcheck(ops.visit_pool_backward, arguments, test_utils=tests)
    torch.library.opcheck(ops.visit_pool_backward_sparse, arguments, test_utils=tests[:3])
    embeddings = torch.randn(4, 6, 7, 8)
    torch.library.opcheck(ops.masked_pool, (embeddings, mask, mode), test_utils=tests)
    arg_max = ops.masked_pool(embeddings, mask, mode)[1]
    arguments = (torch.randn(4, 6, 8), mask, arg_max, 7, mode)
    torch.library.opcheck(ops.masked_pool_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("mode", MODES)
def test_compile(backend, mode):
    torch._dynamo.reset()

    def pooled(codes, weight, mask):
        return visit_mean_pool(codes, weight, mask, mode=mode, padding_idx=0).sin()

    # Inductor, whose C++ compiler takes seconds: once around a kernel, which is a call to it
    # whatever its backend, and once for the reference
    inductor = (backend, mode) in (("cpu", "max"), ("reference", "mean"))
    compiler = "inductor" if inductor else "aot_eager"
    whole = torch.compile(pooled, fullgraph=True, dynamic=True, backend=compiler)
    for shape in ((4, 6, 7), (3, 9, 5), (2, 2, 11)):
        codes, mask, weight = ragged_batch(shape=shape)
        codes = torch.where(mask, codes, 0)
        grad = torch.randn(*shape[:2], 8)
        actual = gradients(whole, codes, weight, mask, grad)
        expected = gradients(pooled, codes, weight, mask, grad)
        torch.testing.assert_close(actual, expected)


def test_compile_masked_pool(backend):
    torch._dynamo.reset()
    compiler = "inductor" if backend == "cpu" else "aot_eager"
    whole = torch.compile(masked_pool, fullgraph=True, dynamic=True, backend=compiler)
    for shape in ((4, 6, 7, 8), (3, 9, 5, 3)):
        embeddings = torch.randn(shape, requires_grad=True)
        mask = torch.rand(shape[:-1]) < 0.5
        (actual,) = torch.autograd.grad(whole(embeddings, mask).square().sum(), embeddings)
        (expected,) = torch.autograd.grad(masked_pool(embeddings, mask).square().sum(), embeddings)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_on_every_run(kernels, mode):
    shape = (4, 20, 9) if is_emulated(kernels) else (16, 40, 9)
    codes, mask, weight = ragged_batch(shape=shape, vocabulary=6, width=33)
    grad = torch.randn(*shape[:2], 33)
    first = gradients(visit_mean_pool, codes, weight, mask, grad, mode=mode)
    for _ in range(2 if is_emulated(kernels) else 1000):
        again = gradients(visit_mean_pool, codes, weight, mask, grad, mode=mode)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(compiled, mode, dtype):
    codes, mask, weight = ragged_batch(shape=(64, 100, 9), vocabulary=6, width=33, dtype=dtype)
    grad = torch.randn(64, 100, 33).to(dtype)
    embeddings = torch.randn(6, 100, 9, 5).to(dtype).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 4):
            torch.set_num_threads(n)
            with use_backend("cpu"):
                pooled, weight_grad = gradients(
                    visit_mean_pool, codes, weight, mask, grad, mode=mode
                )
                existing = masked_pool(embeddings, mask[:6], mode=mode)
                (grad_embeddings,) = torch.autograd.grad(
                    existing.float().square().sum(), embeddings
                )
            results.append((pooled, weight_grad, existing.detach(), grad_embeddings))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", RUNNABLE)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(name, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    width = data.draw(st.integers(1, 70))
    mode = data.draw(st.sampled_from(MODES))
    seed = data.draw(st.integers(0, 2**31))
    codes, mask, weight = ragged_batch(shape, data.draw(st.integers(1, 30)), width, seed=seed)
    with use_backend(name):
        check_against_definition(codes, weight, mask, mode=mode)
