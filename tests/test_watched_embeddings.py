"""Embeddings that something watches or changes are called, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ehrseq_fast.models.base import PATHS

from .batches import from_lists
from .test_packed_models import VOCABULARY, batch, build
from .watched import BASELINES, MODELS, Shifted, check, scaled

# The embedding -------------------------------------------------------------------------------


class Lora(nn.Module):
    """As adapters wrap a table: frozen, with a low-rank change beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        torch.manual_seed(7)
        self.down = nn.Parameter(torch.randn(base.num_embeddings, 2))
        self.up = nn.Parameter(torch.randn(2, base.embedding_dim))

    def forward(self, codes):
        return self.base(codes) + self.down[codes] @ self.up


class Offloaded:
    """Weights on "meta" but while the module runs, as accelerate's cpu_offload keeps them."""

    def __init__(self, module):
        self.kept = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.module, self.forward, self.calls = module, module.forward, 0
        self.unload()
        module.forward = self

    def unload(self):
        for name, tensor in self.kept.items():
            setattr(self.module, name, nn.Parameter(torch.empty_like(tensor, device="meta")))

    def __call__(self, *args):
        self.calls += 1
        for name, tensor in self.kept.items():
            setattr(self.module, name, nn.Parameter(1.5 * tensor))
        try:
            return self.forward(*args)
        finally:
            self.unload()


def with_option(**options):
    def change(model):
        for name, value in options.items():
            setattr(model.embedding, name, value)

    return change


def with_module(make):
    def change(model):
        model.embedding = make(model.embedding)

    return change


def shifted(old):
    new = Shifted(old.num_embeddings, old.embedding_dim, padding_idx=old.padding_idx)
    new.load_state_dict(old.state_dict())
    return new


def patched_class(model):
    forward = nn.Embedding.forward
    nn.Embedding.forward = lambda self, codes: 2 * forward(self, codes)

    def undo():
        nn.Embedding.forward = forward

    return undo


def tied(model):
    """One parameter under two names: the table is projected on by a hook as well."""
    model.decoder = nn.Linear(model.embedding.embedding_dim, VOCABULARY, bias=False)
    model.decoder.weight = model.embedding.weight
    with torch.no_grad():
        model.decoder.weight.mul_(2)


def frozen(model):
    model.embedding.weight.requires_grad_(False)


class Subclassed(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is not torch.nn.functional.embedding:
            return out
        return 2 * out.as_subclass(torch.Tensor)


def subclassed(model):
    weight = model.embedding.weight.detach().as_subclass(Subclassed)
    model.embedding.weight = nn.Parameter(weight)


EMBEDDINGS = {
    "max_norm": with_option(max_norm=0.5),
    "scale_grad_by_freq": with_option(scale_grad_by_freq=True),
    "subclass": with_module(shifted),
    "low-rank adapter": with_module(Lora),
    "patched class": patched_class,
    "frozen": frozen,
    "tied": tied,
    "tensor subclass": subclassed,
    "wrapped": with_module(lambda old: nn.Sequential(old, nn.Tanh())),
    "of another size": with_module(lambda old: nn.Embedding(VOCABULARY + 5, old.embedding_dim)),
}


@pytest.mark.parametrize("change", EMBEDDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_embeddings(name, change):
    def seeded(model):
        torch.manual_seed(5)
        return EMBEDDINGS[change](model)

    check(name, seeded)


@pytest.mark.parametrize("name", MODELS)
def test_max_norm_writes_the_rows_in_use(name):
    tables = {}
    for path in PATHS:
        model = build(name, path=path)
        model.embedding.max_norm = 0.5
        before = model.embedding.weight.detach().clone()
        model.loss(batch(model))
        tables[path] = model.embedding.weight.detach()
        assert (tables[path].norm(dim=1) < 0.51)[batch().index_codes.long()].all()
        assert not torch.equal(tables[path], before)
    torch.testing.assert_close(tables["fused"], tables["packed"])
    torch.testing.assert_close(tables["fused"], tables["padded"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_offloaded_layers(name, path):
    """Every leaf of the model, with weights that exist only while it runs."""
    model, expected = build(name, path=path), build(name, path=path)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(1.5)
    offloaded = [
        Offloaded(module)
        for module in model.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    torch.testing.assert_close(model.loss(batch(model)), expected.loss(batch(expected)))
    assert all(leaf.calls for leaf in offloaded)
    state = model.start(2)
    features = torch.ones(2, 3) if model._n_visit_features else None
    ours, _ = model.step(state, [[1], [2]], features)
    theirs, _ = expected.step(expected.start(2), [[1], [2]], features)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("aggregation", ["mean", "sum", "max", "attention"])
@pytest.mark.parametrize("place", ["embedding", "visit_encoder"])
def test_weighted_codes_of_watched_modules(unemulated, aggregation, place):
    """A fractional mask takes its own way, and never a padded code to the embedding."""
    codes, visit_mask, sequence_mask = batch().to_padded()
    weights = visit_mask * (0.25 + torch.rand(visit_mask.shape))
    codes = codes.masked_fill(~visit_mask, 10**6)
    seen, outputs = [], []

    def changes(path, output):
        seen.append(path)
        return scaled(output)

    for path in ("fused", "padded"):
        model = build(f"baseline, {aggregation}", path=path)
        module = model.get_submodule(place)
        module.register_forward_hook(lambda m, i, output, path=path: changes(path, output))
        given = codes if path == "fused" else codes.masked_fill(~visit_mask, 0)
        outputs.append(model(given, weights, sequence_mask)["logits"])
    assert seen == ["fused", "padded"]
    torch.testing.assert_close(*outputs)


def test_a_watched_embedding_is_given_real_codes_alone():
    for name in MODELS:
        model, seen = build(name), []
        model.embedding.register_forward_pre_hook(lambda m, inputs, seen=seen: seen.extend(inputs))
        model.loss(batch(model))
        assert [codes.shape for codes in seen] == [(batch().n_codes,)]


@pytest.mark.parametrize("name", MODELS)
def test_records_without_codes(unemulated, name):
    empty = from_lists(
        [[[], []], [[]]],
        visit_features=torch.ones(3, 3) if name == "with time" else None,
        **{"event_times": [1, 0], "event_indicators": [1, 0], "event_types": [1, 0]},
        targets={"labels": torch.ones(2)},
    )
    model, expected = build(name), build(name).loss(empty)
    model.embedding.register_forward_hook(lambda module, inputs, output: None)
    torch.testing.assert_close(model.loss(empty), expected)
    if name in BASELINES:
        model.visit_encoder.register_forward_hook(lambda module, inputs, output: None)
        torch.testing.assert_close(model.loss(empty), expected)


@pytest.mark.parametrize("path", PATHS)
def test_codes_outside_a_called_embedding(unemulated, path):
    model = build("survival", path=path)
    model.embedding.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(IndexError, match=r"Found 2 codes .*: expected 0 <= code < 13"):
        model(from_lists([[[1, 13], [14]]]))

    def folds(module, inputs):
        return (inputs[0] % VOCABULARY,)

    model.embedding.register_forward_pre_hook(folds)  # the embedding says what it takes
    torch.testing.assert_close(
        model(from_lists([[[1, 13], [14]]])).values, model(from_lists([[[1, 0], [1]]])).values
    )
    answer, _ = model.step(model.start(), [14])
    torch.testing.assert_close(answer, model.step(model.start(), [1])[0])
