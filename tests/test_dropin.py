"""``accelerate`` and ``restore``: the same numbers, the same objects, and a report that is true."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ehrseq_fast import PackedGRU, PackedLSTM, PackedVisits, accelerate, restore
from ehrseq_fast.models.fused_forward import NOT_SERVED, fused_of, run_fused

from . import plain_models
from .dropin_models import EverySlot, OwnMask, Pool
from .model_cases import (
    SIZE,
    VARIANTS,
    VOCAB,
    assert_gradients_close,
    build,
    build_plain,
    for_plain,
    gradients,
    output_of,
    ragged_batch,
)

READS_PADDING = "survival-bidirectional"
NOT_FUSED = (READS_PADDING, "competing-risks-softmax")  # of which ehrsequencing has none


def batch_for(variant, **options):
    fewest = 1 if variant in ("baseline-max", "baseline-attention") else 0
    return for_plain(variant, ragged_batch(fewest_codes=fewest, **options))


def vectors_and_mask(lengths=(4, 1, 6, 3)):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randn(*mask.shape, 6), mask


def is_served(model, *given):
    """Whether these arguments run the fused forward pass."""
    fused = fused_of(model)
    padding = [None] * (len(fused.arguments) - len(given))
    return run_fused(fused, model, [*given, *padding]) is not NOT_SERVED


def names_of(report):
    return {entry.name: entry.after for entry in report.replaced}


# Whole models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_models_of_the_references_structure(variant):
    """Outputs and gradients as before; parameters, keys and classes too; and back again."""
    model, plain = build_plain(variant).eval(), build_plain(variant).eval()
    kind, parameters = type(model), list(model.parameters())
    report = accelerate(model)
    fused = variant not in NOT_FUSED
    assert [entry.name for entry in report.replaced] == ["", "lstm"][not fused :]
    assert [entry.name for entry in report.left] == [""][fused:]
    assert ("bidirectional" in str(report)) is (variant == READS_PADDING)
    assert isinstance(model, kind)
    assert isinstance(model.lstm, (PackedLSTM, PackedGRU))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())

    batch = batch_for(variant)
    assert not fused or is_served(model, *batch)
    torch.testing.assert_close(output_of(model, batch), output_of(plain, batch))
    assert_gradients_close(gradients(model, batch), gradients(plain, batch))
    assert restore(model) == (("", "lstm") if fused else ("lstm",))
    assert type(model) is kind
    assert type(model.lstm) in (nn.LSTM, nn.GRU)
    assert torch.equal(output_of(model, batch), output_of(plain, batch))


@pytest.mark.parametrize("variant", ["survival", "with-time", "baseline-attention"])
def test_packed_batches_are_taken_and_give_what_this_packages_model_gives(variant):
    model, ours = build_plain(variant).eval(), build(variant).eval()
    accelerate(model)
    batch = PackedVisits.from_padded(*ragged_batch())
    if variant == "with-time":
        batch = batch.with_features(torch.randn(batch.n_visits, 3))
    results = model(batch), ours(batch)
    if variant == "baseline-attention":
        results = tuple(result["logits"] for result in results)
    else:
        results = tuple(result.values for result in results)
    torch.testing.assert_close(*results)


def test_keywords_hidden_states_and_time_features():
    codes, visit_mask, sequence_mask = ragged_batch()  # one visit more than the longest patient has
    names = ("codes", "visit_mask", "sequence_mask")
    given = dict(zip(names, (codes, visit_mask, sequence_mask), strict=True))
    model, plain = build_plain("baseline-mean").eval(), build_plain("baseline-mean").eval()
    accelerate(model)
    for options in ({"return_hidden": True}, {}):
        ours, theirs = model(**given, **options), plain(**given, **options)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value)
    assert is_served(model, codes)
    torch.testing.assert_close(model(codes)["logits"], plain(codes)["logits"])
    timed, plain = build_plain("with-time").eval(), build_plain("with-time").eval()
    accelerate(timed)
    for features in (None, torch.randn(*codes.shape[:2], 3)):
        given["time_features"] = features
        torch.testing.assert_close(timed(**given), plain(**given))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        timed(codes, visit_mask)


def trained(model, batches, optimizer):
    for batch in batches:
        optimizer.zero_grad()
        model(*batch).square().mean().backward()
        optimizer.step()
    return dict(model.named_parameters())


def test_accelerate_train_restore_train():
    """An optimizer that was made before goes on, through both, to the parameters of plain
    training; ``train()``, devices and what was trained stay."""
    batches = [ragged_batch(seed=seed) for seed in range(4)]
    plain, model = build_plain("survival", dropout=0.0), build_plain("survival", dropout=0.0)
    expected = trained(plain, batches, torch.optim.Adam(plain.parameters(), 0.01))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    trained(model, batches[:1], optimizer)
    accelerate(model)
    trained(model, batches[1:3], optimizer)
    model.eval()
    restore(model)
    assert not model.lstm.training
    model.train()
    found = trained(model, batches[3:], optimizer)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=1e-5)


def test_what_the_fused_forward_does_not_serve_is_the_models_own():
    codes, visit_mask, sequence_mask = ragged_batch()
    holed, empty = sequence_mask.clone(), sequence_mask.clone()
    holed[2, 1] = False
    empty[1] = False
    weights = torch.rand(sequence_mask.shape) * sequence_mask
    model, plain = build_plain("survival").eval(), build_plain("survival").eval()
    accelerate(model)
    for mask in (holed, empty, weights):
        assert not is_served(model, codes, visit_mask, mask)
        assert torch.equal(
            model(codes, visit_mask, mask), plain(codes, visit_mask, mask)
        )  # padded: to the bit
    pool = Pool("mean").half()
    plain = copy.deepcopy(pool)
    accelerate(pool)
    for mask in (visit_mask, visit_mask.float()):  # which gives float32
        ours, theirs = pool(codes, mask), plain(codes, mask)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_fractional_masks_weigh_codes():
    codes, visit_mask, sequence_mask = ragged_batch()
    weights = torch.rand(visit_mask.shape) * visit_mask
    model, plain = build_plain("survival"), build_plain("survival")
    accelerate(model.eval())
    batch = (codes, weights, sequence_mask)
    assert is_served(model, *batch)
    torch.testing.assert_close(model(*batch), plain.eval()(*batch))


@pytest.mark.parametrize("variant", ["survival", "competing-risks", "baseline-mean"])
def test_autocast(variant):
    model, plain = build_plain(variant).eval(), build_plain(variant).eval()
    accelerate(model)
    batch = batch_for(variant)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_served(model, *batch)
        ours, theirs = output_of(model, batch), output_of(plain, batch)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2)  # and of the same dtype


@pytest.mark.parametrize(
    "change", ["hook", "hook of the layer", "hook of all", "forward", "another head"]
)
def test_a_model_that_is_changed_afterwards_runs_its_own_forward(change):
    """Hooks see the calls and shapes that they would have seen."""
    batch, seen = ragged_batch(), {}
    model, plain = build_plain("survival").eval(), build_plain("survival").eval()
    accelerate(model)
    handles, outputs = [], {}
    for each in (model, plain):

        def see(module, given, output, key=each):
            first = given[0]
            shape = first.shape if isinstance(first, torch.Tensor) else type(first)
            seen.setdefault(key, []).append(shape)

        if change == "hook":
            handles.append(each.hazard_head.register_forward_hook(see))
        elif change == "hook of the layer":
            handles.append(each.lstm.register_forward_hook(see))
        elif change == "hook of all":
            handles.append(nn.modules.module.register_module_forward_hook(see))
        elif change == "forward":
            table = each.embedding
            table.forward = lambda codes, t=table: 2 * nn.Embedding.forward(t, codes)
        else:
            torch.manual_seed(1)
            each.hazard_head = nn.Sequential(nn.Linear(5, 1), nn.Softmax(dim=1))  # over visits
        outputs[each] = each(*batch)
        if change.startswith("hook"):
            handles[-1].remove()
    torch.testing.assert_close(outputs[model], outputs[plain])
    assert len(seen.get(model, [])) == {"hook": 1, "hook of the layer": 1, "hook of all": 9}.get(
        change, 0
    )
    assert seen.get(model) == seen.get(plain)


class Doubled(plain_models.SurvivalLSTM):
    def forward(self, codes, visit_mask, sequence_mask):
        return super().forward(codes, visit_mask, sequence_mask) * 2


class NoisyInTraining(plain_models.SurvivalLSTM):
    def forward(self, codes, visit_mask, sequence_mask):
        hazards = super().forward(codes, visit_mask, sequence_mask)
        return nn.functional.dropout(hazards, 0.5, self.training)


class Detached(plain_models.SurvivalLSTM):
    def forward(self, codes, visit_mask, sequence_mask):
        states, _ = self.lstm(plain_models.mean_of_codes(self.embedding, codes, visit_mask))
        return self.hazard_head(states.detach())[..., 0] * sequence_mask.float()


class Clamped(plain_models.SurvivalLSTM):
    def forward(self, codes, visit_mask, sequence_mask):
        return super().forward(codes, visit_mask, sequence_mask).clamp(1e-7, 1 - 1e-7)


class HidingNaN(plain_models.SurvivalLSTM):
    def forward(self, codes, visit_mask, sequence_mask):
        return torch.nan_to_num(super().forward(codes, visit_mask, sequence_mask))


class Remembering(plain_models.SurvivalLSTM):
    def forward(self, codes, visit_mask, sequence_mask):
        self.seen = codes.shape
        return super().forward(codes, visit_mask, sequence_mask)


class OtherArguments(plain_models.SurvivalLSTM):
    def forward(self, batch):
        return super().forward(*batch)


class Failing(plain_models.SurvivalLSTM):
    def forward(self, codes, visit_mask, sequence_mask):
        raise RuntimeError("wants a batch of its own")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Doubled, "its forward computes something else"),
        (NoisyInTraining, "its forward computes something else"),
        (Detached, "its gradients are others"),
        (Clamped, "its forward computes something else"),
        (HidingNaN, "its forward hides a NaN"),
        (Remembering, r"its forward sets attributes \(seen\)"),
        (OtherArguments, "its forward takes other arguments"),
        (Failing, "could not be compared: RuntimeError: wants a batch of its own"),
    ],
)
def test_a_forward_that_does_something_else_is_left(kind, reason):
    torch.manual_seed(0)
    model = kind(VOCAB, **SIZE)
    weights, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    report = accelerate(model)
    assert type(model) is kind
    assert names_of(report) == {"lstm": "PackedLSTM"}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.left[0].reason)
    assert not hasattr(model, "seen")
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_no_other_instance_and_no_class_is_touched():
    forwards = nn.LSTM.forward, plain_models.SurvivalLSTM.forward
    other, model = build_plain("survival"), build_plain("survival")
    accelerate(model)
    assert (nn.LSTM.forward, plain_models.SurvivalLSTM.forward) == forwards
    assert type(other) is plain_models.SurvivalLSTM
    assert type(other.lstm) is type(nn.LSTM(2, 2)) is nn.LSTM


# Pools --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("mean", "mean"),
        ("mean, any weights", "mean"),
        ("mean, 3 dimensions", "mean"),
        ("sum", "sum"),
        ("max", "max"),
    ],
)
@pytest.mark.parametrize("padding_idx", [0, None, 7])
def test_modules_that_pool_an_embedding(how, mode, padding_idx):
    torch.manual_seed(0)
    model = Pool(how, padding_idx=padding_idx)
    plain = copy.deepcopy(model)
    assert names_of(accelerate(model)) == {"": f"visit_mean_pool, mode {mode!r}"}
    codes, mask, _ = ragged_batch(fewest_codes=1)
    mask[..., 0] = True
    masks = [mask, mask.long(), mask.float(), mask * 0.3, mask.double()]
    for given in masks:
        outputs = [each(codes, given) for each in (model, plain)]
        torch.testing.assert_close(*outputs)
        for each, output in zip((model, plain), outputs, strict=True):
            each.zero_grad()
            output.square().sum().backward()
        torch.testing.assert_close(model.codes.weight.grad, plain.codes.weight.grad)
    if how != "mean, 3 dimensions":
        torch.testing.assert_close(model(codes[0], mask[0]), plain(codes[0], mask[0]))
    batch = PackedVisits.from_padded(codes, mask)
    torch.testing.assert_close(model(batch), batch.pack(plain(codes, mask)))


def test_pools_that_make_their_mask_or_have_none():
    codes = torch.randint(23, (3, 4, 5))
    codes[0, 0] = 0
    for model in (OwnMask(), OwnMask(padding_idx=7), EverySlot()):
        plain = copy.deepcopy(model)
        assert names_of(accelerate(model)) == {"": "visit_mean_pool, mode 'mean'"}
        torch.testing.assert_close(model(codes), plain(codes))


@pytest.mark.parametrize("aggregation", ["mean", "sum", "max"])
def test_a_visit_encoder_alone(aggregation):
    model = nn.Sequential(plain_models.VisitEncoder(6, aggregation)).eval()
    plain = copy.deepcopy(model)
    assert names_of(accelerate(model)) == {"0": "forward of VisitEncoder"}
    embeddings = torch.randn(8, 5, 6)
    mask = torch.rand(8, 5) < 0.5
    mask[:, 0] = True
    torch.testing.assert_close(model[0](embeddings, mask), plain[0](embeddings, mask))
    torch.testing.assert_close(model(embeddings), plain(embeddings))
