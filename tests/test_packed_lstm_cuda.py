"""The packed LSTM's CUDA kernels, on the host by the emulator; marked ``gpu`` what only a GPU can
show. Their sums are in float32; what they have to agree with is in float64."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from ehrseq_fast import PackedLSTM, packed_lstm
from ehrseq_fast import backend as backends
from ehrseq_fast.packed_lstm import cuda
from ehrseq_fast.packed_lstm.reference import packed_lstm_layer

from .packed_lstm_on_cuda import (
    NOTHING,
    backward,
    bound_of,
    emulated,
    forward,
    launches,
    not_finite,
    on_host,
    ops,
    ragged,
    raw,
    twice,
)
from .packed_lstm_on_cuda import assert_agree as agree
from .recurrent_layers import LENGTHS, everything, results_of

pytestmark = pytest.mark.operation("packed_lstm")
BOUND = 2e-6  # of the largest value of each tensor


def assert_agree(mine, exact, bound=BOUND):
    assert all(got.dtype == torch.float32 for got in mine)
    agree(mine, exact, bound)


@pytest.fixture
def shim():
    with emulated() as loaded:
        yield loaded


@on_host
@pytest.mark.parametrize("lengths", ["any order", "length 1", "all equal", "one patient"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
def test_values_and_gradients(shim, lengths, bidirectional):
    fast, exact, mine, theirs = twice(LENGTHS[lengths], bidirectional=bidirectional, given=True)
    results, launched = launches(shim, lambda: everything(fast, *mine))
    assert launched == (8 if bidirectional else 4)  # row numbers and scan, each way
    assert_agree(results, everything(exact, *theirs))


@on_host
def test_layers_without_biases_and_states(shim):
    options = {"num_layers": 2, "bidirectional": True, "bias": False}
    fast, exact, mine, theirs = twice([3, 1, 4], **options)
    results, launched = launches(shim, lambda: everything(fast, *mine))
    assert launched == 16
    assert_agree(results, everything(exact, *theirs))


@on_host
@pytest.mark.parametrize("hidden", [64, 160, 288])
def test_hidden_sizes(shim, hidden):
    """Slices of which one is longer than the others; and the most that shared memory holds."""
    fast, exact, mine, theirs = twice([3, 1], 3, hidden, bidirectional=True, given=True)
    assert_agree(everything(fast, *mine), everything(exact, *theirs))


@on_host
def test_tiles_of_sixteen_patients(shim):
    """Where there are more than 128 patients; the last tile has few."""
    lengths = [1 + i % 3 for i in range(131)]
    fast, exact, mine, theirs = twice(lengths, 2, bidirectional=True, given=True)
    assert_agree(everything(fast, *mine), everything(exact, *theirs))


@on_host
def test_more_times_than_one_launch_carries(shim):
    fast, exact, mine, theirs = twice([490, 485, 1], 2)
    with torch.no_grad():
        results, launched = launches(shim, lambda: results_of(fast, *mine))
        assert launched == 3
        assert_agree(results, results_of(exact, *theirs))


@on_host
def test_inference_has_the_bits_of_training(shim):
    fast, _, mine, _ = twice([3, 2], bidirectional=True, given=True)
    trained = results_of(fast, *mine)
    with torch.no_grad():
        assert all(map(torch.equal, trained, results_of(fast, *mine)))


@on_host
def test_no_order_of_blocks_changes_a_bit(shim):
    fast, _, mine, _ = twice([4, 3, 3, 2, 1, 1, 1, 1, 1], bidirectional=True, given=True)
    first = everything(fast, *mine)
    for seed in range(4):
        shim.set_seed(100 * seed)
        assert all(map(torch.equal, first, everything(fast, *mine)))


@on_host
@pytest.mark.parametrize("reverse", [False, True])
@not_finite
@pytest.mark.parametrize("states", [True, False])
def test_what_is_not_finite_goes_where_the_definition_has_it(
    shim, argument, at, value, reverse, states
):
    operands = raw()
    operands[argument][at] = value
    if not states:
        operands[6:] = [None, None]
        if argument >= 6:
            pytest.skip("there are no states")
    results = forward(operands, reverse)
    given = [x if x is None or not x.is_floating_point() else x.double() for x in operands]
    expected = packed_lstm_layer(*given, reverse)
    for mine, theirs in zip(results[:3], expected, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        kept = theirs.isfinite()
        torch.testing.assert_close(mine.double()[kept], theirs[kept], rtol=0, atol=1e-5)


@on_host
@pytest.mark.parametrize("reverse", [False, True])
def test_a_gradient_that_is_not_finite_stays_with_its_patient(shim, reverse):
    operands = raw()
    results = forward(operands, reverse)
    incoming = [torch.randn_like(result) for result in results[:3]]
    incoming[0][1, 3] = NOTHING  # of the second patient's first visit
    grads = backward(operands, results, incoming, reverse)
    rows_of_others = [0, 2, 3, 5]
    assert grads[0][rows_of_others].isfinite().all()
    assert grads[0][1].isnan().all()
    assert grads[0][4].isnan().all() == reverse  # what was before the visit, in the scan's order
    for of_states in grads[4:]:
        assert of_states[[0, 2]].isfinite().all()
        assert of_states[1].isnan().any()
    assert grads[1].isnan().any()


@on_host
def test_gradients_that_are_not_asked_for_or_not_given(shim):
    operands = raw()
    results = forward(operands)
    incoming = [torch.randn_like(result) for result in results[:3]]
    saved = results[0], *results[3:]
    whole = backward(operands, results, incoming)
    for need in ((True, False, False), (False, True, False), (False, False, True)):
        grads = ops().packed_lstm_layer_backward(*incoming, *operands, *saved, False, *need)
        wanted = [need[0], *[need[1]] * 3, *[need[2]] * 2]
        for grad, all_of_it, is_wanted in zip(grads, whole, wanted, strict=True):
            assert torch.equal(grad, all_of_it) if is_wanted else grad.numel() == 0
    for at in range(3):
        given = [grad if i == at else None for i, grad in enumerate(incoming)]
        zeros = [grad if i == at else torch.zeros_like(grad) for i, grad in enumerate(incoming)]
        pairs = backward(operands, results, given), backward(operands, results, zeros)
        assert all(map(torch.equal, *pairs))


@on_host
@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        (0, torch.zeros(6, 3, dtype=torch.float64), "input: expected float32 or .*, got float64"),
        (1, torch.tensor([3, 2, 2]), r"batch_sizes: .* 6 in all, got more"),
        (1, torch.tensor([1, 2, 3]), r"batch_sizes\[1\] = 2 after 1"),
        (2, torch.zeros(128, 4), r"weight_ih: expected .*\[128, 3\], got \[128, 4\]"),
        (3, torch.zeros(132, 33), "weight_hh: expected a multiple of 32 of at most 288 .*, got 33"),
        (3, torch.zeros(1280, 320), "weight_hh: expected a multiple of 32 of at most 288"),
        (4, torch.zeros(127), r"bias_ih: expected .*\[128\], got \[127\]"),
        (7, torch.zeros(2, 32), r"c0: expected .*\[3, 32\], got \[2, 32\]"),
    ],
)
def test_the_raw_operators_refuse_what_they_do_not_serve(shim, argument, value, match):
    operands = raw()
    results = forward(operands)
    operands[argument] = value
    with pytest.raises(ValueError, match=match):
        ops().packed_lstm_layer(*operands, False, True, 6)
    with pytest.raises(ValueError, match=match):
        backward(operands, results, results[:3])


@on_host
def test_the_gates_of_all_visits_are_kept(shim):
    with pytest.raises(ValueError, match=r"kept: expected 6\.\.6, got 5"):
        ops().packed_lstm_layer(*raw(), False, True, 5)
    operands = raw()
    results = forward(operands)
    saved = results[0], results[3][:5], results[4]
    with pytest.raises(ValueError, match=r"gates: expected shape .*\[6, 128\], got \[5, 128\]"):
        ops().packed_lstm_layer_backward(*results[:3], *operands, *saved, False, *(True,) * 3)


@on_host
def test_results_share_no_memory_and_operands_stay(shim):
    operands = raw()
    before = copy.deepcopy(operands)
    results = forward(operands)
    grads = backward(operands, results, [torch.ones_like(result) for result in results[:3]])
    assert all(map(torch.equal, operands, before))
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*results, *grads)]
    assert len(set(storages)) == len(storages)


@on_host
def test_a_second_derivative_is_refused(shim):
    fast, _, (visits, _), _ = twice([2, 1])
    output, _ = fast(pack_sequence(visits))
    (grad,) = torch.autograd.grad(output.data.sum(), visits[0], create_graph=True)
    with pytest.raises(RuntimeError, match="packed_lstm"):
        torch.autograd.grad(grad.sum(), visits[0])


@on_host
@pytest.mark.parametrize(
    ("hidden", "dtype"),
    [
        *((33, torch.float32), (320, torch.float32), (32, torch.float64)),
        *((40, torch.bfloat16), (448, torch.float16)),
    ],
)
def test_what_they_do_not_serve_goes_where_it_went(shim, hidden, dtype):
    fast = PackedLSTM(3, hidden, dtype=dtype)
    packed = pack_sequence([torch.randn(2, 3, dtype=dtype)])
    got, launched = launches(shim, lambda: fast(packed)[0].data)
    assert launched == 0
    with backends.use_backend(None):
        assert torch.equal(got, fast(packed)[0].data)


@on_host
def test_why_they_are_not_taken(shim):
    def why(dtype, hidden):
        return cuda.why_not(torch.empty(0, dtype=dtype), hidden)

    assert why(torch.bfloat16, 416) is None
    assert why(torch.float32, 288) is None
    assert "up to 416 in torch.bfloat16, got 448" in why(torch.bfloat16, 448)
    assert "up to 288 in torch.float32, got 320" in why(torch.float32, 320)
    assert "float32, bfloat16 and float16, and this is torch.float64" in why(torch.float64, 32)
    with torch.autocast("cpu"):
        assert why(torch.bfloat16, 32) == "autocast takes cuDNN"


@on_host
def test_they_are_taken_where_they_are_asked_for(shim, monkeypatch):
    fast = PackedLSTM(3, 32)
    packed = pack_sequence([torch.randn(2, 3)])
    for call in (lambda: fast(packed), lambda: packed_lstm(packed, fast.all_weights)):
        assert launches(shim, call)[1] > 0
        with torch.autocast("cpu"):
            assert launches(shim, call)[1] == 0
        with backends.use_backend(None):
            assert launches(shim, call)[1] == 0
        with backends.use_backend("reference"):
            assert launches(shim, call)[1] == 0
        with monkeypatch.context() as changed:
            changed.setenv(cuda.SWITCH, "0")
            assert launches(shim, call)[1] == 0


def a_run(**changed):
    rows = [
        {"arithmetic": arithmetic, "hidden": hidden, "ours": ours, "cudnn_packed": 9.0}
        for arithmetic, hidden, ours in (
            *(("float32", 128, 5.0), ("float32", 128, 8.0), ("float32", 256, 9.5)),
            *(("bfloat16", 128, 9.5), ("bfloat16", 256, 2.5)),
        )
    ]
    run = {"gpu": "A GPU", "measured_at": "2026-02-01", "rows": rows}
    return run | dict.fromkeys(cuda.CHECKS, True) | changed


def test_results_decide_by_default():
    assert cuda.faster_sizes([], "A GPU") == set()
    assert cuda.faster_sizes([a_run()], "A GPU") == {128}
    assert cuda.faster_sizes([a_run()], "A GPU", "bfloat16") == {256}
    assert cuda.faster_sizes([a_run()], "A GPU", "float16") == set()
    assert cuda.faster_sizes([a_run()], "Another") == set()
    for check in cuda.CHECKS:
        assert cuda.faster_sizes([a_run(**{check: False})], "A GPU") == set()
    newer = a_run(measured_at="2026-03-01", same_bits_1000_times=None)
    assert cuda.faster_sizes([newer, a_run()], "A GPU") == set()


def test_info_says_why(monkeypatch):
    monkeypatch.delenv(cuda.SWITCH, raising=False)
    assert "are off, as no committed results show them right" in cuda.describe([])
    said = cuda.describe([a_run()])
    assert "A GPU, float32: hidden sizes 128; A GPU, bfloat16: hidden sizes 256)" in said
    monkeypatch.setenv(cuda.SWITCH, "1")
    assert f"{cuda.SWITCH} asks for" in cuda.describe([])
    monkeypatch.setenv(cuda.SWITCH, "0")
    assert f"{cuda.SWITCH} is 0" in cuda.describe([a_run()])


@on_host
def test_the_run_that_settles_the_default(shim, monkeypatch):
    """In small, and against PyTorch's kernels on the host."""
    cuda_lstm = pytest.importorskip("benchmarks.cuda_lstm")
    monkeypatch.delenv(cuda.SWITCH, raising=False)
    sizes = cuda_lstm.Sizes((2, 5), (32, 40), ("float32", "tf32"), 3, 4, 2, 1, 30)
    found = cuda_lstm.measure("cpu", sizes) | {"racecheck": True, "synccheck": True}
    assert all(found[check] is True for check in cuda.CHECKS)
    assert [row["ours"] is None for row in found["rows"]] == [False, False, True, True] * 2
    for row in found["rows"]:
        assert all(
            row[f"{name}{way}"] > 0 for name in cuda_lstm.LAYERS[1:] for way in ("", "_forward")
        )
    assert len(found["steps"]) == 2
    assert "not served" in cuda_lstm.table(found)
    for row in found["rows"]:
        row["ours"] = row["ours"] and 0.5 * row["cudnn_packed"]
    for arithmetic in sizes.arithmetics:
        line = f"The default in {arithmetic} for hidden sizes: 32"
        assert line in cuda_lstm.table(found)
    assert cuda.SWITCH not in os.environ


