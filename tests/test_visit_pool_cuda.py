"""What is particular to the CUDA kernels of visit pooling: how they share work out over lanes,
blocks and launches. What they compute is tested with every other backend's.

On the host the kernels run in an emulator (``cuda_on_cpu``), on a GPU also there.
"""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast import (
    PackedVisits,
    backend,
    masked_pool,
    packed_visit_pool,
    use_backend,
    visit_mean_pool,
)
from ehrseq_fast.visit_pool import reference

from . import cuda_on_cpu
from .conftest import ON_GPU, _running
from .pool_cases import check_against_definition, gradients, ragged_batch
from .test_packed_visit_pool import check as check_packed
from .tolerances import assert_close

pytestmark = pytest.mark.operation("visit_pool")

MODES = ("mean", "sum", "max")
PLACES = [("cuda", "cpu")] if cuda_on_cpu.why_not() is None else []
PLACES += [pytest.param(("cuda", "cuda"), marks=pytest.mark.gpu)] if "cuda" in ON_GPU else []


@pytest.fixture(params=PLACES, ids=str)
def cuda(request):
    """Where the kernels run: the emulator, and a GPU if there is one."""
    with _running(request.param):
        yield request.param[1]


@pytest.fixture
def emulator():
    if cuda_on_cpu.why_not() is not None:
        pytest.skip(str(cuda_on_cpu.why_not()))
    with _running(("cuda", "cpu")):
        yield cuda_on_cpu.load()


def packed(visits):
    """One patient's visits."""
    return PackedVisits.from_lists([visits]).to(torch.get_default_device())


def numbered(n_codes, vocabulary, step=7):
    return [(step * i) % vocabulary for i in range(n_codes)]


# ---------------------------------------------------------------------------------------------
# The index that is built on the device


def sorted_slots(codes, mask, vocabulary, padding_idx=-1):
    cuda_on_cpu.load()
    sort = torch.ops.ehrseq_fast_cuda_on_cpu_tests.sorted_slots.default
    return sort(codes, mask, vocabulary, padding_idx)


@pytest.mark.parametrize(
    "vocabulary", [1, 2, 7, 300, 1024, 1025, 5000, 2**20, 2**20 + 1, 2**31 - 1]
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (300, 37), (2, 5000)])
def test_slots_are_sorted_by_code_and_keep_their_order(emulator, vocabulary, shape):
    """One pass, two and three or four of them; one tile and many."""
    mask = torch.rand(shape) < 0.3
    codes = torch.randint(0, vocabulary, shape)
    codes[torch.rand(shape) < 0.2] = vocabulary - 1
    codes[torch.rand(shape) < 0.1] = 0
    by_code, visits, _, scales, distinct, begins, sizes = sorted_slots(
        torch.where(mask, codes, -(2**40)), mask, vocabulary
    )
    n_slots, n_codes = sizes.tolist()
    assert n_slots == int(mask.sum())
    expected = codes[mask].sort(stable=True)
    assert torch.equal(by_code[:n_slots].long(), expected.values)
    rows = torch.arange(shape[0]).unsqueeze(1).expand(shape)[mask]
    assert torch.equal(visits[:n_slots].long(), rows[expected.indices])
    torch.testing.assert_close(scales, 1 / mask.sum(1).clamp(min=1).float())
    values, counts = expected.values.unique(return_counts=True)
    assert torch.equal(distinct[:n_codes].long(), values)
    assert torch.equal(begins[: n_codes + 1].long(), torch.cat([torch.zeros(1), counts.cumsum(0)]))


def test_no_real_slot(emulator):
    codes = torch.full((30, 100), -1)
    *_, sizes = sorted_slots(codes, torch.zeros(30, 100, dtype=torch.bool), 50)
    assert sizes.tolist() == [0, 0]


def test_weights_and_padding_codes_are_sorted_too(emulator):
    codes = torch.randint(0, 40, (60, 90), dtype=torch.int32)
    mask = torch.rand(60, 90) * (torch.rand(60, 90) < 0.4)
    by_code, visits, weights, _, _, _, sizes = sorted_slots(codes, mask, 40, padding_idx=7)
    kept = (mask != 0) & (codes != 7)
    expected = codes[kept].sort(stable=True)
    n_slots = sizes[0]
    assert n_slots == kept.sum()
    assert torch.equal(by_code[:n_slots], expected.values)
    assert torch.equal(weights[:n_slots], mask[kept][expected.indices])
    assert torch.equal(visits[:n_slots].long(), kept.nonzero()[:, 0][expected.indices])


