"""Models on PackedVisits: the numbers of the padded paths, losses from codes, growing records."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ehrseq_fast import (
    CompetingRisksSurvivalLoss,
    DiscreteTimeSurvivalLoss,
    PackedRows,
)
from ehrseq_fast.losses import FixedHorizonProgressionLoss, compute_masked_loss
from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    HorizonSurvivalLSTM,
    LSTMBaseline,
)

from .batches import from_lists

VOCABULARY = 13
RECORDS = [[[1, 2], [3], [], [4, 4, 5]], [[6]], [[7, 8, 9], [1, 10]], [[2], [], [12]]]


def reads_features(of):
    """Whether a model, or one of a name, reads features of visits."""
    return of == "with time" or bool(getattr(of, "_n_visit_features", 0))


def batch(of=None, **fields):
    """For the model ``of``, or one of that name."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    features = [torch.rand(len(visits), 3, generator=generator) for visits in RECORDS]
    if not reads_features(of):
        features = None
    outcomes = {
        "event_times": torch.tensor([3, 0, 1, 1]),
        "event_indicators": torch.tensor([1, 0, 1, 0]),
        "event_types": torch.tensor([2, 0, 1, 0]),
        "targets": {"labels": torch.tensor([1, 0, 0, 1])},
        "visit_targets": {"days_to_end": [torch.arange(len(v), 0.0, -1) * 50 for v in RECORDS]},
    }
    return from_lists(
        RECORDS, vocab_size=VOCABULARY, visit_features=features, **{**outcomes, **fields}
    )


MODELS = {
    "survival": lambda **k: DiscreteTimeSurvivalLSTM(VOCABULARY, 6, 7, dropout=0.0, **k),
    "survival, two layers": lambda **k: DiscreteTimeSurvivalLSTM(
        VOCABULARY, 6, 7, num_layers=2, dropout=0.0, **k
    ),
    "survival, GRU": lambda **k: DiscreteTimeSurvivalLSTM(
        VOCABULARY, 6, 7, dropout=0.0, cell="gru", **k
    ),
    "with time": lambda **k: DiscreteTimeSurvivalLSTMWithTime(VOCABULARY, 6, 7, dropout=0.0, **k),
    "competing risks": lambda **k: CompetingRisksSurvivalLSTM(
        VOCABULARY, 3, 6, 7, dropout=0.0, **k
    ),
    **{
        f"baseline, {aggregation}": lambda aggregation=aggregation, **k: LSTMBaseline(
            VOCABULARY, 6, 7, dropout=0.0, visit_aggregation=aggregation, **k
        )
        for aggregation in ("mean", "sum", "max", "attention")
    },
}


# with a loss of their own (test_horizon_model.py)
OF_DAYS = {
    "horizons": lambda **k: HorizonSurvivalLSTM(VOCABULARY, (30, 120), 6, 7, dropout=0.0, **k)
}


def build(name, **options):
    torch.manual_seed(3)
    return (MODELS | OF_DAYS)[name](**options).eval()


def padded_loss(name, model, packed):
    """The loss by the padded way: the model on the triple, the criterion with its mask."""
    codes, visit_mask, sequence_mask = packed.to_padded()
    if name.startswith("baseline"):
        logits = model(codes, visit_mask, sequence_mask)["logits"]
        return F.binary_cross_entropy_with_logits(
            logits.squeeze(1), packed.targets["labels"].to(logits.dtype)
        )
    inputs = [codes, visit_mask, sequence_mask]
    if name == "with time":
        inputs.append(packed.pad(packed.visit_features))
    hazards = model(*inputs)
    if name == "competing risks":
        criterion, outcome = CompetingRisksSurvivalLoss(), packed.event_types
    else:
        criterion, outcome = DiscreteTimeSurvivalLoss(), packed.event_indicators
    return criterion(hazards, packed.event_times, outcome, sequence_mask)


