"""Whether the event comes within a horizon: labels by hand, the loss on every layout, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    fixed_horizon_bce,
    fixed_horizon_labels,
    use_backend,
)
from ehrseq_fast.fixed_horizon import reference
from ehrseq_fast.losses import FixedHorizonProgressionLoss
from ehrseq_fast.visitwise import Visits

from .fixed_horizon_cases import AXES, DTYPES, REDUCTIONS, draw, packed_of
from .survival_cases import value_and_grad
from .tolerances import assert_matches

pytestmark = pytest.mark.operation("fixed_horizon")


def label_by_hand(now, time, seen, horizon):
    """1, 0, or None where it is not known or the visit does not count."""
    if now >= time:
        return None
    if seen:
        return int(time <= now + horizon)
    return 0 if time >= now + horizon else None


@pytest.mark.parametrize("axis", AXES)
def test_labels_one_by_one(axis):
    _, mask, given, _ = draw(60, 9, axis)
    labels, known = fixed_horizon_labels(sequence_mask=mask, **given)
    days = given.get("visit_times", torch.arange(9.0).expand(60, 9))
    kinds = set()
    for p in range(60):
        time, seen = given["event_times"][p].item(), given["event_indicators"][p].item()
        for t in range(9):
            wanted = label_by_hand(days[p, t].item(), time, seen, given["horizon"])
            if not mask[p, t]:
                wanted = None
            assert known[p, t] == (wanted is not None)
            assert labels[p, t] == (wanted or 0)
            kinds.add((seen, wanted))
    assert kinds == {(0, None), (0, 0), (1, None), (1, 0), (1, 1)}


def test_labels_at_the_ends_of_the_horizon():
    """Event at the horizon's end: within. Censored there: nothing came. The event's visit: out."""
    times, seen = torch.tensor([3, 3]), torch.tensor([1, 0])
    labels, known = fixed_horizon_labels(times, seen, 2, torch.ones(2, 5))
    assert labels.tolist() == [[0, 1, 1, 0, 0], [0] * 5]
    assert known.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    always = (torch.tensor([torch.inf]), torch.tensor([0]))
    days = torch.tensor([[0.0, 5.0]])
    assert fixed_horizon_labels(*always, 30, visit_times=days)[1].all()
    labels, known = fixed_horizon_labels(*always, torch.inf, visit_times=days)
    assert known.all()
    assert not labels.any()


def loss_on_real_rows(x, mask, given, weights, reduction, pos_weight):
    """By PyTorch's own function, of labels from fixed_horizon_labels."""
    labels, known = fixed_horizon_labels(sequence_mask=mask, **given)
    weight = known.to(x.dtype)
    if weights:
        weight = weight * weights["visit_weight"] * weights["sample_weight"][:, None]
    factor = None if pos_weight is None else x.new_tensor(pos_weight)
    terms = F.binary_cross_entropy_with_logits(
        torch.where(known, x, 0), labels.to(x.dtype), weight, reduction="none", pos_weight=factor
    )
    if reduction == "none":
        return terms
    return terms.sum() / (weight.sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("weighted", "pos_weight"), [(False, None), (True, 2.5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_is_bce_of_the_visits_that_count(unemulated, axis, weighted, reduction, pos_weight):
    x, mask, given, weights = draw(40, 37, axis, torch.float64)
    weights = weights if weighted else {}
    options = {"reduction": reduction, "pos_weight": pos_weight, **given, **weights}
    got = value_and_grad(lambda x: fixed_horizon_bce(x, sequence_mask=mask, **options), x)
    wanted = value_and_grad(loss_on_real_rows, x, mask, given, weights, reduction, pos_weight)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis", "weighted", "scale"),
    [
        ((1, 1), "visits", False, 2.0),
        ((70, 5), "days", True, 2.0),
        ((20, 33), "visits", False, 1e4),
        ((3, 200), "days", False, 2.0),
        ((20, 33), "days", True, 1e4),
    ],
)
def test_agrees_with_the_reference(unemulated, shape, axis, weighted, dtype, scale):
    x, mask, given, weights = draw(*shape, axis, dtype, scale)
    weights = weights if weighted else {}
    outcomes = (given["event_times"], given["event_indicators"])
    times, horizon = given.get("visit_times"), float(given["horizon"])
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "pos_weight": 1.5, **weights}
        value, grad = value_and_grad(
            lambda x, o=options: fixed_horizon_bce(x, sequence_mask=mask, **given, **o), x
        )
        wide, wide_grad = value_and_grad(
            reference.fixed_horizon_bce,
            x.double(),
            *outcomes,
            Visits(mask),
            times,
            horizon,
            **options,
        )
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert grad.dtype == dtype
        assert value.isfinite().all()
        assert_matches(value, wide, scale=wide.abs() + scale, terms=shape[1])
        assert_matches(grad, wide_grad, scale=wide_grad.abs().max() + 1, terms=shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("axis", "weighted"), [*((axis, False) for axis in AXES), ("days", True)])
def test_packed_has_the_bits_of_padded(compiled, axis, weighted, dtype):
    x, mask, given, weights = draw(150, 21, axis, dtype)
    mask[:, 0] = True  # a packed patient has a visit
    rows = packed_of(x, mask)
    batch = rows.batch
    for reduction in REDUCTIONS:
        options = {**given, **(weights if weighted else {}), "reduction": reduction}
        value, grad = value_and_grad(
            lambda x, o=options: fixed_horizon_bce(x, sequence_mask=mask, **o), x
        )
        for name in {"visit_times", "visit_weight"} & options.keys():
            options[name] = batch.pack(options[name])
        values = rows.values.detach().clone().requires_grad_()
        packed = fixed_horizon_bce(PackedRows(values, batch), **options)
        scale = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
        if reduction == "none":
            value, scale = batch.pack(value), batch.pack(scale)
        assert torch.equal(packed.detach(), value)
        (of_rows,) = torch.autograd.grad(packed, values, scale)
        assert torch.equal(of_rows, batch.pack(grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_every_kernel_agrees_with_the_reference(backend, layout, dtype):
    """Small, as some are emulated."""
    for axis, shape in (("visits", (3, 5)), ("days in any order", (9, 11))):
        x, mask, given, weights = draw(*shape, axis, dtype, 20.0)
        mask[:, 0] = True
        rows = packed_of(x, mask)
        count = rows.batch.pack if layout == "packed" else lambda values: values
        for reduction, weighted in zip(REDUCTIONS, (True, False, True), strict=True):
            options = {"reduction": reduction, "pos_weight": 1.5, **(weights if weighted else {})}
            wide, wide_grad = value_and_grad(
                reference.fixed_horizon_bce,
                x.double(),
                given["event_times"],
                given["event_indicators"],
                Visits(mask),
                given.get("visit_times"),
                float(given["horizon"]),
                **options,
            )
            visits = {"visit_times": given.get("visit_times"), **options, **given}
            if layout == "packed":
                for name in {"visit_times", "visit_weight"} & visits.keys():
                    visits[name] = None if visits[name] is None else count(visits[name])
            leaf = count(torch.where(mask, x, torch.nan)).detach().requires_grad_()
            if layout == "packed":
                value = fixed_horizon_bce(PackedRows(leaf, rows.batch), **visits)
            else:
                value = fixed_horizon_bce(leaf, sequence_mask=mask, **visits)
            scale = torch.arange(1.0, wide.numel() + 1, dtype=value.dtype).reshape(wide.shape)
            wanted = wide
            if reduction == "none":
                wanted, scale = count(wide), count(scale)
            (grad,) = torch.autograd.grad(value, leaf, scale)
            assert_matches(value.detach(), wanted, scale=40, terms=shape[1])
            wanted_grad = count(wide_grad)
            assert_matches(grad, wanted_grad, scale=wide_grad.abs().max() + 1, terms=shape[1])
            assert not grad[wanted_grad == 0].any()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_does_not_count_is_never_read(unemulated, axis, reduction):
    x, mask, given, weights = draw(30, 20, axis)
    known = fixed_horizon_labels(sequence_mask=mask, **given)[1]

    def run(x, **changed):
        options = {**given, **weights, "reduction": reduction, **changed}
        return value_and_grad(lambda x: fixed_horizon_bce(x, sequence_mask=mask, **options), x)

    expected = run(x)
    changed = {"visit_weight": torch.where(mask, weights["visit_weight"], torch.nan)}
    if "visit_times" in given:
        changed["visit_times"] = torch.where(mask, given["visit_times"], torch.nan)
    got = run(torch.where(known, x, torch.nan), **changed)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not got[1][~known].any()
    weights.clear()
    got = run(torch.where(known, x, torch.nan))
    assert got[0].isfinite().all()
    assert not got[1][~known].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_not_finite_is_seen(backend, weighted, value):
    x = torch.zeros(2, 20)
    x[0, 17] = x[1, 3] = value
    given = (torch.tensor([19, 19]), torch.tensor([1, 1]), 3)
    weights = {"visit_weight": torch.ones(2, 20)} if weighted else {}

    def run(x):
        return fixed_horizon_bce(x, *given, reduction="none", **weights)

    got, grad = value_and_grad(run, x)
    with use_backend("reference"):
        wanted, wanted_grad = value_and_grad(run, x)
    assert_matches(got, wanted.double(), scale=1)
    assert_matches(grad, wanted_grad.double(), scale=40)
    assert (~got.isfinite()).sum() == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(0, 1), (0, 17), (0, 38), (1, 1), (1, 6)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_is_not_finite_is_seen_in_a_sum(backend, reduction, at, value):
    """With a label of 0 or 1, among many visits or few: as PyTorch's own loss has it, which is NaN
    for an infinite logit on the label's side."""
    x = torch.zeros(2, 40)
    x[at] = value
    times = torch.tensor([39, 8])
    got = fixed_horizon_bce(x, times, torch.tensor([1, 1]), 3, reduction=reduction)
    visit = torch.arange(40)
    counts = visit < times[:, None]
    within = (visit + 3 >= times[:, None]).float()
    wanted = F.binary_cross_entropy_with_logits(x[counts], within[counts], reduction=reduction)
    torch.testing.assert_close(got, wanted, equal_nan=True)


def test_no_visit_that_counts(backend):
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    for reduction in REDUCTIONS:
        # censored within the horizon, and an event before the first visit
        times, seen = torch.tensor([2, 0]), torch.tensor([0, 1])
        loss = fixed_horizon_bce(x, times, seen, 9, reduction=reduction).sum()
        assert loss == 0
        assert not torch.autograd.grad(loss, x)[0].any()
        none = (x[:0], times[:0], seen[:0], 9)
        assert fixed_horizon_bce(*none, reduction=reduction).sum() == 0
        assert fixed_horizon_bce(x[:, :0], times, seen, 9, reduction=reduction).sum() == 0


@pytest.mark.parametrize("axis", ["visits", "days"])
def test_derivatives(unemulated, axis):
    x, mask, given, weights = draw(5, 4, axis, torch.float64)
    x.requires_grad_()
    for reduction in ("mean", "none"):

        def run(x, reduction=reduction):
            return fixed_horizon_bce(
                x, sequence_mask=mask, reduction=reduction, pos_weight=2.0, **given, **weights
            )

        assert torch.autograd.gradcheck(run, x)
        assert torch.autograd.gradgradcheck(run, x)
        tangent = torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))[1]
        (grad,) = torch.autograd.grad(run(x).sum(), x)
        torch.testing.assert_close(tangent.sum(), grad.sum())
    mapped = torch.func.vmap(run)(torch.stack([x.detach(), -x.detach()]))
    torch.testing.assert_close(mapped[1], run(-x.detach()))


@pytest.mark.parametrize("grad", ["stride 0", "strided"])
def test_gradients_of_any_strides(unemulated, grad):
    x, mask, given, _ = draw(12, 5, "days")
    x = x.t().contiguous().t().requires_grad_()
    given["visit_times"] = given["visit_times"].t().contiguous().t()
    loss = fixed_horizon_bce(x, sequence_mask=mask, reduction="none", **given)
    scale = torch.tensor(2.0).expand(12, 5) if grad == "stride 0" else torch.randn(5, 24).t()[::2]
    (got,) = torch.autograd.grad(loss, x, scale)
    wanted = loss_on_real_rows(wide := x.detach().double().requires_grad_(), mask, given, {},
                               "none", None)  # fmt: skip
    (wanted_grad,) = torch.autograd.grad(wanted, wide, scale.double())
    assert_matches(got, wanted_grad, scale=4)


@pytest.mark.parametrize("axis", AXES)
def test_same_bits_for_any_number_of_threads_and_every_time(compiled, axis):
    x, mask, given, _ = draw(1500, 60, axis)

    def run():
        return value_and_grad(lambda x: fixed_horizon_bce(x, sequence_mask=mask, **given), x)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run()
        torch.set_num_threads(2)
        again = [run() for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    for second in again:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators_and_compile(compiled):
    x, mask, given, weights = draw(5, 4, "days")
    times, seen, days = (given[k] for k in ("event_times", "event_indicators", "visit_times"))
    operator = torch.ops.ehrseq_fast.fixed_horizon_bce.default
    none = [None] * 3
    torch.library.opcheck(
        operator, (x, times, seen, mask, *none, days, None, None, 60.0, 1.0, 0, True)
    )
    labels = torch.rand(5, 4)
    torch.library.opcheck(torch.ops.ehrseq_fast.masked_bce.default, (x, labels, mask.float(), True))
    mask[:, 0] = True
    rows = packed_of(x, mask)
    batch = rows.batch
    layout = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
    sample = weights["sample_weight"]
    torch.library.opcheck(
        operator,
        (rows.values, times.long(), seen, None, *layout, None, None, sample, 2.0, 3.0, 1, False),
    )
    for reduction in ("mean", "none"):

        def run(x, reduction=reduction):
            return fixed_horizon_bce(x, sequence_mask=mask, reduction=reduction, **given)

        fast = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        got, expected = value_and_grad(fast, x), value_and_grad(run, x)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


DAYS = torch.tensor([[0.0, 10, 20], [0, 5, 9]])
BAD = [
    ({"logits": torch.zeros(2)}, ValueError, r"logits: expected shape \[B, V\], got \[2\]"),
    ({"event_times": None}, TypeError, "event_times: expected a tensor"),
    ({"event_times": torch.tensor([1.0, 2.0])}, TypeError, "as there are no visit_times.*float32"),
    ({"event_times": torch.tensor([1, -1])}, ValueError, "counted from 0: patient 1 has -1 "),
    ({"event_times": torch.tensor([1])}, ValueError, r"event_times: expected shape \[B\] = \[2\]"),
    (
        {"event_times": torch.tensor([torch.nan, 2.0]), "visit_times": DAYS},
        ValueError,
        r"event_times must not be NaN: patient 0 has nan \(patients at fault: 1\)",
    ),
    (
        {"visit_times": torch.where(DAYS == 9, torch.nan, DAYS)},
        ValueError,
        r"visit_times must not be NaN: patient 1 has nan at visit 2 \(visits at fault: 1\)",
    ),
    ({"visit_times": DAYS[:, :2]}, ValueError, r"visit_times: expected shape \[B, V\] = \[2, 3\]"),
    (
        {"event_indicators": torch.tensor([0, 2])},
        ValueError,
        r"event_indicators must be 0 \(censored\) or 1 \(event\): patient 1 has 2 ",
    ),
    ({"sequence_mask": torch.tensor([[1, 0, 1]] * 2)}, ValueError, "patient 0 has 1 at visit 2"),
    (
        {"visit_weight": torch.tensor([[1.0, 1, 1], [1, -3, 1]])},
        ValueError,
        "visit_weight must not be negative: patient 1 has -3 at visit 1",
    ),
    ({"sample_weight": torch.ones(2).requires_grad_()}, ValueError, "expected no requires_grad"),
    (
        {"sample_weight": torch.tensor([torch.inf, -2])},
        ValueError,
        r"sample_weight must not be negative: patient 1 has -2 \(patients at fault: 1\)",
    ),
    ({"pos_weight": torch.inf}, ValueError, "pos_weight: expected a finite weight from 0, got inf"),
    ({"horizon": 0}, ValueError, "horizon: expected a number above 0, got 0"),
    ({"horizon": torch.tensor(3.0)}, TypeError, "horizon: expected a number, got Tensor"),
    ({"pos_weight": -1.0}, ValueError, "pos_weight: expected a finite weight from 0, got -1.0"),
    ({"reduction": "max"}, ValueError, "reduction: expected one of"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD)
def test_errors(unemulated, change, error, match):
    given = {
        "logits": torch.zeros(2, 3),
        "event_times": torch.tensor([1, 2]),
        "event_indicators": torch.tensor([1, 0]),
        "horizon": 3,
        **change,
    }
    device = torch.get_default_device()
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) and k != "horizon" else v
             for k, v in given.items()}  # fmt: skip
    with pytest.raises(error, match=match):
        fixed_horizon_bce(**moved, validate=True)


def test_labels_refuse():
    times, seen = torch.tensor([1, 2]), torch.tensor([1, 0])
    with pytest.raises(TypeError, match="sequence_mask: expected it, visit_times or a batch"):
        fixed_horizon_labels(times, seen, 3)
    with pytest.raises(ValueError, match=r"visits.*got \[3\]|expected shape \[B, V\], got \[3\]"):
        fixed_horizon_labels(times, seen, 3, torch.ones(3))
    with pytest.raises(ValueError, match="patient 1 has 5"):
        fixed_horizon_labels(times, torch.tensor([1, 5]), 3, torch.ones(2, 3))


def test_the_outcomes_of_a_batch(unemulated):
    x, mask, given, _ = draw(20, 9)
    mask[:, 0] = True
    times = torch.minimum(given["event_times"], mask.sum(1) - 1)
    seen = given["event_indicators"]
    rows = packed_of(x, mask, event_times=times, event_indicators=seen)
    expected = fixed_horizon_bce(x, times, seen, 3, mask, reduction="none")
    got = fixed_horizon_bce(rows, horizon=3, reduction="none")
    assert torch.equal(rows.batch.pad(got), expected)
    labels, known = fixed_horizon_labels(horizon=3, batch=rows.batch)
    wanted = fixed_horizon_labels(times, seen, 3, mask)
    assert torch.equal(rows.batch.pad(labels), wanted[0])
    assert torch.equal(rows.batch.pad(known), wanted[1])
    loss = FixedHorizonProgressionLoss(horizon_visits=3)
    assert torch.equal(loss(rows), fixed_horizon_bce(x, times, seen, 3, mask))


def test_the_module_with_days(unemulated):
    x, mask, given, _ = draw(20, 9, "days", torch.bfloat16)
    mask[:, 0] = True
    horizon = given.pop("horizon")
    loss = FixedHorizonProgressionLoss(horizon)
    got = loss(x, sequence_mask=mask, **given)
    assert got.dtype == torch.bfloat16
    wanted = fixed_horizon_bce(x, horizon=horizon, sequence_mask=mask, **given)
    assert torch.equal(got, wanted.bfloat16())
    labels, known = fixed_horizon_labels(horizon=horizon, sequence_mask=mask, **given)
    assert_matches(loss(x, labels, known), wanted.double(), scale=1)
    # a store's batches have the days from each visit to the end
    to_end = [(t - d[m]).clamp(min=0).cpu().numpy()
              for t, d, m in zip(given["event_times"], given["visit_times"], mask, strict=True)
              ]  # fmt: skip
    batch = PackedVisits.from_lists(
        [[[1]] * n for n in mask.sum(1).tolist()],
        event_indicators=given["event_indicators"],
        visit_targets={"days_to_end": to_end},
    ).to(x.device)
    assert torch.equal(loss(PackedRows(batch.pack(x), batch)), got)


def test_the_module_refuses():
    x, times, seen = torch.zeros(1, 2), torch.tensor([1]), torch.tensor([1])
    outcomes = {"event_times": times, "event_indicators": seen}
    with pytest.raises(ValueError, match="expected one of them, got 3 and 4"):
        FixedHorizonProgressionLoss(3, horizon_visits=4)
    with pytest.raises(ValueError, match="horizon_days: expected a number above 0, got -1"):
        FixedHorizonProgressionLoss(-1)
    with pytest.raises(ValueError, match="horizon_days or horizon_visits: expected"):
        FixedHorizonProgressionLoss()(x, **outcomes)
    with pytest.raises(ValueError, match="visit_times: expected with horizon_days"):
        FixedHorizonProgressionLoss(3)(x, **outcomes)
    with pytest.raises(ValueError, match="visit_times: expected None with horizon_visits"):
        FixedHorizonProgressionLoss(horizon_visits=3)(x, **outcomes, visit_times=x)
    with pytest.raises(ValueError, match="event_times: expected None with labels"):
        FixedHorizonProgressionLoss(3)(x, x, x, **outcomes)
    assert "horizon_visits=3" in repr(FixedHorizonProgressionLoss(horizon_visits=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40,), (7, 33), (2, 3, 5)])
