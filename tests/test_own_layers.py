"""Visit encoders, heads and recurrent layers of one's own in the place of a model's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ehrseq_fast import PackedGRU, PackedLSTM
from ehrseq_fast.models import LSTMBaseline, VisitEncoder
from ehrseq_fast.models.base import PATHS

from .batches import from_lists
from .test_packed_models import VOCABULARY, batch, build
from .watched import BASELINES, check, scaled

# The visit encoder and the heads ---------------------------------------------------------------


class LastCode(nn.Module):
    """Written for the reference's model, whose visit encoder gets ``[N, C, E]``."""

    def forward(self, embeddings, mask=None):
        visits = torch.arange(len(embeddings), device=embeddings.device)
        last = (mask.sum(1) - 1).clamp(min=0)
        rows = embeddings[visits, last]
        return rows * (mask.sum(1, keepdim=True) > 0)


class Halved(VisitEncoder):
    def forward(self, visit_embeddings, visit_mask=None):
        return super().forward(visit_embeddings, visit_mask) / 2


def halved(old):
    new = Halved(old.embedding_dim, old.aggregation, 0.0).train(old.training)
    new.load_state_dict(old.state_dict())
    return new


@pytest.mark.parametrize("make", [lambda old: LastCode(), halved], ids=["other", "subclass"])
@pytest.mark.parametrize("name", BASELINES)
def test_visit_encoders_of_ones_own(name, make):
    def change(model):
        model.visit_encoder = make(model.visit_encoder)

    check(name, change)


def test_an_attention_that_is_more_than_a_score_per_code():
    def change(model):
        model.visit_encoder.attention = nn.Sequential(
            *model.visit_encoder.attention, nn.LayerNorm(1), nn.Linear(1, 1)
        )
        torch.manual_seed(2)
        nn.init.normal_(model.visit_encoder.attention[-1].weight)
        nn.init.normal_(model.visit_encoder.attention[3].bias)

    check("baseline, attention", change, effect=False)


HEADS = {
    "no bias": lambda head: nn.Sequential(nn.Linear(7, 7, bias=False), *head[1:]),
    "no last bias": lambda head: nn.Sequential(*head[:3], nn.Linear(7, 1, bias=False), head[4]),
    "another activation": lambda head: nn.Sequential(head[0], nn.GELU(), *head[2:]),
    "inplace": lambda head: nn.Sequential(head[0], nn.ReLU(inplace=True), *head[2:]),
    "one linear": lambda head: nn.Sequential(nn.Linear(7, 1), nn.Sigmoid()),
    "deeper": lambda head: nn.Sequential(head[0], nn.ReLU(), nn.Linear(7, 7), *head[1:]),
    "linear of a subclass": lambda head: nn.Sequential(Half(7, 7), *head[1:]),
    "not a Sequential": lambda head: Wrapped(head),  # noqa: PLW0108 (defined below)
}


class Half(nn.Linear):
    def forward(self, rows):
        return super().forward(rows) / 2


class Wrapped(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        return scaled(self.inside(*args, **kwargs))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["survival", "competing risks"])
def test_heads(name, head):
    def change(model):
        torch.manual_seed(4)
        if name == "survival":
            model.hazard_head = HEADS[head](model.hazard_head)
        else:
            model.hazard_heads[1] = HEADS[head](model.hazard_heads[1])

    check(name, change, effect=head != "inplace")


# The recurrent layer ---------------------------------------------------------------------------

LAYERS = {
    "nn.LSTM": lambda width: nn.LSTM(width, 7, batch_first=True),
    "nn.LSTM, time first": lambda width: nn.LSTM(width, 7),
    "nn.GRU": lambda width: nn.GRU(width, 7, num_layers=2),
    "nn.RNN": lambda width: nn.RNN(width, 7, batch_first=True),
    "projected": lambda width: nn.LSTM(width, 9, proj_size=7, batch_first=True),
    "wrapped": lambda width: Wrapped(nn.LSTM(width, 7, num_layers=2)),
    "wrapped GRU": lambda width: Wrapped(Wrapped(nn.GRU(width, 7))),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["survival", "with time", "competing risks", "baseline, mean"])
def test_recurrent_layers_of_ones_own(name, layer):
    def change(model):
        torch.manual_seed(4)
        model.lstm = LAYERS[layer](model.lstm.input_size)

    check(name, change)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_layers_in_both_directions(path, layer):
    def logits(path):
        torch.manual_seed(4)
        model = LSTMBaseline(VOCABULARY, 6, 7, bidirectional=True, path=path).eval()
        model.lstm = layer(6, 7, num_layers=2, bidirectional=True)
        whole = batch()[[0, 1, 2, 3]]
        return torch.cat([model(whole[[i]])["logits"] for i in range(4)])  # nothing padded

    torch.testing.assert_close(logits(path), logits("padded"))


@pytest.mark.parametrize("path", PATHS)
def test_layers_that_are_not_recurrent_are_refused(path):
    model = build("survival", path=path)
    model.lstm = nn.Linear(6, 7)
    with pytest.raises(TypeError, match=r"model.lstm: expected a recurrent layer .*got Linear"):
        model(batch(model))
    model.lstm = Wrapped(nn.ModuleList([nn.LSTM(6, 7), nn.LSTM(6, 7)]))
    with pytest.raises(TypeError, match=r"expected .* exactly one, got Wrapped, which holds 2"):
        model(batch(model))

    class OutputAlone(nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(input, hx)[0]

    model.lstm = OutputAlone(6, 7, batch_first=True)
    with pytest.raises(TypeError, match=r"must return one and its final states.*OutputAlone"):
        model(batch(model))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, PackedLSTM, PackedGRU])
def test_backward_hooks_of_the_layer_are_called_once(layer, path):
    model, calls = build("survival", path=path), []
    model.lstm = layer(model.lstm.input_size, 7, batch_first=True)
    model.lstm.register_full_backward_hook(
        lambda module, inputs, outputs: calls.append((len(inputs), len(outputs)))
    )
    model.loss(batch(model)).backward()
    assert calls == [(1, 2)]


@pytest.mark.parametrize("layer", LAYERS)
def test_records_grow_with_any_recurrent_layer(layer):
    model = build("survival")
    torch.manual_seed(4)
    model.lstm = LAYERS[layer](6)
    state = model.start()
    for visit in ([3, 5], [2], []):
        hazard, state = model.step(state, visit)
    if layer.startswith("wrapped"):
        return  # what it does to its states between steps is its own
    whole = model(from_lists([[[3, 5], [2], []]]))
    torch.testing.assert_close(hazard, whole.last(), rtol=0, atol=1e-6)
