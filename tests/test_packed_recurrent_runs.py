"""The packed LSTM and GRU: the same bits, memory, torch.compile, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ehrseq_fast import use_backend
from tests.recurrent_layers import (
    close,
    every_cell,
    everything,
    flat,
    one_thread,
    pack_sequence,
    packed_rows,
    records,
    sizes_of,
    weighted,
)

pytestmark = [pytest.mark.operation("packed_lstm"), pytest.mark.operation("packed_gru")]
_one_thread = pytest.fixture(autouse=True)(one_thread)


@every_cell
def test_operands_are_not_written_to(cell, compiled):
    _, fast = cell.layers(4, 6, 2, bidirectional=True)
    visits = records([4, 1, 3], 4)
    hx = cell.states_for(fast, 3)
    packed = pack_sequence(visits, enforce_sorted=False)
    output, final = fast(packed, hx)
    results = [output.data, *flat(final)]
    operands = [packed.data, *fast.parameters(), *flat(hx), *results]
    before = [t.detach().clone() for t in operands]
    loss = sum(map(weighted, results))
    first = torch.autograd.grad(loss, visits, retain_graph=True)
    second = torch.autograd.grad(loss, visits)
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(cell, compiled, dtype):
    _, fast = cell.layers(10, 20, bidirectional=True, dtype=dtype)
    visits = records([7, 1, 3, 3, 12, 2], 10, dtype)
    hx = cell.states_for(fast, 6, dtype)
    first = everything(fast, visits, hx)
    for _ in range(200):
        again = everything(fast, visits, hx)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(cell, compiled, dtype):
    (_, fast), visits = cell.realistic(150, 40, 72, dtype)
    hx = cell.states_for(fast, 150, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            results.append(everything(fast, visits, hx))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_cell
def test_same_bits_within_any_batch(cell, compiled):
    """A record's outputs do not depend on the records beside it."""
    _, fast = cell.layers(6, 18, dtype=torch.float32)
    visits = records([9, 4, 4, 1], 6, torch.float32, requires_grad=False)
    with torch.no_grad():
        together = nn.utils.rnn.unpack_sequence(fast(pack_sequence(visits))[0])
        for one, own in zip(visits, together, strict=True):
            assert torch.equal(fast(pack_sequence([one]))[0].data, own)


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hidden", [5, 18])
def test_fresh_memory_is_written_before_it_is_read(cell, compiled, dtype, hidden):
    _, fast = cell.layers(6, hidden, 2, bidirectional=True, dtype=dtype)
    visits = records([7, 1, 3, 3], 6, dtype)
    expected = everything(fast, visits, None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # new tensors are then filled with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        poisoned = everything(fast, visits, None)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert all(torch.equal(a, b) for a, b in zip(poisoned, expected, strict=True))


def layer_operands(cell, dtype=torch.float32, states=True):
    given = [torch.randn(3, 5, dtype=dtype) if states else None for _ in range(cell.states)]
    x, weights = torch.randn(8, 3, dtype=dtype), cell.weights(3, 5, dtype=dtype)
    return [x, sizes_of([4, 3, 1]), *weights, *given]


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_opcheck_forward(cell, compiled, dtype, training, states):
    torch.library.opcheck(
        cell.forward,
        (*layer_operands(cell, dtype, states), False, training, 5 if training else 0),
    )


@every_cell
@pytest.mark.parametrize("kept", [8, 3, 0])
@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_backward(cell, compiled, need, kept):
    operands = layer_operands(cell)
    results = cell.forward(*operands, False, True, kept)
    outputs, saved = results[: 1 + cell.states], results[1 + cell.states :]
    torch.library.opcheck(
        cell.backward,
        (*outputs, *operands, outputs[0], *saved, False, *need),
    )


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given_states", [False, True])
@pytest.mark.parametrize(("inputs", "hidden"), [(3, 5), (16, 64), (7, 101)])
def test_gates_computed_again_give_the_same_bits(
    cell, compiled, dtype, bidirectional, bias, given_states, inputs, hidden
):
    """In the backward pass of 130 patients, some of one visit and some of 90."""
    torch.manual_seed(0)
    layer = cell.fast(inputs, hidden, 2, bidirectional=bidirectional, bias=bias).to(dtype)
    lengths = [1, 90, 40, 40, 2] + [1 + 7 * i % 23 for i in range(125)]
    packed = pack_sequence(
        [torch.randn(n, inputs).to(dtype) for n in lengths], enforce_sorted=False
    )
    data = packed.data.requires_grad_()
    hx = cell.states_for(layer, 130, dtype) if given_states else None
    leaves = [data, *layer.parameters(), *flat(hx)]
    results = []
    for keep_gates in (1.0, 0.4, 0.0, None):
        layer.keep_gates = keep_gates
        output, final = layer(PackedSequence(data, *packed[1:]), hx)
        loss = output.data.float().sin().sum() - sum(s.float().cos().sum() for s in flat(final))
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@every_cell
def test_gates_that_are_not_kept_take_no_memory(cell, compiled):
    layer = cell.fast(32, 64)
    packed = pack_sequence([torch.randn(100, 32, requires_grad=True) for _ in range(50)])
    held = {}
    for keep_gates in (1.0, 0.4, 0.0):
        layer.keep_gates = keep_gates
        output = layer(packed)[0].data
        held[keep_gates] = sum(
            tensor.numel()  # but for the biases
            for tensor in output.grad_fn.saved_tensors
            if tensor is not None and tensor.dim() > 1
        )
    assert held[1.0] - held[0.0] == 5000 * 4 * 64
    assert held[0.4] - held[0.0] == 5000 * 25 // 64 * 4 * 64


@every_cell
@pytest.mark.parametrize(("visits", "kept"), [(16384, 16384), (16385, 16385 * 25 // 64)])
def test_without_a_share_gates_of_up_to_16_mib_are_all_kept(cell, compiled, visits, kept):
    layer = cell.fast(1, 64)
    layer.keep_gates = None
    packed = packed_rows(torch.ones(visits, 1), visits)
    saved = layer(packed)[0].data.grad_fn.saved_tensors
    assert [kept, 4 * 64] in [list(tensor.shape) for tensor in saved if tensor is not None]


@every_cell
def test_chunks_of_which_some_gates_were_kept_give_the_same_bits(cell, compiled):
    """Chunks of 4 MiB of gates, 2,048 visits here, and shares that end inside each of them."""
    torch.manual_seed(0)
    layer = cell.fast(3, 128)
    packed = packed_rows(torch.randn(6000, 3), *[500] * 12)
    incoming = torch.randn(6000, 128)
    results = []
    for keep_gates in (1.0, 0.1, 0.5, 0.9):
        layer.keep_gates = keep_gates
        output = layer(packed)[0].data
        results.append(torch.autograd.grad(output, list(layer.parameters()), incoming))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@every_cell
@pytest.mark.parametrize("given_states", [False, True])
@pytest.mark.parametrize("as_module", [False, True])
def test_compiles_whole_with_dynamic_shapes(cell, compiled, given_states, as_module):
    _, fast = cell.layers(3, 5, 2, bidirectional=True, dtype=torch.float32)
    weights = fast.all_weights

    def step(data, sizes, hx):
        packed = PackedSequence(data, sizes)
        run = (
            fast(packed, hx)
            if as_module
            else cell.function(packed, weights, hx, bidirectional=True)
        )
        output, final = run
        return output.data.square().sum() + sum(s.sin().sum() for s in flat(final))

    torch._dynamo.reset()  # which counts compilations of `step` from all parameters
    # Dynamo leaves modules that are an nn.RNNBase alone unless it is told not to.
    with torch._dynamo.config.patch(allow_rnn=as_module):
        whole = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for lengths in ([4, 3, 1], [5, 5, 2, 1]):
            data = torch.randn(sum(lengths), 3, requires_grad=True)
            hx = cell.states_for(fast, len(lengths), torch.float32) if given_states else None
            leaves = [data, *fast.parameters(), *flat(hx)]
            expected = step(data, sizes_of(lengths), hx)
            actual = whole(data, sizes_of(lengths), hx)
            torch.testing.assert_close(actual, expected)
            close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), 1e-6)


def bad(cell, **changed):
    """A call, with a function of the cell for each argument that is changed."""
    x, sizes, *weights = layer_operands(cell)
    call = {
        "data": x,
        "sizes": sizes,
        "weights": [weights[:4]],
        "hx": cell.given([torch.zeros(1, 3, 5)] * cell.states),
    }
    return {**call, **{name: value(cell) for name, value in changed.items()}}


def states_of(*shape):
    return lambda cell: cell.given([torch.zeros(shape)] * cell.states)


def always(value):
    return lambda cell: value


REFUSED = {
    "data of 3 dimensions": ({"data": always(torch.zeros(8, 1, 3))}, ValueError, "visits, inputs"),
    "no weights": ({"weights": always([])}, ValueError, "weights"),
    "one bias": (
        {"weights": lambda cell: [cell.weights(3, 5, dtype=torch.float32)[:3]]},
        ValueError,
        "both biases",
    ),
    "narrow weight": (
        {"data": always(torch.zeros(8, 4))},
        ValueError,
        r"weight_ih .* \[(20|15), 4\], got \[(20|15), 3\]",
    ),
    "sizes rise": ({"sizes": always(torch.tensor([2, 3, 3]))}, ValueError, "do not rise"),
    "a size of zero": ({"sizes": always(torch.tensor([3, 5, 0]))}, ValueError, "positive"),
    "sizes miscount": ({"sizes": always(torch.tensor([3, 3, 1]))}, ValueError, "8 in all, got 7"),
    "no sizes": (
        {"sizes": always(torch.tensor([], dtype=torch.int64))},
        (ValueError, IndexError),
        "batch_sizes|index",
    ),
    "flat states": ({"hx": states_of(3, 5)}, ValueError, "h_0: expected"),
    "states of others": ({"hx": states_of(1, 2, 5)}, ValueError, "3 patients"),
    "mixed dtypes": (
        {"data": always(torch.zeros(8, 3, dtype=torch.float64))},
        TypeError,
        "float64",
    ),
    "dropout of 2": ({"dropout": always(2.0)}, ValueError, "probability"),
}


@every_cell
@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(cell, unemulated, changed, error, message):
    call = bad(cell, **changed)
    data, sizes, weights, hx = (call.pop(k) for k in ("data", "sizes", "weights", "hx"))
    if len(sizes) and sizes[0] != 3:
        hx = None
    with pytest.raises(error, match=message):
        cell.function(PackedSequence(data, sizes), weights, hx, **call)


@every_cell
def test_padded_input_is_refused_by_the_function(cell, unemulated):
    with pytest.raises(TypeError, match="PackedSequence"):
        cell.function(torch.zeros(2, 3, 4), [])


@every_cell
def test_a_backend_that_cannot_run_is_an_error(cell, compiled):
    _, fast = cell.layers(3, 4)
    packed = pack_sequence(records([2, 1], 3))
    with use_backend("cpu"):
        fast(packed)
        meta = PackedSequence(packed.data.to("meta"), packed.batch_sizes)
        with pytest.raises(RuntimeError, match="asked for"):
            fast(meta)


OTHER_CPUS = """
import torch
from tests.recurrent_layers import *
from tests.test_packed_recurrent import test_16_bits_near_float32

torch.manual_seed(0)
for cell in CELLS.values():
    for dtype, bound in [(torch.float64, 1e-11), (torch.float32, 1e-5)]:
        for hidden in (1, 5, 16, 37):
            plain, fast = cell.layers(11, hidden, 2, bidirectional=True, dtype=dtype)
            visits = records([9, 4, 4, 1] + [2] * 30, 11, dtype)
            hx = cell.states_for(plain, 34, dtype)
            close(everything(fast, visits, hx), everything(plain, visits, hx), bound)
    test_16_bits_near_float32(cell, None, torch.bfloat16, 8)
print("equal")
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_kernels_of_lesser_cpus(compiled, capability):
    environment = {**os.environ, "EHRSEQ_FAST_CPU_CAPABILITY": capability}
    run = subprocess.run(
        [sys.executable, "-c", OTHER_CPUS],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.stdout.endswith("equal\n"), run.stderr
