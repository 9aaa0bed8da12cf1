"""packed_visit_pool: every backend against the padded definition in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ehrseq_fast import packed_visit_pool, use_backend
from ehrseq_fast.backend import operators
from ehrseq_fast.visit_pool import reference

from .batches import from_lists
from .conftest import RUNNABLE, is_emulated
from .poison import poison_allocator
from .tolerances import assert_close

pytestmark = pytest.mark.operation("visit_pool")

MODES = ("mean", "sum", "max", "attention")
VOCABULARY = 17


def records(seed=0, n_patients=5, vocabulary=VOCABULARY):
    """Ragged patients: empty visits, repeated codes, a patient of one visit."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def draw(high, low=0):
        return int(torch.randint(low, high, (1,), generator=generator))

    patients = [
        [[draw(vocabulary) for _ in range(draw(6))] for _ in range(draw(7, low=1))]
        for _ in range(n_patients)
    ]
    if patients:
        patients[0] = [[3, 3, 1, 3]]
    return patients


def packed(patients):
    """On the device under test; built on the host, as in a data loader."""
    return from_lists(patients)


def attention_by_hand(codes, mask, weight, scores):
    """Softmax of the real codes' scores in each visit; zeros where there is none."""
    codes = torch.where(mask, codes, 0)
    score = scores[codes].masked_fill(~mask, float("-inf"))
    share = torch.softmax(torch.where(mask.any(-1, keepdim=True), score, 0), -1)
    share = torch.where(mask, share, 0)
    return (share.unsqueeze(-1) * F.embedding(codes, weight)).sum(-2)


def pooled_and_gradients(batch, weight, scores, grad, **options):
    inputs = [weight.detach().clone().requires_grad_()]
    if options["mode"] == "attention":
        inputs.append(scores.detach().clone().requires_grad_())
        options["scores"] = inputs[1]
    pooled = packed_visit_pool(batch, inputs[0], **options)
    return pooled.detach(), *torch.autograd.grad(pooled, inputs, grad)


def expected_and_gradients(batch, weight, scores, grad, mode, padding_idx=None):
    """The padded definition in float64, its rows in packed order."""
    codes, mask, _ = batch.to_padded()
    inputs = [weight.double().requires_grad_()]
    if mode == "attention":
        inputs.append(scores.double().requires_grad_())
        padded = attention_by_hand(codes, mask, *inputs)
    else:
        padded = reference.visit_mean_pool(
            codes, inputs[0], mask, mode=mode, padding_idx=padding_idx
        )
    pooled = batch.pack(padded)
    gradients = torch.autograd.grad(pooled, inputs, grad.double())
    if padding_idx is not None:
        gradients[0][padding_idx] = 0
    return pooled.detach(), *gradients


def check(batch, mode, dtype=torch.float32, width=8, vocabulary=VOCABULARY, terms=64, **options):
    weight = torch.randn(vocabulary, width, dtype=torch.float64).to(dtype)
    scores = torch.randn(vocabulary, dtype=torch.float64).to(dtype)
    grad = torch.randn(batch.n_visits, width, dtype=torch.float64).to(dtype)
    actual = pooled_and_gradients(batch, weight, scores, grad, mode=mode, **options)
    expected = expected_and_gradients(batch, weight, scores, grad, mode, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, terms=terms)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 5, 16, 64, 101, 128])
def test_agrees_with_the_padded_definition(backend, mode, dtype, width):
    check(packed(records()), mode, dtype, width)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(backend, mode, dtype):
    """One rounding of the output; the attention's gradient is a difference of two sums of it."""
    batch = packed(records())
    weight = torch.randn(VOCABULARY, 8).to(dtype)
    scores = torch.randn(VOCABULARY).to(dtype)
    grad = torch.randn(batch.n_visits, 8).to(dtype)
    actual = pooled_and_gradients(batch, weight, scores, grad, mode=mode)
    expected = expected_and_gradients(batch, weight, scores, grad, mode)
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        assert_close(ours, theirs, terms=64)
    if mode == "attention":
        assert_close(actual[2] / 32, expected[2] / 32, terms=64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "patients",
    [[[[]]], [[[1]]], [[[], [], []], [[2]]], [[[4] * 9] * 40] * 30],
    ids=["one empty visit", "one code", "empty visits", "one code everywhere"],
)
def test_small_and_lopsided_batches(backend, mode, patients):
    patients = patients[:4] if is_emulated(backend) else patients
    terms = 4 * 9 * 40 * 30 if backend == "reference" else 128
    check(packed(patients), mode, terms=terms)


