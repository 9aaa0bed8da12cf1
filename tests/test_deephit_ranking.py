"""DeepHit's ranking loss, of all pairs of patients, against the pairs one by one and pycox."""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast import (
    DeepHitLoss,
    DeepHitRankingLoss,
    PackedRows,
    deephit_competing_ranking_loss,
    deephit_ranking_loss,
    pmf_competing_risks_nll,
    pmf_nll,
    use_backend,
)
from ehrseq_fast import backend as backends
from ehrseq_fast.deephit_ranking import reference

from . import pycox_files
from .batches import from_lists
from .survival_cases import (
    assert_ranks_as_defined,
    draw_patients,
    on_default_device,
    value_and_grad,
)
from .tolerances import assert_matches

pytestmark = pytest.mark.operation("deephit_ranking")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(patients, slots, causes=None, dtype=torch.float64, scale=1.0):
    p = draw_patients(patients, slots, causes or 1)
    shape = (patients, slots) if causes is None else (patients, slots, causes)
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype), p


def loss_of(causes):
    return deephit_ranking_loss if causes is None else deephit_competing_ranking_loss


def pairs(x, times, types, mask, entries, weights, sigma, included):
    """Every pair on its own."""
    x = x if x.dim() == 3 else x[:, :, None]
    kept = mask & (torch.arange(x.shape[1]) >= entries[:, None])
    x = torch.where(kept[:, :, None], x, -torch.inf)
    mass = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1).softmax(1)[:, :-1]
    incidence = mass.view(x.shape).cumsum(1)
    total = x.new_zeros(())
    for i in range(len(x)):
        if not types[i]:
            continue
        t, cause = times[i], int(types[i]) - 1
        for j in range(len(x)):
            tied = times[j] == t and not types[j] and included
            if (times[j] > t or tied) and entries[j] <= t:
                apart = incidence[j, t, cause] - incidence[i, t, cause]
                total = total + weights[i] * weights[j] * (apart / sigma).exp()
    return total / len(x) ** 2


@pytest.mark.parametrize("causes", [None, 3])
@pytest.mark.parametrize("included", [True, False])
@pytest.mark.parametrize("sigma", [10.0, 0.1, 1e-2, 1e-3])
def test_every_pair(backend, causes, included, sigma):
    x, p = draw(23, 7, causes)
    more = {"entry_times": p.entries, "sample_weight": p.weights, "sigma": sigma}
    more["censored_visit"] = "included" if included else "excluded"
    got = value_and_grad(loss_of(causes), x, p.times, p.types, p.mask, **more)
    rest = (p.times, p.types, p.mask, p.entries, p.weights.double(), sigma, included)
    expected = value_and_grad(pairs, x, *rest)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("patients", "slots", "causes"), [(1, 1, None), (200, 37, None), (130, 19, 3), (65, 16, 1)]
)
def test_agrees_with_the_reference_in_float64(backend, patients, slots, causes, dtype):
    x, p = draw(patients, slots, causes, dtype)
    more = {"entry_times": p.entries, "sample_weight": p.weights}
    value, grad = value_and_grad(loss_of(causes), x, p.times, p.types, p.mask, **more)
    wide = value_and_grad(reference.deephit_ranking, x.double(), p.times, p.types, p.mask, **more)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert_matches(value, wide[0], scale=10 * wide[0], terms=40)
    size = 10 * wide[1].abs().amax()  # of the sums, of which gradients are differences
    assert_matches(grad, wide[1], scale=size, terms=40)


