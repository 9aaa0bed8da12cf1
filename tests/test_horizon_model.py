"""Risks by horizon from every visit: the likelihood against loops, the truth of simulations, and
the rules of the other models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ehrseq_fast import PackedRows, PackedVisits, packed_survival_nll
from ehrseq_fast.models import DiscreteTimeSurvivalLSTM, HorizonSurvivalLSTM, ModelWithLoss
from ehrseq_fast.models.intervals import interval_hazards

VOCABULARY = 13
HORIZONS = (30, 90, 365)
RECORDS = [[[1, 2], [3], [], [4, 4, 5]], [[6]], [[7, 8, 9], [1, 10]], [[2], [], [12]]]
# an event on the day of the visit, exactly at a boundary, inside, beyond; censored likewise
DAYS = [[400.0, 365.0, 90.0, 0.0], [30.0], [100.5, 20.0], [366.0, 365.0, 0.0]]


def batch(**fields):
    days = [torch.tensor(days) for days in DAYS]
    outcomes = {
        "event_times": [3, 0, 1, 2],
        "event_indicators": [1, 0, 1, 0],
        "visit_targets": {"days_to_end": days},
    }
    return PackedVisits.from_lists(RECORDS, vocab_size=VOCABULARY, **{**outcomes, **fields})


def build(**options):
    torch.manual_seed(3)
    return HorizonSurvivalLSTM(VOCABULARY, HORIZONS, 6, 7, **options).eval()


def loop(logits, days, event, horizons):
    """−log likelihood of one visit, by the integral of the rate, in float64."""
    total, start = 0.0, 0.0
    for z, end in zip(logits.double(), horizons, strict=True):
        cumulative = -torch.log1p(-torch.sigmoid(z))
        if days > end:
            total = total + cumulative
        else:
            total = total + cumulative * (days - start) / (end - start)
            return total - cumulative.log() if event else total
        start = end
    return total


def loop_of(model, packed, entry=(0, 0, 0, 0)):
    """Per patient, with the sum over its visits."""
    logits = model(packed, output="logits")
    logits = logits["horizons"] if isinstance(logits, dict) else logits
    padded = logits.to_padded()
    return torch.stack(
        [
            sum(
                (
                    loop(padded[p, t], DAYS[p][t], int(packed.event_indicators[p]), HORIZONS)
                    for t in range(entry[p], int(packed.event_times[p]) + 1)
                ),
                torch.zeros((), dtype=torch.float64),
            )
            for p in range(len(RECORDS))
        ]
    )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("visit_hazard", [False, True])
def test_the_loss_is_the_loops(cell, visit_hazard):
    model = build(cell=cell, visit_hazard=visit_hazard, visit_weight=0.5).double()
    packed = batch()
    expected = loop_of(model, packed)
    if visit_hazard:
        visit = model(packed, output="logits")["visit"]
        expected = expected + 0.5 * packed_survival_nll(visit, from_logits=True, reduction="none")
    found = model.loss(packed, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.loss(packed), expected.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.loss(packed, reduction="sum"), expected.sum())
    ours = torch.autograd.grad(model.loss(packed), list(model.parameters()))
    theirs = torch.autograd.grad(expected.mean(), list(model.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-14)


def test_entry_times_weights_and_visits_behind_the_event():
    model, packed = build().double(), batch()
    late = packed.with_outcomes(event_times=[2, 0, 0, 2])
    torch.testing.assert_close(
        model.loss(late, reduction="none"), loop_of(model, late), rtol=1e-12, atol=0
    )
    entry = torch.tensor([1, 0, 1, 2])
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    expected = loop_of(model, packed, entry.tolist())
    found = model.loss(packed, entry_times=entry, sample_weight=weight, reduction="none")
    torch.testing.assert_close(found, expected * weight.double(), rtol=1e-12, atol=0)
    held = packed.with_outcomes(targets={"entry_times": entry})
    assert torch.equal(model.loss(held), model.loss(packed, entry_times=entry))
    # without event_times every visit of the batch counts
    free = packed.with_outcomes(event_times=None)
    assert torch.equal(model.loss(free), model.loss(packed))


def test_days_of_visits_that_do_not_count_are_not_read():
    model, packed = build(), batch()
    entry = torch.tensor([1, 0, 0, 0])
    days = packed.visit_targets["days_to_end"].clone()
    days[packed.rows_of(0)[0]] = math.nan
    broken = packed.with_outcomes(visit_targets={"days_to_end": days})
    assert torch.equal(model.loss(broken, entry_times=entry), model.loss(packed, entry_times=entry))
    with pytest.raises(ValueError, match=r"got nan \(patient 0, visit 0; 1 in all\)"):
        model.loss(broken)


def test_a_trained_model_knows_the_risks():
    """Two kinds of patients with constant rates, censored inside intervals."""
    rng = np.random.default_rng(0)
    rates, n = {1: 0.01, 2: 0.001}, 4000
    kinds = rng.integers(1, 3, n)
    event = rng.exponential(1 / np.vectorize(rates.get)(kinds))
    end = rng.uniform(0, 500, n)
    packed = PackedVisits.from_lists(
        [[[int(kind)]] for kind in kinds],
        event_times=np.zeros(n, int),
        event_indicators=(event <= end).astype(int),
        visit_targets={"days_to_end": np.minimum(event, end)[:, None].astype(np.float32).ravel()},
    )
    torch.manual_seed(0)
    model = HorizonSurvivalLSTM(3, HORIZONS, 4, 8, dropout=0.0)
    days = packed.visit_targets["days_to_end"]
    model.set_base_hazards(
        interval_hazards(days, packed.event_indicators[packed.patient_of_row], HORIZONS)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(250):
        optimizer.zero_grad()
        model.loss(packed).backward()
        optimizer.step()
    model.eval()
    risks = model.predict_risk(PackedVisits.from_lists([[[1]], [[2]]])).to_padded()[:, 0]
    truth = torch.tensor([[-math.expm1(-rates[k] * b) for b in HORIZONS] for k in (1, 2)])
    torch.testing.assert_close(risks.detach(), truth.float(), atol=0.03, rtol=0.15)


def test_observed_hazards_have_logits():
    """Also where every event is on the day of its visit, or there is none."""
    for days, seen in (([0.0, 0.0], [1, 1]), ([0.0], [0]), ([500.0], [0]), ([20.0, 40.0], [1, 1])):
        found = interval_hazards(days, seen, HORIZONS)
        assert ((found > 0) & (found < 1)).all()
        build().set_base_hazards(found)


@pytest.mark.parametrize("visit_hazard", [False, True])
@pytest.mark.parametrize("path", ["fused", "packed", "padded"])
def test_paths_and_padded_input_agree(path, visit_hazard):
    packed = batch()
    fused, model = (build(path=p, visit_hazard=visit_hazard) for p in ("fused", path))
    codes, visit_mask, sequence_mask = packed.to_padded(total_length=6)
    for output in ("hazards", "logits", "risks"):
        rows = fused(packed, output=output)
        padded = model(codes, visit_mask, sequence_mask, output=output)
        if not visit_hazard:
            rows, padded = {"horizons": rows}, {"horizons": padded}
        for name, expected in rows.items():
            assert isinstance(expected, PackedRows)
            torch.testing.assert_close(padded[name], expected.to_padded(total_length=6))
            assert (padded[name][~sequence_mask] == 0).all()
    torch.testing.assert_close(model.loss(packed), fused.loss(packed))
    torch.testing.assert_close(
        model.predict_risk(codes, visit_mask, sequence_mask),
        fused.predict_risk(packed).to_padded(total_length=6),
    )


def test_risks_are_products_of_hazards():
    model, packed = build().double(), batch()
    hazards = model(packed).values
    torch.testing.assert_close(model.predict_risk(packed).values, 1 - (1 - hazards).cumprod(1))
    with torch.no_grad():
        model.horizon_head[3].weight.zero_()
    model.set_base_hazards([1e-18, 1e-18, 0.5])
    risks = model.predict_risk(packed).values
    assert risks[0].tolist() == pytest.approx([1e-18, 2e-18, 0.5], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    narrow, wide = build(visit_hazard=True).to(dtype), build(visit_hazard=True)
    packed = batch()
    out = narrow(packed)
    assert out["horizons"].dtype == dtype
    assert out["visit"].dtype == dtype
    assert narrow.predict_risk(packed).dtype == torch.float32
    loss = narrow.loss(packed)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide.loss(packed), rtol=2e-2, atol=2e-2)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in narrow.parameters())
    # the horizons are kept as they are
    assert torch.equal(narrow._bounds, wide._bounds)


def test_weights_of_the_visit_model_fit():
    """One ``state_dict`` for what both have: the head's sigmoid has no weights."""
    torch.manual_seed(1)
    other = DiscreteTimeSurvivalLSTM(VOCABULARY, 6, 7).eval()
    model, packed = build(visit_hazard=True), batch()
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith("horizon_head") for name in missing)
    torch.testing.assert_close(model(packed)["visit"].values, other(packed).values)
    again = build(visit_hazard=True)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.loss(packed), model.loss(packed))
    assert "_bounds" not in model.state_dict()


