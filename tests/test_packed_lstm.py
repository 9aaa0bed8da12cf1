"""The packed LSTM against nn.LSTM and against its definition."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import ehrseq_fast
from ehrseq_fast import PackedLSTM, packed_lstm, use_backend
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
from ehrseq_fast.packed_lstm import reference
from tests.tolerances import ROUNDOFF

pytestmark = pytest.mark.operation("packed_lstm")

LENGTHS = {
    "any order": [3, 1, 7, 7, 2, 5],
    "length 1": [1, 1, 1],
    "all equal": [4] * 6,
    "one patient": [5],
    "one visit": [1],
    "long tail": [40, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Batches of tests are small, and threads that wait for each other only slow a busy machine.
    The tests that are about threads set their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sizes_of(lengths):
    return torch.tensor([sum(n > t for n in lengths) for t in range(max(lengths))])


def records(lengths, inputs, dtype=torch.float64, requires_grad=True):
    return [torch.randn(n, inputs, dtype=dtype, requires_grad=requires_grad) for n in lengths]


def states_for(lstm, patients, dtype=torch.float64):
    directions = 2 if lstm.bidirectional else 1
    shape = lstm.num_layers * directions, patients, lstm.hidden_size
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))


def weighted(tensor, seed=5):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    weights = torch.randn(tensor.shape, generator=generator).bfloat16()  # exact in every dtype
    return (tensor * weights.to(tensor.dtype)).sum()


def twins(*args, dtype=torch.float64, **kwargs):
    """The same LSTM twice: nn.LSTM and ours, from one state_dict."""
    plain = nn.LSTM(*args, **kwargs).to(dtype)
    fast = PackedLSTM(*args, **kwargs).to(dtype)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def everything(lstm, visits, hx):
    """Outputs, final states and the gradients of all that has one."""
    output, (h_n, c_n) = lstm(pack_sequence(visits, enforce_sorted=False), hx)
    loss = weighted(output.data) + weighted(h_n, 6) + weighted(c_n, 7)
    leaves = [*visits, *lstm.parameters(), *(hx or ())]
    return [output.data, h_n, c_n, *torch.autograd.grad(loss, leaves)]


def close(actual, expected, bound):
    """Within `bound` of the largest value of each tensor."""
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=bound * scale)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("given_states", [False, True])
def test_equals_nn_lstm(unemulated, lengths, layers, bidirectional, given_states):
    for dtype, bound in [(torch.float64, 1e-12), (torch.float32, 1e-5)]:
        plain, fast = twins(5, 17, layers, bidirectional=bidirectional, dtype=dtype)
        visits = records(lengths, 5, dtype)
        hx = states_for(plain, len(lengths), dtype) if given_states else None
        close(everything(fast, visits, hx), everything(plain, visits, hx), bound)


@pytest.mark.parametrize("hidden", [1, 3, 5, 16, 17, 64, 101])
@pytest.mark.parametrize("inputs", [1, 3, 101])
@pytest.mark.parametrize("bias", [True, False])
def test_any_width(unemulated, hidden, inputs, bias):
    plain, fast = twins(inputs, hidden, bidirectional=True, bias=bias)
    visits = records(LENGTHS["any order"], inputs)
    hx = states_for(plain, 6)
    close(everything(fast, visits, hx), everything(plain, visits, hx), 1e-12)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=40),
    inputs=st.integers(1, 40),
    hidden=st.integers(1, 40),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    given_states=st.booleans(),
    threads=st.integers(1, 4),
)
def test_equals_nn_lstm_for_any_shape(
    lengths, inputs, hidden, layers, bidirectional, bias, given_states, threads
):
    plain, fast = twins(inputs, hidden, layers, bias=bias, bidirectional=bidirectional)
    visits = records(lengths, inputs)
    hx = states_for(plain, len(lengths)) if given_states else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        close(everything(fast, visits, hx), everything(plain, visits, hx), 1e-11)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("given_states", [False, True])
def test_layer_equals_definition(compiled, reverse, given_states):
    lengths = sorted(LENGTHS["any order"], reverse=True)
    sizes = sizes_of(lengths)
    x = torch.randn(sum(lengths), 5, dtype=torch.float64)
    weights = [torch.randn(s, dtype=x.dtype) for s in [(28, 5), (28, 7), (28,), (28,)]]
    states = [torch.randn(6, 7, dtype=x.dtype) for _ in range(2)] if given_states else [None, None]
    actual = torch.ops.ehrseq_fast.packed_lstm_layer(x, sizes, *weights, *states, reverse, False, 0)
    expected = reference.packed_lstm_layer(x, sizes, *weights, *states, reverse)
    close(actual[:3], expected, 1e-12)


def test_definition_equals_nn_lstm():
    plain = nn.LSTM(3, 4, bidirectional=True).double()
    packed = pack_sequence(records([5, 3, 3, 1], 3, requires_grad=False))
    output, (h_n, c_n) = plain(packed)
    for i, reverse in enumerate([False, True]):
        out, h, c = reference.packed_lstm_layer(
            packed.data, packed.batch_sizes, *plain.all_weights[i], reverse=reverse
        )
        close([out, h, c], [output.data[:, 4 * i : 4 * i + 4], h_n[i], c_n[i]], 1e-14)


def realistic(patients, inputs, hidden, dtype=torch.float32, cap=200):
    lengths = torch.exp(2.08 + 1.1 * torch.randn(patients)).round().clamp(1, cap).int().tolist()
    return twins(inputs, hidden, dtype=dtype), records(lengths, inputs, dtype)


def test_long_batches_go_through_several_chunks(compiled):
    # 256 hidden units in float64: a chunk of the backward pass holds 1,024 visits.
    (plain, fast), visits = realistic(300, 8, 256, torch.float64, cap=15)
    hx = states_for(plain, 300)
    assert sum(map(len, visits)) > 2 * 1024
    close(everything(fast, visits, hx), everything(plain, visits, hx), 1e-11)


def test_float32_as_near_as_nn_lstm(compiled):
    (plain, fast), visits = realistic(64, 32, 64, cap=60)
    hx = states_for(plain, 64, torch.float32)
    close(everything(fast, visits, hx), everything(plain, visits, hx), 1e-5)
    packed = pack_sequence([v.detach() for v in visits], enforce_sorted=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(packed)[0].data, plain(packed)[0].data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [7, 8, 134])
def test_16_bits_near_float32(compiled, dtype, inputs):
    (plain, fast), visits = realistic(16, inputs, 24, cap=40)
    low = PackedLSTM(inputs, 24).to(dtype)
    low.load_state_dict(fast.state_dict())
    # From weights and inputs that 16 bits hold exactly, only the results are rounded.
    plain.load_state_dict(low.state_dict())
    lowered = [v.detach().to(dtype).requires_grad_() for v in visits]
    raised = [v.detach().float().requires_grad_() for v in lowered]
    actual = everything(low, lowered, None)
    assert all(a.dtype == dtype for a in actual)
    expected = everything(plain, raised, None)
    close([a.float() for a in actual[:3]], expected[:3], 2 * ROUNDOFF[dtype])
    close([a.float() for a in actual[3:]], expected[3:], 2 * ROUNDOFF[dtype])


def test_saturated_gates_stay_finite(compiled):
    plain, fast = twins(3, 20, dtype=torch.float32)
    packed = pack_sequence([torch.tensor([[1e4, -1e4, 1e4]]).repeat(5, 1), torch.zeros(2, 3)])
    expected = plain(packed)[0].data
    torch.testing.assert_close(fast(packed)[0].data, expected, rtol=1e-6, atol=1e-6)
    spoilt = pack_sequence([torch.full((2, 3), torch.nan), torch.zeros(2, 3)])
    output = fast(spoilt)[0].data
    assert output[::2].isnan().all()
    assert output[1::2].isfinite().all()


def test_gradcheck(compiled):
    sizes = sizes_of([4, 3, 1])
    for reverse in [False, True]:
        shapes = [(8, 3), (12, 3), (12, 3), (12,), (12,), (3, 3), (3, 3)]
        leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

        def layer(x, w_ih, w_hh, b_ih, b_hh, h0, c0, bidirectional=reverse):
            hx = h0[None], c0[None]
            weights = [(w_ih, w_hh, b_ih, b_hh)]
            if bidirectional:
                weights *= 2
                hx = tuple(s.expand(2, -1, -1) for s in hx)
            output, (h_n, c_n) = packed_lstm(
                PackedSequence(x, sizes), weights, hx, bidirectional=bidirectional
            )
            return output.data, h_n, c_n

        assert torch.autograd.gradcheck(layer, leaves)


def test_double_backward_is_refused(compiled):
    _, fast = twins(3, 4)
    visits = records([3, 2], 3)
    loss = fast(pack_sequence(visits))[0].data.sum()
    (grad,) = torch.autograd.grad(loss, visits[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (loss + grad.square().sum()).backward()


@pytest.mark.parametrize("used", ["output", "h_n", "c_n"])
def test_outputs_that_the_loss_leaves_out(unemulated, used):
    plain, fast = twins(4, 6, bidirectional=True)
    visits = records([4, 1, 3], 4)
    hx = states_for(plain, 3)

    def gradients(lstm):
        output, (h_n, c_n) = lstm(pack_sequence(visits, enforce_sorted=False), hx)
        loss = weighted({"output": output.data, "h_n": h_n, "c_n": c_n}[used])
        return torch.autograd.grad(loss, [*visits, *lstm.parameters(), *hx])

    close(gradients(fast), gradients(plain), 1e-12)


@pytest.mark.parametrize("frozen", ["input", "weights", "all but one bias", "all but h_0"])
def test_gradients_of_some_only(unemulated, frozen):
    plain, fast = twins(4, 6, 2)
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=frozen not in ("input",))
    hx = states_for(plain, 3)
    if frozen != "input":
        for lstm in (plain, fast):
            lstm.requires_grad_(False)
            if frozen == "all but one bias":
                lstm.bias_hh_l0.requires_grad_(True)
    if frozen in ("all but one bias", "all but h_0"):
        x.requires_grad_(False)
        hx[1].requires_grad_(False)
        hx[0].requires_grad_(frozen == "all but h_0")

    def gradients(lstm):
        leaves = [t for t in (x, *lstm.parameters(), *hx) if t.requires_grad]
        output, _ = lstm(PackedSequence(x, sizes_of([4, 3, 1])), hx)
        return torch.autograd.grad(weighted(output.data), leaves)

    mine = gradients(fast)
    assert len(mine) > 0
    close(mine, gradients(plain), 1e-12)


def test_incoming_gradients_of_any_stride(unemulated):
    plain, fast = twins(4, 6)
    visits = records([4, 1, 3], 4)

    def gradients(lstm, incoming):
        output, _ = lstm(pack_sequence(visits, enforce_sorted=False))
        return torch.autograd.grad(output.data, visits, incoming(output.data))

    for incoming in (
        lambda out: torch.ones((), dtype=out.dtype).expand_as(out),
        lambda out: weighted(out).new_ones(out.shape[1], out.shape[0]).cumsum(0).t(),
        lambda out: out.new_ones(out.shape[0], 2 * out.shape[1])[:, ::2],
    ):
        close(gradients(fast, incoming), gradients(plain, incoming), 1e-12)


def test_inputs_and_weights_of_any_stride(unemulated):
    x = torch.randn(16, 8, dtype=torch.float64)[::2, ::2]
    weights = [
        [
            torch.randn(s, dtype=torch.float64).t().contiguous().t() if len(s) == 2 else None
            for s in [(20, 4), (20, 5)]
        ]
    ]
    state = torch.randn(1, 5, 3, dtype=torch.float64).transpose(1, 2)
    sizes = sizes_of([4, 3, 1])
    actual, _ = packed_lstm(PackedSequence(x, sizes), weights, (state, state))
    expected, _, _ = reference.packed_lstm_layer(x, sizes, *weights[0], None, None, *[state[0]] * 2)
    close([actual.data], [expected], 1e-12)


def test_operands_are_not_written_to(compiled):
    _, fast = twins(4, 6, 2, bidirectional=True)
    visits = records([4, 1, 3], 4)
    hx = states_for(fast, 3)
    packed = pack_sequence(visits, enforce_sorted=False)
    output, (h_n, c_n) = fast(packed, hx)
    operands = [packed.data, *fast.parameters(), *hx, output.data, h_n, c_n]
    before = [t.detach().clone() for t in operands]
    loss = weighted(output.data) + weighted(h_n) + weighted(c_n)
    first = torch.autograd.grad(loss, visits, retain_graph=True)
    second = torch.autograd.grad(loss, visits)
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(compiled, dtype):
    _, fast = twins(10, 20, bidirectional=True, dtype=dtype)
    visits = records([7, 1, 3, 3, 12, 2], 10, dtype)
    hx = states_for(fast, 6, dtype)
    first = everything(fast, visits, hx)
    for _ in range(200):
        again = everything(fast, visits, hx)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(compiled, dtype):
    (_, fast), visits = realistic(150, 40, 72, dtype)
    hx = states_for(fast, 150, dtype)
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


def test_same_bits_within_any_batch(compiled):
    """A record's outputs do not depend on the records beside it."""
    _, fast = twins(6, 18, dtype=torch.float32)
    visits = records([9, 4, 4, 1], 6, torch.float32, requires_grad=False)
    with torch.no_grad():
        together = nn.utils.rnn.unpack_sequence(fast(pack_sequence(visits))[0])
        for one, own in zip(visits, together, strict=True):
            assert torch.equal(fast(pack_sequence([one]))[0].data, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hidden", [5, 18])
def test_fresh_memory_is_written_before_it_is_read(compiled, dtype, hidden):
    _, fast = twins(6, hidden, 2, bidirectional=True, dtype=dtype)
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


def test_dropout_between_layers(unemulated):
    plain, fast = twins(4, 64, 3, dropout=0.4, dtype=torch.float32)
    packed = pack_sequence(records([6, 5, 5, 2], 4, torch.float32, requires_grad=False))
    # From one seed both draw the same masks, over the same rows.
    torch.manual_seed(11)
    mine, final = fast(packed)
    torch.manual_seed(11)
    theirs, expected = plain(packed)
    close([mine.data, *final], [theirs.data, *expected], 1e-5)
    assert not torch.equal(fast(packed)[0].data, mine.data)
    for lstm in (plain, fast):
        lstm.eval()
    close([fast(packed)[0].data], [plain(packed)[0].data], 1e-5)


def test_dropout_zeroes_its_share_and_scales_the_rest():
    seen = []
    rows = torch.ones(400, 50)
    ones = [torch.zeros(200, 50), torch.zeros(200, 50), torch.zeros(200), torch.zeros(200)]
    ones[2][50:100] = -50.0  # nothing is carried over
    ones[2][[*range(50), *range(100, 200)]] = 50.0  # and every output is tanh(1)
    second = [torch.zeros(200, 50), torch.zeros(200, 50), ones[2].clone(), torch.zeros(200)]
    second[0][100:150] = 0.01 * torch.eye(50)
    second[2][100:150] = 0.0
    output, _ = packed_lstm(
        PackedSequence(rows, torch.tensor([400])), [ones, second], dropout=0.25, training=True
    )
    # The second layer's output is tanh(tanh(0.01 * what dropout let through)).
    seen = torch.atanh(torch.atanh(output.data.double())) / 0.01
    kept = seen.abs() > 1e-3
    assert abs(kept.double().mean().item() - 0.75) < 0.01
    through = torch.tanh(torch.tensor(1.0, dtype=torch.float64)) / 0.75
    torch.testing.assert_close(seen[kept], through.expand(int(kept.sum())), rtol=1e-3, atol=0)


def test_state_dict_goes_both_ways():
    plain, fast = nn.LSTM(3, 4, 2, bidirectional=True), PackedLSTM(3, 4, 2, bidirectional=True)
    assert list(plain.state_dict()) == list(fast.state_dict())
    plain.load_state_dict(fast.state_dict())
    fast.load_state_dict(plain.state_dict())
    torch.manual_seed(3)
    first = nn.LSTM(3, 4)
    torch.manual_seed(3)
    second = PackedLSTM(3, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_what_is_not_packed_goes_to_nn_lstm(unemulated):
    plain, fast = twins(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert torch.equal(fast(x)[0], plain(x)[0])
    assert torch.equal(fast(x[0])[0], plain(x[0])[0])
    plain, fast = twins(3, 4, proj_size=2)
    packed = pack_sequence(records([3, 2], 3))
    assert torch.equal(fast(packed)[0].data, plain(packed)[0].data)


def test_batch_first_says_nothing_about_packed_input(unemulated):
    plain, fast = twins(3, 4, batch_first=True)
    packed = pack_padded_sequence(
        torch.randn(3, 5, 3, dtype=torch.float64), [2, 5, 3], batch_first=True, enforce_sorted=False
    )
    close([fast(packed)[0].data], [plain(packed)[0].data], 1e-12)


def test_result_is_packed_as_the_input_was(unemulated):
    _, fast = twins(3, 4)
    packed = pack_sequence(records([2, 5, 3], 3), enforce_sorted=False)
    output, _ = fast(packed)
    assert torch.equal(output.sorted_indices, packed.sorted_indices)
    assert torch.equal(output.unsorted_indices, packed.unsorted_indices)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)


@pytest.mark.parametrize("patients", [1, 5, 300])  # by torch.lstm_cell, and by the kernel
@pytest.mark.parametrize("layers", [1, 2])
def test_visit_by_visit_equals_the_whole(unemulated, patients, layers):
    _, fast = twins(6, 20, layers, dtype=torch.float32)
    x = torch.randn(4, patients, 6)
    with torch.no_grad():
        whole, final = fast(pack_sequence(list(x.transpose(0, 1))))
        state = None
        for t, visit in enumerate(x):
            step = PackedSequence(visit, torch.tensor([patients]))
            output, state = fast(step, state)
            now = whole.data[t * patients : (t + 1) * patients]
            torch.testing.assert_close(output.data, now, rtol=0, atol=1e-6)
    close(state, final, 1e-6)


def test_one_step_has_gradients(unemulated):
    plain, fast = twins(3, 4, 2)
    visits = records([1, 1], 3)
    hx = states_for(plain, 2)
    close(everything(fast, visits, hx), everything(plain, visits, hx), 1e-12)


def test_autocast(unemulated):
    plain, fast = twins(3, 4, 2, dtype=torch.float32)
    packed = pack_sequence(records([3, 2], 3, torch.float32, requires_grad=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for data in (packed.data, packed.data.bfloat16()):
            output, (h_n, _) = fast(packed._replace(data=data))
            expected, (h, _) = plain(packed._replace(data=data))
            assert (output.data.dtype, h_n.dtype) == (expected.data.dtype, h.dtype)
            torch.testing.assert_close(output.data, expected.data, rtol=0.05, atol=0.02)


def layer_operands(dtype=torch.float32, states=True):
    sizes = sizes_of([4, 3, 1])
    shapes = [(8, 3), (20, 3), (20, 5), (20,), (20,), (3, 5), (3, 5)]
    x, *rest = (torch.randn(s, dtype=dtype) for s in shapes)
    if not states:
        rest[4:] = [None, None]
    return [x, sizes, *rest]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_opcheck_forward(compiled, dtype, training, states):
    torch.library.opcheck(
        torch.ops.ehrseq_fast.packed_lstm_layer,
        (*layer_operands(dtype, states), False, training, 5 if training else 0),
    )


@pytest.mark.parametrize("kept", [8, 3, 0])
@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_backward(compiled, need, kept):
    operands = layer_operands()
    output, h_n, c_n, gates, cells = torch.ops.ehrseq_fast.packed_lstm_layer(
        *operands, False, True, kept
    )
    torch.library.opcheck(
        torch.ops.ehrseq_fast.packed_lstm_layer_backward,
        (output, h_n, c_n, *operands, output, gates, cells, False, *need),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given_states", [False, True])
@pytest.mark.parametrize(("inputs", "hidden"), [(3, 5), (16, 64), (7, 101)])
def test_gates_computed_again_give_the_same_bits(
    compiled, dtype, bidirectional, bias, given_states, inputs, hidden
):
    """In the backward pass of 130 patients, some of one visit and some of 90."""
    torch.manual_seed(0)
    lstm = PackedLSTM(inputs, hidden, 2, bidirectional=bidirectional, bias=bias).to(dtype)
    lengths = [1, 90, 40, 40, 2] + [1 + 7 * i % 23 for i in range(125)]
    packed = pack_sequence(
        [torch.randn(n, inputs).to(dtype) for n in lengths], enforce_sorted=False
    )
    data = packed.data.requires_grad_()
    layers = 4 if bidirectional else 2
    states = [torch.randn(layers, 130, hidden).to(dtype).requires_grad_() for _ in range(2)]
    leaves = [data, *lstm.parameters(), *(states if given_states else [])]
    results = []
    for keep_gates in (1.0, 0.4, 0.0):
        lstm.keep_gates = keep_gates
        output, (h_n, c_n) = lstm(
            PackedSequence(data, *packed[1:]), tuple(states) if given_states else None
        )
        loss = output.data.float().sin().sum() + h_n.float().sum() - c_n.float().cos().sum()
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_gates_that_are_not_kept_take_no_memory(compiled):
    lstm = PackedLSTM(32, 64)
    packed = pack_sequence([torch.randn(100, 32) for _ in range(50)])
    held = {}
    for keep_gates in (1.0, 0.4, 0.0):
        lstm.keep_gates = keep_gates
        output = lstm(packed)[0].data
        held[keep_gates] = sum(
            tensor.numel() for tensor in output.grad_fn.saved_tensors if tensor is not None
        )
    assert held[1.0] - held[0.0] == 5000 * 4 * 64
    assert held[0.4] - held[0.0] == 5000 * 25 // 64 * 4 * 64


@pytest.mark.parametrize("given_states", [False, True])
@pytest.mark.parametrize("as_module", [False, True])
def test_compiles_whole_with_dynamic_shapes(compiled, given_states, as_module):
    _, fast = twins(3, 5, 2, bidirectional=True, dtype=torch.float32)
    weights = fast.all_weights

    def step(data, sizes, hx):
        packed = PackedSequence(data, sizes)
        run = (
            fast(packed, hx) if as_module else packed_lstm(packed, weights, hx, bidirectional=True)
        )
        output, (h_n, c_n) = run
        return output.data.square().sum() + h_n.sum() + 2 * c_n.sum()

    # Dynamo leaves modules that are an nn.LSTM alone unless it is told not to.
    with torch._dynamo.config.patch(allow_rnn=as_module):
        whole = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for lengths in ([4, 3, 1], [5, 5, 2, 1]):
            data = torch.randn(sum(lengths), 3, requires_grad=True)
            hx = states_for(fast, len(lengths), torch.float32) if given_states else None
            leaves = [data, *fast.parameters(), *(hx or ())]
            expected = step(data, sizes_of(lengths), hx)
            actual = whole(data, sizes_of(lengths), hx)
            torch.testing.assert_close(actual, expected)
            close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), 1e-6)


def bad(**changed):
    x, sizes, *weights = layer_operands(torch.float32)
    state = torch.zeros(1, 3, 5)
    call = {"data": x, "sizes": sizes, "weights": [weights[:4]], "hx": (state, state)}
    return {**call, **changed}


REFUSED = {
    "data of 3 dimensions": (bad(data=torch.zeros(8, 1, 3)), ValueError, "visits, inputs"),
    "no weights": (bad(weights=[]), ValueError, "weights"),
    "one bias": (bad(weights=[bad()["weights"][0][:3]]), ValueError, "both biases"),
    "narrow weight": (bad(data=torch.zeros(8, 4)), ValueError, r"weight_ih .* \[20, 4\]"),
    "sizes rise": (bad(sizes=torch.tensor([2, 3, 3])), ValueError, "must not rise"),
    "a size of zero": (bad(sizes=torch.tensor([3, 5, 0])), ValueError, "positive"),
    "sizes miscount": (bad(sizes=torch.tensor([3, 3, 1])), ValueError, "8 in all, got 7"),
    "no sizes": (
        bad(sizes=torch.tensor([], dtype=torch.int64)),
        (ValueError, IndexError),
        "batch_sizes|index",
    ),
    "flat states": (bad(hx=(torch.zeros(3, 5),) * 2), ValueError, "h_0 must be"),
    "states of others": (bad(hx=(torch.zeros(1, 2, 5),) * 2), ValueError, "3 patients"),
    "mixed dtypes": (bad(data=torch.zeros(8, 3, dtype=torch.float64)), TypeError, "float64"),
    "dropout of 2": (bad(dropout=2.0), ValueError, "probability"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(unemulated, call, error, message):
    call = dict(call)
    data, sizes, weights, hx = (call.pop(k) for k in ("data", "sizes", "weights", "hx"))
    if len(sizes) and sizes[0] != 3:
        hx = None
    with pytest.raises(error, match=message):
        packed_lstm(PackedSequence(data, sizes), weights, hx, **call)


def test_padded_input_is_refused_by_the_function(unemulated):
    with pytest.raises(TypeError, match="PackedSequence"):
        packed_lstm(torch.zeros(2, 3, 4), [])


def test_a_backend_that_cannot_run_is_an_error(compiled):
    _, fast = twins(3, 4)
    packed = pack_sequence(records([2, 1], 3))
    with use_backend("cpu"):
        fast(packed)
        meta = PackedSequence(packed.data.to("meta"), packed.batch_sizes)
        with pytest.raises(RuntimeError, match="asked for"):
            fast(meta)


OTHER_CPUS = """
import torch
from tests.test_packed_lstm import *
import ehrseq_fast

torch.manual_seed(0)
for dtype, bound in [(torch.float64, 1e-11), (torch.float32, 1e-5)]:
    for hidden in (1, 5, 16, 37):
        plain, fast = twins(11, hidden, 2, bidirectional=True, dtype=dtype)
        visits = records([9, 4, 4, 1] + [2] * 30, 11, dtype)
        hx = states_for(plain, 34, dtype)
        close(everything(fast, visits, hx), everything(plain, visits, hx), bound)
test_16_bits_near_float32(None, torch.bfloat16, 8)
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


def test_public_names():
    assert {"PackedLSTM", "packed_lstm"} <= set(ehrseq_fast.__all__)


@pytest.mark.parametrize("path", ["fused", "packed", "padded"])
def test_a_model_takes_any_nn_lstm(unemulated, path):
    """Instead of its own, and one whose class or forward was changed is called as it stands."""
    model = DiscreteTimeSurvivalLSTM(9, 4, 6, dropout=0.0, path=path)
    codes = torch.tensor([[[1, 2], [3, 0]], [[4, 5], [0, 0]]])
    masks = codes != 0, (codes != 0).any(2)
    expected = model(codes, *masks)
    for batch_first in (True, False):
        plain = nn.LSTM(4, 6, batch_first=batch_first)
        plain.load_state_dict(model.lstm.state_dict())
        model.lstm = plain
        torch.testing.assert_close(model(codes, *masks), expected, rtol=0, atol=1e-6)

    seen = []

    class Watched(nn.LSTM):
        def forward(self, input, hx=None):
            seen.append(type(input))
            return super().forward(input, hx)

    model.lstm = Watched(4, 6, batch_first=True)
    model.lstm.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(codes, *masks), expected, rtol=0, atol=1e-6)
    assert len(seen) == 1
