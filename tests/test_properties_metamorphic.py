"""What a known change of the input must do to the result, on every backend: patients in another
order, codes in another order within their visits, padding added, a batch split, a patient twice.

Bitwise where nothing is summed in another order: a visit's vector depends on its codes alone and a
patient's loss on its visits alone. Sums over patients (gradients of tables, the mean loss) are the
same within rounding.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ehrseq_fast import (
    PackedVisits,
    discrete_time_survival_nll,
    packed_competing_risks_nll,
    packed_survival_nll,
    packed_visit_pool,
    visit_mean_pool,
)
from ehrseq_fast.models import CompetingRisksSurvivalLSTM, DiscreteTimeSurvivalLSTM

from . import strategies as draws
from .tolerances import assert_matches

MODES = ("mean", "sum", "max", "attention")
quietly = settings(suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")


def packed(lists, patients):
    batch = PackedVisits.from_lists(patients, vocab_size=lists.vocabulary)
    return batch.to(torch.get_default_device())


def by_patient(batch, rows):
    """Each patient's rows, in the caller's order of patients."""
    return [rows[batch.rows_of(patient)] for patient in range(len(batch))]


class Pooled:
    """A batch pooled in one mode, with the gradient of the table for rows' weights 1, 1, ..."""

    def __init__(self, lists, patients, mode, width, seed, dtype=torch.float32):
        random = draws.generator(seed)
        shape = (lists.vocabulary, width)
        self.table = torch.randn(shape, generator=random).to(dtype).requires_grad_()
        scores = torch.randn(shape[0], generator=random).to(dtype)
        self.batch = packed(lists, patients)
        self.rows = packed_visit_pool(
            self.batch, self.table, mode=mode, scores=scores if mode == "attention" else None
        )
        (self.grad,) = torch.autograd.grad(self.rows.sum(), self.table)

    @property
    def patients(self):
        return by_patient(self.batch, self.rows.detach())


def same_bits(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b), (a, b)


pooling = given(
    lists=draws.records(),
    mode=st.sampled_from(MODES),
    width=draws.widths,
    seed=draws.seeds,
    order=st.randoms(use_true_random=False),
)


@pytest.mark.usefixtures("unemulated")
@quietly
@pooling
def test_pooling_with_patients_permuted(lists, mode, width, seed, order):
    places = list(range(len(lists.patients)))
    order.shuffle(places)
    before = Pooled(lists, lists.patients, mode, width, seed)
    after = Pooled(lists, [lists.patients[i] for i in places], mode, width, seed)
    same_bits(after.patients, [before.patients[i] for i in places])
    assert_matches(after.grad, before.grad.double(), scale=8, terms=64)


@pytest.mark.usefixtures("unemulated")
@quietly
@pooling
def test_pooling_with_codes_permuted_within_visits(lists, mode, width, seed, order):
    shuffled = [[order.sample(v, len(v)) for v in patient] for patient in lists.patients]
    before = Pooled(lists, lists.patients, mode, width, seed)
    after = Pooled(lists, shuffled, mode, width, seed)
    if mode == "max":
        same_bits(after.patients, before.patients)
    for a, b in zip(after.patients, before.patients, strict=True):
        assert_matches(a, b.double(), scale=8, terms=16)
    assert_matches(after.grad, before.grad.double(), scale=8, terms=64)


@pytest.mark.usefixtures("unemulated")
@quietly
@pooling
def test_pooling_of_a_batch_split_in_two(lists, mode, width, seed, order):
    cut = order.randint(0, len(lists.patients))
    whole = Pooled(lists, lists.patients, mode, width, seed)
    parts = [
        Pooled(lists, part, mode, width, seed)
        for part in (lists.patients[:cut], lists.patients[cut:])
    ]
    same_bits(whole.patients, parts[0].patients + parts[1].patients)
    together = parts[0].grad.double() + parts[1].grad.double()
    assert_matches(whole.grad, together, scale=8, terms=64)


