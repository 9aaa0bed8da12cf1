"""The kernels of the survival losses with weights of visits, held to the definition in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ehrseq_fast import (
    PackedRows,
    PackedVisits,
    competing_risks_nll,
    discrete_time_survival_nll,
)
from ehrseq_fast import backend as backends

from .conftest import is_emulated
from .survival_cases import definition, draw_hazards, draw_patients, value_and_grad

pytestmark = pytest.mark.operation("visit_weighted_nll")

LINKS = ("probabilities", "sigmoid", "cloglog", "softmax")
# a link, how many causes (None: one risk), whether the visit of censoring counts
KINDS = [
    (link, causes, included)
    for link, causes, included in itertools.product(LINKS, (None, 3), (False, True))
    if link != "softmax" or causes
]
# of these in Triton's interpreter, which takes long: each link, one risk and several
FEW = [
    ("probabilities", None, True),
    ("probabilities", 3, False),
    ("sigmoid", None, False),
    ("sigmoid", 3, True),
    ("cloglog", None, True),
    ("cloglog", 3, False),
    ("softmax", 3, False),
    ("softmax", 3, True),
]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 4e-6, "atol": 4e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-4},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
}
SLOTS = 70


@pytest.fixture
def kernels_of_kind(kernels, kind):
    """The kernels of every backend; Triton's in its interpreter for a few of the kinds."""
    if kernels == "triton" and is_emulated(kernels) and kind not in FEW:
        pytest.skip("Triton's interpreter takes a few kinds")
    return kernels


class Drawn:
    """Patients with hazards, weights of visits, and NaN in both where no visit is read."""

    def __init__(self, kind, patients=70, dtype=torch.float64, slots=SLOTS):
        link, causes, included = kind
        self.p = draw_patients(patients, slots, causes or 1)
        shape = (patients, slots, *((causes + (link == "softmax"),) if causes else ()))
        self.hazards = draw_hazards(shape, dtype, link != "probabilities").clamp(max=4)
        visit = torch.arange(slots)
        last = (visit == self.p.times[:, None]) & (included | (self.p.types > 0)[:, None])
        self.read = ((visit >= self.p.entries[:, None]) & (visit < self.p.times[:, None])) | last
        weight = torch.rand(patients, slots, dtype=torch.float64) * 2
        weight[::4] = weight[::4].round()  # zeros among them
        self.weight = torch.where(self.read, weight, math.nan)
        self.hazards[~self.read] = math.nan
        self.loss = competing_risks_nll if causes else discrete_time_survival_nll
        self.options = {
            "from_logits": link != "probabilities",
            "censored_visit": "included" if included else "excluded",
            "entry_times": self.p.entries,
        }
        if link != "probabilities":
            self.options["link"] = link
        self.types = {"event_types" if causes else "event_indicators": self.p.types}
        batch = PackedVisits.from_lists([[[1]] * n for n in self.p.lengths.tolist()])
        self.batch = batch.to(torch.get_default_device())

    def padded(self, hazards=None, **more):
        given = {"visit_weight": self.weight, **self.options, **more}
        x = self.hazards if hazards is None else hazards
        return self.loss(x, self.p.times, self.p.types, self.p.mask, **given)

    def packed(self, hazards=None, **more):
        weight = self.batch.pack(more.pop("visit_weight", self.weight))
        given = {**self.types, **self.options, "visit_weight": weight, **more}
        rows = PackedRows(self.batch.pack(self.hazards) if hazards is None else hazards, self.batch)
        return self.loss(rows, event_times=self.p.times, **given)

    def expected(self, hazards, **more):
        given = {"visit_weight": self.weight, **self.options, **more}
        return definition(hazards, self.p.times, self.p.types, self.p.mask, **given)

    def gradients(self, **more):
        """The loss and its gradient, padded and packed, the latter as padded ones."""
        value, grad = value_and_grad(lambda x: self.padded(x, **more), self.hazards)
        of_rows = value_and_grad(lambda x: self.packed(x, **more), self.batch.pack(self.hazards))
        exists = self.p.mask.view(*self.p.mask.shape, *(1,) * (grad.dim() - 2))
        assert not grad[~self.p.mask].any()
        return value, torch.where(exists, grad, 0), of_rows[0], self.batch.pad(of_rows[1])


