"""Weights of visits in the loss of rates, on every backend, held to the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from ehrseq_fast import PackedRows, PackedVisits, piecewise_hazard_nll, use_backend
from ehrseq_fast.piecewise_hazard import reference

from .survival_cases import draw_patients, value_and_grad
from .tolerances import assert_matches

pytestmark = [pytest.mark.operation("survival_nll"), pytest.mark.operation("piecewise_hazard")]

LINKS = ["softplus", "exp"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Drawn:
    """Patients with logits, weights of visits, and NaN in both where no visit is read."""

    def __init__(self, patients, slots, dtype=torch.float64, link="softplus"):
        self.p = draw_patients(patients, slots)
        generator = torch.Generator(torch.get_default_device()).manual_seed(3)
        options = {"generator": generator, "dtype": torch.float64}
        x = torch.randn(patients, slots, **options) * 2
        self.fraction = torch.rand(patients, generator=generator)
        self.fraction[::3] = 0
        weight = torch.rand(patients, slots, **options) * 2
        weight[::4] = weight[::4].round()  # zeros among them
        visit = torch.arange(slots)
        survived = (visit >= self.p.entries[:, None]) & (visit < self.p.times[:, None])
        reads_last = (self.p.types != 0) | (self.fraction != 0)
        self.read = survived | ((visit == self.p.times[:, None]) & reads_last[:, None])
        self.x = torch.where(self.read, x, math.nan).to(dtype)
        self.weight = torch.where(self.read, weight, math.nan)
        self.more = {"entry_times": self.p.entries, "link": link}
        lists = [[[1]] * length for length in self.p.lengths.tolist()]
        self.batch = PackedVisits.from_lists(lists).to(self.x.device)

    def given(self):
        return self.p.times, self.p.types, self.fraction

    def padded(self, x, **more):
        given = {"visit_weight": self.weight, **self.more, **more}
        return piecewise_hazard_nll(x, *self.given(), self.p.mask, **given)

    def packed(self, rows, **more):
        weight = self.batch.pack(more.pop("visit_weight", self.weight))
        given = {"visit_weight": weight, **self.more, **more}
        return piecewise_hazard_nll(PackedRows(rows, self.batch), *self.given(), **given)

    def expected(self, x, **more):
        given = {"visit_weight": self.weight, **self.more, **more}
        return reference.piecewise_hazard_nll(x, *self.given(), self.p.mask, **given)

    def both(self, **more):
        """The loss and its gradient of padded and of packed rows, the latter as padded ones."""
        padded = value_and_grad(lambda x: self.padded(x, **more), self.x)
        value, grad = value_and_grad(lambda x: self.packed(x, **more), self.batch.pack(self.x))
        return padded, (value, self.batch.pad(grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("link", LINKS)
def test_the_definition_in_float64(backend, link, dtype):
    drawn = Drawn(31, 37, dtype, link)
    more = {"sample_weight": drawn.p.weights, "reduction": "none"}
    wide = value_and_grad(lambda x: drawn.expected(x, **more), drawn.x.double())
    size = wide[0].abs().max() + 10
    for value, grad in drawn.both(**more):
        assert_matches(value, wide[0], scale=size, terms=37)
        assert_matches(grad, wide[1], scale=size * 31, terms=37)
        assert not grad[~drawn.read].any()
    of_other_strides = drawn.weight.t().contiguous().t()
    mean = value_and_grad(lambda x: drawn.padded(x, visit_weight=of_other_strides), drawn.x)
    wide = value_and_grad(drawn.expected, drawn.x.double())
    assert_matches(mean[0], wide[0], scale=size, terms=37)
    assert_matches(mean[1], wide[1], scale=1, terms=37)
    with torch.no_grad():
        assert torch.equal(drawn.padded(drawn.x), mean[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("link", LINKS)
def test_padded_and_packed_are_the_same_bits_for_any_number_of_threads(compiled, link, dtype):
    drawn = Drawn(1500, 40, dtype, link)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            with use_backend("cpu"):
                results.extend(drawn.both(reduction="none"))
    finally:
        torch.set_num_threads(threads)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("link", LINKS)
def test_ones_give_the_loss_without_weights(backend, link):
    drawn = Drawn(12, 20, torch.float64, link)
    ones = torch.where(drawn.read, 1.0, math.nan)
    for weighted, plain in zip(
        drawn.both(visit_weight=ones), (drawn.both(visit_weight=torch.ones_like(ones))), strict=True
    ):
        assert all(map(torch.equal, weighted, plain))
    without = value_and_grad(
        lambda x: piecewise_hazard_nll(x, *drawn.given(), drawn.p.mask, **drawn.more), drawn.x
    )
    for got, expected in zip(weighted, without, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("link", LINKS)
def test_what_is_not_finite_shows_where_the_definition_shows_it(backend, link):
    """In a weight, and under a weight of 0 too; at an interval that was survived, at the last."""
    values = [math.nan, math.inf, -math.inf, 100.0, 0.3]  # e^100 is infinite in float32
    weights = [math.nan, math.inf, 0.0, 2.0]
    pairs = [(v, w) for v in values for w in weights if not (v == 0.3 and w == 2)]
    x = torch.tensor([[v, 0.1, 0.1] for v, _ in pairs] + [[0.1, v, 0.1] for v, _ in pairs])
    weight = torch.tensor([[w, 1, 1.0] for _, w in pairs] + [[1, w, 1.0] for _, w in pairs])
    times = torch.ones(len(x), dtype=torch.int64)
    # at -inf autograd's derivative of log Λ has the term inf · 0, where the weight is inf
    either = ((x == -math.inf) & (weight == math.inf)).any(1, keepdim=True)
    for kind, part in ((0, 0.5), (1, 0.5), (1, 0.0), (0, 0.0)):
        given = times, torch.full((len(x),), kind), torch.full((len(x),), part)
        ours, theirs = (
            value_and_grad(f, x, *given, link=link, reduction="none", visit_weight=weight)
            for f in (piecewise_hazard_nll, reference.piecewise_hazard_nll)
        )
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
        torch.testing.assert_close(
            ours[1].masked_fill(either & ~ours[1].isfinite(), math.nan),
            theirs[1].masked_fill(either & ~theirs[1].isfinite(), math.nan),
            equal_nan=True,
        )


@pytest.mark.parametrize("link", LINKS)
def test_a_weight_of_0_and_an_infinite_gradient(backend, link):
    """NaN where a visit is read, and 0 where it is not, as in the definition."""
    drawn = Drawn(8, 20, torch.float32, link)
    drawn.weight = torch.where(drawn.read, 0.0, math.nan)
    read = drawn.batch.pack(drawn.read)
    cases = ((drawn.padded, drawn.x, drawn.read), (drawn.packed, drawn.batch.pack(drawn.x), read))
    for run, given, read in cases:
        x = given.clone().requires_grad_()
        value = run(x, reduction="none")
        assert not value.any()
        (grad,) = torch.autograd.grad(value, x, torch.full_like(value, math.inf))
        assert torch.equal(grad.isnan(), read)
        assert not grad.nan_to_num(0.0).any()


def test_a_large_weight_of_a_visit_and_a_small_share_of_the_patient(backend):
    """Their product is a float32, that of the weight and the slope is not."""
    x = torch.full((8, 3), 1.5)
    given = torch.full((8,), 1), torch.arange(8) % 2
    weight = torch.full((8, 3), 3e38)
    ours, theirs = (
        value_and_grad(f, x, *given, link="exp", visit_weight=weight)[1]
        for f in (piecewise_hazard_nll, reference.piecewise_hazard_nll)
    )
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_negative_weight_is_refused_wherever_it_is_read(compiled, layout):
    """A kernel has a loop over whole vectors, one for the rest of a row, and one for last
    intervals. What is not read may be negative."""
    drawn = Drawn(30, 40)
    patient = int((drawn.p.times - drawn.p.entries).argmax())
    entry, time = int(drawn.p.entries[patient]), int(drawn.p.times[patient])
    assert time - entry > 16
    drawn.weight[~drawn.read] = -1
    run = {"padded": lambda **more: drawn.padded(drawn.x, **more)}
    run["packed"] = lambda **more: drawn.packed(drawn.batch.pack(drawn.x), **more)
    for kind, part in ((1, 0.5), (1, 0), (0, 0.5), (0, 0)):
        drawn.p.types[patient], drawn.fraction[patient] = kind, part
        drawn.weight[patient, time] = 1.0 if kind or part else -1.0
        drawn.x[patient, time] = 0.5
        assert run[layout]().isfinite()
        for visit in (entry, time - 1, time) if kind or part else (entry, time - 1):
            weight = drawn.weight.clone()
            weight[patient, visit] = -2
            message = (
                rf"visit_weight must not be negative: patient {patient} has -2 at visit {visit} "
                r"\(visits at fault: 1\)"
            )
            with pytest.raises(ValueError, match=message):
                run[layout](visit_weight=weight)
    drawn.weight[patient, entry] = -math.inf
    drawn.fraction[3] = 1.5  # said first
    with pytest.raises(ValueError, match=r"fraction must be in .* patient 3 has 1\.5"):
        run[layout]()


def test_opcheck(compiled):
    drawn = Drawn(5, 20, torch.float32)
    x, weight = drawn.x.nan_to_num(0.1), drawn.weight.float().nan_to_num(1.0)
    operator = torch.ops.ehrseq_fast.piecewise_hazard_nll.default
    p, batch = drawn.p, drawn.batch
    rows = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
    companions = (p.entries, p.weights, drawn.fraction)
    padded = (x, p.times, p.types, p.mask, None, None, None, *companions, weight, 0, 1, True)
    packed = (batch.pack(x), p.times, p.types, None, *rows, *companions, batch.pack(weight))
    for arguments in (padded, (*packed, 1, 0, True)):
        torch.library.opcheck(operator, arguments)


def test_the_operator_refuses_weights_that_do_not_fit(compiled):
    drawn = Drawn(3, 4, torch.float32)
    operator = torch.ops.ehrseq_fast.piecewise_hazard_nll.default
    given = (drawn.x.nan_to_num(0.0), drawn.p.times, drawn.p.types, *[None] * 7)
    for weight, expected in (
        (drawn.weight, "float32, got float64"),
        (drawn.weight.float()[:, :3], r"shape \[B, V\] = \[3, 4\], got \[3, 3\]"),
    ):
        with pytest.raises(ValueError, match=f"visit_weight: expected {expected}"):
            operator(*given, weight, 0, 1, False)


def test_compiles(compiled):
    drawn = Drawn(9, 4, torch.float32)
    fast = torch.compile(drawn.padded, fullgraph=True, dynamic=True, backend="aot_eager")
    got, expected = (value_and_grad(f, drawn.x) for f in (fast, drawn.padded))
    torch.testing.assert_close(got, expected)


def test_transforms_and_weights_that_learn():
    drawn = Drawn(4, 3)
    x, weight = drawn.x.nan_to_num(0.5), drawn.weight.nan_to_num(1.0) + 0.1
    _, expected = value_and_grad(lambda w: drawn.expected(x, visit_weight=w), weight)
    for run, given, rows in (
        (drawn.padded, x, lambda w: w),
        (drawn.packed, drawn.batch.pack(x), drawn.batch.pack),
    ):
        _, learned = value_and_grad(lambda w, run=run, x=given: run(x, visit_weight=w), weight)
        assert torch.equal(rows(learned), rows(expected))

    def of_logits(x):
        return drawn.padded(x, visit_weight=weight)

    of_transform = torch.func.grad(lambda w: drawn.padded(x, visit_weight=w))(weight)
    torch.testing.assert_close(of_transform, expected)
    _, along = torch.func.jvp(of_logits, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, value_and_grad(of_logits, x)[1].sum())
    learned = weight.clone().requires_grad_()
    with torch.no_grad():
        assert drawn.padded(x, visit_weight=learned) == of_logits(x)
