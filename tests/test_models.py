"""The models against plain PyTorch models of the reference's structure, and what they get right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ehrseq_fast import use_backend
from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    LSTMBaseline,
    VisitEncoder,
    create_lstm_baseline,
)
from ehrseq_fast.models.base import PATHS
from ehrseq_fast.models.survival_lstm import survival_curve

from . import plain_models
from .conftest import RUNNABLE

VOCAB = 23
SIZE = {"embedding_dim": 6, "hidden_dim": 5}
AGGREGATIONS = ("mean", "sum", "max", "attention")

# name: (model, plain, constructor arguments)
VARIANTS = {
    "survival": (DiscreteTimeSurvivalLSTM, plain_models.SurvivalLSTM, {}),
    "survival-2-layers": (DiscreteTimeSurvivalLSTM, plain_models.SurvivalLSTM, {"num_layers": 2}),
    "survival-bidirectional": (
        DiscreteTimeSurvivalLSTM,
        plain_models.SurvivalLSTM,
        {"bidirectional": True, "num_layers": 2},
    ),
    "with-time": (
        DiscreteTimeSurvivalLSTMWithTime,
        plain_models.SurvivalLSTMWithTime,
        {"time_encoding_dim": 4},
    ),
    "with-time-2-layers": (
        DiscreteTimeSurvivalLSTMWithTime,
        plain_models.SurvivalLSTMWithTime,
        {"num_layers": 2},
    ),
    "competing-risks": (
        CompetingRisksSurvivalLSTM,
        plain_models.CompetingRisksLSTM,
        {"num_event_types": 3},
    ),
    "baseline-bidirectional": (
        LSTMBaseline,
        plain_models.LSTMBaseline,
        {"bidirectional": True, "task": "multi_class", "output_dim": 3},
    ),
    "baseline-1-layer": (
        LSTMBaseline,
        plain_models.LSTMBaseline,
        {"num_layers": 1, "task": "regression", "padding_idx": 2},
    ),
    **{
        f"baseline-{how}": (LSTMBaseline, plain_models.LSTMBaseline, {"visit_aggregation": how})
        for how in AGGREGATIONS
    },
}
# Padding before the last real visit of a backward LSTM is read by these paths and plain_models.
READS_PADDING = {
    ("survival-bidirectional", "padded"),
    ("baseline-bidirectional", "padded"),
}


@pytest.fixture(
    params=[("fused", name) for name in RUNNABLE] + [("packed", None), ("padded", None)],
    ids=lambda param: "-".join(filter(None, param)),
)
def path(request):
    """Each path; the fused one on every backend that can run here, as it alone depends on it."""
    which, backend = request.param
    with use_backend(backend):
        yield which


def build(variant, path="fused", seed=0, **changes):
    kind, _, options = VARIANTS[variant]
    torch.manual_seed(seed)
    return kind(VOCAB, **SIZE, **(options | changes), path=path)


def build_plain(variant, seed=0, **changes):
    _, kind, options = VARIANTS[variant]
    torch.manual_seed(seed)
    return kind(VOCAB, **SIZE, **(options | changes))


def ragged_batch(lengths=(4, 1, 6, 3), visits=7, width=5, seed=1, fewest_codes=0):
    """Codes, masks: patients of these lengths, visits of ``fewest_codes`` to ``width`` codes."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    lengths = torch.tensor(lengths)
    sequence_mask = torch.arange(visits) < lengths[:, None]
    counts = torch.randint(fewest_codes, width + 1, (len(lengths), visits), generator=generator)
    visit_mask = (torch.arange(width) < counts[..., None]) & sequence_mask[..., None]
    codes = torch.randint(1, VOCAB, visit_mask.shape, generator=generator) * visit_mask
    return codes, visit_mask, sequence_mask


def for_plain(variant, batch):
    """Without empty visits (padded ones too), where the reference gives NaN for them."""
    codes, visit_mask, sequence_mask = batch
    if variant in ("baseline-max", "baseline-attention"):
        visit_mask = visit_mask.clone()
        visit_mask[..., 0] = True
    return codes, visit_mask, sequence_mask


def output_of(model, batch, **more):
    """The model's output as one tensor, padded."""
    out = model(*batch, **more)
    return torch.cat([out["logits"], out["predictions"]], 1) if isinstance(out, dict) else out