def dtypes_of(name, kind):
    """All that these kernels serve; of an emulator's one for each kind."""
    served = [dtype for dtype in TOLERANCE if dtype in backends.kernels(name).dtypes]
    return [served[KINDS.index(kind) % len(served)]] if is_emulated(name) else served


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_definition_in_float64_padded_and_packed(kernels_of_kind, kind):
    """On the CPU padded and packed to the bit."""
    patients = 24 if is_emulated(kernels_of_kind) else 70
    for dtype in dtypes_of(kernels_of_kind, kind):
        drawn = Drawn(kind, patients, dtype)
        for more in (
            {"reduction": "none", "sample_weight": drawn.p.weights},
            {"reduction": "mean", "visit_weight": drawn.weight.float()},
        ):
            value, grad, of_rows, grad_of_rows = drawn.gradients(**more)
            if kernels_of_kind == "cpu":
                if value.dim():  # a sum over patients is in the order of their rows
                    assert torch.equal(value, of_rows)
                assert torch.equal(grad, grad_of_rows)
            rtol = 1e-6 if kernels_of_kind == "cpu" else 2e-6  # lanes are shared out by length
            torch.testing.assert_close(value, of_rows, rtol=rtol, atol=0)
            torch.testing.assert_close(grad, grad_of_rows, rtol=0, atol=0)
            exact = value_and_grad(
                lambda x, more=more, drawn=drawn: drawn.expected(x, **more), drawn.hazards.double()
            )
            torch.testing.assert_close(value.double(), exact[0], **TOLERANCE[value.dtype])
            factor = torch.arange(1.0, patients + 1) if value.dim() else torch.ones(patients)
            factor = factor.view(-1, *(1,) * (grad.dim() - 1))  # of each patient's loss
            close = TOLERANCE[dtype]
            torch.testing.assert_close(grad.double() / factor, exact[1] / factor, **close)
            if dtype == torch.float64:
                assert torch.equal(grad != 0, exact[1] != 0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ones_give_the_loss_without_weights(kernels_of_kind, kind):
    drawn = Drawn(kind, 20, slots=40)
    plain = drawn.loss(
        drawn.hazards, drawn.p.times, drawn.p.types, drawn.p.mask, reduction="none", **drawn.options
    )
    ones = torch.where(drawn.read, 1.0, math.nan)
    got = drawn.padded(reduction="none", visit_weight=ones)
    torch.testing.assert_close(got, plain, rtol=1e-13, atol=1e-14)
    if kernels_of_kind != "cpu":  # whose kernels without weights take products of hazards
        assert torch.equal(got, plain)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_not_finite_shows_as_in_the_definition(kernels_of_kind, kind):
    """In the weights, and in the hazards under a weight of 0 too."""
    drawn = Drawn(kind, 24, slots=20)
    at = drawn.read.nonzero()[torch.arange(1, 40, 6)]
    for patient, visit in at[:3].tolist():
        drawn.weight[patient, visit] = (math.nan, math.inf, 0)[visit % 3]
        if visit % 3 == 2:
            drawn.hazards[patient, visit] = math.nan
    for patient, visit in at[3:].tolist():
        drawn.weight[patient, visit] = math.inf
    value, grad, of_rows, grad_of_rows = drawn.gradients(reduction="none")
    exact = value_and_grad(lambda x: drawn.expected(x, reduction="none"), drawn.hazards)
    equal = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
    torch.testing.assert_close(value, exact[0], **equal)
    # An infinite weight of an event of cloglog is a NaN in the definition, as infinities cancel.
    finite = exact[1].isfinite()
    assert torch.equal(grad.isfinite(), finite)
    torch.testing.assert_close(grad[finite], exact[1][finite], **equal)
    torch.testing.assert_close(of_rows, value, **equal)
    torch.testing.assert_close(grad_of_rows, grad, rtol=0, atol=0, equal_nan=True)
    assert not value.isfinite().all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_weight_of_0_times_an_infinity_is_nan_where_a_visit_is_read(kernels_of_kind, kind):
    drawn = Drawn(kind, 8, torch.float32, 20)
    drawn.weight = torch.where(drawn.read, 0.0, math.nan)
    for run, given, read in (
        (drawn.padded, drawn.hazards, drawn.read),
        (drawn.packed, drawn.batch.pack(drawn.hazards), drawn.batch.pack(drawn.read)),
    ):
        x = given.clone().requires_grad_()
        value = run(x, reduction="none")
        assert not value.any()
        (grad,) = torch.autograd.grad(value, x, torch.full_like(value, math.inf))
        shown = grad.isnan().view(*read.shape, -1)
        assert torch.equal(shown.any(-1), read)
        assert not grad.nan_to_num(0.0).any()


@pytest.mark.parametrize("link", ["sigmoid", "cloglog"])
def test_logits_of_any_size(kernels, link):
    sizes = torch.tensor([-1e4, -700, -80, -1e-6, 0, 3]) if link == "cloglog" else None
    sizes = torch.tensor([-1e4, -80, 1e-6, 80, 1e4]) if sizes is None else sizes
    for dtype, close in TOLERANCE.items():
        if dtype not in backends.kernels(kernels).dtypes:
            continue
        drawn = Drawn((link, 3, True), 24, dtype, 20)
        drawn.hazards = sizes[torch.randint(0, len(sizes), drawn.hazards.shape)].to(dtype)
        value, grad, *_ = drawn.gradients(reduction="none")
        exact = value_and_grad(
            lambda x, drawn=drawn: drawn.expected(x, reduction="none"), drawn.hazards.double()
        )
        tolerance = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
        torch.testing.assert_close(value.double(), exact[0], **tolerance)
        torch.testing.assert_close(grad.double(), exact[1], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0, 1e-9])
