"""The packed LSTM and GRU against PyTorch's, and against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tests.recurrent_layers import (
    LENGTHS,
    close,
    every_cell,
    everything,
    flat,
    one_thread,
    pack_sequence,
    packed_rows,
    records,
    results_of,
    sizes_of,
    weighted,
)
from tests.tolerances import ROUNDOFF

pytestmark = [
    pytest.mark.operation("packed_lstm"),
    pytest.mark.operation("packed_gru"),
    every_cell,
]
_one_thread = pytest.fixture(autouse=True)(one_thread)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("given_states", [False, True])
def test_equals_pytorch(cell, unemulated, lengths, layers, bidirectional, given_states):
    for dtype, bound in [(torch.float64, 1e-12), (torch.float32, 1e-5)]:
        plain, fast = cell.layers(5, 17, layers, bidirectional=bidirectional, dtype=dtype)
        visits = records(lengths, 5, dtype)
        hx = cell.states_for(plain, len(lengths), dtype) if given_states else None
        close(everything(fast, visits, hx), everything(plain, visits, hx), bound)


@pytest.mark.parametrize("hidden", [1, 3, 5, 16, 17, 64, 101])
@pytest.mark.parametrize("inputs", [1, 3, 101])
@pytest.mark.parametrize("bias", [True, False])
def test_any_width(cell, unemulated, hidden, inputs, bias):
    plain, fast = cell.layers(inputs, hidden, bidirectional=True, bias=bias)
    visits = records(LENGTHS["any order"], inputs)
    hx = cell.states_for(plain, 6)
    close(everything(fast, visits, hx), everything(plain, visits, hx), 1e-12)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
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
def test_equals_pytorch_for_any_shape(
    cell, lengths, inputs, hidden, layers, bidirectional, bias, given_states, threads
):
    plain, fast = cell.layers(inputs, hidden, layers, bias=bias, bidirectional=bidirectional)
    visits = records(lengths, inputs)
    hx = cell.states_for(plain, len(lengths)) if given_states else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        close(everything(fast, visits, hx), everything(plain, visits, hx), 1e-11)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("given_states", [False, True])
def test_layer_equals_definition(cell, compiled, reverse, given_states):
    lengths = sorted(LENGTHS["any order"], reverse=True)
    sizes = sizes_of(lengths)
    x = torch.randn(sum(lengths), 5, dtype=torch.float64)
    weights = cell.weights(5, 7)
    states = [torch.randn(6, 7, dtype=x.dtype) if given_states else None] * cell.states
    actual = cell.forward(x, sizes, *weights, *states, reverse, False, 0)
    expected = cell.definition(x, sizes, *weights, *states, reverse)
    close(actual[: 1 + cell.states], expected, 1e-12)


def test_definition_equals_pytorch(cell):
    plain = cell.plain(3, 4, bidirectional=True).double()
    packed = pack_sequence(records([5, 3, 3, 1], 3, requires_grad=False))
    output, final = plain(packed)
    for i, reverse in enumerate([False, True]):
        out, *last = cell.definition(
            packed.data, packed.batch_sizes, *plain.all_weights[i], reverse=reverse
        )
        expected = [output.data[:, 4 * i : 4 * i + 4], *(state[i] for state in flat(final))]
        close([out, *last], expected, 1e-14)


def test_long_batches_go_through_several_chunks(cell, compiled):
    # 256 hidden units in float64: a chunk of the backward pass holds 1,024 visits.
    (plain, fast), visits = cell.realistic(300, 8, 256, torch.float64, cap=15)
    hx = cell.states_for(plain, 300)
    assert sum(map(len, visits)) > 2 * 1024
    close(everything(fast, visits, hx), everything(plain, visits, hx), 1e-11)


def test_float32_as_near_as_pytorch(cell, compiled):
    (plain, fast), visits = cell.realistic(64, 32, 64, cap=60)
    hx = cell.states_for(plain, 64, torch.float32)
    close(everything(fast, visits, hx), everything(plain, visits, hx), 1e-5)
    packed = pack_sequence([v.detach() for v in visits], enforce_sorted=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(packed)[0].data, plain(packed)[0].data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [7, 8, 134])
def test_16_bits_near_float32(cell, compiled, dtype, inputs):
    (plain, fast), visits = cell.realistic(16, inputs, 24, cap=40)
    low = cell.fast(inputs, 24).to(dtype)
    low.load_state_dict(fast.state_dict())
    # From weights and inputs that 16 bits hold exactly, only the results are rounded.
    plain.load_state_dict(low.state_dict())
    lowered = [v.detach().to(dtype).requires_grad_() for v in visits]
    raised = [v.detach().float().requires_grad_() for v in lowered]
    actual = everything(low, lowered, None)
    assert all(a.dtype == dtype for a in actual)
    expected = everything(plain, raised, None)
    close([a.float() for a in actual], expected, 2 * ROUNDOFF[dtype])


def test_saturated_gates_stay_finite(cell, compiled):
    plain, fast = cell.layers(3, 20, dtype=torch.float32)
    packed = pack_sequence([torch.tensor([[1e4, -1e4, 1e4]]).repeat(5, 1), torch.zeros(2, 3)])
    expected = plain(packed)[0].data
    torch.testing.assert_close(fast(packed)[0].data, expected, rtol=1e-6, atol=1e-6)
    spoilt = pack_sequence([torch.full((2, 3), torch.nan), torch.zeros(2, 3)])
    output = fast(spoilt)[0].data
    assert output[::2].isnan().all()
    assert output[1::2].isfinite().all()


def test_gradcheck(cell, compiled):
    sizes = sizes_of([4, 3, 1])
    for reverse in [False, True]:
        leaves = [torch.randn(8, 3, dtype=torch.float64), *cell.weights(3, 3)]
        leaves += [torch.randn(3, 3, dtype=torch.float64) for _ in range(cell.states)]
        leaves = [leaf.requires_grad_() for leaf in leaves]

        def layer(x, w_ih, w_hh, b_ih, b_hh, *states, bidirectional=reverse):
            weights = [(w_ih, w_hh, b_ih, b_hh)] * (2 if bidirectional else 1)
            hx = cell.given([state.expand(len(weights), -1, -1) for state in states])
            output, final = cell.function(
                PackedSequence(x, sizes), weights, hx, bidirectional=bidirectional
            )
            return output.data, *flat(final)

        assert torch.autograd.gradcheck(layer, leaves)


def test_double_backward_is_refused(cell, compiled):
    _, fast = cell.layers(3, 4)
    visits = records([3, 2], 3)
    loss = fast(pack_sequence(visits))[0].data.sum()
    (grad,) = torch.autograd.grad(loss, visits[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (loss + grad.square().sum()).backward()


@pytest.mark.parametrize("used", ["output", "h_n", "last state"])
def test_outputs_that_the_loss_leaves_out(cell, unemulated, used):
    plain, fast = cell.layers(4, 6, bidirectional=True)
    visits = records([4, 1, 3], 4)
    hx = cell.states_for(plain, 3)

    def gradients(layer):
        results = results_of(layer, visits, hx)
        loss = weighted(results[{"output": 0, "h_n": 1, "last state": -1}[used]])
        return torch.autograd.grad(loss, [*visits, *layer.parameters(), *flat(hx)])

    close(gradients(fast), gradients(plain), 1e-12)


@pytest.mark.parametrize("frozen", ["input", "weights", "all but one bias", "all but h_0"])
def test_gradients_of_some_only(cell, unemulated, frozen):
    plain, fast = cell.layers(4, 6, 2)
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=frozen not in ("input",))
    hx = cell.states_for(plain, 3)
    if frozen != "input":
        for layer in (plain, fast):
            layer.requires_grad_(False)
            if frozen == "all but one bias":
                layer.bias_hh_l0.requires_grad_(True)
    if frozen in ("all but one bias", "all but h_0"):
        x.requires_grad_(False)
        for at, state in enumerate(flat(hx)):
            state.requires_grad_(at == 0 and frozen == "all but h_0")

    def gradients(layer):
        leaves = [t for t in (x, *layer.parameters(), *flat(hx)) if t.requires_grad]
        output, _ = layer(PackedSequence(x, sizes_of([4, 3, 1])), hx)
        return torch.autograd.grad(weighted(output.data), leaves)

    mine = gradients(fast)
    assert len(mine) > 0
    close(mine, gradients(plain), 1e-12)


def test_incoming_gradients_of_any_stride(cell, unemulated):
    plain, fast = cell.layers(4, 6)
    visits = records([4, 1, 3], 4)

    def gradients(layer, incoming):
        output, _ = layer(pack_sequence(visits, enforce_sorted=False))
        return torch.autograd.grad(output.data, visits, incoming(output.data))

    for incoming in (
        lambda out: torch.ones((), dtype=out.dtype).expand_as(out),
        lambda out: weighted(out).new_ones(out.shape[1], out.shape[0]).cumsum(0).t(),
        lambda out: out.new_ones(out.shape[0], 2 * out.shape[1])[:, ::2],
    ):
        close(gradients(fast, incoming), gradients(plain, incoming), 1e-12)


def test_inputs_and_weights_of_any_stride(cell, unemulated):
    x = torch.randn(16, 8, dtype=torch.float64)[::2, ::2]
    weights = [
        [
            torch.randn(s, dtype=torch.float64).t().contiguous().t() if len(s) == 2 else None
            for s in [(5 * cell.gates, 4), (5 * cell.gates, 5)]
        ]
    ]
    state = torch.randn(1, 5, 3, dtype=torch.float64).transpose(1, 2)
    sizes = sizes_of([4, 3, 1])
    states = [state] * cell.states
    actual, _ = cell.function(PackedSequence(x, sizes), weights, cell.given(states))
    expected, *_ = cell.definition(x, sizes, *weights[0], None, None, *(s[0] for s in states))
    close([actual.data], [expected], 1e-12)


def test_dropout_between_layers(cell, unemulated):
    plain, fast = cell.layers(4, 64, 3, dropout=0.4, dtype=torch.float32)
    packed = pack_sequence(records([6, 5, 5, 2], 4, torch.float32, requires_grad=False))
    # From one seed both draw the same masks, over the same rows.
    torch.manual_seed(11)
    mine, final = fast(packed)
    torch.manual_seed(11)
    theirs, expected = plain(packed)
    close([mine.data, *flat(final)], [theirs.data, *flat(expected)], 1e-5)
    assert not torch.equal(fast(packed)[0].data, mine.data)
    for layer in (plain, fast):
        layer.eval()
    close([fast(packed)[0].data], [plain(packed)[0].data], 1e-5)


def test_state_dict_goes_both_ways(cell):
    plain, fast = cell.plain(3, 4, 2, bidirectional=True), cell.fast(3, 4, 2, bidirectional=True)
    assert list(plain.state_dict()) == list(fast.state_dict())
    plain.load_state_dict(fast.state_dict())
    fast.load_state_dict(plain.state_dict())
    torch.manual_seed(3)
    first = cell.plain(3, 4)
    torch.manual_seed(3)
    second = cell.fast(3, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_what_is_not_packed_goes_to_pytorch(cell, unemulated):
    plain, fast = cell.layers(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert torch.equal(fast(x)[0], plain(x)[0])
    assert torch.equal(fast(x[0])[0], plain(x[0])[0])


def test_batch_first_says_nothing_about_packed_input(cell, unemulated):
    plain, fast = cell.layers(3, 4, batch_first=True)
    packed = pack_padded_sequence(
        torch.randn(3, 5, 3, dtype=torch.float64), [2, 5, 3], batch_first=True, enforce_sorted=False
    )
    close([fast(packed)[0].data], [plain(packed)[0].data], 1e-12)


def test_result_is_packed_as_the_input_was(cell, unemulated):
    _, fast = cell.layers(3, 4)
    packed = pack_sequence(records([2, 5, 3], 3), enforce_sorted=False)
    output, _ = fast(packed)
    assert torch.equal(output.sorted_indices, packed.sorted_indices)
    assert torch.equal(output.unsorted_indices, packed.unsorted_indices)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)


@pytest.mark.parametrize("patients", [1, 5, 300])  # by PyTorch's cell, and by the kernel
@pytest.mark.parametrize("layers", [1, 2])
def test_visit_by_visit_equals_the_whole(cell, unemulated, patients, layers):
    _, fast = cell.layers(6, 20, layers, dtype=torch.float32)
    x = torch.randn(4, patients, 6)
    with torch.no_grad():
        whole, final = fast(pack_sequence(list(x.transpose(0, 1))))
        state = None
        for t, visit in enumerate(x):
            step = packed_rows(visit, patients)
            output, state = fast(step, state)
            now = whole.data[t * patients : (t + 1) * patients]
            torch.testing.assert_close(output.data, now, rtol=0, atol=1e-6)
    close(flat(state), flat(final), 1e-6)


def test_one_step_has_gradients(cell, unemulated):
    plain, fast = cell.layers(3, 4, 2)
    visits = records([1, 1], 3)
    hx = cell.states_for(plain, 2)
    close(everything(fast, visits, hx), everything(plain, visits, hx), 1e-12)


@pytest.mark.parametrize("lengths", [[3, 2], [3, 3], [1, 1], [4]])
def test_autocast(cell, unemulated, lengths):
    """Dtypes are PyTorch's, which depend on whether patients have as many visits as each other."""
    plain, fast = cell.layers(3, 4, 2, dtype=torch.float32)
    packed = pack_sequence(records(lengths, 3, torch.float32, requires_grad=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for data in (packed.data, packed.data.bfloat16()):
            output, final = fast(packed._replace(data=data))
            expected, last = plain(packed._replace(data=data))
            assert output.data.dtype == expected.data.dtype
            assert [s.dtype for s in flat(final)] == [s.dtype for s in flat(last)]
            torch.testing.assert_close(output.data, expected.data, rtol=0.05, atol=0.02)
