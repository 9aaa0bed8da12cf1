"""Modules that something watches or changes are called, on every path, and so agree on all three.

Each change is made to the same model three times, once per path; losses, gradients and one step
must agree, and must not be those of the model as it was built.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from ehrseq_fast.models import LSTMBaseline, VisitEncoder
from ehrseq_fast.models.base import PATHS
from ehrseq_fast.models.reading import are_plain, is_plain, is_plain_embedding

from .batches import from_lists
from .test_packed_models import VOCABULARY, batch, build

BASELINES = [f"baseline, {aggregation}" for aggregation in ("mean", "max", "attention")]
MODELS = ["survival", "with time", "competing risks", *BASELINES]
WHOLE = ["survival", "with time", "competing risks", "baseline, attention"]  # every kind of module


def scaled(output):
    if isinstance(output, PackedSequence):
        return output._replace(data=1.5 * output.data)
    if isinstance(output, tuple):
        return tuple(scaled(part) for part in output)
    return 1.5 * output


def results(model, **options):
    """Loss, gradients by name (dense), and what the model says after one step."""
    model.zero_grad(set_to_none=True)
    loss = model.loss(batch(), **options)
    loss.backward()
    gradients = {
        name: None if p.grad is None else p.grad.to_dense() for name, p in model.named_parameters()
    }
    state = model.start(2)
    features = torch.ones(2, 3) if model._n_visit_features else None
    answer, state = model.step(state, [[1, 2, 2], [3]], features)
    answer = answer["logits"] if isinstance(answer, dict) else answer
    return loss.detach(), gradients, answer, state.h


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6, equal_nan=True)


def differs(ours, theirs):
    try:
        assert_same(ours[:2], theirs[:2])
    except AssertionError:
        return True
    return ours[1].keys() != theirs[1].keys()


def check(name, change, *, called=None, effect=True):
    """``change(model)`` on all paths; ``called`` is a list that grows where something is called."""
    before, found = results(build(name)), {}
    for path in PATHS:
        model = build(name, path=path)
        seen = len(called) if called is not None else 0
        with contextlib.ExitStack() as stack:
            undo = change(model)
            if callable(undo):
                stack.callback(undo)
            found[path] = results(model)
        assert called is None or len(called) > seen, f"nothing was called on path {path}"
        assert not effect or differs(found[path], before), f"no effect on path {path}"
    assert_same(found["fused"], found["padded"])
    assert_same(found["packed"], found["padded"])


# Every submodule of every model --------------------------------------------------------------


def submodules(kinds=object):
    for name in WHOLE:
        for path, module in build(name).named_modules():
            # the loss takes the logits, before the activation
            skipped = isinstance(module, nn.ModuleList) or path in ("", "activation")
            one_of_many = path.startswith(("hazard_heads.0", "hazard_heads.2"))
            if isinstance(module, kinds) and not skipped and not one_of_many:
                yield pytest.param(name, path, id=f"{name}-{path}")


@pytest.mark.parametrize(("name", "place"), list(submodules()))
def test_forward_hooks(name, place):
    """One that changes the output, and one that changes the input."""
    seen = []

    def changes_output(module, inputs, output):
        seen.append(place)
        return scaled(output)

    def changes_input(module, inputs):
        seen.append(place)
        if inputs[0].__class__ is torch.Tensor and not inputs[0].is_floating_point():
            return ((inputs[0] + 1) % VOCABULARY, *inputs[1:])
        return (scaled(inputs[0]), *inputs[1:])

    def output_hook(model):
        model.get_submodule(place).register_forward_hook(changes_output)

    def input_hook(model):
        model.get_submodule(place).register_forward_pre_hook(changes_input)

    check(name, output_hook, called=seen)
    check(name, input_hook, called=seen)


@pytest.mark.parametrize(("name", "place"), list(submodules()))
def test_patched_forwards(name, place):
    seen = []

    def patch(model):
        module = model.get_submodule(place)
        forward = module.forward

        @functools.wraps(forward)
        def patched(*args, **kwargs):
            seen.append(place)
            return scaled(forward(*args, **kwargs))

        module.forward = patched

    check(name, patch, called=seen)


@pytest.mark.parametrize(
    ("name", "place"),
    list(submodules((nn.Linear, nn.ReLU, nn.Embedding, nn.Sequential, nn.LSTM, VisitEncoder))),
)
def test_backward_hooks(name, place):
    seen = []

    def after(module, grad_inputs, grad_outputs):
        seen.append(place)
        return tuple(
            2 * grad if grad is not None and grad.is_floating_point() else grad
            for grad in grad_inputs
        )

    def before(module, grad_outputs):
        seen.append(place)
        return tuple(None if grad is None else 2 * grad for grad in grad_outputs)

    # there is nothing to change where the input, codes or time features, has no gradient
    has_input_gradient = place not in ("embedding", "time_encoder", "time_encoder.0")
    check(
        name,
        lambda model: model.get_submodule(place).register_full_backward_hook(after) and None,
        called=seen,
        effect=has_input_gradient,
    )
    check(
        name,
        lambda model: model.get_submodule(place).register_full_backward_pre_hook(before) and None,
        called=seen,
    )


def weighted(name):
    for place, module in build(name).named_modules():
        for weight in [
            key for key, _ in module.named_parameters(recurse=False) if "bias" not in key
        ]:
            yield place, weight


def parametrizable():
    for name in WHOLE:
        for place, weight in weighted(name):
            if not place.startswith(("hazard_heads.0", "hazard_heads.2")):
                yield pytest.param(name, place, weight, id=f"{name}-{place}.{weight}")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(("name", "place", "weight"), list(parametrizable()))
def test_parametrizations_pruning_and_weight_norm(name, place, weight):
    def parametrized(model):
        parametrize.register_parametrization(model.get_submodule(place), weight, Doubled())

    def normed(model):
        parametrizations.weight_norm(model.get_submodule(place), weight)
        with torch.no_grad():
            model.get_submodule(place).parametrizations[weight].original0.mul_(1.5)

    def normed_by_a_hook(model):
        module = nn.utils.weight_norm(model.get_submodule(place), weight)
        with torch.no_grad():
            getattr(module, f"{weight}_g").mul_(1.5)

    def pruned(model):
        torch.manual_seed(0)
        prune.random_unstructured(model.get_submodule(place), weight, 0.5)

    check(name, parametrized)
    check(name, normed)
    with pytest.warns(FutureWarning):
        check(name, normed_by_a_hook)
    check(name, pruned)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_all_modules(name):
    seen = []

    def hook(module, inputs, output):
        seen.append(type(module))
        return scaled(output) if isinstance(module, (nn.Embedding, nn.Linear)) else None

    def change(model):
        return every_module.register_module_forward_hook(hook).remove

    check(name, change, called=seen)
    fused = build(name)
    handle = every_module.register_module_forward_hook(hook)
    seen.clear()
    fused.loss(batch())
    handle.remove()
    expected = {type(module) for module in fused.modules()} - {nn.ModuleList, nn.Identity}
    assert set(seen) >= expected - {type(fused.activation)} if hasattr(fused, "activation") else 1


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


class Shifted(nn.Embedding):
    def forward(self, codes):
        return super().forward(codes) + 1


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
        model.loss(batch())
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
    torch.testing.assert_close(model.loss(batch()), expected.loss(batch()))
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
        model.loss(batch())
        assert [codes.shape for codes in seen] == [(batch().n_codes,)]


@pytest.mark.parametrize("name", MODELS)
def test_records_without_codes(unemulated, name):
    empty = from_lists(
        [[[], []], [[]]],
        visit_features=torch.ones(3, 3),
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
    with pytest.raises(TypeError, match=r"model.lstm: must be a recurrent layer .*got Linear"):
        model(batch())
    model.lstm = Wrapped(nn.ModuleList([nn.LSTM(6, 7), nn.LSTM(6, 7)]))
    with pytest.raises(TypeError, match=r"must .* hold exactly one, got Wrapped, which holds 2"):
        model(batch())

    class OutputAlone(nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(input, hx)[0]

    model.lstm = OutputAlone(6, 7, batch_first=True)
    with pytest.raises(TypeError, match=r"must return one and its final states.*OutputAlone"):
        model(batch())


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


# Copies and functional calls ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_copies_keep_their_hooks(name):
    model = build(name)
    model.embedding.register_forward_hook(_scale)
    expected = model.loss(batch())
    assert not torch.allclose(expected, build(name).loss(batch()))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied.loss(batch()), expected)


def _scale(module, inputs, output):
    return 3 * output


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_functional_calls(name, path):
    """Other weights for one call: gradients go to them, and the model keeps its own."""
    model, other = build(name, path=path), build(name, path=path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    given = {key: p.detach().clone().requires_grad_() for key, p in other.named_parameters()}

    def output(model, *args):
        out = model(*args)
        return out["logits"] if isinstance(out, dict) else out.values

    out = torch.func.functional_call(model, given, (batch(),))
    out = out["logits"] if isinstance(out, dict) else out.values
    expected = output(other, batch())
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.sum(), list(given.values()))
    wanted = torch.autograd.grad(expected.sum(), list(other.parameters()))
    torch.testing.assert_close(gradients, wanted)
    torch.testing.assert_close(output(model, batch()), output(build(name, path=path), batch()))


def calls_scaled(owner, attribute):
    """Replace what leads from a call to ``forward``; linear layers' and tables' outputs change."""

    def change(model):
        of = owner if owner is not None else model.embedding
        own, before = attribute in vars(of), getattr(of, attribute)

        def called(*args, **kwargs):
            output = before(*args, **kwargs)
            module = args[0] if owner is not None else of
            return scaled(output) if isinstance(module, (nn.Linear, nn.Embedding)) else output

        setattr(of, attribute, called)
        return lambda: setattr(of, attribute, before) if own else delattr(of, attribute)

    return change


WAYS_TO_CALL = {
    "nn.Module.__call__": (nn.Module, "__call__"),
    "nn.Linear.__call__": (nn.Linear, "__call__"),
    "nn.Embedding.__call__": (nn.Embedding, "__call__"),
    "nn.Module._call_impl": (nn.Module, "_call_impl"),
    "nn.Linear._call_impl": (nn.Linear, "_call_impl"),
    "embedding._call_impl": (None, "_call_impl"),
}


@pytest.mark.parametrize("way", WAYS_TO_CALL)
@pytest.mark.parametrize("name", MODELS)
def test_replaced_calls(name, way):
    check(name, calls_scaled(*WAYS_TO_CALL[way]))
    assert is_plain(nn.Linear(1, 1), nn.Linear)


class Scales(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        return 1.5 * output if func in (F.linear, F.embedding) else output


@pytest.mark.parametrize("name", MODELS)
def test_function_modes(name):
    def change(model):
        stack = contextlib.ExitStack()
        stack.enter_context(Scales())
        return stack.close

    check(name, change)
    with torch.device("cpu"):  # a mode as well, and one that changes nothing that is computed
        assert is_plain(nn.Linear(1, 1), nn.Linear)


def test_what_is_plain():
    table = nn.Embedding(3, 2)
    assert is_plain_embedding(table)
    assert not is_plain_embedding(nn.Embedding(3, 2, max_norm=1.0))
    assert not is_plain_embedding(nn.Embedding(3, 2, scale_grad_by_freq=True))
    assert not is_plain_embedding(Shifted(3, 2))
    assert not is_plain_embedding(nn.Linear(3, 2))
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert are_plain(layers, (nn.Linear, nn.ReLU))
    assert not are_plain(layers, (nn.Linear,))
    assert not are_plain(list(layers), (nn.Linear, nn.ReLU))
    layers[0].compile(backend="eager")
    assert not is_plain(layers[0], nn.Linear)
    handle = table.register_forward_hook(_scale)
    assert not is_plain_embedding(table)
    handle.remove()
    assert is_plain_embedding(table)