def test_a_small_sigma_does_not_overflow_where_the_result_is_finite(backend):
    # both incidences are near 1: e^(F / sigma) alone would be e^1000
    x = torch.tensor([[9.0, 0.0], [8.9995, 0.0]])
    times, seen = torch.tensor([0, 1]), torch.tensor([1, 0])
    value, grad = value_and_grad(deephit_ranking_loss, x, times, seen, sigma=1e-3)
    wide = value_and_grad(deephit_ranking_loss, x.double(), times, seen, sigma=1e-3)
    assert value.isfinite()
    assert grad.isfinite().all()
    torch.testing.assert_close(value.double(), wide[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("causes", [None, 2])
@pytest.mark.parametrize("slots", [8, 40])
def test_packed_rows_and_padding(backend, slots, causes):
    x, p = draw(30, slots, causes)
    x[::3] *= 40  # of some patients the largest logit has to be taken out of e^x
    loss = loss_of(causes)
    expected = value_and_grad(loss, x, p.times, p.types, p.mask)
    mask = p.mask if causes is None else p.mask[:, :, None]
    got = value_and_grad(loss, torch.where(mask, x, torch.nan), p.times, p.types, p.mask)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    lists = [[[1]] * length for length in p.lengths.tolist()]
    types = {"event_indicators" if causes is None else "event_types": p.types}
    batch = from_lists(lists, event_times=p.times, **types)
    values = batch.pack(x).detach().requires_grad_()
    packed = loss(PackedRows(values, batch))
    (grad,) = torch.autograd.grad(packed, values)
    if backend == "triton" and grad.is_cuda:  # a compiler lays rows in memory out otherwise
        assert_matches(packed, expected[0].double(), scale=10 * expected[0], terms=8)
        assert_matches(grad, batch.pack(expected[1]).double(), scale=10 * expected[1].abs().max())
        return
    assert torch.equal(packed, expected[0])
    assert torch.equal(grad, batch.pack(expected[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# at the second and the third e to the difference just overflows float32 and float64
@pytest.mark.parametrize("sigma", [0.1, 7.536e-3, 9.4203e-4, 1e-4])
def test_a_patient_of_weight_0_is_left_out(backend, dtype, sigma):
    # whose exponent is by far the largest, and the others' vanish beside it
    x = torch.tensor([[0.0, 0.0], [9.0, 0.0], [-0.01, 0.0], [-9.0, 1.0], [9.0, 9.0]], dtype=dtype)
    times, seen = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([1, 0, 0, 1, 0])
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    more = {"sample_weight": weights, "sigma": sigma, "entry_times": torch.tensor([0, 0, 0, 0, 1])}
    value, grad = value_and_grad(deephit_ranking_loss, x, times, seen, **more)
    some = [0, 2]
    alone = value_and_grad(deephit_ranking_loss, x[some], times[some], seen[some], sigma=sigma)
    assert value > 0
    torch.testing.assert_close(value, alone[0] * 4 / 25)
    torch.testing.assert_close(grad[some], alone[1] * 4 / 25)
    assert not grad[[1, 3, 4]].any()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *((what, v) for what in ("logits", "weights") for v in (torch.nan, torch.inf)),
        ("logits", -torch.inf),
        ("incoming gradient", torch.nan),
    ],
)
@pytest.mark.parametrize("convention", ["included", "excluded"])
def test_what_is_not_finite(backend, where, value, convention):
    """It shows where the definition shows it."""
    x, p = draw(9, 19, None, torch.float32)
    for patient in range(0, 9, 4 if backend == "triton" else 1):  # slow where it is interpreted
        broken, weights, incoming = x.clone(), p.weights.clone(), 1.0
        if where == "logits":
            broken[patient, p.entries[patient]] = value
        elif where == "weights":
            weights[patient] = value
        else:
            incoming, weights[patient] = value, 0.0  # a derivative of 0, unless it is of no pair
        more = {"entry_times": p.entries, "sample_weight": weights, "censored_visit": convention}
        found = []
        for loss, leaf in (
            (deephit_ranking_loss, broken.clone()),
            (reference.deephit_ranking, broken.double()),
        ):
            leaf.requires_grad_()
            got = loss(leaf, p.times, p.types, p.mask, **more)
            found.append((got, *torch.autograd.grad(got * incoming, leaf)))
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.isinf(), theirs.isinf())


def test_a_nan_stays_with_the_pairs_of_its_patient(backend):
    x = torch.zeros(4, 2)
    times, seen = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 1])
    x[0, 1] = torch.nan
    value, grad = value_and_grad(deephit_ranking_loss, x, times, seen)
    assert value.isnan()
    # the event of patient 1 has pairs with 2 and 3, who have pairs with 0 too
    assert grad.isnan().tolist() == [[True] * 2, [False] * 2, [True] * 2, [True] * 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(backend, dtype):
    x = torch.tensor([[1e4, -1e4, 3.0], [-1e4, 1e4, -1e4], [-1e4] * 3, [1e4] * 3]).to(dtype)
    times, seen = torch.tensor([1, 2, 2, 1]), torch.tensor([1, 1, 0, 0])
    got = value_and_grad(deephit_ranking_loss, x, times, seen, sigma=0.5)
    wide = value_and_grad(reference.deephit_ranking, x.double(), times, seen, sigma=0.5)
    for ours, theirs in zip(got, wide, strict=True):
        assert_matches(ours, theirs, scale=10, terms=4)
    x, p = draw(23, 17, dtype=dtype, scale=60)  # e^x of the largest is no float32
    x[3] += 30 - x[3].amax()  # and of a patient's is far from that
    given = (p.times, p.types, p.mask)
    got = value_and_grad(deephit_ranking_loss, x, *given, sigma=0.5)
    wide = value_and_grad(reference.deephit_ranking, x.double(), *given, sigma=0.5)
    for ours, theirs in zip(got, wide, strict=True):
        assert_matches(ours, theirs, scale=wide[0] / 0.5, terms=40)


@pytest.mark.parametrize("causes", [None, 3])
def test_impossible_outcomes_stay_within_memory_and_the_formula(kernels, causes):
    """Nothing checks outcomes on a GPU: times outside the visits, masks with holes."""
    if kernels == "cpu":
        pytest.skip("where they are refused")
    x, _ = draw(8, 40, causes, torch.float32)
    times = torch.tensor([-(2**40), -1, 0, 3, 39, 40, 2**40, 37])
    types = torch.tensor([1, 0, 1, 0, 7, -3, 1, 2] if causes else [1, 0, 1, 0, 1, 0, 1, 1])
    entries = torch.tensor([0, 0, -5, 4, 2**40, 1, 2, -(2**40)])
    mask = torch.rand(8, 40) < 0.7
    mask[4] = False
    operator = backends.operators(kernels).deephit_ranking
    weights = torch.tensor([1.0, 2, -1, 0, 1, 1, 0.5, 1])
    assert_ranks_as_defined(operator, x, times, types, mask, entries, weights)


def test_strides(backend):
    x, p = draw(12, 5)
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous()
    expected = value_and_grad(deephit_ranking_loss, x, p.times, p.types, p.mask)
    got = value_and_grad(deephit_ranking_loss, strided, p.times, p.types, p.mask)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_operator(kernels):
    x, p = draw(6, 4, None, torch.float32)
    operator = backends.operators(kernels).deephit_ranking.default
    batch = from_lists([[[1]] * length for length in p.lengths.tolist()])
    rows = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
    end = (False, True, 0.1)
    torch.library.opcheck(operator, (x, p.times, p.types, p.mask, *[None] * 5, *end, True))
    packed = (batch.pack(x), p.times, p.types, None, *rows, p.entries, p.weights, *end, False)
    torch.library.opcheck(operator, packed)
    with pytest.raises(ValueError, match=r"sigma: expected a finite number above 0, got -1\.0"):
        operator(x, p.times, p.types, p.mask, *[None] * 5, False, True, -1.0, True)


def test_compile(compiled):
    x, p = draw(6, 4, None, torch.float32)
    fast = torch.compile(deephit_ranking_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    got = value_and_grad(fast, x, p.times, p.types, p.mask)
    expected = value_and_grad(deephit_ranking_loss, x, p.times, p.types, p.mask)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("causes", [None, 2])
def test_derivatives(unemulated, causes):
    x, p = draw(6, 4, causes)
    weights = p.weights.double().requires_grad_()
    x.requires_grad_()

    def run(x, weights):
        more = {"entry_times": p.entries, "sample_weight": weights, "sigma": 0.5}
        return loss_of(causes)(x, p.times, p.types, p.mask, **more)

    def of_logits(x):
        return run(x, weights.detach())

    assert torch.autograd.gradcheck(of_logits, x)
    assert torch.autograd.gradgradcheck(of_logits, x)
    assert torch.autograd.gradcheck(run, (x, weights))
    assert torch.autograd.gradgradcheck(run, (x, weights))
    given = (x.detach(), weights.detach())
    tangent = torch.func.jvp(run, given, tuple(torch.ones_like(v) for v in given))[1]
    grads = torch.autograd.grad(run(x, weights), (x, weights))
    torch.testing.assert_close(tangent, sum(grad.sum() for grad in grads))


def test_pycox(monkeypatch):
    losses = pycox_files.load(monkeypatch, "models.loss")
    x, p = draw(40, 6, None, torch.float32)
    rank = torch.zeros(40, 40)
    for i in range(40):
        tied = (p.times == p.times[i]) & (p.types == 0)
        rank[i] = ((p.times > p.times[i]) | tied) & (p.types[i] != 0)
    theirs = losses.rank_loss_deephit_single(x, p.times, p.types, rank, 0.3)
    torch.testing.assert_close(deephit_ranking_loss(x, p.times, p.types, sigma=0.3), theirs)
    x, p = draw(40, 6, 2, torch.float32)
    for i in range(40):
        tied = (p.times == p.times[i]) & (p.types == 0)
        rank[i] = ((p.times > p.times[i]) | tied) & (p.types[i] != 0)
    phi = x.transpose(1, 2).contiguous()
    theirs = losses.rank_loss_deephit_cr(phi, p.times, p.types, rank, 0.3)
    ours = deephit_competing_ranking_loss(x, p.times, p.types, sigma=0.3)
    torch.testing.assert_close(ours, theirs)


def test_same_bits_for_any_number_of_threads(unemulated):
    x, p = draw(3000, 30, None, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = value_and_grad(deephit_ranking_loss, x, p.times, p.types, p.mask)
        torch.set_num_threads(2)
        second = value_and_grad(deephit_ranking_loss, x, p.times, p.types, p.mask)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_linear_in_patients():
    """No tensor of the graph has as many values as there are pairs."""
    x, p = draw(300, 3, None, torch.float32)
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, use_backend("reference"):
        deephit_ranking_loss(x.requires_grad_(), p.times, p.types).backward()
    assert max(sizes) <= 300 * 4


def test_modules_and_empty_batches(backend):
    none = torch.zeros(0, dtype=torch.int64)
    assert deephit_ranking_loss(torch.zeros(0, 3), none, none).isnan()
    x, p = draw(9, 5)
    given = (x, p.times, p.types, p.mask)
    ranking = DeepHitRankingLoss(0.3, censored_visit="excluded")
    more = {"sigma": 0.3, "censored_visit": "excluded"}
    assert torch.equal(ranking(*given), deephit_ranking_loss(*given, **more))
    both = DeepHitLoss(0.25, 0.3)(*given)
    expected = 0.25 * pmf_nll(*given) + 0.75 * deephit_ranking_loss(*given, sigma=0.3)
    torch.testing.assert_close(both, expected)
    x, p = draw(9, 5, 2)
    given = (x, p.times, p.types, p.mask)
    expected = 0.2 * pmf_competing_risks_nll(*given) + 0.8 * deephit_competing_ranking_loss(*given)
    torch.testing.assert_close(DeepHitLoss()(*given), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sigma": 0.0}, "sigma: expected a finite number above 0, got 0.0"),
        ({"sigma": float("nan")}, "sigma: expected a finite number above 0, got nan"),
        ({"censored_visit": "maybe"}, "censored_visit: expected one of"),
        ({"event_times": torch.tensor([0, 3])}, "patient 1 has event time 3 and 3"),
        ({"event_indicators": torch.tensor([0, 2])}, "patient 1 has 2"),
        ({"entry_times": torch.tensor([1, 0])}, "patient 0 has entry time 1"),
        ({"logits": torch.zeros(2, 3, 1)}, r"logits: expected shape \[B, V\]"),
        ({"sample_weight": torch.ones(3)}, "sample_weight: expected shape"),
    ],
)
def test_errors(unemulated, change, match):
    given = {
        "logits": torch.zeros(2, 3),
        "event_times": torch.tensor([0, 1]),
        "event_indicators": torch.tensor([1, 0]),
    }
    with pytest.raises(ValueError, match=match):
        deephit_ranking_loss(**on_default_device({**given, **change}), validate=True)


def test_errors_of_competing_risks_and_modules(unemulated):
    times, types = torch.tensor([0, 1]), torch.tensor([1, 3])
    with pytest.raises(ValueError, match=r"a cause 1..2: patient 1 has 3"):
        deephit_competing_ranking_loss(torch.zeros(2, 3, 2), times, types, validate=True)
    with pytest.raises(ValueError, match="logits: expected at least one cause"):
        deephit_competing_ranking_loss(torch.zeros(2, 3, 0), times, types)
    with pytest.raises(ValueError, match="alpha: expected"):
        DeepHitLoss(1.5)
