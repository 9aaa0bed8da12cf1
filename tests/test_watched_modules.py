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
from torch.overrides import TorchFunctionMode

from ehrseq_fast.models import VisitEncoder
from ehrseq_fast.models.base import PATHS
from ehrseq_fast.models.reading import are_plain, is_plain, is_plain_embedding

from .test_packed_models import VOCABULARY, batch, build
from .watched import MODELS, WHOLE, Shifted, check, scaled

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
    fused.loss(batch(fused))
    handle.remove()
    expected = {type(module) for module in fused.modules()} - {nn.ModuleList, nn.Identity}
    assert set(seen) >= expected - {type(fused.activation)} if hasattr(fused, "activation") else 1


# Copies and functional calls ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_copies_keep_their_hooks(name):
    model = build(name)
    model.embedding.register_forward_hook(_scale)
    expected = model.loss(batch(model))
    assert not torch.allclose(expected, build(name).loss(batch(name)))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied.loss(batch(copied)), expected)


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

    out = torch.func.functional_call(model, given, (batch(model),))
    out = out["logits"] if isinstance(out, dict) else out.values
    expected = output(other, batch(other))
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.sum(), list(given.values()))
    wanted = torch.autograd.grad(expected.sum(), list(other.parameters()))
    torch.testing.assert_close(gradients, wanted)
    torch.testing.assert_close(
        output(model, batch(name)), output(build(name, path=path), batch(name))
    )


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


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", MODELS)
def test_function_modes(name):
    """The package's operations are no functions of PyTorch; their definitions consist of some."""

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