@pytest.mark.parametrize("visit_hazard", [False, True])
def test_growing_records(visit_hazard):
    model, record = build(visit_hazard=visit_hazard), [[3, 5], [2], [], [7, 1]]
    state = model.start()
    for t, visit in enumerate(record):
        answer, state = model.step(state, visit)
        whole = model(PackedVisits.from_lists([record[: t + 1]]))
        if not visit_hazard:
            answer, whole = {"horizons": answer}, {"horizons": whole}
        for name, values in answer.items():
            torch.testing.assert_close(values, whole[name].last(), rtol=0, atol=1e-6)


def test_hooks_are_called():
    model, packed, seen = build(visit_hazard=True), batch(), []
    expected = model(packed)["horizons"].values
    model.register_forward_hook(lambda *call: seen.append("model"))
    model.horizon_head.register_forward_hook(lambda *call: seen.append("head"))
    model.horizon_head[1].register_forward_hook(lambda m, i, out: (seen.append("relu"), out)[1])
    torch.testing.assert_close(model(packed)["horizons"].values, expected)
    assert seen == ["relu", "head", "model"]
    seen.clear()
    model.loss(packed)
    assert seen == ["relu", "head", "model"]
    model.horizon_head[3] = nn.Linear(7, 3, bias=False)
    assert model.loss(packed).isfinite()


