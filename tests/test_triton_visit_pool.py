"""What the Triton kernels of visit pooling promise beyond their numbers: launches, chunks of the
code index, sorting, and codes outside the vocabulary where nobody checks."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ehrseq_fast import PackedVisits, backend, packed_visit_pool, use_backend, visit_mean_pool
from ehrseq_fast.visit_pool import reference

from .poison import poison_allocator
from .tolerances import assert_close

MODES = ("mean", "sum", "max")
NUMBER = {mode: number for number, mode in enumerate(MODES)}

reason = backend.why_not_loaded("triton")
if reason is not None:
    pytest.skip(f"no Triton kernels: {reason}", allow_module_level=True)

from ehrseq_fast.triton_support import watching_launches  # noqa: E402
from ehrseq_fast.visit_pool.triton import (  # noqa: E402
    launch_attention,
    launch_gradient,
    launch_index,
    launch_pool,
    launch_weights,
    tiles,
)

DEVICE = backend.kernels("triton").device
pytestmark = [pytest.mark.operation("visit_pool"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


@pytest.fixture(autouse=True)
def _on_triton():
    torch.set_default_device(DEVICE)
    with use_backend("triton"):
        yield
    torch.set_default_device(None)


def packed(patients):
    return PackedVisits.from_lists(patients).to(DEVICE)


class Fills(TorchDispatchMode):
    """PyTorch's own operations that would be launches on a GPU: all but allocations and views."""

    FREE = ("aten::new_empty", "aten::empty", "aten::empty_like", "aten::view", "aten::detach")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().split(".")[0]
        if name not in self.FREE:
            self.names.append(name)
        return function(*arguments, **(options or {}))


def launched(call):
    """Kernels and other operations that ``call`` would launch on a GPU; none of them runs."""
    with watching_launches(held_back=True) as launches, Fills() as fills:
        call()
    return [launch.name for launch in launches] + fills.names


@pytest.mark.parametrize("mode", MODES)
def test_launches_of_a_packed_batch(mode):
    batch = packed([[[1, 2, 3]] * 40] * 9)
    weight, grad = torch.randn(50, 8), torch.randn(batch.n_visits, 8)
    arg_max = torch.zeros(batch.n_visits, 8, dtype=torch.int32)
    index = (batch.index_codes, batch.index_offsets, batch.index_visits)
    number = NUMBER[mode]
    forward = launched(
        lambda: launch_pool.packed_visit_pool(batch.codes, batch.code_offsets, weight, number)
    )
    assert forward == ["pool_contiguous"]
    backward = launched(
        lambda: launch_gradient.packed_visit_pool_backward(
            grad, batch.code_offsets, *index, 50, arg_max, number, 0
        )
    )
    assert backward == ["find_segments", "sum_segments", "sum_pieces"]


def test_launches_of_attention():
    batch = packed([[[1, 2, 3]] * 40] * 9)
    weight, scores, grad = torch.randn(50, 8), torch.randn(50), torch.randn(batch.n_visits, 8)
    highest = torch.zeros(batch.n_visits, dtype=torch.float64)
    index = (batch.index_codes, batch.index_offsets, batch.index_visits)
    forward = launched(
        lambda: launch_attention.packed_attention_pool(
            batch.codes, batch.code_offsets, weight, scores
        )
    )
    assert forward == ["pool_attention"]
    backward = launched(
        lambda: launch_attention.packed_attention_pool_backward(
            grad, grad, highest, highest, *index, weight, scores, 0
        )
    )
    assert backward == ["find_segments", "sum_attention", "sum_pieces"]


@pytest.mark.parametrize("mode", [0, 1])
def test_launches_with_weights_of_codes(mode):
    batch = packed([[[1, 2, 3]] * 40] * 9)
    weight, grad = torch.randn(50, 8), torch.randn(batch.n_visits, 8)
    weights, totals = torch.rand(batch.n_codes), torch.rand(batch.n_visits)
    index = (batch.index_codes, batch.index_offsets, batch.index_visits, batch.index_visits)
    of_visits = (batch.codes, batch.code_offsets)
    forward = launched(lambda: launch_pool.packed_weighted_pool(*of_visits, weight, weights, mode))
    assert forward == ["pool_contiguous"]
    backward = launched(
        lambda: launch_weights.packed_weighted_pool_backward(
            grad, *of_visits, weights, totals, *index, 50, mode, 0
        )
    )
    assert backward == ["find_segments", "sum_segments", "sum_pieces"]
    of_weights = launched(
        lambda: launch_weights.packed_weighted_pool_backward_weights(
            grad, grad, totals, *of_visits, weight, mode
        )
    )
    assert of_weights == ["weight_gradients"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("vocabulary", "digits"), [(1, 0), (256, 1), (257, 2), (65537, 3)])
