"""What is of the packed GRU alone; the rest is in test_packed_recurrent*.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import ehrseq_fast
from ehrseq_fast import packed_gru
from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    LSTMBaseline,
)
from ehrseq_fast.packed_gru import reference
from tests.recurrent_layers import GRU, close, pack_sequence, packed_rows, records, sizes_of

pytestmark = pytest.mark.operation("packed_gru")


def test_public_names():
    assert {"PackedGRU", "packed_gru"} <= set(ehrseq_fast.__all__)


@pytest.mark.parametrize("keep_gates", [0.0, 1.0])
def test_the_reset_gate_scales_the_product_with_the_state(unemulated, keep_gates):
    """By hand, for one unit over two visits; the bias of the product is scaled with it."""
    weight_ih = torch.tensor([[0.5], [-1.0], [0.25]], dtype=torch.float64)
    weight_hh = torch.tensor([[2.0], [0.75], [-1.5]], dtype=torch.float64)
    bias_ih = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    bias_hh = torch.tensor([-0.4, 0.6, 0.7], dtype=torch.float64, requires_grad=True)
    h = torch.tensor(0.8, dtype=torch.float64)
    expected = []
    for x in (1.5, -0.5):
        r = torch.sigmoid(0.5 * x + 0.1 + 2.0 * h + bias_hh[0])
        z = torch.sigmoid(-x - 0.2 + 0.75 * h + bias_hh[1])
        n = torch.tanh(0.25 * x + 0.3 + r * (-1.5 * h + bias_hh[2]))
        h = (1 - z) * n + z * h
        expected.append(h)
    sequence = packed_rows(torch.tensor([[1.5], [-0.5]]).double(), 1, 1)
    hx = torch.full((1, 1, 1), 0.8, dtype=torch.float64)
    weights = [[weight_ih, weight_hh, bias_ih, bias_hh]]
    output, h_n = packed_gru(sequence, weights, hx, keep_gates=keep_gates)
    close([output.data[:, 0], h_n[0, 0, 0]], [torch.stack(expected), expected[-1]], 1e-14)
    mine = torch.autograd.grad(output.data.sum(), bias_hh)
    close(mine, torch.autograd.grad(torch.stack(expected).sum(), bias_hh), 1e-14)


def test_gradients_of_the_biases_differ(unemulated):
    """Only in the candidate: the reset gate scales one of its two."""
    _, fast = GRU.layers(3, 5)
    fast(pack_sequence(records([4, 2], 3)))[0].data.sum().backward()
    of_inputs, of_hidden = fast.bias_ih_l0.grad, fast.bias_hh_l0.grad
    torch.testing.assert_close(of_inputs[:10], of_hidden[:10])
    assert (of_inputs[10:] != of_hidden[10:]).all()


@pytest.mark.parametrize("hx", [(torch.zeros(1, 3, 5),) * 2, [torch.zeros(1, 3, 5)], 0.0])
def test_states_that_are_no_tensor(unemulated, hx):
    sequence = PackedSequence(torch.randn(8, 3), sizes_of([4, 3, 1]))
    with pytest.raises(TypeError, match="packed_gru: hx: expected a tensor or None, got "):
        packed_gru(sequence, [GRU.weights(3, 5, dtype=torch.float32)], hx)


def test_16_bit_states_keep_small_changes(compiled):
    """With an update gate near 1 a visit moves the state by less than 16 bits resolve: what is
    carried must be wider than what is given out."""
    hidden, times = 16, 200
    weights = [torch.zeros(3 * hidden, 2), torch.zeros(3 * hidden, hidden)]
    biases = [torch.zeros(3 * hidden), torch.zeros(3 * hidden)]
    biases[0][hidden : 2 * hidden] = 7.0  # z = 0.9991
    biases[0][2 * hidden :] = 3.0  # n = 0.995
    for dtype in (torch.bfloat16, torch.float16):
        low = [tensor.to(dtype) for tensor in (*weights, *biases)]
        sequence = PackedSequence(torch.zeros(times, 2, dtype=dtype), sizes_of([times]))
        hx = torch.full((1, 1, hidden), 0.5, dtype=dtype)
        output, _ = packed_gru(sequence, [low], hx)
        exact, _ = reference.packed_gru_layer(
            sequence.data.double(), sequence.batch_sizes, *(x.double() for x in low), hx[0].double()
        )
        assert exact[-1, 0] > 0.55
        close([output.data.double()], [exact], 2**-8)


MODELS = {
    "survival": lambda **k: DiscreteTimeSurvivalLSTM(9, 4, 6, num_layers=2, dropout=0.0, **k),
    "with time": lambda **k: DiscreteTimeSurvivalLSTMWithTime(9, 4, 6, dropout=0.0, **k),
    "competing risks": lambda **k: CompetingRisksSurvivalLSTM(9, 2, 4, 6, dropout=0.0, **k),
    "baseline": lambda **k: LSTMBaseline(9, 4, 6, dropout=0.0, **k),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_with_a_gru(unemulated, name):
    """One state_dict, that of nn.GRU; three paths; a record that grows, without a cell state."""
    model = MODELS[name](cell="gru")
    layer = model.lstm
    plain = nn.GRU(layer.input_size, layer.hidden_size, layer.num_layers)
    plain.load_state_dict(layer.state_dict())
    codes = torch.tensor([[[1, 2], [3, 4]], [[4, 5], [0, 0]]])
    masks = codes != 0, (codes != 0).any(2)
    found = []
    for path in ("fused", "packed", "padded"):
        model.path = path
        output = model(codes, *masks)
        found.append(output["logits"] if isinstance(output, dict) else output)
        loss = found[-1].square().sum()
        grads = torch.autograd.grad(loss, list(layer.parameters()))
        found[-1] = [found[-1], *grads]
    for other in found[1:]:
        close(other, found[0], 1e-6)

    model.path = "fused"
    state = model.start()
    for visit in ([1, 2], [3, 4]):
        answer, state = model.step(state, visit)
    assert state.c is None
    last = answer["logits"] if name == "baseline" else answer
    whole = found[0][0][:1] if name == "baseline" else found[0][0][:1, -1]
    close([last], [whole.detach()], 1e-6)
