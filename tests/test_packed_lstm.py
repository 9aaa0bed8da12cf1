"""What is of the packed LSTM alone; the rest is in test_packed_recurrent*.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ehrseq_fast
from ehrseq_fast import packed_lstm
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM
from tests.recurrent_layers import LSTM, pack_sequence, packed_rows, records

pytestmark = pytest.mark.operation("packed_lstm")


def test_dropout_zeroes_its_share_and_scales_the_rest():
    seen = []
    rows = torch.ones(400, 50)
    ones = [torch.zeros(200, 50), torch.zeros(200, 50), torch.zeros(200), torch.zeros(200)]
    ones[2][50:100] = -50.0  # nothing is carried over
    ones[2][[*range(50), *range(100, 200)]] = 50.0  # and every output is tanh(1)
    second = [torch.zeros(200, 50), torch.zeros(200, 50), ones[2].clone(), torch.zeros(200)]
    second[0][100:150] = 0.01 * torch.eye(50)
    second[2][100:150] = 0.0
    output, _ = packed_lstm(packed_rows(rows, 400), [ones, second], dropout=0.25, training=True)
    # The second layer's output is tanh(tanh(0.01 * what dropout let through)).
    seen = torch.atanh(torch.atanh(output.data.double())) / 0.01
    kept = seen.abs() > 1e-3
    assert abs(kept.double().mean().item() - 0.75) < 0.01
    through = torch.tanh(torch.tensor(1.0, dtype=torch.float64)) / 0.75
    torch.testing.assert_close(seen[kept], through.expand(int(kept.sum())), rtol=1e-3, atol=0)


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


def test_projections_go_to_nn_lstm(unemulated):
    plain, fast = LSTM.layers(3, 4, proj_size=2)
    packed = pack_sequence(records([3, 2], 3))
    assert torch.equal(fast(packed)[0].data, plain(packed)[0].data)