@pytest.mark.parametrize("mode", MODES)
def test_no_patient(backend, mode):
    batch = packed([])
    weight = torch.randn(4, 3, requires_grad=True)
    scores = torch.zeros(4) if mode == "attention" else None
    pooled = packed_visit_pool(batch, weight, mode=mode, scores=scores)
    assert pooled.shape == (0, 3)
    pooled.sum().backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_idx_gets_no_gradient(backend, mode, padding_idx):
    check(packed(records()), mode, padding_idx=padding_idx)


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3, 11])
def test_sparse_gradient_is_the_dense_one(backend, mode, padding_idx):
    batch = packed(records())
    weight = torch.randn(40, 8)
    grad = torch.randn(batch.n_visits, 8)
    options = {"mode": mode, "padding_idx": padding_idx}
    _, dense = pooled_and_gradients(batch, weight, None, grad, **options)
    _, sparse = pooled_and_gradients(batch, weight, None, grad, sparse_grad=True, **options)
    assert sparse.is_sparse
    if backend != "reference":
        assert sparse.is_coalesced()
        ids = batch.index_codes[batch.index_codes != (-1 if padding_idx is None else padding_idx)]
        assert torch.equal(sparse.indices()[0], ids.long())
    torch.testing.assert_close(sparse.to_dense(), dense)


def test_attention_scores_of_any_size(backend):
    """Softmax is shifted by its maximum, so that large scores neither overflow nor vanish."""
    batch = packed([[[0, 1], [1, 2], [0]]])
    weight = torch.randn(3, 4)
    scores = torch.tensor([1000.0, 1001.0, -1000.0])
    pooled = packed_visit_pool(batch, weight, mode="attention", scores=scores)
    share = torch.sigmoid(torch.tensor(-1.0))
    torch.testing.assert_close(pooled[0], share * weight[0] + (1 - share) * weight[1])
    torch.testing.assert_close(pooled[1], weight[1])
    torch.testing.assert_close(pooled[2], weight[0])


@pytest.mark.parametrize("mode", MODES)
def test_fresh_memory_is_all_written(backend, mode):
    batch = packed([[[1], []], [[2, 2]]])
    poison_allocator((3, 16), (9, 16), (9,))
    weight, scores = torch.randn(9, 16), torch.randn(9)
    results = pooled_and_gradients(batch, weight, scores, torch.ones(3, 16), mode=mode)
    assert not any(result.isnan().any() for result in results)
    absent = [0, *range(3, 9)]
    assert all((result[absent] == 0).all() for result in results[1:])


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_any_stride(backend, mode):
    batch = packed(records())
    weight, scores = torch.randn(VOCABULARY, 8), torch.randn(VOCABULARY)
    n = batch.n_visits
    for grad in (torch.ones(()).expand(n, 8), torch.randn(8, n).t(), torch.randn(n, 16)[:, ::2]):
        strided = pooled_and_gradients(batch, weight, scores, grad, mode=mode)
        dense = pooled_and_gradients(batch, weight, scores, grad.contiguous(), mode=mode)
        assert all(map(torch.equal, strided, dense))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(backend, mode):
    batch = packed(records(n_patients=2))
    inputs = [torch.randn(VOCABULARY, 3, dtype=torch.float64, requires_grad=True)]
    if mode == "attention":
        inputs.append(torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True))

    def pool(weight, scores=None):
        return packed_visit_pool(batch, weight, mode=mode, scores=scores)

    torch.autograd.gradcheck(pool, inputs, fast_mode=is_emulated(backend))


