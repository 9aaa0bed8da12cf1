"""Every derivative of the packed LSTM and GRU is right or refused; no two results share memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence

from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
from tests.checkpointed import checkpoint
from tests.recurrent_layers import CELLS, close, every_cell, flat, packed_rows, sizes_of

pytestmark = [pytest.mark.operation("packed_lstm"), pytest.mark.operation("packed_gru")]

LENGTHS = [4, 3, 1]


@pytest.fixture(params=CELLS.values(), ids=CELLS)
def layer(request):
    """One layer as a function of all its operands, by the package and by the definition."""
    cell = request.param
    operands = [torch.randn(8, 3, dtype=torch.float64), *cell.weights(3, 5)]
    operands += [torch.randn(1, 3, 5, dtype=torch.float64) for _ in range(cell.states)]
    sizes = sizes_of(LENGTHS)

    def ours(x, w_ih, w_hh, b_ih, b_hh, *states):
        output, final = cell.function(
            PackedSequence(x, sizes), [(w_ih, w_hh, b_ih, b_hh)], cell.given(states)
        )
        return output.data, *(state[0] for state in flat(final))

    def definition(x, w_ih, w_hh, b_ih, b_hh, *states):
        return cell.definition(x, sizes, w_ih, w_hh, b_ih, b_hh, *(s[0] for s in states))

    return ours, definition, operands


def test_forward_mode(unemulated, layer):
    ours, definition, operands = layer
    for which, operand in enumerate(operands):
        tangents = [torch.zeros_like(x) for x in operands]
        tangents[which] = torch.randn_like(operand)
        expected = jvp(definition, tuple(operands), tuple(tangents))
        actual = jvp(ours, tuple(operands), tuple(tangents))
        assert any(tangent.abs().max() > 1e-3 for tangent in actual[1])
        close([*actual[0], *actual[1]], [*expected[0], *expected[1]], 1e-12)

        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(operands, tangents, strict=True)]
            outputs = [forward_ad.unpack_dual(output).tangent for output in ours(*duals)]
        close(outputs, expected[1], 1e-12)


@pytest.mark.parametrize("transform", [jacfwd, jacrev])
def test_jacobians(unemulated, layer, transform):
    ours, definition, operands = layer
    for which in (0, 2, 5):
        expected = transform(definition, argnums=which)(*operands)
        close(transform(ours, argnums=which)(*operands), expected, 1e-12)


def test_second_derivatives_by_transforms(unemulated, layer):
    ours, definition, operands = layer

    def loss(run):
        return lambda bias: sum(out.sin().sum() for out in run(*operands[:3], bias, *operands[4:]))

    expected = hessian(loss(definition))(operands[3])
    assert expected.abs().max() > 1e-2
    close([hessian(loss(ours))(operands[3])], [expected], 1e-12)


@every_cell
def test_gradients_per_sample(cell, unemulated):
    plain, fast = cell.layers(3, 4, 2, bidirectional=True)
    data = torch.randn(5, 8, 3, dtype=torch.float64)

    def loss(lstm):
        def of(parameters, rows):
            packed = PackedSequence(rows, sizes_of(LENGTHS))
            output, final = functional_call(lstm, parameters, (packed,))
            return output.data.square().sum() + sum(state.sum() for state in flat(final))

        return of

    parameters = {name: tensor.detach() for name, tensor in fast.named_parameters()}
    actual = vmap(grad(loss(fast)), (None, 0))(parameters, data)
    for i, rows in enumerate(data):
        parameters = {name: p.detach().requires_grad_() for name, p in plain.named_parameters()}
        expected = torch.autograd.grad(loss(plain)(parameters, rows), list(parameters.values()))
        close([gradient[i] for gradient in actual.values()], expected, 1e-12)


@every_cell
def test_many_gradients_at_once(cell, unemulated):
    """``is_grads_batched`` runs the backward pass under vmap."""
    plain, fast = cell.layers(3, 4)
    data = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(6, 8, 4, dtype=torch.float64)

    def gradients(lstm):
        output = lstm(PackedSequence(data, sizes_of(LENGTHS)))[0].data
        leaves = [data, *lstm.parameters()]
        return torch.autograd.grad(output, leaves, incoming, is_grads_batched=True)

    close(gradients(fast), gradients(plain), 1e-12)


@every_cell
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(cell, unemulated, use_reentrant):
    _, fast = cell.layers(3, 4, 2)
    data = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)

    def run(rows):
        return fast(PackedSequence(rows, sizes_of(LENGTHS)))[0].data

    def gradients(output):
        return torch.autograd.grad(output.square().sum(), [data, *fast.parameters()])

    if use_reentrant:  # which serves .backward() alone
        checkpoint(run, data, use_reentrant=True).square().sum().backward()
        actual = [data.grad, *(p.grad for p in fast.parameters())]
    else:
        actual = gradients(checkpoint(run, data, use_reentrant=False))
    assert all(map(torch.equal, actual, gradients(run(data))))


@every_cell
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("patients", [3, 1])
def test_no_two_results_share_memory(cell, unemulated, layers, bidirectional, patients):
    _, fast = cell.layers(3, 4, layers, bidirectional=bidirectional, dtype=torch.float32)
    lengths = LENGTHS[:patients]
    data = torch.randn(sum(lengths), 3, requires_grad=True)
    hx = cell.states_for(fast, patients, torch.float32)
    for times in (lengths, [1] * patients):
        rows = data[: sum(times)]
        output, final = fast(PackedSequence(rows, sizes_of(times)), hx)
        leaves = [data, *fast.parameters(), *flat(hx)]
        outputs = [output.data, *flat(final)]
        results = [result.detach() for result in outputs]
        results += torch.autograd.grad(sum(result.sum() for result in outputs), leaves)
        places = [tensor.untyped_storage().data_ptr() for tensor in [*results, *leaves]]
        assert len(set(places)) == len(places)


@every_cell
def test_bias_gradients_are_two(cell, unemulated):
    fast = cell.fast(3, 4)
    data = torch.randn(8, 3)
    seen = fast.bias_hh_l0.register_hook(lambda gradient: gradient.zero_())
    fast(PackedSequence(data, sizes_of(LENGTHS)))[0].data.sum().backward()
    seen.remove()
    assert fast.bias_hh_l0.grad.abs().max() == 0
    assert fast.bias_ih_l0.grad.abs().max() > 0
    output = fast(PackedSequence(data, sizes_of(LENGTHS)))[0].data.sum()
    biases = torch.autograd.grad(output, [fast.bias_ih_l0, fast.bias_hh_l0])
    before = biases[0].clone()
    torch._foreach_mul_(biases, 2.0)
    assert torch.equal(biases[0], 2 * before)


@every_cell
def test_parametrizations_are_honoured(cell, unemulated):
    plain, fast = cell.layers(3, 4, dtype=torch.float32)
    for lstm in (plain, fast):
        nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
    packed = PackedSequence(torch.randn(8, 3), sizes_of(LENGTHS))
    torch.testing.assert_close(fast(packed)[0].data, plain(packed)[0].data, rtol=0, atol=1e-6)


def test_the_first_states_of_a_model_are_two():
    state = DiscreteTimeSurvivalLSTM(5, 3, 4).start(2)
    state.h.fill_(1.0)
    assert (state.c == 0).all()


@every_cell
def test_autocast_is_the_same_for_a_few_patients_and_for_many(cell):
    lstm = cell.fast(64, 128)
    visits, state = torch.randn(5, 64), [torch.randn(1, 5, 128) for _ in range(cell.states)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        five = lstm(packed_rows(visits, 5), cell.given(state))[0].data
        few = cell.given([part[:, :4].contiguous() for part in state])
        four = lstm(packed_rows(visits[:4], 4), few)[0].data
    torch.testing.assert_close(four, five[:4], rtol=1e-5, atol=1e-6)