@pytest.mark.usefixtures("unemulated")
@quietly
@pooling
def test_pooling_with_a_patient_twice(lists, mode, width, seed, order):
    again = order.randrange(len(lists.patients))
    whole = Pooled(lists, [*lists.patients, lists.patients[again]], mode, width, seed)
    alone = Pooled(lists, [lists.patients[again]], mode, width, seed)
    once = Pooled(lists, lists.patients, mode, width, seed)
    same_bits(whole.patients, [*once.patients, once.patients[again]])
    assert_matches(whole.grad, once.grad.double() + alone.grad.double(), scale=8, terms=64)


@pytest.mark.usefixtures("unemulated")
@quietly
@given(
    lists=draws.records(),
    mode=st.sampled_from(MODES[:3]),
    width=draws.widths,
    seed=draws.seeds,
    more=st.tuples(st.integers(0, 3), st.integers(0, 5)),
    fill=st.integers(-(2**31), 2**31 - 1),
    mask_dtype=st.sampled_from(draws.MASKS),
)
def test_pooling_with_padding_added(lists, mode, width, seed, more, fill, mask_dtype):
    """The padded form gives the bits of the packed one, and no padding changes them."""
    whole = Pooled(lists, lists.patients, mode, width, seed)
    codes, mask, _ = whole.batch.to_padded()
    visits, slots = more
    codes = torch.nn.functional.pad(codes, (0, slots, 0, visits))
    mask = torch.nn.functional.pad(mask, (0, slots, 0, visits))
    codes = codes.masked_fill(~mask, fill)
    table = whole.table.detach().requires_grad_()
    pooled = visit_mean_pool(codes, table, mask.to(mask_dtype), mode=mode)
    (grad,) = torch.autograd.grad(pooled.sum(), table)
    rows = whole.batch.pack(pooled.detach())
    assert_matches(rows, whole.rows.detach().double(), scale=8, terms=16)
    assert_matches(grad, whole.grad.double(), scale=8, terms=64)
    plain = whole.batch.to_padded()
    unpadded = visit_mean_pool(plain[0], table, plain[1], mode=mode)
    (plain_grad,) = torch.autograd.grad(unpadded.sum(), table)
    assert torch.equal(whole.batch.pack(unpadded), whole.batch.pack(pooled))
    assert_matches(grad, plain_grad.double(), scale=8, terms=64)


# Losses -------------------------------------------------------------------------------------------


class Losses:
    """Patients' losses and the gradients of their hazards, patient by patient."""

    def __init__(self, patients, causes):
        self.batch = PackedVisits.from_lists([[[]] * len(p["hazards"]) for p in patients])
        self.batch = self.batch.to(torch.get_default_device())
        rows = torch.zeros(self.batch.n_visits, causes)
        for at, patient in enumerate(patients):
            rows[self.batch.rows_of(at)] = patient["hazards"]
        self.rows = (rows if causes > 1 else rows[:, 0]).requires_grad_()
        self.times = torch.tensor([p["time"] for p in patients], dtype=torch.int64)
        self.types = torch.tensor([p["type"] for p in patients], dtype=torch.int64)
        kinds = {"event_types" if causes > 1 else "event_indicators": self.types}
        loss = packed_competing_risks_nll if causes > 1 else packed_survival_nll
        options = {"event_times": self.times, **kinds, "from_logits": True}
        self.each = loss(self.rows, self.batch, reduction="none", **options)
        (grad,) = torch.autograd.grad(self.each.sum(), self.rows)
        self.grads = by_patient(self.batch, grad)
        self.total = loss(self.rows, self.batch, reduction="sum", **options).detach()
        self.each = self.each.detach()


@st.composite
def cohorts(draw):
    causes = draw(st.sampled_from((1, 3)))
    random = draws.generator(draw(draws.seeds))
    patients = []
    for length in draw(st.lists(st.integers(1, 6), min_size=1, max_size=7)):
        hazards = torch.randn(length, causes, generator=random)
        time, kind = draw(st.integers(0, length - 1)), draw(st.integers(0, causes))
        patients.append({"hazards": hazards, "time": time, "type": kind})
    return causes, patients


