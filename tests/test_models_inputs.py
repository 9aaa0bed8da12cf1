"""Inputs of models: shapes, dtypes, layouts, modes, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    LSTMBaseline,
    VisitEncoder,
    create_lstm_baseline,
)
from ehrseq_fast.models.base import PATHS

from .model_cases import (
    AGGREGATIONS,
    READS_PADDING,
    VARIANTS,
    VOCAB,
    build,
    build_plain,
    for_plain,
    gradients,
    output_of,
    ragged_batch,
)

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


def test_states_under_autocast_are_not_rounded_where_lengths_are_equal():
    """A patient's states do not depend on how many visits the others have."""
    codes, visit_mask, sequence_mask = ragged_batch((4, 4))
    model = build("survival").eval()
    with torch.autocast("cpu", torch.bfloat16):
        states = model._hidden_states(codes, visit_mask, sequence_mask).values
    assert not torch.equal(states, states.bfloat16().float())


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
    "hole": (hole, ValueError, r"holes.*patient 2"),
    "left-padded": (left_padded, ValueError, r"holes.*patient 0"),
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
        (lambda: LSTMBaseline(9, cell="rnn"), "cell: expected one of 'lstm', 'gru', got 'rnn'"),
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


def test_masks_are_not_differentiated_by_in_silence():
    """A mask of zeros and ones is dropped where its codes are packed, unless it has a gradient."""
    model = build("survival").double().eval()
    codes, _, sequence_mask = ragged_batch(fewest_codes=1)
    mask = torch.ones(codes.shape, dtype=torch.float64)
    tangent = torch.rand(codes.shape, dtype=torch.float64)

    def hazards(mask):
        return model(codes, mask, sequence_mask).sum()

    derivative = torch.func.jvp(hazards, (mask,), (tangent,))[1]
    model.path = "padded"
    torch.testing.assert_close(derivative, torch.func.jvp(hazards, (mask,), (tangent,))[1])
    assert derivative != 0
    model.path = "fused"
    for differentiate in (
        lambda: hazards(mask.clone().requires_grad_()),
        lambda: torch.func.grad(hazards)(mask),
    ):
        with pytest.raises(ValueError, match=r"no gradient for it: pass mask\.detach"):
            differentiate()