def gradients(model, batch, **more):
    model.zero_grad()
    out = output_of(model, batch, **more)
    torch.manual_seed(5)
    (out * torch.rand(out.shape).to(out)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_close(actual, expected, relative=1e-5):
    assert actual.keys() == expected.keys()
    # The floor is for gradients that are 0 but for rounding, such as that of the last bias of the
    # attention, which moves all scores of a visit alike.
    floor = 1e-2 * torch.stack([wanted.norm() for wanted in expected.values()]).norm()
    for name, wanted in expected.items():
        error = (actual[name] - wanted).norm()
        assert error <= relative * torch.maximum(wanted.norm(), floor), (name, float(error))


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


# Padding, empty visits, saturation.


@pytest.mark.parametrize("variant", ["survival", "with-time", "competing-risks"])
def test_hazards_are_zero_on_padding_alone(variant, path):
    batch = ragged_batch()
    hazards = build(variant, path)(*batch)
    real = batch[2]
    assert torch.equal(hazards[~real], torch.zeros_like(hazards[~real]))
    assert ((hazards[real] > 0) & (hazards[real] < 1)).all()


@pytest.mark.parametrize("variant", ["survival", "with-time"])
def test_survival_is_the_plain_models_and_constant_over_padding(variant, path):
    model, plain = build(variant, path).eval(), build_plain(variant).eval()
    batch = ragged_batch()
    real = batch[2]
    survival, cumulative = model.predict_survival(*batch)
    wanted_survival, wanted_cumulative = plain.predict_survival(*batch)
    torch.testing.assert_close(survival[real], wanted_survival[real], rtol=0, atol=2e-6)
    torch.testing.assert_close(cumulative[real], wanted_cumulative[real], rtol=0, atol=2e-6)
    for values in (survival, cumulative):
        for patient, length in enumerate((4, 1, 6, 3)):
            assert (values[patient, length:] == values[patient, length - 1]).all()
    assert (survival.diff(dim=1) <= 0).all()


def test_survival_takes_time_features(unemulated):
    model = build("with-time").eval()
    batch, times = ragged_batch(), torch.rand(4, 7, 3)
    survival, _ = model.predict_survival(*batch, time_features=times)
    wanted = (1 - model(*batch, time_features=times)).cumprod(1)
    torch.testing.assert_close(survival, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_survival_is_finite_at_saturation(dtype):
    hazards = torch.tensor([[1.0, 1.0, 0.5, 0.0], [0.0, 1e-4, 0.0, 0.0]], dtype=dtype)
    hazards.requires_grad_()
    survival, cumulative = survival_curve(hazards)
    assert survival.dtype == cumulative.dtype
    assert survival.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert survival.isfinite().all()
    assert (survival[0] <= 2e-7).all()
    assert survival[1, -1].item() == pytest.approx(1 - hazards[1, 1].item(), abs=1e-7)
    (survival.sum() + cumulative.sum()).backward()
    assert hazards.grad.isfinite().all()


def test_saturated_16_bit_model_is_finite(path):
    model = build("survival", path).eval().to(torch.bfloat16)
    with torch.no_grad():
        model.hazard_head[3].bias.fill_(1e4)
    batch = ragged_batch()
    survival, cumulative = model.predict_survival(*batch)
    assert (model(*batch)[batch[2]] == 1).all()
    assert survival.isfinite().all()
    assert cumulative.isfinite().all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_visit_encoder_is_the_plain_one_and_zero_for_empty_visits(aggregation, unemulated):
    torch.manual_seed(0)
    encoder = VisitEncoder(6, aggregation).eval()
    torch.manual_seed(0)
    plain = plain_models.VisitEncoder(6, aggregation).eval()
    assert list(encoder.state_dict()) == list(plain.state_dict())
    embeddings, mask = torch.randn(4, 5, 6), torch.ones(4, 5)
    mask[0, 3:] = 0
    mask[2, 1:] = 0
    ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    for arguments in [(mask,), (mask.bool(),), (mask.long(),), ()]:
        torch.testing.assert_close(
            encoder(ours, *arguments), plain(theirs, *arguments), rtol=0, atol=1e-6
        )
    assert torch.equal(encoder.encode_plain(ours, mask) != 0, encoder(ours, mask) != 0)
    scale = torch.randn(4, 6)
    (encoder(ours, mask) * scale).sum().backward()
    (plain(theirs, mask) * scale).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)

    mask[1] = 0
    for encode in (encoder, encoder.encode_plain):
        assert torch.equal(encode(embeddings, mask)[1], torch.zeros(6))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_visit_encoder_takes_leading_dimensions_and_non_contiguous_input(aggregation, unemulated):
    encoder = VisitEncoder(6, aggregation).eval()
    embeddings = torch.randn(6, 5, 3, 2).permute(3, 2, 1, 0)
    mask = (torch.rand(5, 3, 2) > 0.3).permute(2, 1, 0)
    flat = encoder(embeddings.reshape(6, 5, 6), mask.reshape(6, 5))
    torch.testing.assert_close(encoder(embeddings, mask), flat.view(2, 3, 6))
    torch.testing.assert_close(encoder(embeddings[0, 0], mask[0, 0]), flat[0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_visit_encoder_never_reads_padded_slots(aggregation, unemulated):
    encoder = VisitEncoder(6, aggregation).eval()
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    clean = torch.randn(3, 3, 6)
    poisoned = clean.masked_fill((mask == 0)[..., None], torch.nan).requires_grad_()
    out = encoder(poisoned, mask)
    assert torch.equal(out, encoder(clean, mask))
    out.sum().backward()
    assert poisoned.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_empty_visits_are_zero_vectors(aggregation, path):
    model = build(f"baseline-{aggregation}", path).eval()
    codes, visit_mask, sequence_mask = ragged_batch(lengths=(3, 2), visits=3, fewest_codes=1)
    visit_mask[0, 1] = False
    seen = []
    model.lstm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(codes, visit_mask, sequence_mask)
    if path == "padded":
        assert not seen[0][0, 1].any()
        assert seen[0][0, 0].any()
    else:  # rows: visit 0 of both patients, visit 1 of both, visit 2
        assert not seen[0].data[2].any()
        assert seen[0].data[[0, 1, 3, 4]].any(1).all()
    assert all(
        grad.isfinite().all()
        for grad in gradients(model, (codes, visit_mask, sequence_mask)).values()
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_codes_at_all(variant, unemulated):
    codes = torch.zeros(2, 3, 0, dtype=torch.long)
    mask = torch.ones(2, 3)
    model = build(variant).eval()
    expected = output_of(
        model, (torch.zeros(2, 3, 1, dtype=torch.long), torch.zeros(2, 3, 1), mask)
    )
    assert torch.equal(output_of(model, (codes, codes, mask)), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_poisoned_row_that_only_padding_names_changes_no_bit(variant, unemulated):
    """NaN in the embedding of code 0, which stands in padded slots of real and padded visits."""
    batch = ragged_batch()
    clean, poisoned = build(variant).eval(), build(variant).eval()
    with torch.no_grad():
        poisoned.embedding.weight[0] = torch.nan
        clean.embedding.weight[0] = 0.0
    assert torch.equal(output_of(poisoned, batch), output_of(clean, batch))
    wanted = gradients(clean, batch)
    for name, grad in gradients(poisoned, batch).items():
        assert torch.equal(grad, wanted[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_stands_in_padded_slots_changes_no_bit(variant, unemulated):
    """Codes outside the vocabulary, and codes that the visit mask calls real in padded visits."""
    codes, visit_mask, sequence_mask = ragged_batch()
    model = build(variant).eval()
    wanted = output_of(model, (codes, visit_mask, sequence_mask))
    junk_codes = codes.masked_fill(~visit_mask, -(10**12))
    junk_mask = visit_mask | ~sequence_mask[..., None]
    assert torch.equal(output_of(model, (junk_codes, junk_mask, sequence_mask)), wanted)


def test_time_features_of_padded_visits_change_nothing(unemulated):
    batch, times = ragged_batch(), torch.rand(4, 7, 3)
    junk = times.masked_fill(~batch[2][..., None], torch.nan)
    model = build("with-time").eval()
    assert torch.equal(model(*batch, junk), model(*batch, times))
    grads = gradients(model, batch, time_features=junk)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_hidden_states_keep_the_inputs_visits(path, bidirectional):
    model = build("baseline-mean", path, bidirectional=bidirectional).eval()
    plain = build_plain("baseline-mean", bidirectional=bidirectional).eval()
    batch = ragged_batch(lengths=(4, 1, 3), visits=7)
    hidden = model(*batch, return_hidden=True)["hidden_states"]
    assert hidden.shape == (3, 7, 10 if bidirectional else 5)
    assert torch.equal(hidden[~batch[2]], torch.zeros_like(hidden[~batch[2]]))
    if not (bidirectional and path == "padded"):
        wanted = plain(*batch, return_hidden=True)["hidden_states"]  # [3, 4, H]
        torch.testing.assert_close(hidden[:, :4], wanted, rtol=0, atol=1e-6)
    assert "hidden_states" not in model(*batch)


def test_padding_code_is_no_mask_and_is_not_trained(unemulated):
    """Code 0 that the mask calls real counts in the mean; its row gets no gradient."""
    codes = torch.tensor([[[3, 0]]])
    model = build("survival").eval()
    with torch.no_grad():
        model.embedding.weight[0] = 1.0
    all_real = torch.ones(1, 1, 2)
    assert not torch.allclose(
        model(codes, all_real, torch.ones(1, 1)), model(codes, codes != 0, torch.ones(1, 1))
    )
    grad = gradients(model, (codes, all_real, torch.ones(1, 1)))["embedding.weight"]
    assert not grad[0].any()
    assert grad[3].any()


def test_predict_and_embeddings(path):
    model = build("baseline-mean", path)
    batch = ragged_batch()
    first, second = model.predict(*batch), model.predict(*batch)
    assert torch.equal(first, second), "dropout must be off"
    assert not first.requires_grad
    assert model.training
    assert model.visit_encoder.training
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


# Shapes and dtypes.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "shape", [{"lengths": (3,), "visits": 5}, {"lengths": (1, 1), "visits": 1, "width": 1}]
)
def test_one_patient_and_one_visit(variant, path, shape):
    model, plain = build(variant, path).eval(), build_plain(variant).eval()
    codes, visit_mask, sequence_mask = for_plain(variant, ragged_batch(**shape, fewest_codes=1))
    if variant == "survival-bidirectional" or (variant, path) in READS_PADDING:
        keep = shape["lengths"][0]
        codes, visit_mask, sequence_mask = (
            tensor[:, :keep] for tensor in (codes, visit_mask, sequence_mask)
        )
        if variant.startswith("baseline"):  # the plain asks for contiguous input
            codes, visit_mask = codes.contiguous(), visit_mask.contiguous()
    batch = codes, visit_mask, sequence_mask
    torch.testing.assert_close(output_of(model, batch), output_of(plain, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["survival", "competing-risks", "baseline-attention"])
def test_non_contiguous_inputs(variant, path):
    model = build(variant, path).eval()
    batch = ragged_batch()
    codes, visit_mask, sequence_mask = (
        tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in batch
    )
    strided = torch.stack([codes, codes], -1)[..., 0]
    assert not codes.is_contiguous()
    assert not strided.is_contiguous()
    for layout in (codes, strided):
        assert torch.equal(
            output_of(model, (layout, visit_mask, sequence_mask)), output_of(model, batch)
        )
    # one visit mask for all patients, stride 0
    shared = batch[1][:1].expand_as(batch[1])
    assert torch.equal(
        output_of(model, (codes, shared, sequence_mask)),
        output_of(model, (batch[0], shared.contiguous(), batch[2])),
    )


@pytest.mark.parametrize("variant", ["survival", "baseline-mean", "baseline-attention"])
@pytest.mark.parametrize(
    "mask_dtype",
    [torch.bool, torch.int32, torch.int64, torch.float32, torch.float64, torch.float16],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_any_dtype_leave_the_outputs_dtype_alone(variant, path, mask_dtype, dtype):
    codes, visit_mask, sequence_mask = ragged_batch()
    model = build(variant, path).eval().to(dtype)
    wanted = output_of(model, (codes, visit_mask, sequence_mask))
    out = output_of(model, (codes.int(), visit_mask.to(mask_dtype), sequence_mask.to(mask_dtype)))
    assert out.dtype == wanted.dtype == dtype
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_model_dtypes(variant, path, dtype):
    batch = ragged_batch()
    model = build(variant, path).eval()
    wanted, wanted_grads = output_of(model, batch), gradients(model, batch)
    model = model.to(dtype)
    out = output_of(model, batch)
    assert out.dtype == dtype
    bound = {torch.float64: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.float(), wanted, rtol=bound, atol=bound)
    for name, grad in gradients(model, batch).items():
        assert grad.dtype == dtype
        error = (grad.float() - wanted_grads[name]).norm()
        assert error <= 10 * bound * wanted_grads[name].norm().clamp(min=0.1), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant, path):
    batch = ragged_batch()
    model = build(variant, path).eval()
    wanted = output_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = output_of(model, batch)
        grads = gradients(model, batch)
    torch.testing.assert_close(out.float(), wanted, rtol=3e-2, atol=3e-2)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("lengths", [(4, 1, 6, 3), (4, 4), (3,)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_states_under_autocast_have_one_dtype_on_every_path(variant, lengths):
    """PyTorch's LSTM gives another one where visits are padded, or all patients have as many."""
    batch = ragged_batch(lengths)
    found = {}
    for path in PATHS:
        model = build(variant, path).eval()
        with torch.autocast("cpu", torch.bfloat16):
            states = model._hidden_states(*batch[:3])
            out = output_of(model, batch)
        found[path] = states.values.dtype, states.final.dtype, out.dtype
    assert found == dict.fromkeys(PATHS, (torch.float32, torch.float32, torch.bfloat16))


@pytest.mark.parametrize(("variant", "path"), [("with-time", "fused"), ("survival", "padded")])
def test_torch_compile_gives_the_same(variant, path):
    """Not as one graph: lengths are read on the host, and torch leaves nn.LSTM out of graphs."""
    torch._dynamo.reset()
    model = build(variant, path).eval()
    compiled_model = torch.compile(model, backend="eager", dynamic=True)
    for seed, lengths in enumerate([(4, 1, 6, 3), (2, 7)]):
        batch = ragged_batch(lengths, seed=seed)
        torch.testing.assert_close(
            output_of(compiled_model, batch), output_of(model, batch), rtol=0, atol=1e-6
        )


def test_fused_path_is_bitwise_repeatable(unemulated):
    model = build("baseline-attention")
    batch = ragged_batch(lengths=tuple(range(1, 13)), visits=14)
    model.eval()
    first = gradients(model, batch)
    first = {name: grad.clone() for name, grad in first.items()}
    for _ in range(10):
        assert all(torch.equal(grad, first[name]) for name, grad in gradients(model, batch).items())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_sparse_embeddings_get_sparse_gradients(aggregation, path):
    batch = ragged_batch()
    model = build(f"baseline-{aggregation}", path).eval()
    wanted = gradients(model, batch)["embedding.weight"].clone()
    model.embedding.sparse = True
    grad = gradients(model, batch)["embedding.weight"]
    assert grad.is_sparse
    torch.testing.assert_close(grad.to_dense(), wanted)


def test_dropout_is_active_in_training_mode(unemulated):
    for path in PATHS:
        model = build("survival", path, dropout=0.5).train()
        batch = ragged_batch()
        assert not torch.equal(model(*batch), model(*batch))


# Bad input.


def zero_length(codes, visit_mask, sequence_mask):
    sequence_mask[1] = sequence_mask[3] = False
    return codes, visit_mask, sequence_mask


def hole(codes, visit_mask, sequence_mask):
    sequence_mask[2, 1] = False
    return codes, visit_mask, sequence_mask


def left_padded(codes, visit_mask, sequence_mask):
    return codes, visit_mask, sequence_mask.flip(1)


def code_too_large(codes, visit_mask, sequence_mask):
    visit_mask[2, 3, 1] = True
    codes[2, 3, 1] = VOCAB
    return codes, visit_mask, sequence_mask


def code_negative(codes, visit_mask, sequence_mask):
    visit_mask[0, 0, 0] = True
    codes[0, 0, 0] = -1
    codes[2, 5, 0] = -7
    visit_mask[2, 5, 0] = True
    return codes, visit_mask, sequence_mask


# what is wrong: (how to make it, error, message)
BAD_BATCHES = {
    "zero length": (
        zero_length,
        ValueError,
        r"Found 2 sequences with zero length\. All sequences must have at least 1 visit\. "
        r"The first is patient 1\.",
    ),
    "hole": (hole, ValueError, r"holes.*The first is patient 2"),
    "left-padded": (left_padded, ValueError, r"holes.*The first is patient 0"),
    "code too large": (
        code_too_large,
        IndexError,
        r"The first is (code )?23( of|:) patient 2, visit 3, (slot|code) 1",
    ),
    "code negative": (
        code_negative,
        IndexError,
        r"Found 2 codes outside the vocabulary.*The first is (code )?-1( of|:) patient 0, visit 0",
    ),
    "float codes": (
        lambda codes, *masks: (codes.float(), *masks),
        TypeError,
        "visit_codes: expected int32 or int64, got torch.float32",
    ),
    "codes not [B, V, C]": (
        lambda codes, *masks: (codes[0], *masks),
        ValueError,
        r"visit_codes: expected \[B, V, C\], got shape \[7, 5\]",
    ),
    "visit mask not [B, V, C]": (
        lambda codes, visit_mask, sequence_mask: (codes, sequence_mask, sequence_mask),
        ValueError,
        r"visit_mask: expected \[B, V, C\] = \[4, 7, 5\] as visit_codes, got shape \[4, 7\]",
    ),
    "sequence mask not [B, V]": (
        lambda codes, visit_mask, sequence_mask: (codes, visit_mask, sequence_mask[:, :-1]),
        ValueError,
        r"sequence_mask: expected \[B, V\] = \[4, 7\] as visit_codes, got shape \[4, 6\]",
    ),
    "no patient": (
        lambda *batch: tuple(tensor[:0] for tensor in batch),
        ValueError,
        r"expected at least one patient, got \[B, V, C\] = \[0, 7, 5\]",
    ),
    "no visit": (
        lambda *batch: tuple(tensor[:, :0] for tensor in batch),
        ValueError,
        "Found 4 sequences with zero length.*patient 0",
    ),
}


@pytest.mark.parametrize(
    "variant", ["survival", "competing-risks", "baseline-mean", "baseline-attention"]
)
@pytest.mark.parametrize("what", BAD_BATCHES)
def test_bad_batches_are_refused(what, variant, path):
    spoil, error, message = BAD_BATCHES[what]
    model = build(variant, path)
    with pytest.raises(error, match=message):
        model(*spoil(*ragged_batch()))


@pytest.mark.parametrize("path", PATHS)
def test_time_features_of_the_wrong_shape_are_refused(path):
    with pytest.raises(ValueError, match=r"time_features: expected \[B, V, 3\] = \[4, 7, 3\]"):
        build("with-time", path)(*ragged_batch(), time_features=torch.zeros(4, 7, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: VisitEncoder(4, "median"),
            "aggregation: expected one of 'mean', ",
        ),
        (lambda: LSTMBaseline(9, visit_aggregation="median"), "got 'median'"),
        (lambda: LSTMBaseline(9, task="ranking"), "task: expected one of .*got 'ranking'"),
        (lambda: create_lstm_baseline(9, "multi_class"), "output_dim: expected a number"),
        (
            lambda: create_lstm_baseline(9, model_size="huge"),
            "model_size: .*got 'huge'",
        ),
        (lambda: CompetingRisksSurvivalLSTM(9, 0), "num_event_types: expected at least 1, got 0"),
        (
            lambda: VisitEncoder(4)(torch.zeros(2, 3, 5)),
            r"expected \[..., C, 4\], got .*\[2, 3, 5\]",
        ),
        (
            lambda: VisitEncoder(4)(torch.zeros(2, 3, 4), torch.zeros(2, 4)),
            r"visit_mask: expected \[..., C\] = \[2, 3\]",
        ),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_are_left_as_they_were(unemulated):
    for path in PATHS:
        batch = ragged_batch()
        before = [tensor.clone() for tensor in batch]
        output_of(build("baseline-attention", path), batch).sum().backward()
        assert all(torch.equal(now, then) for now, then in zip(batch, before, strict=True))