def test_the_loss_of_given_labels_has_its_old_numbers(backend, shape, dtype):
    x, labels = (torch.randn(shape) * 3).to(dtype), torch.rand(shape)
    weights = torch.rand(shape) * (torch.rand(shape) < 0.6)
    x[weights == 0] = torch.nan
    labels[weights == 0] = -1
    value, grad = value_and_grad(FixedHorizonProgressionLoss(), x, labels, weights)
    wide, wide_grad = value_and_grad(reference.masked_bce, x.double(), labels, weights.double())
    assert value.dtype == grad.dtype == dtype
    assert_matches(value, wide, scale=4, terms=40)
    assert_matches(grad, wide_grad, scale=1, terms=40)
    leaf = labels.clone().requires_grad_()
    loss = FixedHorizonProgressionLoss()(x, leaf, weights)  # which no kernel differentiates
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()


def test_the_operator_of_given_labels_refuses(compiled):
    x, ones = torch.zeros(1, 3), torch.ones(1, 3)
    for labels, weights in ((ones * 1.5, ones), (ones, -ones), (ones / 0, ones)):
        with pytest.raises(ValueError, match="masked_bce: labels and weights: expected labels in"):
            torch.ops.ehrseq_fast.masked_bce(x, labels, weights, True)
    assert torch.ops.ehrseq_fast.masked_bce(x, ones / 0, ones * 0, True)[0] == 0


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_weights_of_given_labels_that_sum_to_less_than_one(backend, weight):
    """Their mean is over 1."""
    x, labels, weights = torch.randn(2, 3), torch.rand(2, 3), torch.zeros(2, 3)
    weights[1, 1] = weight
    got = value_and_grad(FixedHorizonProgressionLoss(), x, labels, weights)
    term = F.binary_cross_entropy_with_logits(x[1, 1], labels[1, 1])
    assert_matches(got[0], weight * term.double())
    wanted = torch.zeros(2, 3)
    wanted[1, 1] = weight * (x[1, 1].sigmoid() - labels[1, 1])
    assert_matches(got[1], wanted.double())


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int32])
def test_given_labels_give_the_same_bits_on_every_number_of_threads(compiled, kind):
    x, labels = torch.randn(300, 200), torch.randint(0, 2, (300, 200))
    weights = (torch.rand(300, 200) < 0.5).to(kind)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.ehrseq_fast.masked_bce(x, labels, weights, True))
    finally:
        torch.set_num_threads(before)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])
