"""Whole models under activation checkpointing, torch.func and forward-mode differentiation: right,
or an error that names the way that is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from ehrseq_fast import use_backend
from ehrseq_fast.models import ModelWithLoss
from ehrseq_fast.models.base import PATHS

from .checkpointed import checkpoint
from .test_packed_models import batch, build

MODELS = ["survival, two layers", "with time", "competing risks", "baseline, sum"]
MODELS += ["baseline, max", "baseline, attention", "horizons"]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def as_function(name, path="fused"):
    """The loss as a function of the parameters, those, and the gradients by backward()."""
    training = ModelWithLoss(build(name, path=path))
    parameters = {key: p.detach().clone() for key, p in training.named_parameters()}
    packed = batch(name)
    expected = gradients(training, training(packed))
    return lambda given: functional_call(training, given, (packed,)), parameters, expected


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_checkpointed(unemulated, name, path, reentrant):
    model, packed = build(name, path=path), batch(name)
    expected = gradients(model, model.loss(packed))

    def run(wanted):  # reentrant checkpoints need an input that asks for a gradient
        return model.loss(packed) * wanted

    wanted = torch.ones((), requires_grad=True)
    assert_close(gradients(model, checkpoint(run, wanted, use_reentrant=reentrant)), expected)


@pytest.mark.parametrize("place", ["lstm", "hazard_head", "embedding"])
def test_checkpointed_parts(unemulated, place):
    """A module whose forward is checkpointed is a patched module."""
    model, packed = build("survival"), batch()
    expected = gradients(model, model.loss(packed))
    module = model.get_submodule(place)
    forward = module.forward
    module.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)
    assert_close(gradients(model, model.loss(packed)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_function(unemulated, name):
    function, parameters, expected = as_function(name)
    assert_close(grad(function)(parameters), expected)
    assert_close(jacrev(function)(parameters), expected)


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode(unemulated, name):
    function, parameters, expected = as_function(name)
    torch.manual_seed(2)
    tangents = {key: torch.randn_like(p) for key, p in parameters.items()}
    wanted = sum((expected[key] * tangents[key]).sum() for key in parameters)
    value, tangent = jvp(function, (parameters,), (tangents,))
    assert_close(value, function(parameters))
    torch.testing.assert_close(tangent, wanted, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        duals = {key: forward_ad.make_dual(p, tangents[key]) for key, p in parameters.items()}
        tangent = forward_ad.unpack_dual(function(duals)).tangent
    torch.testing.assert_close(tangent, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_many_weights_at_once(unemulated, name):
    """vmap over the weights of an ensemble, and over its gradients."""
    function, parameters, _ = as_function(name)
    members = [parameters, {key: 1.2 * p for key, p in parameters.items()}]
    stacked = {key: torch.stack([member[key] for member in members]) for key in parameters}
    assert_close(vmap(function)(stacked), torch.stack([function(m) for m in members]))
    found = vmap(grad(function))(stacked)
    for i, member in enumerate(members):
        assert_close({key: g[i] for key, g in found.items()}, grad(function)(member))


@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives(unemulated, name):
    """Refused by the kernels; right on the backend that the error names, and the padded path's."""

    def penalty(path):
        model = build(name, path=path)
        parameters = list(model.parameters())
        first = torch.autograd.grad(model.loss(batch(model)), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    with use_backend("reference"):
        ours, theirs = penalty("fused"), penalty("padded")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_plain_paths_name_the_fused_one(path):
    function, parameters, expected = as_function("baseline, sum", path)
    stacked = {key: torch.stack([p, p]) for key, p in parameters.items()}
    with pytest.raises(RuntimeError, match=r'runs PyTorch\'s own recurrent layer.*path="fused" is'):
        vmap(function)(stacked)
    with pytest.raises(RuntimeError, match=r'runs PyTorch\'s own recurrent layer.*path="fused" is'):
        jvp(function, (parameters,), (parameters,))
    if path == "padded":
        assert_close(grad(function)(parameters), expected)


@pytest.mark.parametrize("path", ["fused", "packed"])
@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_layer_of_pytorch_in_the_place_of_the_models_is_named(layer, path):
    model = build("survival", path=path)
    model.lstm = layer(model.lstm.input_size, model.lstm.hidden_size, batch_first=True)
    weights = {key: p.detach() for key, p in model.named_parameters()}

    packed = batch()

    def total(weights):
        return functional_call(model, weights, (packed,)).values.sum()

    message = (
        rf'of class {layer.__name__}, on path=.{path}. runs .* cell \(cell="lstm" or cell="gru"\) '
        'on path="fused" is transformed'
    )
    with pytest.raises(RuntimeError, match=message):
        grad(total)(weights)
    with pytest.raises(RuntimeError, match=message):
        jvp(total, (weights,), (weights,))
    stacked = {key: torch.stack([p, p]) for key, p in weights.items()}
    with pytest.raises(RuntimeError, match=message):
        vmap(total)(stacked)


@pytest.mark.parametrize("path", PATHS)
def test_batches_are_not_mapped_over(path):
    model = build("survival", path=path)

    def hazards(codes, visit_mask, sequence_mask):
        return model(codes[None], visit_mask[None], sequence_mask[None])

    with pytest.raises(RuntimeError, match=r"vmap hides: pass all patients as one batch"):
        vmap(hazards)(*batch().to_padded())


def test_gradients_by_patient():
    """The way that the error names."""
    _, parameters, expected = as_function("survival, two layers")
    training = ModelWithLoss(build("survival, two layers"))
    packed = batch()
    patients = [packed[[i]] for i in range(len(packed))]
    by_patient = [
        grad(lambda given, one=one: functional_call(training, given, (one,)))(parameters)
        for one in patients
    ]
    mean = {key: sum(g[key] for g in by_patient) / len(packed) for key in parameters}
    assert_close(mean, expected)


def test_frozen_models_have_input_gradients():
    """Saliency: gradients to the embeddings of codes, through a hook that keeps them."""
    model, kept = build("survival").requires_grad_(False), []

    def keep(module, inputs, output):
        kept.append(output.requires_grad_())

    model.embedding.register_forward_hook(keep)
    packed = batch()
    model.loss(packed).backward()
    assert kept[0].grad.shape == (packed.n_codes, 6)
    assert kept[0].grad.abs().sum(1).gt(0).any()
    assert isinstance(model.embedding, nn.Embedding)