# ---------------------------------------------------------------------------------------------
# Runs of entries, and codes that reach over their ends


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [8, 48, 130])
@pytest.mark.parametrize("n_entries", [1, 15, 16, 17, 31, 33, 512, 528, 529, 545, 1100])
def test_one_code_over_any_number_of_runs(cuda, mode, width, n_entries):
    """A run has 16 entries; up to 32 runs are added by one group of lanes, more by a block."""
    check_packed(packed([[3]] * n_entries), mode, width=width)


@pytest.mark.parametrize("mode", [*MODES, "attention"])
@pytest.mark.parametrize("counts", [(15, 1, 1, 15), (16, 16), (17, 15, 600, 3, 29), (1, 700, 1)])
def test_codes_that_end_at_or_beside_the_end_of_a_run(cuda, mode, counts):
    visits = [[2 * code] for code, count in enumerate(counts) for _ in range(count)]
    check_packed(packed(visits), mode, width=12)
    codes = torch.tensor(visits)
    weight = torch.randn(2 * len(counts) + 1, 12)
    if mode != "attention":
        check_against_definition(codes, weight, None, mode=mode, terms=64)
        check_against_definition(codes, weight, None, mode=mode, terms=64, padding_idx=2)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_longer_runs_of_more_entries(cuda, mode):
    """More than 4,096 runs of 16: runs grow, and one code lies in nearly all of them."""
    codes = torch.where(torch.rand(5000, 14) < 0.98, 1, torch.randint(0, 9, (5000, 14)))
    weight = torch.randn(9, 4)
    check_against_definition(codes, weight, None, mode=mode, terms=128)


def test_repeated_codes_win_once_across_the_end_of_a_run(cuda):
    """Entries 15 and 16 are the same code of the same visit."""
    visits = [[0]] * 15 + [[0, 0]] + [[0]] * 20
    check_packed(packed(visits), "max")
    check_against_definition(
        torch.tensor([[0, 9]] * 15 + [[0, 0]] + [[0, 9]] * 20), torch.randn(10, 8), None, mode="max"
    )


# ---------------------------------------------------------------------------------------------
# Visits and rows of any size


@pytest.mark.parametrize("mode", [*MODES, "attention"])
@pytest.mark.parametrize("width", [1, 8, 66])
@pytest.mark.parametrize("n_short", [0, 150])
def test_visits_longer_than_what_is_staged_at_once(cuda, mode, width, n_short):
    """Alone such a visit is shared out over groups of lanes; among many short ones it is not."""
    visits = [numbered(700, 17), *[[5]] * n_short, [], numbered(65, 17)]
    check_packed(packed(visits), mode, width=width, terms=1024)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_padded_visits_longer_than_what_is_staged_at_once(cuda, mode, share):
    mask = torch.rand(3, 3000) < share
    codes = torch.where(mask, torch.randint(0, 50, mask.shape), -1)
    weight = torch.randn(50, 20)
    check_against_definition(codes, weight, mask, mode=mode)
    weights = torch.rand(mask.shape) * mask
    check_against_definition(codes, weight, weights, mode=mode)


# in 16 bits attention's gradient of the scores is a difference that they do not resolve
WIDE = [(mode, dtype) for mode in MODES for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("mode", "dtype"), [*WIDE, ("attention", torch.float32)], ids=str)
@pytest.mark.parametrize("width", [257, 1000, 4099])
def test_rows_wider_than_a_warp(cuda, mode, dtype, width):
    visits = [[1, 2, 3], [], [3, 3], numbered(40, 17)]
    check_packed(packed(visits), mode, dtype=dtype, width=width, terms=64 if width < 300 else 1024)


