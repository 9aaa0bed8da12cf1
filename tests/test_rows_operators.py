"""Rows of visits: operators, sums of each patient, the visit before and the next one."""

from __future__ import annotations

import operator
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ehrseq_fast import PackedRows, PackedVisits

from .batch_cases import SOME_PATIENTS, many

PATIENTS = [[[1], [2]], [[3]], [[], [4], [5, 6], [7]]]


def batch():
    return PackedVisits.from_lists(PATIENTS)


def rows(*trailing, dtype=torch.float64, of=None):
    of = batch() if of is None else of
    torch.manual_seed(0)
    values = torch.rand(of.n_visits, *trailing, dtype=torch.float64) * 4 + 1
    return PackedRows(values.to(dtype), of)


BINARY = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
]


@pytest.mark.parametrize("operation", BINARY)
@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_operators(operation, trailing):
    ours = rows(*trailing)
    values = ours.values
    others = [2, 2.5, torch.tensor(2.5), values + 1, PackedRows(values + 1, ours.batch)]
    for other in others:
        theirs = other.values if isinstance(other, PackedRows) else other
        found = operation(ours, other)
        assert isinstance(found, PackedRows)
        assert found.batch is ours.batch
        torch.testing.assert_close(found.values, operation(values, theirs), rtol=0, atol=0)
        reflected = operation(other, ours)
        assert isinstance(reflected, PackedRows)
        torch.testing.assert_close(reflected.values, operation(theirs, values), rtol=0, atol=0)


@pytest.mark.parametrize("operation", [operator.and_, operator.or_, operator.xor])
def test_operators_of_booleans(operation):
    above = rows() > 3
    other = torch.arange(7) % 2 == 0
    assert torch.equal(operation(above, other).values, operation(above.values, other))
    assert torch.equal(operation(other, above).values, operation(other, above.values))
    assert torch.equal((~above).values, ~above.values)


def test_one_operand():
    ours = rows(2) - 3
    assert torch.equal((-ours).values, -ours.values)
    assert torch.equal((+ours).values, ours.values)
    assert torch.equal(abs(ours).values, ours.values.abs())
    assert torch.equal(ours.map(torch.exp).values, ours.values.exp())


def test_shapes_are_aligned_from_the_first_dimension():
    """By torch's rule, [7] beside [7, 7] would be one number for each column."""
    square, column = rows(7), torch.arange(7.0, dtype=torch.float64)
    expected = square.values * column[:, None]
    assert torch.equal((square * column).values, expected)
    assert torch.equal((column * square).values, expected)
    assert torch.equal((square * PackedRows(column, square.batch)).values, expected)
    assert torch.equal((PackedRows(column, square.batch) * square).values, expected)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (rows(), ValueError, "expected rows of the same batch, got those of another"),
        (torch.ones(3), ValueError, r"one row per visit, \[n_visits=7, ...\], got \[3\]"),
        (torch.ones(1, 7), ValueError, r"got \[1, 7\]"),
        (torch.ones(7, 2, 3), ValueError, r"broadcast from the first dimension on"),
        ("1", TypeError, "unsupported operand"),
        (None, TypeError, "unsupported operand"),
        ([1] * 7, TypeError, "unsupported operand"),
        # NumPy would compute with the rows' values, without their gradient
        (np.ones(7), TypeError, r"expected a number or a tensor, got a NumPy array of float64"),
    ],
)
def test_operands_that_do_not_fit(other, error, message):
    ours = rows(3)
    for operation in (lambda: ours + other, lambda: other - ours):
        with pytest.raises(error, match=message):
            operation()


def test_rows_of_copies_of_a_batch_are_rows_of_it():
    ours = rows()
    others = [
        ours.batch.with_outcomes(event_times=[0, 0, 1]),
        ours.batch.with_codes(keep=ours.batch.codes > 3),
        ours.batch.with_features(torch.ones(7, 1)),
        ours.batch.to("cpu"),
    ]
    for other in others:
        assert ours.batch.same_visits(other)
        assert torch.equal((ours + PackedRows(ours.values, other)).values, 2 * ours.values)
    copied = pickle.loads(pickle.dumps(ours))
    with pytest.raises(ValueError, match="the same batch"):
        ours - copied
    assert torch.equal((ours - copied.values).values, torch.zeros(7, dtype=torch.float64))


def test_comparisons_have_no_one_truth_value():
    with pytest.raises(ValueError, match="expected one truth value"):
        bool(rows() > 0)


def test_map_refuses_another_number_of_rows():
    with pytest.raises(ValueError, match="the result of function: expected one row per visit"):
        rows().map(lambda values: values.sum())


def test_numpy_sees_an_array():
    ours = rows(dtype=torch.float32)
    array = ours.numpy()
    assert np.mean(ours) == array.mean()
    assert np.sum(ours) == array.sum()
    np.testing.assert_array_equal(np.concatenate([ours, ours]), np.concatenate([array, array]))
    np.testing.assert_array_equal(np.exp(ours), np.exp(array))
    ours.values.requires_grad_()
    doubled = np.float64(2) * ours
    assert isinstance(doubled, PackedRows)
    assert doubled.values.requires_grad


def by_patient(ours):
    return [ours.values[ours.batch.rows_of(p)] for p in range(len(ours.batch))]