def test_probabilities_at_and_next_to_the_clamp(kernels, eps, dtype):
    """Of 1e-310 the logarithm is finite, although it is no normal number."""
    lowest = 1e-310 if dtype == torch.float64 else 1e-40
    h = torch.tensor([[0, 1, 0.5], [0.5, 0.25, 1], [0.5, 0.5, lowest], [0, 0.5, 0]], dtype=dtype)
    times, seen = torch.tensor([2, 2, 2, 2]), torch.tensor([1, 1, 1, 0])
    weight = torch.tensor([[2.0, 0.5, 1], [1, 2, 3], [0, 1, 0.5], [1, 0, 2]], dtype=dtype)
    more = {"eps": eps, "reduction": "none", "visit_weight": weight}
    value, grad = value_and_grad(lambda x: discrete_time_survival_nll(x, times, seen, **more), h)
    exact = value_and_grad(lambda x: definition(x, times, seen, **more), h)
    tolerance = {**TOLERANCE[dtype], "equal_nan": True}
    torch.testing.assert_close(value, exact[0], **tolerance)
    torch.testing.assert_close(grad, exact[1], **tolerance)
    assert value[1:].isfinite().all()


@pytest.mark.parametrize("kind", [("sigmoid", None, False), ("softmax", 3, True)], ids=str)
def test_the_same_bits_for_any_number_of_threads(compiled, kind):
    drawn = Drawn(kind, 1500, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(drawn.gradients())
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", [("probabilities", None, False), ("softmax", 3, True)], ids=str)
def test_second_derivatives_and_transforms(compiled, kind):
    drawn = Drawn(kind, 4, slots=3)
    x, weight = drawn.hazards.nan_to_num(0.5), drawn.weight.nan_to_num(1.0) + 0.1
    rows = drawn.batch.pack(x).requires_grad_()
    for run, given in ((drawn.padded, x.clone().requires_grad_()), (drawn.packed, rows)):

        def loss(given, run=run):
            return run(given, visit_weight=weight, reduction="none")

        assert torch.autograd.gradcheck(loss, given)
        assert torch.autograd.gradgradcheck(loss, given)
    learned = torch.func.grad(lambda w: drawn.padded(x, visit_weight=w))(weight)
    asked = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(drawn.expected(x, visit_weight=asked), asked)
    torch.testing.assert_close(learned, expected)
    tangent = torch.ones_like(x)
    _, along = torch.func.jvp(lambda x: drawn.padded(x, visit_weight=weight), (x,), (tangent,))
    grad = torch.func.grad(lambda x: drawn.padded(x, visit_weight=weight))(x)
    torch.testing.assert_close(along, grad.sum())


def test_compiled_programs(compiled):
    drawn = Drawn(("sigmoid", None, False), 6, slots=5)
    x = drawn.hazards.nan_to_num(0.0).requires_grad_()
    program = torch.compile(drawn.padded, fullgraph=True, dynamic=True, backend="aot_eager")
    for run in (program, drawn.padded):
        x.grad = None
        value = run(x)
        value.backward()
        assert torch.equal(value, drawn.padded(x))
        torch.testing.assert_close(x.grad, value_and_grad(drawn.padded, x)[1], rtol=0, atol=0)


def test_a_gradient_that_has_one_itself_is_the_definitions(kernels):
    drawn = Drawn(("sigmoid", 3, True), 4, slots=3)
    weight = drawn.weight.nan_to_num(1.0)
    x = drawn.hazards.nan_to_num(0.5).requires_grad_()
    rows = drawn.batch.pack(x.detach()).requires_grad_()
    seconds = []
    for run, given in ((drawn.padded, x), (drawn.packed, rows), (drawn.expected, x)):
        value = run(given, visit_weight=weight)
        (grad,) = torch.autograd.grad(value, given, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), given)[0])
    torch.testing.assert_close(seconds[0], seconds[2])
    torch.testing.assert_close(drawn.batch.pad(seconds[1]), seconds[2])