def shifted(tensor):
    """The same values one element into a larger buffer: aligned to nothing but its dtype."""
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return buffer[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("width", [2, 4, 12, 64])
def test_misaligned_tables_and_gradients(cuda, mode, dtype, width):
    codes, mask, weight = ragged_batch(width=width, dtype=dtype)
    grad = torch.randn(4, 6, width).to(dtype)
    expected = gradients(visit_mean_pool, codes, weight, mask, grad, mode=mode)
    table = shifted(weight).requires_grad_()
    assert table.data_ptr() % 16 != 0
    pooled = visit_mean_pool(codes, table, mask, mode=mode)
    (weight_grad,) = torch.autograd.grad(pooled, table, shifted(grad))
    torch.testing.assert_close(pooled, expected[0])
    torch.testing.assert_close(weight_grad, expected[1])
    values = torch.randn(3, 5, width).to(dtype)
    torch.testing.assert_close(
        masked_pool(shifted(values), mode=mode), masked_pool(values, mode=mode)
    )


def test_no_column_and_no_code(cuda):
    codes, mask, _ = ragged_batch()
    weight = torch.randn(23, 0, requires_grad=True)
    for mode in MODES:
        pooled = visit_mean_pool(codes, weight, mask, mode=mode)
        assert pooled.shape == (4, 6, 0)
        assert torch.autograd.grad(pooled.sum(), weight)[0].shape == (23, 0)
    nothing = torch.randn(0, 5, requires_grad=True)
    pooled = visit_mean_pool(codes, nothing, torch.zeros_like(mask))
    assert (pooled == 0).all()
    assert torch.autograd.grad(pooled.sum(), nothing)[0].shape == (0, 5)


@pytest.mark.parametrize("mode", MODES)
def test_many_visits_without_a_slot_or_a_code(cuda, mode):
    weight = torch.randn(4, 6)
    check_against_definition(torch.zeros(9000, 0, dtype=torch.int64), weight, None, mode=mode)
    empty = torch.zeros(9000, 3, dtype=torch.bool)
    check_against_definition(torch.full((9000, 3), -1), weight, empty, mode=mode)


# ---------------------------------------------------------------------------------------------
# Launches, orders, and what does not fit


def launches(emulator, call):
    emulator.reset_counts()
    result = call()
    counts = emulator.counts()
    return result, counts.kernels + counts.memsets


@pytest.mark.parametrize("mode", [*MODES, "attention"])
@pytest.mark.parametrize("n_visits", [1, 900])
def test_launches_of_a_packed_batch(emulator, mode, n_visits):
    """One forward; two backward, whatever the batch, and one more for the gradient of scores."""
    batch = packed([numbered(1 + i % 5, 40) for i in range(n_visits)])
    weight = torch.randn(50, 24, requires_grad=True)
    scores = torch.randn(50, requires_grad=True) if mode == "attention" else None
    inputs = [weight] if scores is None else [weight, scores]
    pooled, forward = launches(
        emulator, lambda: packed_visit_pool(batch, weight, mode=mode, scores=scores)
    )
    _, backward = launches(
        emulator, lambda: torch.autograd.grad(pooled, inputs, torch.ones_like(pooled))
    )
    assert (forward, backward) == (1, 3 if mode == "attention" else 2)


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("n_visits", [1, 900])
def test_launches_with_weights_of_codes(emulator, mode, n_visits):
    """One forward; three backward for the table, and one for the weights."""
    batch = packed([numbered(1 + i % 5, 40) for i in range(n_visits)])
    inputs = torch.randn(50, 24, requires_grad=True), torch.rand(batch.n_codes, requires_grad=True)
    pooled, forward = launches(
        emulator, lambda: packed_visit_pool(batch, inputs[0], mode=mode, code_weights=inputs[1])
    )
    _, backward = launches(
        emulator, lambda: torch.autograd.grad(pooled, inputs, torch.ones_like(pooled))
    )
    assert (forward, backward) == (1, 4)


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("width", [1, 8, 66])
@pytest.mark.parametrize("n_short", [0, 150])
def test_weighted_visits_longer_than_what_is_staged_at_once(cuda, mode, width, n_short):
    """With zeros among the weights, which are not staged; and one code over many runs."""
    batch = packed([numbered(700, 17), *[[5]] * n_short, [], numbered(65, 17)])
    weights = torch.rand(batch.n_codes)
    weights[torch.rand(batch.n_codes) < 0.3] = 0
    table, grad = torch.randn(18, width), torch.randn(batch.n_visits, width)
    results = []
    for name in ("cuda", "reference"):
        dtype = torch.float32 if name == "cuda" else torch.float64
        inputs = [x.detach().to(dtype).requires_grad_() for x in (table, weights)]
        with use_backend(name):
            pooled = packed_visit_pool(batch, inputs[0], mode=mode, code_weights=inputs[1])
            gradients = torch.autograd.grad(pooled, inputs, grad.to(dtype))
        results.append([pooled.detach(), *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours / 8, theirs / 8, terms=1024)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("vocabulary", "passes"), [(900, 1), (10_000, 2)])
def test_launches_of_a_padded_batch(emulator, mode, vocabulary, passes):
    """The same, after three for each pass of the sort."""
    codes = torch.randint(0, vocabulary, (40, 30, 9))
    mask = torch.rand(codes.shape) < 0.1
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    pooled, forward = launches(emulator, lambda: visit_mean_pool(codes, weight, mask, mode=mode))
    _, backward = launches(
        emulator, lambda: torch.autograd.grad(pooled, weight, torch.ones_like(pooled))
    )
    assert (forward, backward) == (1, 3 * passes + 2)
    embeddings = torch.randn(5, 6, 8, requires_grad=True)
    pooled, forward = launches(emulator, lambda: masked_pool(embeddings, mode=mode))
    _, backward = launches(
        emulator, lambda: torch.autograd.grad(pooled, embeddings, torch.ones_like(pooled))
    )
    assert (forward, backward) == (1, 1)


@pytest.mark.parametrize("mode", [*MODES, "attention"])
def test_no_order_of_blocks_and_threads_changes_a_bit(emulator, mode):
    batch = packed([numbered(1 + i % 7, 30, step=i + 1) for i in range(400)])
    codes, mask, weight = ragged_batch(shape=(30, 20, 9), vocabulary=11, width=33)
    weights = torch.rand(mask.shape) * mask
    table, scores = torch.randn(30, 33), torch.randn(30)
    grad = torch.randn(30, 20, 33)

    def run(seed):
        emulator.set_seed(seed)
        inputs = [table.clone().requires_grad_()]
        inputs += [scores.clone().requires_grad_()] if mode == "attention" else []
        pooled = packed_visit_pool(
            batch, inputs[0], mode=mode, scores=inputs[1] if len(inputs) > 1 else None
        )
        results = [pooled.detach(), *torch.autograd.grad(pooled.square().sum(), inputs)]
        if mode != "attention":
            results += gradients(visit_mean_pool, codes, weight, weights, grad, mode=mode)
        return results

    first = run(0)
    for seed in range(1, 6):
        assert all(map(torch.equal, first, run(1000 * seed)))


def operators():
    return getattr(torch.ops, cuda_on_cpu.NAMESPACE)


@pytest.mark.parametrize("code", [-1, 3, 2**31 - 1, -(2**31), 2**40])
def test_a_code_outside_the_vocabulary_traps(emulator, code):
    """Python checks codes on the host; on a GPU the kernel stops rather than read elsewhere."""
    weight = torch.randn(3, 8)
    grad = torch.randn(2, 8)
    codes = torch.tensor([[0, 1], [2, code]])
    with pytest.raises(RuntimeError, match="__trap"):
        operators().visit_pool(codes, weight, None, 0)
    with pytest.raises(RuntimeError, match="__trap"):
        operators().visit_pool_backward(grad, codes, 3, None, None, 0, -1)
    if abs(code) < 2**31 or code == -(2**31):
        offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
        flat = codes.flatten().int()
        with pytest.raises(RuntimeError, match="__trap"):
            operators().packed_visit_pool(flat, offsets, weight, 0)
        with pytest.raises(RuntimeError, match="__trap"):
            operators().packed_attention_pool(flat, offsets, weight, torch.randn(3))


BATCH = PackedVisits.from_lists([[[1, 2], [0]], [[2]]])
TAMPERED = {
    "offsets that fall": {"code_offsets": [0, 3, 2, 4]},
    "offsets past the end": {"code_offsets": [0, 2, 3, 9]},
    "negative offsets": {"code_offsets": [-5, 2, 3, 4]},
    "index of other visits": {"index_visits": [0, 1, 2, 70]},
    "index of negative visits": {"index_visits": [0, 1, 2, -1]},
    "index offsets past the end": {"index_offsets": [0, 1, 2, 70]},
    "index offsets that end early": {"index_offsets": [0, 1, 2, 3]},
    "index offsets that fall": {"index_offsets": [0, 2, 1, 4]},
    "an empty code": {"index_offsets": [0, 1, 1, 4]},
    "index of other codes": {"index_codes": [0, 1, 9]},
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_batch_traps(emulator, name):
    fields = ("codes", "code_offsets", "index_codes", "index_offsets", "index_visits")
    tensors = {field: getattr(BATCH, field) for field in fields}
    tensors |= {k: torch.tensor(v, dtype=torch.int32) for k, v in TAMPERED[name].items()}
    codes, offsets, *index = tensors.values()
    weight, grad = torch.randn(3, 8), torch.randn(3, 8)

    def both():
        operators().packed_visit_pool(codes, offsets, weight, 0)
        operators().packed_visit_pool_backward(grad, offsets, *index, 3, None, 0, -1)

    with pytest.raises(RuntimeError, match="__trap"):
        both()


def test_an_index_that_is_none_is_refused(emulator):
    grad = torch.randn(3, 8)
    index = [BATCH.index_codes, BATCH.index_offsets, BATCH.index_visits]
    backward = operators().packed_visit_pool_backward
    with pytest.raises(ValueError, match="index_codes: expected int32"):
        backward(grad, BATCH.code_offsets, index[0].long(), *index[1:], 3, None, 0, -1)
    with pytest.raises(ValueError, match="index_offsets: expected shape"):
        backward(grad, BATCH.code_offsets, index[0][1:], *index[1:], 3, None, 0, -1)
    with pytest.raises(ValueError, match="code_offsets: expected"):
        backward(grad[1:], BATCH.code_offsets, *index, 3, None, 0, -1)


# ---------------------------------------------------------------------------------------------
# On a GPU alone


@pytest.fixture
def gpu():
    reason = backend.why_not_loaded("cuda")
    if reason is not None or not torch.cuda.is_available():
        pytest.skip(reason or "there is no GPU")
    with _running(("cuda", "cuda")):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_replays_with_other_codes(gpu, mode):
    """Forward and backward, index included, wait for nothing and so can be captured."""
    codes, mask, weight = ragged_batch(shape=(64, 30, 20), vocabulary=5000, width=64)
    codes, grad = torch.where(mask, codes, 0), torch.randn(64, 30, 64)
    arguments = (weight, mask, grad)

    def run():
        return gradients(visit_mean_pool, codes, *arguments, mode=mode)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        codes.copy_(torch.randint(0, 5000, codes.shape))
        mask.copy_(torch.rand(mask.shape) < 0.2)
        for result in captured:
            result.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, captured, run()))


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31(gpu):
    weight = torch.zeros(300_000, 8192, dtype=torch.bfloat16)
    weight[-1] = 1
    weight.requires_grad_()
    codes = torch.tensor([[299_999, 0], [299_999, 299_999]])
    pooled = visit_mean_pool(codes, weight, mode="sum")
    assert torch.equal(pooled[:, 0].float(), torch.tensor([1.0, 2.0]))
    pooled.sum().backward()
    assert (weight.grad[-1] == 3).all()
    assert (weight.grad[0] == 1).all()
    assert not weight.grad[1:-1].any()