@pytest.mark.parametrize("path", ["fused", "packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_padded_ones(unemulated, name, path):
    packed = batch(name)
    model, plain = build(name, path=path), build(name, path="padded")
    loss, expected = model.loss(packed), padded_loss(name, plain, packed)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_packed_rows(unemulated, name):
    packed = batch(name)
    model = build(name)
    codes, visit_mask, sequence_mask = packed.to_padded()
    if name.startswith("baseline"):
        ours = model(packed, return_hidden=True)
        theirs = model(codes, visit_mask, sequence_mask, return_hidden=True)
        torch.testing.assert_close(ours["logits"], theirs["logits"])
        torch.testing.assert_close(model.predict(packed), theirs["predictions"])
        rows, padded = ours["hidden_states"], theirs["hidden_states"]
    else:
        rows = model(packed)
        features = [packed.pad(packed.visit_features)] if name == "with time" else []
        padded = model(codes, visit_mask, sequence_mask, *features)
    assert isinstance(rows, PackedRows)
    assert rows.values.shape[0] == packed.n_visits
    torch.testing.assert_close(rows.to_padded(), padded)
    assert rows.to_padded(total_length=9).shape[1] == 9
    last = torch.tensor([len(visits) - 1 for visits in RECORDS])
    torch.testing.assert_close(rows.last(), padded[torch.arange(4), last])


def test_survival_curves_are_packed_too(unemulated):
    packed, model = batch(), build("survival")
    survival, cumulative = model.predict_survival(packed)
    padded_survival, padded_cumulative = model.predict_survival(*packed.to_padded())
    torch.testing.assert_close(survival.values, packed.pack(padded_survival))
    torch.testing.assert_close(
        cumulative.to_padded(),
        packed.pack(padded_cumulative).new_tensor(
            packed.pad(packed.pack(padded_cumulative)).tolist()
        ),
    )


@pytest.mark.parametrize("n_patients", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_growing_records_give_the_whole_forward(unemulated, name, n_patients):
    """After every visit, the state's answer is that of the record so far."""
    model = build(name)
    records = [
        [[3, 5], [2], [], [7, 7, 1]],
        [[1], [4], [9, 2], []],
        [[], [8], [6], [5]],
        [[12]] * 4,
    ]
    records = records[:n_patients]
    features = torch.rand(n_patients, 4, 3) if name == "with time" else None
    state = model.start(n_patients)
    for t in range(4):
        visit = [visits[t] for visits in records]
        answer, state = model.step(
            state,
            visit[0] if n_patients == 1 else visit,
            None if features is None else features[:, t],
        )
        so_far = from_lists(
            [visits[: t + 1] for visits in records],
            visit_features=None if features is None else list(features[:, : t + 1]),
        )
        whole = model(so_far)
        if name.startswith("baseline"):
            answer, whole = answer["logits"], whole["logits"]
        else:
            whole = whole.last()
        assert answer.shape == whole.shape
        torch.testing.assert_close(answer, whole, rtol=0, atol=1e-6)
        assert state.n_visits == t + 1
    assert not answer.requires_grad


def test_a_state_is_not_written_to(unemulated):
    model = build("survival")
    start = model.start()
    first, after = model.step(start, [1, 2])
    model.step(after, [3])
    again, _ = model.step(start, [1, 2])
    assert torch.equal(first, again)
    assert (start.h == 0).all()


def test_visit_level_criteria_work_on_rows(unemulated):
    labels = [torch.randint(0, 2, (len(visits),)) for visits in RECORDS]
    packed = batch(visit_targets={"progression": labels})
    rows = build("survival")(packed)
    logits, wanted = rows.values, packed.visit_targets["progression"]
    padded, mask = rows.to_padded(), packed.to_padded()[2]
    padded_labels = packed.pad(wanted, -1)
    criterion = FixedHorizonProgressionLoss()
    torch.testing.assert_close(
        criterion(logits, wanted, torch.ones_like(wanted)), criterion(padded, padded_labels, mask)
    )
    torch.testing.assert_close(
        F.binary_cross_entropy(logits, wanted.float()),
        compute_masked_loss(
            torch.nn.BCELoss(), padded, padded_labels.float().clamp(min=0), packed.lengths
        ),
    )


def test_multi_class_and_regression_losses(unemulated):
    packed = batch(
        targets={"kind": torch.tensor([2, 0, 1, 1]), "score": torch.tensor([0.5, 1.0, -1.0, 2.0])}
    )
    classes = LSTMBaseline(VOCABULARY, 6, 7, task="multi_class", output_dim=3).eval()
    expected = F.cross_entropy(classes(packed)["logits"], packed.targets["kind"])
    torch.testing.assert_close(classes.loss(packed, "kind"), expected)
    scores = LSTMBaseline(VOCABULARY, 6, 7, task="regression").eval()
    expected = F.mse_loss(scores(packed)["logits"].squeeze(1), packed.targets["score"])
    torch.testing.assert_close(scores.loss(packed, "score"), expected)


def test_class_indices_that_are_not_whole_are_refused():
    classes = LSTMBaseline(VOCABULARY, 6, 7, task="multi_class", output_dim=3).eval()
    whole = classes.loss(batch(targets={"kind": torch.tensor([2, 0, 1, 1])}), "kind")
    same = classes.loss(batch(targets={"kind": torch.tensor([2.0, 0.0, 1.0, 1.0])}), "kind")
    assert torch.equal(whole, same)
    for value in (1.7, float("nan"), float("inf")):
        labels = torch.tensor([2.0, 0.0, value, 1.0])
        with pytest.raises(ValueError, match=r"'kind': expected class indices, got .*patient 2"):
            classes.loss(batch(targets={"kind": labels}), "kind")


@pytest.mark.parametrize("n_patients", [1, 2])
def test_visits_may_be_read_once(n_patients):
    model = build("survival")
    codes = [[3, 5], [2, 2]][:n_patients]
    expected, _ = model.step(model.start(n_patients), codes)
    given = iter(codes) if n_patients > 1 else iter(codes[0])
    answer, _ = model.step(model.start(n_patients), given)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize("name", ["survival", "baseline, attention"])
def test_more_padding_changes_no_bit(unemulated, name):
    packed, model = batch(), build(name)
    codes, visit_mask, sequence_mask = packed.to_padded()
    wide = torch.full((4, 11, 9), -7)
    wide[:, :4, : codes.shape[2]] = codes
    wide_visit_mask = torch.zeros(4, 11, 9, dtype=torch.bool)
    wide_visit_mask[:, :4, : codes.shape[2]] = visit_mask
    wide_sequence_mask = torch.zeros(4, 11, dtype=torch.bool)
    wide_sequence_mask[:, :4] = sequence_mask
    narrow = model(codes, visit_mask, sequence_mask)
    broad = model(wide, wide_visit_mask, wide_sequence_mask)
    if name == "survival":
        assert torch.equal(broad[:, :4], narrow)
        assert (broad[:, 4:] == 0).all()
    else:
        assert torch.equal(broad["logits"], narrow["logits"])


@pytest.mark.parametrize("aggregation", ["mean", "sum", "max", "attention"])
def test_fractional_masks_still_weigh(unemulated, aggregation):
    """PackedVisits holds codes without weights; a fractional mask takes the padded way in."""
    codes, visit_mask, sequence_mask = batch().to_padded()
    weights = visit_mask * (0.25 + torch.rand(visit_mask.shape))
    model = build(f"baseline, {aggregation}")
    fused = model(codes, weights, sequence_mask)["logits"]
    model.path = "padded"
    torch.testing.assert_close(fused, model(codes, weights, sequence_mask)["logits"])


BAD = {
    "masks beside a packed batch": (
        lambda: build("survival")(batch(), torch.ones(4, 4, 3)),
        ValueError,
        "masks and features: expected none",
    ),
    "features beside a packed batch": (
        lambda: build("with time")(batch("with time"), time_features=torch.ones(4, 4, 3)),
        ValueError,
        "masks and features: expected none",
    ),
    "no outcomes": (
        lambda: build("survival").loss(from_lists(RECORDS)),
        ValueError,
        "event_times and event_indicators: expected",
    ),
    "no event types": (
        lambda: build("competing risks").loss(from_lists(RECORDS)),
        ValueError,
        "event_times and event_types: expected",
    ),
    "no such target": (
        lambda: build("baseline, mean").loss(batch(), "readmission"),
        KeyError,
        r"expected one of \[.*labels.*\], got .*readmission",
    ),
    "no patient": (
        lambda: build("survival")(from_lists([])),
        ValueError,
        "expected at least one patient",
    ),
    "code outside the vocabulary": (
        lambda: build("survival")(from_lists([[[VOCABULARY]]])),
        IndexError,
        "Found 1 codes outside the vocabulary: expected 0 <= code < 13",
    ),
    "features of another width": (
        lambda: build("with time")(from_lists([[[1]]], visit_features=[torch.ones(1, 2)])),
        ValueError,
        "visit_features: expected 3 features",
    ),
    "step of a bidirectional model": (
        lambda: DiscreteTimeSurvivalLSTM(9, 4, 4, bidirectional=True).start(),
        ValueError,
        "bidirectional model cannot score",
    ),
    "step of other patients": (
        lambda: build("survival").step(build("survival").start(2), [[1]]),
        ValueError,
        "visit: expected one for each of the 2 patients of state, got 1",
    ),
    "step with features that do not fit": (
        lambda: build("with time").step(build("with time").start(), [1], torch.ones(5, 3)),
        ValueError,
        r"visit_features: expected \[B, F\] = \[1, 3\], got shape \[5, 3\]",
    ),
    "step with features that are not taken": (
        lambda: build("survival").step(build("survival").start(), [1], torch.ones(1, 3)),
        ValueError,
        "visit_features: expected None",
    ),
    "target of another shape": (
        lambda: build("baseline, mean").loss(batch(targets={"labels": torch.ones(4, 2)})),
        ValueError,
        r"target 'labels': expected \[B, O\] = \[4, 1\], got shape \[4, 2\]",
    ),
    "NaN in a mask": (
        lambda: build("survival")(
            torch.ones(1, 2, 1, dtype=torch.long), None, torch.tensor([[1.0, float("nan")]])
        ),
        ValueError,
        r"sequence_mask: expected numbers, got NaN \(patient 0; 1 in all\)",
    ),
    "step with an unknown code": (
        lambda: build("survival").step(build("survival").start(), [99]),
        IndexError,
        "outside the vocabulary",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(unemulated, name, monkeypatch):
    monkeypatch.setenv("EHRSEQ_FAST_VALIDATE", "1")  # a GPU's values are checked on request
    call, error, message = BAD[name]
    if name == "NaN in a mask" and torch.get_default_device().type != "cpu":
        pytest.skip("a GPU's mask is read once, for its lengths")
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_train_from_codes(unemulated, dtype):
    model, wide = build("survival").to(dtype), build("survival")
    loss = model.loss(batch(model))
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide.loss(batch(wide)), rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("path", ["fused", "packed", "padded"])
@pytest.mark.parametrize("name", MODELS | OF_DAYS)
def test_features_that_a_model_would_not_see_are_refused(unemulated, name, path):
    """Ignored, they would look like a model that learnt nothing from them."""
    model = build(name, path=path)
    others = batch(None if name == "with time" else "with time")
    message = (
        r"visit_features: expected \[n_visits, 3\], which .*WithTime reads, got None"
        if name == "with time"
        else r"visit_features: expected None, as .* reads none, got \[10, 3\]; batch.with_features"
    )
    for call in (model, model.loss):
        with pytest.raises(ValueError, match=message):
            call(others)
    wanted = torch.ones(others.n_visits, 3) if name == "with time" else None
    model.loss(others.with_features(wanted))


@pytest.mark.parametrize("path", ["fused", "packed", "padded"])
@pytest.mark.parametrize("width", [1, 5])
def test_features_of_any_width(unemulated, width, path):
    model = build("with time", path=path, time_features=width)
    packed = batch().with_features(torch.rand(batch().n_visits, width))
    rows = model(packed)
    padded = model(*packed.to_padded(), time_features=packed.pad(packed.visit_features))
    torch.testing.assert_close(rows.to_padded(), padded)
    rows.values.sum().backward()
    assert model.time_encoder[0].weight.grad.shape == (16, width)
    with pytest.raises(ValueError, match=rf"\[B, V, {width}\]"):
        model(*packed.to_padded(), time_features=torch.ones(4, 4, 3))
    other = packed.with_features(torch.ones(packed.n_visits, width + 1))
    with pytest.raises(ValueError, match=f"expected {width} features, got {width + 1}"):
        model(other)
    state = model.start(4)
    model.step(state, [[1]] * 4, torch.ones(4, width))
    with pytest.raises(ValueError, match="time_features: expected 1 to"):
        build("with time", time_features=0)