def test_a_weight_that_is_learned_is_refused(kernels):
    drawn = Drawn(("sigmoid", None, False), 3, slots=4)
    learned = drawn.weight.nan_to_num(1.0).requires_grad_()
    for run in (drawn.padded, drawn.packed):
        with pytest.raises(ValueError, match="visit_weight: expected no requires_grad"):
            run(visit_weight=learned)
        with torch.no_grad():
            assert run(visit_weight=learned).isfinite()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_refusals_name_the_first_patient_in_either_layout(backend, kind):
    drawn = Drawn(kind, 24, slots=20)
    drawn.weight[~drawn.read] = -1
    (patient, visit), *_, (last, at) = drawn.read.nonzero().tolist()
    assert patient != last
    drawn.weight[patient, visit], drawn.weight[last, at] = -2, -math.inf
    message = (
        rf"visit_weight must not be negative: patient {patient} has -2 at visit {visit} "
        r"\(visits at fault: 2\)"
    )
    for run in (drawn.padded, drawn.packed):
        with pytest.raises(ValueError, match=message):
            run(validate=True)
    if kind[0] == "probabilities":  # refused before weights are
        drawn.hazards[last, at] = 1.5
        for run in (drawn.padded, drawn.packed):
            with pytest.raises(ValueError, match=rf"in \[0, 1\] .*patient {last} has 1.5"):
                run(validate=True)
    drawn.p.times[3] = 20
    with pytest.raises(ValueError, match=r"event_times must be one of .*patient 3 has"):
        drawn.padded(validate=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_negative_weight_is_refused_wherever_it_is(compiled, kind):
    """A kernel has a loop for visits that were survived for certain, and one for the others."""
    drawn = Drawn(kind, 24, slots=40)
    patient = int((drawn.p.times - drawn.p.entries).argmax())
    entry, time = int(drawn.p.entries[patient]), int(drawn.p.times[patient])
    for visit in (entry, (entry + time) // 2, time - 1):
        weight = drawn.weight.clone()
        weight[patient, visit] = -1
        for run in (drawn.padded, drawn.packed):
            with pytest.raises(ValueError, match=f"patient {patient} has -1 at visit {visit} "):
                run(visit_weight=weight)


def test_the_operator_refuses_weights_that_do_not_fit(kernels):
    drawn = Drawn(("sigmoid", None, False), 3, slots=4)
    nothing = [None] * 6
    last = [False, 1, False, 1e-7, 1, False]
    run = backends.operators(kernels).visit_weighted_nll.default
    given = (drawn.hazards.nan_to_num(0.0), drawn.p.times, drawn.p.types)
    with pytest.raises(ValueError, match=r"visit_weight: expected .*float64, got .*float32"):
        run(*given, *nothing, drawn.weight.float(), *last)
    with pytest.raises(ValueError, match=r"visit_weight: expected .*\[B, V\] = \[3, 4\], got"):
        run(*given, *nothing, drawn.weight[:, :3], *last)
    with pytest.raises(ValueError, match=r"hazards: expected shape \[B, V, K\], got \[3, 4\]"):
        run(*given, *nothing, drawn.weight, True, *last[1:])
    rows = (drawn.batch.row_starts, drawn.batch.unsorted_indices, drawn.batch.last_rows)
    packed = (drawn.batch.pack(given[0]), *given[1:], None, *rows, None, None)
    with pytest.raises(ValueError, match=r"visit_weight: expected shape \[n_visits\] = .*, got"):
        run(*packed, drawn.weight, *last)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2)])
def test_nobody(kernels, shape):
    empty, weight = torch.empty(shape), torch.empty(0, 3)
    nobody = torch.empty(0, dtype=torch.long)
    loss = competing_risks_nll if len(shape) == 3 else discrete_time_survival_nll
    for reduction, expected in (("sum", 0.0), ("mean", math.nan)):
        got = loss(empty, nobody, nobody, visit_weight=weight, reduction=reduction)
        torch.testing.assert_close(got, torch.tensor(expected), equal_nan=True)
    assert loss(empty, nobody, nobody, visit_weight=weight, reduction="none").shape == (0,)


def test_weights_and_hazards_of_any_strides(kernels):
    drawn = Drawn(("sigmoid", 3, True), 9, torch.float32, 7)
    expected = value_and_grad(drawn.padded, drawn.hazards)
    of_rows = value_and_grad(drawn.packed, drawn.batch.pack(drawn.hazards))
    weight, hazards = drawn.weight, drawn.hazards
    drawn.weight = weight.float().t().contiguous().t()
    x = hazards.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    value = drawn.padded(x)
    torch.testing.assert_close(value, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], expected[1], rtol=0, atol=0)
    rows = drawn.batch.pack(hazards).t().contiguous().t().requires_grad_()
    of_visits = drawn.batch.pack(weight).repeat_interleave(2)[::2]
    given = {"event_times": drawn.p.times, **drawn.types, **drawn.options}
    value = drawn.loss(PackedRows(rows, drawn.batch), visit_weight=of_visits, **given)
    torch.testing.assert_close(value, of_rows[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, rows)[0], of_rows[1], rtol=0, atol=0)