@pytest.fixture
def gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv(cuda.SWITCH, "1")
    reason = cuda.why_not(torch.empty(0, device="cuda"), 32)
    if reason is not None:
        pytest.skip(reason)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield "cuda"
    torch.backends.cuda.matmul.allow_tf32 = before


SHAPES = {
    **{f"float32-{hidden}": (torch.float32, hidden) for hidden in (32, 128, 192, 256, 288)},
    **{f"bfloat16-{hidden}": (torch.bfloat16, hidden) for hidden in (96, 384, 416)},
    "float16-128": (torch.float16, 128),
    **{f"tf32-{hidden}": (torch.float32, hidden) for hidden in (96, 288)},
}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("patients", [1, 33, 300])
def test_any_shape_on_a_gpu(gpu, patients, shape, monkeypatch):
    dtype, hidden = SHAPES[shape]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", shape.startswith("tf32"))
    options = {"num_layers": 2, "bidirectional": True, "given": True, "device": gpu}
    fast, exact, mine, theirs = twice(ragged(patients, 40), 24, hidden, dtype=dtype, **options)
    results = [result.cpu() for result in everything(fast, *mine)]
    assert all(result.dtype == dtype for result in results)
    bound = 2e-5 if shape.startswith("float32") else bound_of(dtype, layers=2)
    agree(results, everything(exact, *theirs), bound)


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ["float32", "tf32", "bfloat16", "float16"])
def test_the_same_bits_a_thousand_times_on_a_gpu(gpu, arithmetic, monkeypatch):
    """``EHRSEQ_FAST_REPEATS``: fewer, under a sanitizer."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", arithmetic == "tf32")
    dtype = torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)
    options = {"bidirectional": True, "device": gpu, "dtype": dtype}
    fast, _, mine, _ = twice(ragged(200, 20), 24, 256, **options)
    first = everything(fast, *mine)
    for _ in range(int(os.environ.get("EHRSEQ_FAST_REPEATS", "1000")) - 1):
        assert all(map(torch.equal, first, everything(fast, *mine)))


@pytest.mark.gpu
def test_a_graph_of_a_layer_on_a_gpu(gpu):
    fast, _, (visits, _), _ = twice(ragged(20, 9), 8, 128, device=gpu)
    packed = pack_sequence([x.detach() for x in visits], enforce_sorted=False)
    with torch.no_grad():
        expected = fast(packed)[0].data
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fast(packed)[0].data
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
