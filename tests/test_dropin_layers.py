"""``accelerate`` on single layers, copies and wrapped models: what is kept, left and refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, weight_norm
from torch.nn.utils.rnn import pack_sequence

from ehrseq_fast import PackedGRU, PackedLSTM, accelerate, restore

from . import plain_models
from .dropin_models import Nested, PooledRecurrent, SquareRoot
from .model_cases import (
    assert_gradients_close,
    build,
    build_plain,
    for_plain,
    gradients,
    output_of,
    ragged_batch,
)


def vectors_and_mask(lengths=(4, 1, 6, 3)):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randn(*mask.shape, 6), mask


def names_of(report):
    return {entry.name: entry.after for entry in report.replaced}


def batch_for(variant, **options):
    fewest = 1 if variant in ("baseline-max", "baseline-attention") else 0
    return for_plain(variant, ragged_batch(fewest_codes=fewest, **options))


# Layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_a_model_that_packs_for_itself(kind, options):
    torch.manual_seed(0)
    model = PooledRecurrent(kind, **options)
    plain = copy.deepcopy(model)
    layer = model.rnn
    attributes = set(vars(layer))
    assert names_of(accelerate(model)) == {"rnn": f"Packed{kind.__name__}"}
    assert model.rnn is layer
    vectors, mask = vectors_and_mask()
    inputs = [vectors.clone().requires_grad_() for _ in range(2)]
    for each, given in zip((model, plain), inputs, strict=True):
        each(given, mask).square().sum().backward()
    torch.testing.assert_close(model(vectors, mask), plain(vectors, mask))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    assert restore(model) == ("rnn",)
    assert model.rnn is layer
    assert type(layer) is kind
    assert set(vars(layer)) == attributes


def test_shared_nested_and_padded_layers():
    torch.manual_seed(0)
    model = Nested()
    plain = copy.deepcopy(model)
    report = accelerate(model)
    assert names_of(report) == {
        "first, again": "PackedLSTM",
        "towers.0.gru": "PackedGRU",
        "padded": "PackedLSTM",
    }
    assert "padded ones go to PyTorch's layer" in str(report)
    vectors, mask = vectors_and_mask()
    torch.testing.assert_close(model(vectors, mask), plain(vectors, mask))
    again = accelerate(model)
    assert not again.replaced
    assert again.already == ("first, again", "towers.0.gru", "padded")
    assert len(restore(model)) == 3
    assert restore(model) == ()
    assert "nothing in it" in str(accelerate(nn.Linear(2, 2)))


class OwnLSTM(nn.LSTM):
    pass


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized():
    layer = nn.GRU(3, 4)
    parametrize.register_parametrization(layer, "weight_hh_l0", Scaled())
    return layer


def patched():
    layer = nn.LSTM(3, 4)
    layer.forward = lambda *given: given
    return layer


def compiled():
    layer = nn.LSTM(3, 4)
    layer.compile(backend="eager")
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnLSTM(3, 4), "of a subclass"),
        (lambda: nn.RNN(3, 4), "no packed kernels"),
        (lambda: nn.LSTMCell(3, 4), "nothing to pack"),
        (lambda: nn.LSTM(3, 4, proj_size=2), r"proj_size"),
        (parametrized, "parametrized"),
        (patched, "its forward was replaced"),
        (compiled, "it is compiled"),
        (lambda: torch.compile(nn.LSTM(3, 4), backend="eager"), "it is compiled"),
        (lambda: torch.jit.script(nn.LSTM(3, 4)), "it is scripted"),
        (lambda: plain_models.VisitEncoder(4, "attention"), "attention over embeddings"),
        (lambda: SquareRoot("mean"), "no masked mean, sum or maximum"),
    ],
)
def test_what_is_left_and_why(make, reason):
    layer = make()
    model = nn.ModuleDict({"layer": layer, "gru": nn.GRU(3, 4)})
    kind = type(layer)
    report = accelerate(model)
    assert names_of(report) == {"gru": "PackedGRU"}
    (left,) = report.left
    assert (left.name, left.kind) == ("layer", kind.__name__)
    assert reason in left.reason
    assert reason in str(report)
    assert type(layer) is kind


def test_a_forward_that_was_replaced_on_the_class(monkeypatch):
    forward = nn.LSTM.forward

    def watched(layer, *given):
        return forward(layer, *given)

    monkeypatch.setattr(nn.LSTM, "forward", watched)
    assert accelerate(nn.LSTM(3, 4)).left[0].reason == "nn.LSTM.forward was replaced"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_forward_that_is_replaced_on_the_class_later(kind, monkeypatch):
    forward, layer = kind.forward, kind(3, 4)
    accelerate(layer)
    records = pack_sequence([torch.randn(2, 3), torch.randn(5, 3)], enforce_sorted=False)
    before = layer(records)[0].data

    def doubled(layer, *given):
        output, final = forward(layer, *given)
        return output._replace(data=2 * output.data), final

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", doubled)
        torch.testing.assert_close(layer(records)[0].data, 2 * before)
    assert torch.equal(layer(records)[0].data, before)


def test_hooks_and_what_is_built_of_them_are_kept():
    """Among them weight normalisation of the old style, which sets the weight in a hook."""
    torch.manual_seed(0)
    packed = pack_sequence([torch.randn(n, 3) for n in (4, 2)], enforce_sorted=False)
    layer, seen = weight_norm(nn.LSTM(3, 4), "weight_hh_l0"), []
    handle = layer.register_forward_hook(lambda m, i, o: seen.append("after"))
    expected = layer(packed)[0].data
    expected.sum().backward()
    wanted = layer.weight_hh_l0_g.grad.clone()
    layer.zero_grad()
    accelerate(layer)
    layer.register_forward_pre_hook(lambda m, i: seen.append("before"))
    found = layer(packed)[0].data
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.weight_hh_l0_g.grad, wanted)
    assert seen == ["after", "before", "after"]
    handle.remove()
    restore(layer)
    layer(packed)
    assert seen[3:] == ["before"]


def test_requires_grad_and_keys_stay():
    model = PooledRecurrent(nn.LSTM)
    model.rnn.weight_hh_l0.requires_grad_(False)
    keys = list(model.state_dict())
    accelerate(model)
    vectors, mask = vectors_and_mask()
    model(vectors, mask).sum().backward()
    assert model.rnn.weight_hh_l0.grad is None
    assert model.rnn.weight_ih_l0.grad is not None
    assert list(model.state_dict()) == keys
    assert list(model.double().state_dict()) == keys
    assert model(vectors.double(), mask).dtype == torch.float64


# Copies and wrappers ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["survival", "baseline-mean"])
def test_copies_pickles_and_files_stay_accelerated(variant):
    model, batch = build_plain(variant).eval(), batch_for(variant)
    accelerate(model)
    expected, file = output_of(model, batch), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        loaded,
    ):
        assert type(other) is type(model)
        assert torch.equal(output_of(other, batch), expected)
    restored = copy.deepcopy(model)
    assert restore(restored) == ("", "lstm")
    assert type(restored) is type(build_plain(variant))
    assert type(model) is not type(restored)
    restored.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(output_of(restored, batch), expected)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    plain, batch = build_plain("survival", dropout=0.0), ragged_batch()
    model = nn.parallel.DistributedDataParallel(build_plain("survival", dropout=0.0))
    assert [entry.name for entry in accelerate(model).replaced] == ["module", "module.lstm"]
    assert_gradients_close(
        gradients(model, batch),
        {f"module.{name}": grad for name, grad in gradients(plain, batch).items()},
    )
    assert restore(model) == ("module", "module.lstm")


def test_sharded_models_are_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = fully_shard(PooledRecurrent(nn.LSTM), mesh=mesh)
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match="it is sharded: accelerate or restore it before FSDP"):
            function(model)
    assert accelerate(nn.ModuleList([model])).left[0].name == "0"
    fast = PooledRecurrent(nn.LSTM)
    accelerate(fast)
    whole = nn.ModuleList([fully_shard(fast, mesh=mesh)])
    with pytest.raises(RuntimeError, match=r"0\.rnn: expected no compiled or sharded module"):
        restore(whole)


def test_data_parallel():
    model, batch = nn.DataParallel(build_plain("survival").eval()), ragged_batch()
    assert names_of(accelerate(model)).keys() == {"module", "module.lstm"}
    torch.testing.assert_close(model(*batch), build_plain("survival").eval()(*batch))


@pytest.mark.parametrize("function", [accelerate, restore])
def test_what_is_refused(function):
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got a list"):
        function([nn.LSTM(2, 2)])
    for wrap in (lambda m: torch.compile(m, backend="eager"), torch.jit.script):
        with pytest.raises(TypeError, match=r"model: expected one that can be changed, got"):
            function(wrap(nn.LSTM(2, 2)))


def test_a_layer_that_was_parametrized_since_is_not_restored():
    model = nn.ModuleList([nn.LSTM(3, 4), nn.GRU(3, 4)])
    accelerate(model)
    parametrize.register_parametrization(model[1], "weight_hh_l0", Scaled())
    with pytest.raises(RuntimeError, match="1: expected the class that accelerate gave it"):
        restore(model)
    assert type(model[0]) is PackedLSTM
    parametrize.remove_parametrizations(model[1], "weight_hh_l0")
    assert restore(model) == ("0", "1")


def test_traced_and_compiled_models():
    batch, other = ragged_batch(), ragged_batch((2, 7, 7, 1), seed=3)
    model, plain = build_plain("survival").eval(), build_plain("survival").eval()
    accelerate(model)
    traced = torch.jit.trace(model, batch)
    compiled = torch.compile(model, backend="eager")
    for given in (batch, other):
        torch.testing.assert_close(traced(*given), plain(*given))
        torch.testing.assert_close(compiled(*given), plain(*given))


def test_this_packages_own_are_fast_already():
    report = accelerate(nn.ModuleList([build("survival"), PackedGRU(2, 2)]))
    assert not report.replaced
    assert set(report.already) == {"0", "0.lstm", "1"}
    assert restore(PackedLSTM(2, 2)) == ()
