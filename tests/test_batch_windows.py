"""The first and the last visits of a batch; the codes of next visits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ehrseq_fast import PackedVisits, packed_survival_nll

from .batch_cases import SOME_PATIENTS, assert_holds, many

PATIENTS = [[[1], [2, 2], [3]], [[4]], [[], [5], [6], [7]]]


def batch(**given):
    return PackedVisits.from_lists(PATIENTS, **given)


@many
@given(SOME_PATIENTS, st.integers(1, 8))
def test_visits_and_what_is_of_them(builder, patients, n):
    visits = sum(map(len, patients))
    whole = PackedVisits.from_lists(
        patients,
        vocab_size=13,
        visit_features=torch.arange(visits * 2.0).view(visits, 2),
        targets={"age": torch.arange(len(patients))},
        visit_targets={"number": torch.arange(visits)},
    )
    numbers = [whole.visit_targets["number"][whole.rows_of(p)] for p in range(len(patients))]
    for found, of in (
        (whole.first_visits(n), slice(0, n)),
        (whole.last_visits(n), slice(-n, None)),
    ):
        assert_holds(found, [visits_[of] for visits_ in patients])
        assert found.vocab_size == 13
        assert torch.equal(found.targets["age"], torch.arange(len(patients)))
        for p in range(len(patients)):
            at = found.rows_of(p)
            assert torch.equal(found.visit_targets["number"][at], numbers[p][of])
            assert torch.equal(found.visit_features[at, 0], 2.0 * numbers[p][of])


def test_first_visits_censor_what_comes_later():
    given = {"event_indicators": [1, 1, 0], "event_types": [2, 1, 0]}
    whole = batch(event_times=[1, 0, 3], **given, targets={"entry_times": torch.tensor([1, 0, 0])})
    found = whole.first_visits(2)
    assert found.event_times.tolist() == [1, 0, 1]
    assert found.event_indicators.tolist() == [1, 1, 0]
    assert found.event_types.tolist() == [2, 1, 0]
    assert found.targets["entry_times"].tolist() == [1, 0, 0]
    later = batch(event_times=[2, 0, 3], **given).first_visits(2)
    assert later.event_times.tolist() == [1, 0, 1]
    assert later.event_indicators.tolist() == [0, 1, 0]
    assert later.event_types.tolist() == [0, 1, 0]
    assert whole.event_times.tolist() == [1, 0, 3]


def test_the_likelihood_of_first_visits_is_that_of_the_visits_survived():
    hazards = torch.rand(8, dtype=torch.float64) * 0.5
    whole = batch(event_times=[2, 0, 3], event_indicators=[1, 1, 1])
    found = whole.first_visits(2)
    rows = torch.cat([whole.rows_of(p)[:2] for p in range(3)])
    order = torch.cat([found.rows_of(p) for p in range(3)])
    ours = hazards.new_empty(len(order)).index_copy(0, order, hazards[rows])
    options = {"censored_visit": "included", "reduction": "none"}
    nll = packed_survival_nll(ours, found, **options)
    for patient in (0, 2):  # two visits survived, whatever comes later
        expected = -torch.log1p(-hazards[whole.rows_of(patient)[:2]]).sum()
        torch.testing.assert_close(nll[patient], expected)
    expected = packed_survival_nll(hazards, whole, **options)[1]
    torch.testing.assert_close(nll[1], expected)


def test_last_visits_count_times_from_their_first():
    whole = batch(
        event_times=[2, 0, 2],
        event_indicators=[1, 0, 1],
        targets={"entry_times": torch.tensor([2, 0, 1])},
    )
    found = whole.last_visits(2)
    assert found.event_times.tolist() == [1, 0, 0]
    assert found.event_indicators.tolist() == [1, 0, 1]
    assert found.targets["entry_times"].tolist() == [1, 0, 0]
    assert whole.targets["entry_times"].tolist() == [2, 0, 1]


DAYS = {"days_to_end": torch.arange(8.0)}
REFUSED = {
    "no visits": (lambda: batch().first_visits(0), ValueError, "n: expected 1 to"),
    "half a visit": (lambda: batch().last_visits(1.5), TypeError, "n: expected an integer"),
    "an event before the last visits": (
        lambda: batch(event_times=[0, 0, 1]).last_visits(2),
        ValueError,
        r"event_times: expected within the last 2 visits, got 0 \(patient 0; 2 in all\)",
    ),
    "a later event without an indicator": (
        lambda: batch(event_times=[1, 0, 3]).first_visits(2),
        ValueError,
        r"event_times: expected within the first 2 visits .* got 3 \(patient 2; 1 in all\)",
    ),
    "days to the event": (
        lambda: batch(
            event_times=[0, 0, 3], event_indicators=[1, 1, 1], visit_targets=DAYS
        ).first_visits(2),
        ValueError,
        r"visit_targets\['days_to_end'\].* got 3 \(patient 2",
    ),
    "an entry after the first visits": (
        lambda: batch(targets={"entry_times": [0, 0, 2]}).first_visits(2),
        ValueError,
        r"targets\['entry_times'\]: expected within the first 2 visits, got 2 \(patient 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_days_to_the_event_stay_where_no_event_is_left_out():
    found = batch(event_indicators=[1, 1, 1], visit_targets=DAYS).first_visits(2)
    assert found.event_indicators.tolist() == [1, 1, 1]


def test_gradients_of_features_and_no_shared_memory():
    features = torch.ones(8, 1, requires_grad=True)
    whole = batch(visit_features=features)
    whole.last_visits(1).visit_features.sum().backward()
    assert features.grad.flatten().tolist() == [0, 0, 1, 1, 0, 0, 0, 1]


@many
@given(SOME_PATIENTS)
def test_codes_of_next_visits(patients):
    whole = PackedVisits.from_lists(patients)
    targets = whole.next_visit_codes()
    assert targets.offsets[0] == 0
    assert len(targets.offsets) == len(targets.rows) + 1
    assert targets.codes.dtype == targets.offsets.dtype == torch.int32
    found = {}
    for i, row in enumerate(targets.rows.tolist()):
        codes = targets.codes[targets.offsets[i] : targets.offsets[i + 1]].tolist()
        found[int(whole.patient_of_row[row]), int(whole.time_of_row[row])] = codes
    assert found == {
        (p, t): codes for p, visits in enumerate(patients) for t, codes in enumerate(visits[1:])
    }


def test_next_codes_share_no_memory_with_the_batch():
    whole = batch()
    targets = whole.next_visit_codes()
    for tensor in targets:
        tensor.fill_(0)
    assert whole.codes.tolist() == batch().codes.tolist()
