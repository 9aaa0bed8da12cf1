"""``accelerate`` and ``restore``: the same numbers, the same objects, and a report that is true."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, weight_norm
from torch.nn.utils.rnn import pack_sequence

import ehrseq_fast
from ehrseq_fast import PackedGRU, PackedLSTM, PackedVisits, accelerate, restore
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM, LSTMBaseline

from . import plain_models
from .dropin_models import EverySlot, Nested, OwnMask, Pool, PooledRecurrent, SquareRoot
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


def batch_for(variant, **options):
    fewest = 1 if variant in ("baseline-max", "baseline-attention") else 0
    return for_plain(variant, ragged_batch(fewest_codes=fewest, **options))


def vectors_and_mask(lengths=(4, 1, 6, 3)):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randn(*mask.shape, 6), mask


def names_of(report):
    return {entry.name: entry.after for entry in report.replaced}


# Whole models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_models_of_the_references_structure(variant):
    """Outputs and gradients as before; parameters, keys and classes too; and back again."""
    model, plain = build_plain(variant).eval(), build_plain(variant).eval()
    kind, parameters = type(model), list(model.parameters())
    report = accelerate(model)
    fused = variant != READS_PADDING
    assert [entry.name for entry in report.replaced] == ["", "lstm"][not fused :]
    assert [entry.name for entry in report.left] == [""][fused:]
    assert ("bidirectional" in str(report)) is not fused
    assert isinstance(model, kind)
    assert isinstance(model.lstm, (PackedLSTM, PackedGRU))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())

    batch = batch_for(variant)
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
    torch.testing.assert_close(model(*batch), plain.eval()(*batch))


@pytest.mark.parametrize("change", ["hook", "forward", "another head"])
def test_a_model_that_is_changed_afterwards_runs_its_own_forward(change):
    batch, seen = ragged_batch(), []
    model, plain = build_plain("survival").eval(), build_plain("survival").eval()
    accelerate(model)
    for each in (model, plain):
        if change == "hook":
            each.hazard_head.register_forward_hook(lambda m, i, o: seen.append(o.shape))
        elif change == "forward":
            each.embedding.forward = lambda codes, e=each.embedding: (
                2 * nn.Embedding.forward(e, codes)
            )
        else:
            torch.manual_seed(1)
            each.hazard_head = nn.Sequential(nn.Linear(5, 1), nn.Softmax(dim=1))  # over visits
    torch.testing.assert_close(model(*batch), plain(*batch))
    assert seen == ([(4, 7, 1)] * 2 if change == "hook" else [])


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


# Layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_a_model_that_packs_for_itself(kind, options):
    torch.manual_seed(0)
    model = PooledRecurrent(kind, **options)
    plain = copy.deepcopy(model)
    layer = model.rnn
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


# Names of the public package ----------------------------------------------------------------------


def test_the_public_packages_import_paths():
    """A search and replace of the package's name is enough for its LSTM models and losses."""
    from ehrseq_fast.models import (
        DiscreteTimeSurvivalLoss,
        HybridSurvivalLoss,
        PairwiseRankingLoss,
        VisitEncoder,
        concordance_index,
        create_lstm_baseline,
        losses,
        lstm_baseline,
        survival_lstm,
    )

    assert losses.DiscreteTimeSurvivalLoss is DiscreteTimeSurvivalLoss
    assert DiscreteTimeSurvivalLoss is ehrseq_fast.DiscreteTimeSurvivalLoss
    assert losses.HybridSurvivalLoss is HybridSurvivalLoss
    assert losses.PairwiseRankingLoss is PairwiseRankingLoss
    assert losses.FixedHorizonProgressionLoss is ehrseq_fast.losses.FixedHorizonProgressionLoss
    assert losses.MultiTaskSurvivalLoss is ehrseq_fast.losses.MultiTaskSurvivalLoss
    assert losses.concordance_index is concordance_index is ehrseq_fast.metrics.concordance_index
    assert survival_lstm.DiscreteTimeSurvivalLSTM is DiscreteTimeSurvivalLSTM
    names = ("DiscreteTimeSurvivalLSTMWithTime", "CompetingRisksSurvivalLSTM")
    for name in names:
        assert getattr(survival_lstm, name) is getattr(ehrseq_fast.models, name)
    assert lstm_baseline.LSTMBaseline is LSTMBaseline
    assert lstm_baseline.VisitEncoder is VisitEncoder
    assert lstm_baseline.create_lstm_baseline is create_lstm_baseline
    with pytest.raises(AttributeError, match="has no attribute 'BEHRT'"):
        _ = ehrseq_fast.models.BEHRT


def ranking_by_loops(risks, times, seen, margin):
    pairs = [
        max(0.0, margin - (float(risks[i]) - float(risks[j])))
        for i in range(len(risks))
        for j in range(len(risks))
        if i != j and seen[i] and times[i] <= times[j]
    ]
    return sum(pairs) / len(pairs) if pairs else 0.0


def test_pairwise_and_hybrid_losses():
    from ehrseq_fast.models.losses import HybridSurvivalLoss, PairwiseRankingLoss

    hazards = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    times, seen = torch.tensor([0, 3, 2, 2, 1, 3]), torch.tensor([1, 0, 1, 1, 0, 1])
    risks, mask = hazards.sum(1), torch.ones(6, 4)
    rank = PairwiseRankingLoss(margin=0.2)(risks, times, seen)
    expected = ranking_by_loops(risks.detach(), times, seen, 0.2)
    assert float(rank.detach()) == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda r: PairwiseRankingLoss(0.2)(r, times, seen), (risks,))
    nothing = PairwiseRankingLoss()(risks, times, torch.zeros(6))
    assert float(nothing.detach()) == 0
    nothing.backward(retain_graph=True)
    loss, parts = HybridSurvivalLoss(2.0, 3.0, margin=0.2)(hazards, risks, times, seen, mask)
    nll = ehrseq_fast.discrete_time_survival_nll(hazards, times, seen, mask)
    torch.testing.assert_close(loss, 2 * nll + 3 * rank)
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(
        {"total": float(loss.detach()), "nll": float(nll.detach()), "rank": float(rank.detach())}
    )
    with pytest.raises(ValueError, match=r"event_times: expected \[B\]"):
        PairwiseRankingLoss()(risks, times[:3], seen)
