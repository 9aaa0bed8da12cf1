"""Models under PyTorch's own switches: inference mode, default device and dtype, export, and
training after each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehrseq_fast import PackedVisits
from ehrseq_fast.backend import why_not_loaded
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM, LSTMBaseline
from ehrseq_fast.models.base import PATHS

from .test_packed_models import batch, build

MODELS = ["survival", "with time", "competing risks", "baseline, max", "baseline, attention"]
MODELS += ["horizons"]


def everything(model, packed, train=True):
    """Every public way through a model, on a batch and on padded tensors; the loss."""
    codes, visit_mask, sequence_mask = packed.to_padded()
    loss = model.loss(packed)
    if train:
        loss.backward()
    model(codes, visit_mask, sequence_mask)
    model(codes)
    model(codes, 0.5 * visit_mask, sequence_mask)
    if hasattr(model, "predict_survival"):
        model.predict_survival(packed)
        model.predict_survival(codes, visit_mask, sequence_mask)
    if hasattr(model, "predict_risk"):
        model.predict_risk(packed)
        model.predict_risk(codes, visit_mask, sequence_mask)
    if hasattr(model, "predict"):
        model.predict(packed)
        model(packed, return_hidden=True)
    features = torch.ones(2, 3, device="cpu") if model._n_visit_features else None
    _, state = model.step(model.start(2), [[1], [2, 3]], features)
    model.step(state, [[], [2]], features)
    model.train()
    model(packed)
    model.eval()
    return loss.detach()


def watched(model):
    def watch(module, inputs, output):
        return None

    model.embedding.register_forward_hook(watch)
    if hasattr(model, "visit_encoder"):
        model.visit_encoder.register_forward_hook(watch)
    return model


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_inference_leaves_nothing_behind_that_cannot_be_trained_on(name, path):
    model, packed = build(name, path=path), batch(name)
    expected = build(name, path=path).loss(packed)
    with torch.inference_mode():
        everything(model, packed, train=False)
        built_inside, state = batch(name), model.start(2)
    for given in (packed, built_inside):
        model.zero_grad()
        loss = model.loss(given)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        everything(model, given)
    features = torch.ones(2, 3) if model._n_visit_features else None
    model.step(state, [[1], [2]], features)


@pytest.mark.parametrize("keep_gates", [1.0, 0.3])
@pytest.mark.parametrize("name", [*MODELS, "survival, GRU"])
def test_biases_may_change_before_the_backward_pass(name, keep_gates):
    """As those of PyTorch's layers, and the weight of a layer whose input has no gradient."""
    model, packed = build(name), batch(name)
    model.lstm.keep_gates = keep_gates
    loss = model.loss(packed)
    names, weights = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss, weights, retain_graph=True)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "bias" in key or key == "time_encoder.0.weight":
                weight.add_(1)
    actual = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(map(torch.equal, actual, expected))
    if why_not_loaded("cpu") is not None:
        return  # PyTorch's own layers, which can be differentiated again
    biases = [weight for key, weight in zip(names, weights, strict=True) if "bias" in key]
    once = torch.autograd.grad(loss, biases, create_graph=True)
    for gradient, bias in zip(once, biases, strict=True):
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(gradient.sum(), bias, retain_graph=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_model_built_without_memory_is_what_it_is_loaded_with(name, assign):
    """What no ``state_dict`` has is there as well."""
    expected, packed = build(name), batch(name)
    with torch.device("meta"):
        model = build(name)
    if not assign:
        model = model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict(), assign=assign)
    assert torch.equal(model.loss(packed), expected.loss(packed))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_a_default_device_is_not_where_the_batch_lies(name, path):
    """Whatever is made without a device would be on "meta", and meet tensors on the host."""
    packed = batch(name)
    for change in (lambda model: model, watched):
        model = change(build(name, path=path))
        expected = everything(model, packed)
        with torch.device("meta"):
            found = everything(model, packed)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_default_dtype_changes_no_bit(name, dtype):
    packed = batch(name)
    for path in PATHS:
        model = build(name, path=path)
        expected = everything(model, packed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            found = everything(model, packed)
            built = build(name, path=path)
            everything(built, packed)
        finally:
            torch.set_default_dtype(before)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert {parameter.dtype for parameter in built.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["survival", "baseline, max"])
def test_the_padded_path_is_exported_and_the_fused_says_why_not(name):
    model = build(name, path="padded")
    triple = batch().to_padded()
    exported = torch.export.export(model, triple).module()
    torch.testing.assert_close(exported(*triple), model(*triple))
    model.path = "fused"
    with pytest.raises(RuntimeError, match=r'cannot be exported: set model.path = "padded"'):
        torch.export.export(model, triple)


def test_no_visit_at_all_under_a_default_device():
    model, none = build("survival"), torch.zeros(2, 0, 3, dtype=torch.long)
    with torch.device("meta"), pytest.raises(ValueError, match="Found 2 sequences with zero"):
        model(none)


@pytest.mark.parametrize("name", MODELS)
def test_anomaly_mode_and_deterministic_algorithms(name):
    model, packed = build(name), batch(name)
    expected = model.loss(packed)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            everything(model, packed)
        torch.testing.assert_close(model.loss(packed), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_batch_of_one_patient_without_codes():
    for name in MODELS:
        model = build(name)
        packed = PackedVisits.from_lists(
            [[[]]],
            visit_features=torch.ones(1, 3) if name == "with time" else None,
            event_times=[0],
            event_indicators=[1],
            event_types=[1],
            targets={"labels": torch.ones(1)},
            visit_targets={"days_to_end": torch.ones(1)},
        )
        everything(model, packed)
        everything(watched(model), packed)


class NormalizedOutputs(torch.nn.Module):
    """A layer whose outputs are not its final states."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.norm = torch.nn.LayerNorm(10)

    def forward(self, given, state=None):
        outputs, final = self.layer(given, *(() if state is None else (state,)))
        if isinstance(outputs, torch.nn.utils.rnn.PackedSequence):
            return outputs._replace(data=self.norm(outputs.data)), final
        return self.norm(outputs), final


def test_a_step_says_what_the_layer_put_out():
    model = DiscreteTimeSurvivalLSTM(12, 8, 10).eval()
    model.lstm = NormalizedOutputs(model.lstm)
    record, state = [[1, 2], [3], [4, 5]], model.start()
    for visit in record:
        hazard, state = model.step(state, visit)
    whole = model(PackedVisits.from_lists([record])).last()
    torch.testing.assert_close(hazard, whole)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_is_said_of_a_patient_is_read_from_the_outputs_on_every_path(bidirectional):
    codes = torch.tensor([[[1, 2], [3, 0]], [[4, 0], [0, 0]]])
    masks = codes != 0, (codes != 0).any(2)
    model = LSTMBaseline(12, 8, 10 if not bidirectional else 5).eval()
    if bidirectional:
        model.lstm = torch.nn.LSTM(8, 5, batch_first=True, bidirectional=True)
        model.fc = torch.nn.Linear(10, model.fc.out_features)
    model.lstm = NormalizedOutputs(model.lstm)
    found = {}
    for path in PATHS:
        model.path = path
        found[path] = model(codes, *masks)["logits"]
    torch.testing.assert_close(found["fused"], found["packed"])
    if not bidirectional:  # the reverse direction begins on the padding there
        torch.testing.assert_close(found["padded"], found["packed"])


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_in_a_mask_is_refused(path):
    model = DiscreteTimeSurvivalLSTM(12, 8, 10, path=path).eval()
    codes = torch.ones(1, 2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="sequence_mask: expected numbers, got NaN"):
        model(codes, codes != 0, torch.tensor([[1.0, float("nan")]]))


def test_a_padded_batch_under_a_transform():
    model = DiscreteTimeSurvivalLSTM(12, 8, 10).eval()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    codes = torch.tensor([[[1, 2], [3, 0]]])

    def total(weights):
        given = (codes, codes != 0, torch.ones(1, 2))
        return torch.func.functional_call(model, weights, given).sum()

    found = torch.func.grad(total)(weights)
    model(codes, codes != 0, torch.ones(1, 2)).sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad)


def test_a_vocabulary_size_of_numpy_is_stored_as_a_number(tmp_path):
    batch = PackedVisits.from_lists([[[1]]], vocab_size=np.array([1, 5]).max() + 1)
    torch.save(batch, tmp_path / "batch.pt")
    assert torch.load(tmp_path / "batch.pt").vocab_size == 6