def test_launches_of_a_padded_batch(mode, vocabulary, digits):
    codes = torch.zeros(4, 30, 20, dtype=torch.int64)
    weight, grad = torch.randn(vocabulary, 8), torch.randn(4, 30, 8)
    arg_max, number = torch.zeros(4, 30, 8, dtype=torch.int32), NUMBER[mode]
    mask = codes == 0
    forward = launched(lambda: launch_pool.visit_pool(codes, weight, mask, number))
    assert forward == ["pool_masked"]
    backward = launched(
        lambda: launch_gradient.visit_pool_backward(
            grad, codes, vocabulary, mask, arg_max, number, 0
        )
    )
    sort = ["count_digits", "scan_digits", "scatter_digits"] * digits
    index = ["count_codes", "scan_counts", "gather_codes", *sort]
    assert backward == [*index, "find_segments", "sum_segments", "sum_pieces"]


@pytest.mark.parametrize("mode", MODES)
def test_launches_of_masked_pool(mode):
    embeddings, mask = torch.randn(5, 6, 8), torch.ones(5, 6, dtype=torch.bool)
    pool = launch_pool.masked_pool
    assert launched(lambda: pool(embeddings, mask, NUMBER[mode])) == ["pool_masked"]
    assert launched(lambda: pool(embeddings, None, NUMBER[mode])) == ["pool_contiguous"]
    grad, arg_max = torch.randn(5, 8), torch.zeros(5, 8, dtype=torch.int32)
    backward = launched(
        lambda: launch_pool.masked_pool_backward(grad, mask, arg_max, 6, NUMBER[mode])
    )
    assert backward == ["spread"]


