"""The models against plain PyTorch models of the reference's structure, and what they get right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    LSTMBaseline,
    VisitEncoder,
    create_lstm_baseline,
)
from ehrseq_fast.models.base import PATHS

from . import plain_models
from .model_cases import (
    READS_PADDING,
    SIZE,
    VARIANTS,
    assert_gradients_close,
    build,
    build_plain,
    for_plain,
    gradients,
    output_of,
    ragged_batch,
)

# Drop-in: weights, outputs, gradients.


@pytest.mark.parametrize("variant", VARIANTS)
def test_seeded_state_dict_is_the_plain_models_bit_for_bit(variant):
    ours, theirs = build(variant).state_dict(), build_plain(variant).state_dict()
    assert list(ours) == list(theirs)
    for name, wanted in theirs.items():
        assert torch.equal(ours[name], wanted), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dicts_load_both_ways(variant, tmp_path):
    ours, theirs = build(variant, seed=1).eval(), build_plain(variant, seed=2).eval()
    batch = for_plain(variant, ragged_batch(lengths=(7, 7)))

    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    ours.load_state_dict(torch.load(tmp_path / "theirs.pt"))
    torch.testing.assert_close(output_of(ours, batch), output_of(theirs, batch), rtol=0, atol=1e-6)

    ours = build(variant, seed=3).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(output_of(ours, batch), output_of(theirs, batch), rtol=0, atol=1e-6)


def test_defaults_are_the_references():
    torch.manual_seed(0)
    ours = LSTMBaseline(30).state_dict()
    torch.manual_seed(0)
    theirs = plain_models.LSTMBaseline(30).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model = LSTMBaseline(30)
    assert (model.dropout.p, model.visit_encoder.dropout.p, model.lstm.dropout) == (0.3, 0.3, 0.3)
    assert DiscreteTimeSurvivalLSTM(30).hazard_head[2].p == 0.1
    assert CompetingRisksSurvivalLSTM(30, 2).hazard_heads[1][2].p == 0.1
    assert DiscreteTimeSurvivalLSTMWithTime(30).lstm.input_size == 128 + 16
    assert VisitEncoder(4).dropout.p == 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_the_plain_models(variant, path):
    model, plain = build(variant, path).eval(), build_plain(variant).eval()
    right_on_padding = variant != "survival-bidirectional" and (variant, path) not in READS_PADDING
    lengths = (4, 1, 6, 3) if right_on_padding else (7, 7, 7)
    batch = for_plain(variant, ragged_batch(lengths))
    torch.testing.assert_close(output_of(model, batch), output_of(plain, batch), rtol=0, atol=1e-6)
    assert_gradients_close(gradients(model, batch), gradients(plain, batch))


def test_training_mode_without_dropout_is_the_plain_models(path):
    model, plain = build("survival", path, dropout=0.0), build_plain("survival", dropout=0.0)
    batch = ragged_batch()
    torch.testing.assert_close(model(*batch), plain(*batch), rtol=0, atol=1e-6)


def test_time_features_are_the_plain_models(path):
    model, plain = build("with-time", path).eval(), build_plain("with-time").eval()
    batch = ragged_batch()
    times = torch.rand(4, 7, 3) * 10
    ours = output_of(model, batch, time_features=times)
    torch.testing.assert_close(
        ours, output_of(plain, batch, time_features=times), rtol=0, atol=1e-6
    )
    assert_gradients_close(
        gradients(model, batch, time_features=times), gradients(plain, batch, time_features=times)
    )
    assert not torch.allclose(ours, model(*batch)), "time features must matter"
    whole = times.round().long()
    torch.testing.assert_close(
        model(*batch, time_features=whole), model(*batch, time_features=whole.float())
    )


@pytest.mark.parametrize("bidirectional", [False, True])
def test_baseline_without_masks_counts_every_slot(path, bidirectional):
    model = build("baseline-mean", path, bidirectional=bidirectional).eval()
    plain = build_plain("baseline-mean", bidirectional=bidirectional).eval()
    codes, visit_mask, _ = ragged_batch()
    for arguments in [(codes,), (codes, visit_mask)]:
        ours, theirs = model(*arguments, return_hidden=True), plain(*arguments, return_hidden=True)
        for name, wanted in theirs.items():
            torch.testing.assert_close(ours[name], wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(model(codes)["logits"], model(codes, visit_mask)["logits"])


def test_survival_models_take_none_for_masks_as_all_real(unemulated):
    model = build("survival").eval()
    codes, visit_mask, sequence_mask = ragged_batch()
    everything = torch.ones_like(visit_mask), torch.ones_like(sequence_mask)
    for path in PATHS:
        model.path = path
        torch.testing.assert_close(model(codes, None, None), model(codes, *everything))


# The three paths are one model.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_paths_agree_on_ragged_batches(variant, seed, unemulated):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
    batch = ragged_batch(lengths, visits=8 + seed, width=1 + 2 * seed, seed=seed)
    model = build(variant).eval()
    expected, wanted = output_of(model, batch), gradients(model, batch)
    for path in ("packed", "padded"):
        if (variant, path) in READS_PADDING:
            continue
        model.path = path
        torch.testing.assert_close(output_of(model, batch), expected, rtol=0, atol=1e-6)
        assert_gradients_close(gradients(model, batch), wanted)


@pytest.mark.parametrize("path", ["fused", "packed"])
def test_bidirectional_hazards_do_not_depend_on_padding(path, unemulated):
    model = build("survival-bidirectional", path).eval()
    plain = build_plain("survival-bidirectional").eval()
    codes, visit_mask, sequence_mask = ragged_batch(lengths=(4, 1, 6, 3))
    hazards = model(codes, visit_mask, sequence_mask)
    for patient, length in enumerate((4, 1, 6, 3)):
        alone = (slice(patient, patient + 1), slice(0, length))
        wanted = plain(codes[alone], visit_mask[alone], sequence_mask[alone])
        torch.testing.assert_close(hazards[alone], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_more_changes_no_bit(variant, unemulated):
    model = build(variant).eval()
    codes, visit_mask, sequence_mask = ragged_batch()
    before = output_of(model, (codes, visit_mask, sequence_mask))
    wider = (
        torch.nn.functional.pad(codes, (0, 0, 0, 5)),
        torch.nn.functional.pad(visit_mask, (0, 0, 0, 5)),
        torch.nn.functional.pad(sequence_mask, (0, 5)),
    )
    after = output_of(model, wider)
    if not variant.startswith("baseline"):
        assert not after[:, 7:].any()
        after = after[:, :7]
    assert torch.equal(before, after)


def test_path_is_an_attribute_and_survives_copies():
    model = build("survival")
    assert model.path == "fused"
    model.path = "padded"
    assert copy.deepcopy(model).path == "padded"
    assert pickle.loads(pickle.dumps(model)).path == "padded"
    with pytest.raises(ValueError, match=r"path: expected one of 'fused', .*, got 'quick'"):
        model.path = "quick"
    with pytest.raises(ValueError, match="path: expected one of"):
        DiscreteTimeSurvivalLSTM(9, path="quick")
    with pytest.raises(TypeError):
        DiscreteTimeSurvivalLSTM(9, 4, 4, 1, 0.1, False, "padded")  # keyword only


def test_predict_and_embeddings(path):
    model = build("baseline-mean", path)
    batch = ragged_batch()
    first, second = model.predict(*batch), model.predict(*batch)
    assert torch.equal(first, second), "dropout must be off"
    assert not first.requires_grad
    assert model.training
    assert model.visit_encoder.training
    model.visit_encoder.eval()  # frozen in a model that is trained
    model.predict(*batch)
    assert model.training
    assert model.dropout.training
    assert not model.visit_encoder.training
    torch.testing.assert_close(first, model.eval()(*batch)["predictions"].detach())
    codes = torch.tensor([[1, 2, 0]])
    assert torch.equal(model.get_embeddings(codes), model.embedding.weight[codes])


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("binary_classification", torch.sigmoid),
        ("multi_class", lambda logits: logits.softmax(-1)),
        ("regression", lambda logits: logits),
    ],
)
def test_tasks(task, expected):
    out = build("baseline-mean", task=task, output_dim=3).eval()(*ragged_batch())
    assert out["logits"].shape == (4, 3)
    torch.testing.assert_close(out["predictions"], expected(out["logits"]))


@pytest.mark.parametrize(
    ("size", "expected"),
    [("small", (128, 256, 1, 0.3)), ("medium", (256, 512, 2, 0.3)), ("large", (512, 1024, 3, 0.4))],
)
def test_preset_sizes(size, expected):
    with torch.device("meta"):
        model = create_lstm_baseline(11, "multi_class", output_dim=4, model_size=size)
    found = (model.embedding_dim, model.hidden_dim, model.num_layers, model.dropout.p)
    assert found == expected
    assert (model.vocab_size, model.output_dim, model.task) == (11, 4, "multi_class")
    with torch.device("meta"):
        assert create_lstm_baseline(11, "regression", model_size=size).output_dim == 1


# Attention straight from codes.


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(
    "variant", ["survival", "baseline-mean", "baseline-max", "baseline-attention"]
)
def test_fused_path_allocates_nothing_of_the_padded_size(variant, compiled):
    batch = ragged_batch(lengths=(4, 1, 6, 3), visits=20, width=50)
    padded_size = 4 * 20 * 50 * SIZE["embedding_dim"]
    model = build(variant)
    for path, allocates in (("fused", False), ("padded", True)):
        model.path = path
        with LargestTensor() as largest:
            output_of(model, batch).sum().backward()
        assert (largest.numel >= padded_size) == allocates, (path, largest.numel, padded_size)