@pytest.mark.gpu
def test_visits_beyond_the_largest_grid(gpu):
    """2^20 blocks of 16 groups forward, 32 backward; what is left over comes in a second round."""
    embeddings = (torch.arange(2**25 + 7) % 1000).float().view(-1, 1, 1).requires_grad_()
    pooled = masked_pool(embeddings)
    assert torch.equal(pooled, embeddings[:, 0])
    (grad,) = torch.autograd.grad(pooled, embeddings, pooled.detach())
    assert torch.equal(grad, embeddings)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [*MODES, "attention"])
def test_the_same_bits_a_thousand_times(gpu, mode):
    batch = packed([numbered(1 + i % 9, 300, step=i + 1) for i in range(3000)])
    table, scores = torch.randn(300, 128), torch.randn(300)
    options = {"mode": mode}

    def run():
        inputs = [table.clone().requires_grad_()]
        if mode == "attention":
            inputs.append(scores.clone().requires_grad_())
            options["scores"] = inputs[1]
        pooled = packed_visit_pool(batch, inputs[0], **options)
        return pooled.detach(), *torch.autograd.grad(pooled.square().sum(), inputs)

    first = run()
    for _ in range(1000):
        assert all(map(torch.equal, first, run()))


@pytest.mark.gpu
def test_on_a_side_stream(gpu):
    codes, mask, weight = ragged_batch(shape=(64, 30, 20), width=64)
    grad = torch.randn(64, 30, 64)
    expected = gradients(reference.visit_mean_pool, torch.where(mask, codes, 0), weight, mask, grad)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = weight + 0
        actual = gradients(visit_mean_pool, codes, late, mask, grad)
    torch.cuda.current_stream().wait_stream(side)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