def test_with_loss_and_shards():
    """Shards' sums over all patients are the whole batch's mean: what processes compute."""
    model, packed = build(visit_hazard=True), batch()
    training = ModelWithLoss(model, across_processes=True)
    assert torch.equal(training(packed), model.loss(packed))
    shards = [packed[[0]], packed[[1, 2, 3]]]
    total = sum(model.loss(shard, reduction="sum") for shard in shards)
    divisor = sum(model._loss_divisor(shard) for shard in shards)
    torch.testing.assert_close((total / divisor).float(), model.loss(packed))


def test_same_bits_for_any_number_of_threads():
    rng = np.random.default_rng(1)
    records = [[[int(c)] for c in rng.integers(1, 9, n)] for n in rng.integers(1, 30, 200)]
    packed = PackedVisits.from_lists(
        records,
        event_times=[len(r) - 1 for r in records],
        event_indicators=rng.integers(0, 2, len(records)),
        visit_targets={"days_to_end": [rng.uniform(0, 500, len(r)) for r in records]},
    )
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = build(visit_hazard=True).train()
            torch.manual_seed(0)
            loss = model.loss(packed)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_of_samples_by_transforms():
    model, packed = build(visit_hazard=True).double(), batch()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        with torch.nn.utils.stateless._reparametrize_module(model, parameters):
            return model.loss(packed)

    found = torch.func.grad(loss)(parameters)
    model.loss(packed).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def days(*values):
    return {"days_to_end": torch.tensor(values, dtype=torch.float32)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"visit_targets": None}, r"expected 'days_to_end', .* got \[\]"),
        ({"event_indicators": None}, r"batch.event_indicators: expected one per patient, got None"),
        ({"visit_targets": days(*[-1.0] * 10)}, r"got -1 \(patient 0, visit 0; 10 in all\)"),
        ({"visit_targets": days(*[math.inf] * 10)}, r"expected finite days from 0, got inf"),
        (
            {"visit_targets": {"days_to_end": torch.ones(10, 2)}},
            r"expected \[n_visits\] = \[10\], got \[10, 2\]",
        ),
    ],
)
def test_refuses_outcomes(fields, message):
    with pytest.raises(ValueError, match=message):
        build().loss(batch(**fields))


@pytest.mark.parametrize("weight", [math.nan, math.inf])
@pytest.mark.parametrize("visit_hazard", [False, True])
def test_a_weight_that_is_not_finite_shows(visit_hazard, weight):
    model, packed = build(visit_hazard=visit_hazard), batch()
    weights = torch.tensor([1.0, weight, 1.0, 1.0])
    each = model.loss(packed, sample_weight=weights, reduction="none")
    assert each.isfinite().tolist() == [True, False, True, True]
    loss = model.loss(packed, sample_weight=weights)
    assert not loss.isfinite()
    loss.backward()
    assert not model.horizon_head[-1].bias.grad.isfinite().all()


def test_refuses():
    model, packed = build(), batch()
    with pytest.raises(ValueError, match="entry time 2 and last visit 1"):
        model.loss(packed, entry_times=torch.tensor([0, 0, 2, 0]))
    with pytest.raises(ValueError, match=r"entry_times: expected \[B\] = \[4\], got \[3\]"):
        model.loss(packed, entry_times=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weights from 0, got -1 \(patient 2; 1 in all\)"):
        model.loss(packed, sample_weight=torch.tensor([1.0, 1, -1, 1]))
    with pytest.raises(ValueError, match=r"sample_weight: expected \[B\] = \[4\], got \[1\]"):
        model.loss(packed, sample_weight=torch.ones(1))
    with pytest.raises(ValueError, match="censored_visit: expected None without visit_hazard"):
        model.loss(packed, censored_visit="included")
    with pytest.raises(ValueError, match="reduction: expected one of"):
        model.loss(packed, reduction="max")
    with pytest.raises(ValueError, match="output: expected one of"):
        model(packed, output="survival")
    with pytest.raises(TypeError, match="batch: expected a PackedVisits"):
        model.loss(packed.to_padded())
    with pytest.raises(ValueError, match="visit: expected None without visit_hazard=True"):
        model.set_base_hazards([0.1, 0.1, 0.1], 0.2)
    with pytest.raises(ValueError, match=r"horizons: expected hazards in \(0, 1\)"):
        model.set_base_hazards([0.1, 1.0, 0.1])
    with pytest.raises(ValueError, match="horizons: expected 3 hazards"):
        model.set_base_hazards([0.1])
    with pytest.raises(ValueError, match="visit_weight: expected a finite weight from 0, got -1"):
        HorizonSurvivalLSTM(VOCABULARY, visit_weight=-1)
    with pytest.raises(ValueError, match="event_times and event_indicators: expected"):
        build(visit_hazard=True).loss(batch(event_times=None))