@pytest.mark.parametrize("mode", MODES)
def test_double_backward_is_refused(kernels, mode):
    batch = packed(records())
    weight = torch.randn(VOCABULARY, 4, requires_grad=True)
    scores = torch.randn(VOCABULARY, requires_grad=True) if mode == "attention" else None
    for nonlinear in (torch.square, torch.clone):
        pooled = nonlinear(packed_visit_pool(batch, weight, mode=mode, scores=scores))
        (grad,) = torch.autograd.grad(pooled.sum(), weight, create_graph=True)
        if nonlinear is torch.clone and mode != "attention":
            assert not grad.requires_grad  # it depends on no table, as F.embedding's
            continue
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(grad.square().sum(), weight)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_opcheck(kernels, mode):
    ops = operators(kernels)
    batch = packed(records())
    weight = torch.randn(VOCABULARY, 8)
    tests = (
        "test_schema",
        "test_faketensor",
        "test_autograd_registration",
        "test_aot_dispatch_dynamic",
    )
    index = (batch.index_codes, batch.index_offsets, batch.index_visits)
    forward = (batch.codes, batch.code_offsets, weight, mode)
    torch.library.opcheck(ops.packed_visit_pool, forward, test_utils=tests)
    arg_max = ops.packed_visit_pool(*forward)[1]
    grad = torch.randn(batch.n_visits, 8)
    backward = (grad, batch.code_offsets, *index, VOCABULARY, arg_max, mode, 3)
    torch.library.opcheck(ops.packed_visit_pool_backward, backward, test_utils=tests)
    torch.library.opcheck(ops.packed_visit_pool_backward_sparse, backward, test_utils=tests[:3])


def test_opcheck_attention(kernels):
    ops = operators(kernels)
    batch = packed(records())
    weight, scores = torch.randn(VOCABULARY, 8), torch.randn(VOCABULARY)
    forward = (batch.codes, batch.code_offsets, weight, scores)
    torch.library.opcheck(ops.packed_attention_pool, forward)
    pooled, *kept = ops.packed_attention_pool(*forward)
    index = (batch.index_codes, batch.index_offsets, batch.index_visits)
    backward = (torch.randn(batch.n_visits, 8), pooled, *kept, *index, weight, scores, -1)
    torch.library.opcheck(ops.packed_attention_pool_backward, backward)


@pytest.mark.parametrize("mode", MODES)
def test_compile(backend, mode):
    torch._dynamo.reset()

    def pooled(batch, weight, scores):
        return packed_visit_pool(batch, weight, mode=mode, scores=scores).sin()

    # as in test_visit_pool.py; attention is an operator of its own
    inductor = (backend, mode) in (("cpu", "max"), ("cpu", "attention"), ("reference", "mean"))
    compiler = "inductor" if inductor else "aot_eager"
    whole = torch.compile(pooled, fullgraph=True, dynamic=True, backend=compiler)
    for seed in (1, 2, 3):
        batch = packed(records(seed, n_patients=4 + seed))
        weight = torch.randn(VOCABULARY, 8, requires_grad=True)
        scores = torch.randn(VOCABULARY, requires_grad=True) if mode == "attention" else None
        inputs = [weight] if scores is None else [weight, scores]
        actual = torch.autograd.grad(whole(batch, weight, scores).sum(), inputs)
        expected = torch.autograd.grad(pooled(batch, weight, scores).sum(), inputs)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_on_every_run_and_for_any_number_of_threads(compiled, mode):
    batch = packed(records(n_patients=300, vocabulary=5))
    weight, scores = torch.randn(5, 33), torch.randn(5)
    grad = torch.randn(batch.n_visits, 33)
    threads = torch.get_num_threads()
    try:
        with use_backend("cpu"):
            first = pooled_and_gradients(batch, weight, scores, grad, mode=mode)
            for run in range(1000):
                torch.set_num_threads(1 + run % 4)
                again = pooled_and_gradients(batch, weight, scores, grad, mode=mode)
                assert all(map(torch.equal, first, again))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RUNNABLE)
