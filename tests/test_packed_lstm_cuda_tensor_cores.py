"""The packed LSTM's CUDA kernels on tensor cores, on the host by the emulator, which multiplies
what the lanes of a warp hold as the PTX ISA lays it out. What they have to agree with is in
float64, of the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from ehrseq_fast import PackedLSTM
from ehrseq_fast.packed_lstm import cuda
from ehrseq_fast.packed_lstm.reference import packed_lstm_layer

from . import cuda_on_cpu
from .packed_lstm_on_cuda import (
    NOTHING,
    assert_agree,
    bound_of,
    emulated,
    launches,
    not_finite,
    on_host,
    ops,
    raw,
    twice,
)
from .packed_lstm_on_cuda import (
    backward as backward_of,
)
from .packed_lstm_on_cuda import (
    forward as forward_of,
)
from .recurrent_layers import LENGTHS, everything, results_of

pytestmark = [pytest.mark.operation("packed_lstm"), on_host]


@pytest.fixture
def shim():
    with emulated() as loaded:
        yield loaded


@pytest.fixture(params=["bfloat16", "float16", "tf32"])
def dtype(request, monkeypatch):
    """In turn; float32 multiplied as TF32."""
    if request.param == "tf32":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        return torch.float32
    return getattr(torch, request.param)


def forward(operands, reverse=False):
    return forward_of(operands, reverse, operands[0].dtype == torch.float32)


def backward(operands, results, incoming, reverse=False, need=(True, True, True)):
    tf32 = operands[0].dtype == torch.float32
    return backward_of(operands, results, incoming, reverse, tf32, need)


def agree(fast, exact, mine, theirs, dtype, layers=1):
    results = everything(fast, *mine)
    assert all(result.dtype == dtype for result in results)
    assert_agree(results, everything(exact, *theirs), bound_of(dtype, layers))


@pytest.mark.parametrize("lengths", ["any order", "length 1", "one patient", "long tail"])
def test_values_and_gradients(shim, lengths, dtype):
    options = {"bidirectional": True, "given": True, "dtype": dtype}
    fast, exact, mine, theirs = twice(LENGTHS[lengths], **options)
    results, launched = launches(shim, lambda: everything(fast, *mine))
    assert launched == 8  # row numbers and scan, each way, of two directions
    assert all(result.dtype == dtype for result in results)
    assert_agree(results, everything(exact, *theirs), bound_of(dtype))


def test_layers_without_biases_and_states(shim):
    options = {"num_layers": 2, "bidirectional": True, "bias": False, "dtype": torch.bfloat16}
    agree(*twice([3, 1, 4], **options), torch.bfloat16, layers=2)


@pytest.mark.parametrize("hidden", [96, 256, "most"])
def test_hidden_sizes(shim, hidden, dtype):
    """Units that are no multiple of eight; and the most that shared memory holds."""
    hidden = cuda.MOST_HIDDEN[dtype] if hidden == "most" else hidden
    agree(*twice([3, 1], 3, hidden, given=True, dtype=dtype), dtype)


@pytest.mark.parametrize(("hidden", "bidirectional"), [(32, True), (384, False)])
def test_tiles_of_sixteen_patients(shim, hidden, bidirectional):
    """Where there are more than 128 patients; the last tile has few, and one of its halves none."""
    lengths = [1 + i % 3 for i in range(131)] if hidden == 32 else [1] * 129
    options = {"bidirectional": bidirectional, "given": True, "dtype": torch.bfloat16}
    agree(*twice(lengths, 2, hidden, **options), torch.bfloat16)


@pytest.mark.skipif(cuda_on_cpu.SANITIZED, reason="the sanitizers see its bounds with two patients")
def test_tiles_of_eight_patients_for_the_largest_layers(shim):
    fast, exact, mine, theirs = twice([1] * 129, 2, 416, dtype=torch.float16)
    with torch.no_grad():
        results = results_of(fast, *mine)
        assert_agree(results, results_of(exact, *theirs), bound_of(torch.float16))


def test_tf32_is_as_cudnn_is_told(shim, monkeypatch):
    """By either name of the setting; the backward pass multiplies as the forward pass did."""
    fast, exact, mine, theirs = twice([4, 2, 1], given=True)
    expected = everything(exact, *theirs)
    in_float32 = everything(fast, *mine)
    assert_agree(in_float32, expected, 2e-6)
    assert cuda.arithmetic(mine[0][0]) == "float32"

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert cuda.arithmetic(mine[0][0]) == "tf32"
    in_tf32 = everything(fast, *mine)
    assert not any(map(torch.equal, in_tf32, in_float32))
    assert_agree(in_tf32, expected, bound_of(torch.float32))

    output = results_of(fast, *mine)[0]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    after = torch.autograd.grad(output.sum(), mine[0])
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    both = torch.autograd.grad(results_of(fast, *mine)[0].sum(), mine[0])
    assert all(map(torch.equal, after, both))


def test_inference_has_the_bits_of_training(shim, dtype):
    fast, _, mine, _ = twice([3, 2], bidirectional=True, given=True, dtype=dtype)
    trained = results_of(fast, *mine)
    with torch.no_grad():
        assert all(map(torch.equal, trained, results_of(fast, *mine)))


def test_no_order_of_blocks_changes_a_bit(shim, dtype):
    """Fifty times, each in another order of blocks, warps and lanes; fewer under sanitizers."""
    fast, _, mine, _ = twice([3, 2, 2, 1, 1, 1, 1, 1, 1], given=True, dtype=dtype)
    first = everything(fast, *mine)
    for seed in range(5 if cuda_on_cpu.SANITIZED else 50):
        shim.set_seed(100 * seed)
        assert all(map(torch.equal, first, everything(fast, *mine)))


@pytest.mark.parametrize("reverse", [False, True])
@not_finite
def test_what_is_not_finite_goes_where_the_definition_has_it(
    shim, argument, at, value, reverse, dtype
):
    operands = raw(dtype=dtype)
    operands[argument][at] = value
    results = forward(operands, reverse)
    given = [x.double() if x.is_floating_point() else x for x in operands]
    expected = packed_lstm_layer(*given, reverse)
    for mine, theirs in zip(results[:3], expected, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        kept = theirs.isfinite()
        assert_agree([mine[kept]], [theirs[kept]], bound_of(dtype))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_gradient_that_is_not_finite_stays_with_its_patient(shim, reverse, dtype):
    operands = raw(dtype=dtype)
    results = forward(operands, reverse)
    incoming = [torch.randn_like(result) for result in results[:3]]
    incoming[0][1, 3] = NOTHING  # of the second patient's first visit
    grads = backward(operands, results, incoming, reverse)
    assert grads[0][[0, 2, 3, 5]].isfinite().all()
    assert grads[0][1].isnan().all()
    assert grads[0][4].isnan().all() == reverse  # what was before the visit, in the scan's order
    for of_states in grads[4:]:
        assert of_states[[0, 2]].isfinite().all()
        assert of_states[1].isnan().any()
    assert grads[1].isnan().any()


def test_gradients_that_are_not_asked_for(shim, dtype):
    operands = raw(dtype=dtype)
    results = forward(operands)
    incoming = [torch.randn_like(result) for result in results[:3]]
    whole = backward(operands, results, incoming)
    for need in ((True, False, False), (False, True, False), (False, False, True)):
        grads = backward(operands, results, incoming, need=need)
        wanted = [need[0], *[need[1]] * 3, *[need[2]] * 2]
        for grad, all_of_it, is_wanted in zip(grads, whole, wanted, strict=True):
            assert torch.equal(grad, all_of_it) if is_wanted else grad.numel() == 0


def test_states_are_kept_in_float32_and_share_no_memory(shim, dtype):
    operands = raw(dtype=dtype)
    before = copy.deepcopy(operands)
    results = forward(operands)
    assert [result.dtype for result in results] == [*[dtype] * 3, *[torch.float32] * 2]
    grads = backward(operands, results, [torch.ones_like(result) for result in results[:3]])
    assert all(grad.dtype == dtype for grad in grads)
    assert all(map(torch.equal, operands, before))
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*results, *grads)]
    assert len(set(storages)) == len(storages)


def test_operands_that_begin_anywhere(shim):
    """Which a load of more than one value would find misaligned."""
    operands = raw(dtype=torch.bfloat16)
    expected = forward(operands)
    moved = []
    for operand in operands:
        if not operand.is_floating_point():
            moved.append(operand)
            continue
        flat = torch.empty(operand.numel() + 1, dtype=operand.dtype)[1:]
        moved.append(flat.view_as(operand).copy_(operand))
    assert all(map(torch.equal, expected, forward(moved)))
    incoming = [torch.randn_like(result) for result in expected[:3]]
    grads = backward(operands, expected, incoming), backward(moved, expected, incoming)
    assert all(map(torch.equal, *grads))


def test_opcheck(shim, dtype):
    operands = raw((2, 1), dtype=dtype)
    operands = [x.requires_grad_(False) for x in operands]
    tests = ("test_schema", "test_faketensor")
    tf32 = dtype == torch.float32
    arguments = (*operands, False, True, 3, tf32)
    torch.library.opcheck(ops().packed_lstm_layer.default, arguments, test_utils=tests)
    results = forward(operands)
    saved = results[0], *results[3:]
    arguments = (*results[:3], *operands, *saved, True, True, True, True, tf32)
    torch.library.opcheck(ops().packed_lstm_layer_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        (1, torch.tensor([], dtype=torch.long), "batch_sizes: expected one number per time"),
        (1, torch.tensor([0]), r"batch_sizes\[0\] = 0"),
        (2, torch.zeros(128, 3), "weight_ih: expected bfloat16, got float32"),
        (3, torch.zeros(1792, 448).bfloat16(), "a multiple of 32 of at most 416 .*, got 448"),
        (7, torch.zeros(3, 32).half(), "c0: expected bfloat16, got float16"),
    ],
)
def test_the_raw_operators_refuse_what_they_do_not_serve(shim, argument, value, match):
    operands = raw(dtype=torch.bfloat16)
    results = forward(operands)
    operands[argument] = value
    with pytest.raises(ValueError, match=match):
        forward(operands)
    with pytest.raises(ValueError, match=match):
        backward(operands, results, results[:3])


def test_training_a_layer_learns(shim):
    """Through the module: its parameters, in 16 bits, take the steps that float64 takes."""
    fast, exact, (visits, _), (wide, _) = twice([3, 2, 1], dtype=torch.bfloat16)
    assert isinstance(fast, PackedLSTM)
    for _ in range(2):
        for layer, rows in ((fast, visits), (exact, wide)):
            layer.zero_grad()
            results_of(layer, rows, None)[0].square().sum().backward()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.sub_(0.1 * parameter.grad)
    for mine, theirs in zip(fast.parameters(), exact.parameters(), strict=True):
        assert_agree([mine], [theirs.detach()], bound_of(torch.bfloat16))
