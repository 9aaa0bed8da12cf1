"""Models and padding: zeros there, nothing read there, empty visits, saturated hazards."""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast.models import (
    VisitEncoder,
)
from ehrseq_fast.models.survival_lstm import survival_curve

from . import plain_models
from .model_cases import (
    AGGREGATIONS,
    VARIANTS,
    build,
    build_plain,
    gradients,
    output_of,
    ragged_batch,
)

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