@settings(max_examples=40, deadline=None)
@given(
    patients=st.lists(
        st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=6), max_size=6
    ),
    width=st.integers(1, 70),
    mode=st.sampled_from(MODES),
)
def test_any_batch(name, patients, width, mode):
    if not any(code for patient in patients for visit in patient for code in visit):
        patients = [[[1]], *patients]
    with use_backend(name):
        check(packed(patients), mode, width=width, vocabulary=7)


def small_batch():
    return packed([[[1, 2], [0]], [[2]]])


def table():
    return torch.ones(3, 4)


def with_fields(**fields):
    batch = small_batch()
    names = ("codes", "code_offsets", "index_codes", "index_offsets", "index_visits")
    return SimpleNamespace(**{**{name: getattr(batch, name) for name in names}, **fields})


BAD_INPUT = {
    "code too large": (
        lambda: packed_visit_pool(small_batch(), table()[:2], validate=True),
        IndexError,
        r"Found 2 codes .*: expected 0 <= code < 2\. The first is 2: codes\[1\]\.",
    ),
    "mode": (
        lambda: packed_visit_pool(small_batch(), table(), mode="median"),
        ValueError,
        "mode: expected one of 'mean', 'sum', 'max', 'attention', got 'median'",
    ),
    "attention without scores": (
        lambda: packed_visit_pool(small_batch(), table(), mode="attention"),
        ValueError,
        "scores: expected scores with mode='attention', got None",
    ),
    "scores without attention": (
        lambda: packed_visit_pool(small_batch(), table(), scores=torch.ones(3)),
        ValueError,
        "scores: expected None with mode='mean', got a tensor of shape",
    ),
    "scores of another size": (
        lambda: packed_visit_pool(small_batch(), table(), mode="attention", scores=torch.ones(2)),
        ValueError,
        r"scores: expected \[K\] = \[3\], got \[2\]",
    ),
    "scores of another dtype": (
        lambda: packed_visit_pool(
            small_batch(), table(), mode="attention", scores=torch.ones(3).double()
        ),
        TypeError,
        "scores: expected torch.float32, as weight",
    ),
    "sparse attention": (
        lambda: packed_visit_pool(
            small_batch(), table(), mode="attention", scores=torch.ones(3), sparse_grad=True
        ),
        ValueError,
        "sparse_grad: expected False",
    ),
    "table": (
        lambda: packed_visit_pool(small_batch(), table()[0]),
        ValueError,
        r"weight: expected \[K, E\], got \[4\]",
    ),
    "integer table": (
        lambda: packed_visit_pool(small_batch(), table().long()),
        TypeError,
        "weight: expected float32",
    ),
    "padding_idx": (
        lambda: packed_visit_pool(small_batch(), table(), padding_idx=5),
        IndexError,
        "padding_idx: expected -3 <= padding_idx < 3, got 5",
    ),
    "devices": (
        lambda: packed_visit_pool(small_batch(), table().to("meta")),
        ValueError,
        r"batch: expected on meta, where weight is, got (cpu|cuda:\d)",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, name):
    call, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=message):
        call()


TAMPERED = {
    "offsets that fall": {"code_offsets": torch.tensor([0, 3, 2, 4], dtype=torch.int32)},
    "offsets past the end": {"code_offsets": torch.tensor([0, 2, 3, 9], dtype=torch.int32)},
    "index of other visits": {"index_visits": torch.tensor([0, 1, 2, 70], dtype=torch.int32)},
    "index offsets past the end": {"index_offsets": torch.tensor([0, 1, 2, 70]).int()},
    "index of other codes": {"index_codes": torch.tensor([0, 1, 9], dtype=torch.int32)},
    "index of another dtype": {"index_codes": torch.tensor([0, 1, 2])},
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_batch_reads_nothing_out_of_bounds(compiled, name):
    weight = table().requires_grad_()
    with (
        use_backend("cpu"),
        pytest.raises(ValueError, match=r"(code_offsets|index_\w+): expected .*, got"),
    ):
        packed_visit_pool(with_fields(**TAMPERED[name]), weight).sum().backward()