@pytest.mark.usefixtures("unemulated")
@quietly
@given(cohort=cohorts(), order=st.randoms(use_true_random=False))
def test_losses_of_patients_permuted_split_and_repeated(cohort, order):
    causes, patients = cohort
    whole = Losses(patients, causes)
    places = list(range(len(patients)))
    order.shuffle(places)
    shuffled = Losses([patients[i] for i in places], causes)
    assert torch.equal(shuffled.each, whole.each[places])
    same_bits(shuffled.grads, [whole.grads[i] for i in places])
    assert_matches(shuffled.total, whole.each.double().sum(), terms=64)

    cut = order.randint(1, len(patients))
    parts = [Losses(part, causes) for part in (patients[:cut], patients[cut:]) if part]
    assert torch.equal(torch.cat([part.each for part in parts]), whole.each)
    same_bits([grad for part in parts for grad in part.grads], whole.grads)

    twice = Losses([*patients, patients[places[0]]], causes)
    assert torch.equal(twice.each, torch.cat([whole.each, whole.each[places[:1]]]))
    same_bits(twice.grads, [*whole.grads, whole.grads[places[0]]])


@pytest.mark.usefixtures("unemulated")
@quietly
@given(
    cohort=cohorts(),
    more=st.integers(0, 70),
    fill=st.sampled_from((0.0, float("nan"), float("inf"))),
    dtype=st.sampled_from(draws.MASKS),
)
def test_the_loss_with_padding_added(cohort, more, fill, dtype):
    _, patients = cohort
    for patient in patients:
        patient["hazards"] = patient["hazards"][:, :1]
        patient["type"] = min(patient["type"], 1)
    whole = Losses(patients, 1)
    padded = whole.batch.pad(whole.rows.detach(), fill)
    padded = torch.nn.functional.pad(padded, (0, more), value=fill).requires_grad_()
    real = torch.ones(whole.batch.n_visits, dtype=torch.bool)
    mask = torch.nn.functional.pad(whole.batch.pad(real, False), (0, more))
    each = discrete_time_survival_nll(
        *(padded, whole.times, whole.types, mask.to(dtype)), from_logits=True, reduction="none"
    )
    assert_matches(each.detach(), whole.each.double(), terms=16)
    (grad,) = torch.autograd.grad(each.sum(), padded)
    assert not grad[~mask].any()
    for at, of_patient in enumerate(whole.grads):
        assert_matches(grad[at, : len(of_patient)], of_patient.double(), scale=2, terms=16)


# Models -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unemulated")
@quietly
@given(
    lists=draws.records(),
    seed=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
    competing=st.booleans(),
)
def test_hazards_of_a_model(lists, seed, order, competing):
    """Of patients permuted, split and repeated, and of codes permuted within a visit."""
    torch.manual_seed(seed)
    sizes = {"embedding_dim": 5, "hidden_dim": 9}
    model = (
        CompetingRisksSurvivalLSTM(lists.vocabulary, 2, **sizes)
        if competing
        else DiscreteTimeSurvivalLSTM(lists.vocabulary, **sizes)
    ).eval()

    def hazards(patients):
        batch = packed(lists, patients)
        with torch.no_grad():
            return by_patient(batch, model(batch).values)

    whole = hazards(lists.patients)
    places = list(range(len(lists.patients)))
    order.shuffle(places)
    cut = order.randint(0, len(places))
    variants = {
        "permuted": (hazards([lists.patients[i] for i in places]), [whole[i] for i in places]),
        "split": (
            [
                h
                for part in (lists.patients[:cut], lists.patients[cut:])
                if part
                for h in hazards(part)
            ],
            whole,
        ),
        "repeated": (hazards(lists.patients * 2), whole * 2),
        "codes permuted": (
            hazards([[order.sample(v, len(v)) for v in p] for p in lists.patients]),
            whole,
        ),
    }
    for name, (got, expected) in variants.items():
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