@many
@given(SOME_PATIENTS, st.sampled_from([(), (2,), (2, 1)]), st.integers(-9, 9))
def test_what_is_of_each_patient_and_of_visits_nearby(patients, trailing, n):
    of = PackedVisits.from_lists(patients)
    ours = rows(*trailing, of=of)
    parts = by_patient(ours)
    for name, expected in {
        "sum": [part.sum(0) for part in parts],
        "mean": [part.mean(0) for part in parts],
        "first": [part[0] for part in parts],
        "last": [part[-1] for part in parts],
    }.items():
        torch.testing.assert_close(getattr(ours, name)(), torch.stack(expected), msg=name)
    for found, expected in (
        (ours.softmax(), [part.softmax(0) for part in parts]),
        (ours.reversed(), [part.flip(0) for part in parts]),
        (ours.shift(n, fill=-7), [shifted(part, n, -7.0) for part in parts]),
    ):
        for ours_, theirs in zip(by_patient(found), expected, strict=True):
            torch.testing.assert_close(ours_, theirs)
    mask = ours.sequence_mask(of.max_visits + 1)
    assert mask.sum(1).tolist() == [len(visits) for visits in patients]
    assert mask.dtype == torch.bool
    assert (mask.int().diff(dim=1) <= 0).all()


def shifted(part, n, fill):
    found = torch.full_like(part, fill)
    for t in range(len(part)):
        if 0 <= t - n < len(part):
            found[t] = part[t - n]
    return found


OF_PATIENTS = {
    "sum": lambda r: r.sum(),
    "mean": lambda r: r.mean(),
    "first": lambda r: r.first(),
    "last": lambda r: r.last(),
    "softmax": lambda r: r.softmax().sum() + r.softmax().map(torch.square).sum(),
    "reversed": lambda r: (r.reversed() * torch.arange(7.0, dtype=r.dtype)).sum(),
    "previous": lambda r: (r * r.shift(1, fill=2)).sum(),
    "next": lambda r: (r * r.shift(-2)).sum(),
    "operators": lambda r: ((2 / r - r**2 % 5) * r.values).sum(),
}


@pytest.mark.parametrize("name", OF_PATIENTS)
def test_nothing_of_one_patient_reaches_another(name):
    """A NaN of patient 2, forward and backward; patients 0 and 1 as without it."""
    function = OF_PATIENTS[name]
    clean, broken = rows(), rows()
    with torch.no_grad():
        broken.values[broken.batch.rows_of(2)] = float("nan")
    results = []
    for ours in (clean, broken):
        ours.values.requires_grad_()
        found = function(ours)
        found.sum().backward()
        results.append((found.detach(), ours.values.grad))
    (expected, expected_grad), (found, grad) = results
    assert torch.equal(found[:2], expected[:2])
    assert found[2].isnan().all()
    for patient in (0, 1):
        at = clean.batch.rows_of(patient)
        assert torch.equal(grad[at], expected_grad[at])


@pytest.mark.parametrize("name", OF_PATIENTS)
def test_derivatives(name):
    of = batch()
    values = rows(2, of=of).values.requires_grad_()

    def function(values):
        ours = PackedRows(values, of)
        if name in ("reversed", "operators"):
            ours = PackedRows(values[:, 0], of)
        return OF_PATIENTS[name](ours)

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)
    # forward mode, and a batch of values at once
    with_tangents = torch.func.jacfwd(function)(values)
    torch.testing.assert_close(with_tangents, torch.func.jacrev(function)(values))
    stacked = torch.stack([values, 2 * values])
    torch.testing.assert_close(
        torch.func.vmap(function)(stacked), torch.stack([function(v) for v in stacked])
    )


def test_traced_whole():
    of = batch()

    def function(values):
        ours = PackedRows(values, of)
        weights = ours.shift(-1, fill=0.5).softmax()
        return (weights * ours - ours.reversed()).sum() + ours.mean(), ours.sequence_mask()

    values = rows(of=of).values
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(values), function(values))


def test_dtypes():
    of = batch()
    whole = PackedRows(torch.arange(7), of)
    assert whole.sum().dtype == torch.int64
    assert whole.mean().dtype == torch.float32
    assert (whole > 2).sum().tolist() == [1, 0, 3]
    assert whole.shift(-1, fill=-100).values.dtype == torch.int64
    assert PackedRows(torch.ones(7, dtype=torch.bfloat16), of).mean().dtype == torch.bfloat16
    with pytest.raises(TypeError, match="values: expected float32"):
        whole.softmax()
    with pytest.raises(ValueError, match=r"fill: expected a number that torch\.int64 holds"):
        whole.shift(1, fill=0.5)
    with pytest.raises(TypeError, match="n: expected an integer, got float"):
        whole.shift(1.5)


def test_no_patients():
    of = PackedVisits.from_lists([])
    ours = PackedRows(torch.zeros(0, 2), of)
    assert ours.sum().shape == ours.mean().shape == ours.last().shape == (0, 2)
    assert ours.reversed().values.shape == ours.shift(1).values.shape == (0, 2)
    assert ours.softmax().values.shape == (0, 2)
    assert ours.sequence_mask().shape == (0, 0)


def test_fields_can_be_set():
    """What gives a container's tensors other values (Lightning) copies it and sets its fields."""
    ours = rows()
    ours.values = ours.values.detach() * 2
    assert ours.sum().shape == (3,)


def test_results_share_no_memory():
    ours = rows()
    before = ours.values.clone()
    for found in (ours.shift(0).values, ours.reversed().values, ours.to_padded(), ours.first()):
        found.fill_(0)
    assert torch.equal(ours.values, before)