def visits_of_segments(lengths):
    """A batch of one code per visit in which code ``k`` occurs ``lengths[k]`` times; between two
    visits of a code there are others'."""
    codes = torch.repeat_interleave(
        torch.arange(len(lengths), device="cpu"), torch.tensor(lengths, device="cpu")
    )
    codes = codes[torch.randperm(len(codes), device="cpu")]
    return [[[int(code)] for code in codes]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "lengths",
    [
        [63, 64, 65, 1, 31, 32, 33],  # about what is cut into pieces, and about a piece
        [0, 96, 95, 64, 0, 97, 127, 128, 129],  # long segments next to one another
        [1, 1, 1, 500, 1, 64],
        [64 * 8],
    ],
)
def test_segments_of_every_length_against_the_definition(padded, mode, lengths):
    """Chunk boundaries inside, at and between segments; sums of whole numbers are exact."""
    batch = packed(visits_of_segments(lengths))
    weight = torch.randn(len(lengths) + 2, 6).requires_grad_()
    grad = torch.randint(-8, 9, (batch.n_visits, 6)).float()
    poison_allocator((len(lengths) + 2, 6), (len(batch.codes) // 32, 6))
    if padded:
        slots = torch.full((batch.n_visits, 3), 10**6)
        slots[:, 1] = batch.codes
        pooled = visit_mean_pool(slots, weight, slots < 10**6, mode=mode)
    else:
        pooled = packed_visit_pool(batch, weight, mode=mode)
    (actual,) = torch.autograd.grad(pooled, weight, grad)
    expected = torch.zeros_like(actual).index_add(0, batch.codes, grad)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("vocabulary", [1, 2, 256, 257, 70000])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_sorting_codes(vocabulary, count):
    """No, one, two and three digits; stable; what stands past the count is never looked at."""
    keys = torch.randint(0, vocabulary, (400,), dtype=torch.int32)
    keys[100:200] = keys[0]
    keys[2] = vocabulary - 1
    slots = torch.randperm(400, dtype=torch.int32)
    given = keys.clone(), slots.clone()
    given[0][count:] = -7
    on_device = torch.tensor([count], dtype=torch.int32)
    actual = launch_index.sorted_by_code(*given, on_device, vocabulary)
    ascending, order = keys[:count].sort(stable=True)
    assert torch.equal(actual[0][:count], ascending)
    assert torch.equal(actual[1][:count], slots[:count][order])


@pytest.mark.parametrize("mode", MODES)
def test_a_padded_batch_of_more_than_a_block(mode):
    codes = torch.randint(0, 300, (90, 50))
    mask = torch.rand(codes.shape) < 0.1
    weight = torch.randn(300, 2, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(90, 2, dtype=torch.float64)
    pooled = visit_mean_pool(codes, weight, mask, mode=mode)
    (actual,) = torch.autograd.grad(pooled, weight, grad)
    oracle = reference.visit_mean_pool(codes, weight, mask, mode=mode)
    (expected,) = torch.autograd.grad(oracle, weight, grad)
    assert_close(actual, expected, terms=64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1, -(2**31)])
def test_a_code_outside_the_vocabulary_shows_and_gets_no_gradient(mode, wrong):
    """As on a GPU without ``validate``: the operators themselves check nothing."""
    visits = [[1, 2], [wrong, 1], [3]]
    number = NUMBER[mode]
    weight, grad = torch.randn(5, 4), torch.ones(3, 4)
    codes = torch.tensor([[*visit, 0, 0][:3] for visit in visits], dtype=torch.int32)
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0]]).bool()
    flat = torch.tensor([1, 2, wrong, 1, 3], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 4, 5], dtype=torch.int32)
    entries = sorted((code, row) for row, visit in enumerate(visits) for code in visit)
    ids = sorted({code for code, _ in entries})
    starts = [sum(code < k for code, _ in entries) for k in ids] + [len(entries)]
    index = [
        torch.tensor(values, dtype=torch.int32)
        for values in (ids, starts, [row for _, row in entries])
    ]
    for pooled, arg_max in (
        launch_pool.visit_pool(codes, weight, mask, number),
        launch_pool.packed_visit_pool(flat, offsets, weight, number),
    ):
        assert pooled[1].isnan().all()
        assert not pooled[[0, 2]].isnan().any()
        padded = launch_gradient.visit_pool_backward(grad, codes, 5, mask, arg_max, number, -1)
        given = launch_gradient.packed_visit_pool_backward(
            grad, offsets, *index, 5, arg_max, number, -1
        )
        for gradient in (padded, given):
            assert (gradient[[0, 4]] == 0).all()
            assert (gradient[3] == 1).all()
        code_ids, rows = launch_gradient.packed_visit_pool_backward_sparse(
            grad, offsets, *index, 5, arg_max, number, -1
        )
        assert ((code_ids >= 0) & (code_ids < 5)).all()
        assert (rows[ids.index(wrong)] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_gpus_tiles_give_the_same_bits(monkeypatch, mode):
    """The interpreter takes larger ones."""
    codes = torch.randint(0, 40, (7, 150))  # more than two words of the mask
    mask = torch.rand(codes.shape) < 0.1
    mask[3], mask[4] = True, False
    batch = packed([[[3, 4, 4], [], [5]]] * 3)

    def results():
        weight = torch.linspace(-1, 1, 40 * 20).view(40, 20).requires_grad_()
        pooled = visit_mean_pool(codes, weight, mask, mode=mode)
        of_packed = packed_visit_pool(batch, weight, mode=mode)
        total = pooled.square().sum() + of_packed.square().sum()
        return pooled, of_packed, *torch.autograd.grad(total, weight)

    expected = results()
    for module in (launch_index, tiles):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    assert all(map(torch.equal, results(), expected))


def test_attention_without_columns_has_gradients_of_scores():
    """Zeros, and not what stood in their memory; of a code with a long segment as well."""
    batch = packed([[[1, 2] * 20, [3]]] * 5)
    weight = torch.zeros(5, 0, requires_grad=True)
    scores = torch.randn(5, requires_grad=True)
    poison_allocator((5,))
    pooled = packed_visit_pool(batch, weight, mode="attention", scores=scores)
    assert pooled.shape == (10, 0)
    pooled.sum().backward()
    assert (scores.grad == 0).all()


def test_a_huge_padded_batch_is_refused_by_the_backward_pass():
    slots = torch.empty(1, dtype=torch.int32).expand(2**31 - 2**15)
    with pytest.raises(ValueError, match="expected at most 2147418112 slots"):
        launch_gradient.visit_pool_backward(torch.ones(4), slots, 3, None, None, 0, -1)
