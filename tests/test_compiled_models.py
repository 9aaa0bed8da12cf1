"""``torch.compile`` of models on packed batches: no graph break, and few compilations."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from ehrseq_fast import (
    PackedGRU,
    PackedLSTM,
    PackedRows,
    VisitPool,
    accelerate,
    packed_survival_nll,
    restore,
)
from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    HorizonSurvivalLSTM,
    LSTMBaseline,
)

from .batches import from_lists
from .dropin_models import Pool
from .model_cases import build_plain

VOCAB = 23
SIZE = {"embedding_dim": 6, "hidden_dim": 5, "dropout": 0.0}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("compiled")]


class Own(nn.Module):
    """A user's model of the package's parts."""

    def __init__(self, mode="mean", layer=PackedLSTM):
        super().__init__()
        self.pool = VisitPool(nn.Embedding(VOCAB, 6, padding_idx=0), mode=mode)
        self.layer = layer(6, 5, num_layers=2)
        self.head = nn.Linear(5, 1)

    def forward(self, batch):
        rows = self.layer(batch.as_packed_sequence(self.pool(batch)))[0].data
        return PackedRows(self.head(rows).squeeze(-1).sigmoid(), batch)

    def loss(self, batch):
        return packed_survival_nll(self(batch).values, batch)


MODELS = {
    "survival": lambda: DiscreteTimeSurvivalLSTM(VOCAB, **SIZE),
    "gru": lambda: DiscreteTimeSurvivalLSTM(VOCAB, **SIZE, cell="gru"),
    "bidirectional": lambda: DiscreteTimeSurvivalLSTM(
        VOCAB, **SIZE, bidirectional=True, num_layers=2
    ),
    "with time": lambda: DiscreteTimeSurvivalLSTMWithTime(VOCAB, **SIZE),
    "competing risks": lambda: CompetingRisksSurvivalLSTM(VOCAB, **SIZE, num_event_types=2),
    "horizon": lambda: HorizonSurvivalLSTM(VOCAB, **SIZE),
    "baseline, attention": lambda: LSTMBaseline(VOCAB, **SIZE, visit_aggregation="attention"),
    "own": Own,
    "own, attention": lambda: Own("attention", PackedGRU),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


def batch(patients, longest, seed=0, features=0, weighted=False):
    """Patients of 1 to ``longest`` visits, the first of them of ``longest``."""
    draw = random.Random(seed)
    lengths = [longest, *(draw.randint(1, longest) for _ in range(patients - 1))]
    records = [
        [[draw.randrange(1, VOCAB) for _ in range(draw.randint(2, 4))] for _ in range(n)]
        for n in lengths
    ]
    weights = [[[draw.uniform(0.5, 2) for _ in codes] for codes in visits] for visits in records]
    return from_lists(
        records,
        vocab_size=VOCAB,
        event_times=[n - 1 for n in lengths],
        event_indicators=[i % 2 for i in range(patients)],
        event_types=[i % 3 for i in range(patients)],
        visit_features=torch.randn(sum(lengths), features) if features else None,
        targets={"label": torch.tensor([i % 2 for i in range(patients)])},
        code_weights=weights if weighted else None,
    )


def batch_for(model, *sizes, **options):
    return batch(*sizes, features=getattr(model, "_n_visit_features", 0), **options)


def loss_of(model, visits):
    if isinstance(model, LSTMBaseline):
        return model.loss(visits, target="label")
    if isinstance(model, HorizonSurvivalLSTM):
        return model(visits).values.square().sum()
    return model.loss(visits)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    assert torch._dynamo.config.allow_rnn is False
    torch._dynamo.reset()


def both(compiled, model, visits):
    """Loss and gradients of the compiled model and of the model."""
    parameters = list(model.parameters())
    results = []
    for run in (compiled, loss_of):
        loss = run(model, visits)
        results.append((loss, torch.autograd.grad(loss, parameters, allow_unused=True)))
    return results


@pytest.mark.parametrize("name", MODELS)
def test_no_graph_break(name):
    """The backend "aot_eager" traces the backward pass too, and takes twice as long."""
    model = build(name)
    own = name.startswith("own")
    backend = "aot_eager" if name in ("gru", "own, attention") else "eager"
    with torch._dynamo.config.patch(allow_rnn=own):  # as docs/train.md says of layers of one's own
        compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
        for sizes in ((5, 6), (3, 4)):
            torch.testing.assert_close(*both(compiled, model, batch_for(model, *sizes)))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "variant", ["survival-gru", "with-time", "competing-risks", "baseline-attention"]
)
def test_accelerated_models(variant):
    """The compiled accelerated model is the accelerated model; it takes no padded tensors whole."""
    model = build_plain(variant, dropout=0.0)
    report = accelerate(model)
    assert "" in {replaced.name for replaced in report.replaced}

    def step(visits):
        out = model(visits)
        return (out["logits"] if isinstance(out, dict) else out.values).sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    parameters = list(model.parameters())
    for sizes in ((5, 6), (3, 4)):
        visits = batch(*sizes, features=3 if variant == "with-time" else 0)
        wanted, found = step(visits), compiled(visits)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters)
        )
    assert counters["stats"]["unique_graphs"] == 1
    if variant == "baseline-attention":  # what eager mode leaves to the model's own forward
        torch._dynamo.reset()  # PyTorch looks for hooks when it traces
        model.visit_encoder.dropout.register_forward_hook(lambda *_: None)
        for run in (step, torch.compile(step, backend="eager")):
            with pytest.raises(TypeError, match="a hook or an option was changed since"):
                run(batch(3, 3))
    assert "" in restore(model)
    assert type(model) is type(build_plain(variant))


@pytest.mark.parametrize("name", ["embedding", "lstm", "hazard_head"])
@pytest.mark.parametrize("is_late", [False, True])
def test_hooks_are_seen(name, is_late):
    """Those registered before the first call, and later ones where PyTorch looks for them again."""
    model, visits, seen = build("survival"), batch(3, 4), []
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not is_late):
        if is_late:
            compiled(visits)
        getattr(model, name).register_forward_hook(lambda *_: seen.append(name))
        torch.testing.assert_close(compiled(visits).values, model(visits).values)
    assert seen == [name, name]


@pytest.mark.parametrize("name", ["embedding", "hazard_head"])
def test_an_accelerated_model_with_a_late_hook_is_not_traced(name):
    model, visits = build_plain("survival"), batch(3, 4)
    accelerate(model)
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled(visits)
        getattr(model, name).register_forward_hook(lambda *_: None)
        for run in (model, compiled):  # its own forward takes no packed batch
            with pytest.raises(TypeError, match="a hook or an option was changed since"):
                run(visits)


def test_an_accelerated_pool():
    pool = Pool("mean")
    accelerate(pool)
    visits = batch(5, 6)
    compiled = torch.compile(pool, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(visits, None), pool(visits, None))


def test_fifty_batches_of_different_sizes():
    """Compilations are those of Dynamo, the first one not counted: one more where there is one
    patient alone, whose tensors have size 1, and one more where that patient has one visit."""
    model = build("survival")
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    compilations = []
    for i in range(50):
        sizes = {20: (1, 7), 30: (1, 1)}.get(i, (2 + (i + 3) % 13, 2 + (i + 5) % 7))
        visits = batch(*sizes, seed=i)
        torch.testing.assert_close(compiled(visits).values, model(visits).values)
        compilations.append(counters["stats"]["unique_graphs"])
    assert compilations[19] == 1
    assert compilations[-1] == 3


@torch.no_grad()
def test_by_inductor():
    model = build("survival")
    compiled = torch.compile(model, fullgraph=True)
    for sizes in ((5, 6), (3, 4)):
        visits = batch(*sizes)
        torch.testing.assert_close(compiled(visits).values, model(visits).values)
    assert counters["stats"]["unique_graphs"] == 1


def test_pytorch_s_own_layer_in_place_of_ours():
    plain = build("survival")
    plain.lstm = nn.LSTM(6, 5, batch_first=True)
    torch.testing.assert_close(*both(torch.compile(loss_of, backend="eager"), plain, batch(3, 4)))


def test_what_is_allowed_stays_as_it_was_where_tracing_fails():
    model = build("survival")
    model.lstm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss_of, fullgraph=True, backend="eager")(model, batch(3, 4))
    assert torch._dynamo.config.allow_rnn is False
