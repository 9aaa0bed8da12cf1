"""packed_survival_nll and packed_competing_risks_nll against the padded definition in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ehrseq_fast import (
    packed_competing_risks_nll,
    packed_survival_nll,
    use_backend,
)

from .batches import from_lists
from .conftest import RUNNABLE, is_emulated
from .poison import poison_allocator
from .survival_cases import definition
from .tolerances import assert_close

pytestmark = pytest.mark.operation("survival_nll")

LINKS = ("probabilities", "sigmoid", "softmax")


def packed(lengths=(3, 1, 5, 5, 2), times=None, seen=None, types=None):
    """One code per visit; events at the first, a middle and the last visit."""
    lengths = list(lengths)
    if times is None:
        times = [max(0, n - 1 - i % 3) for i, n in enumerate(lengths)]
    count = len(lengths)
    return from_lists(
        [[[1]] * n for n in lengths],
        event_times=torch.tensor(times, dtype=torch.int64),
        event_indicators=torch.tensor([i % 2 for i in range(count)] if seen is None else seen),
        event_types=torch.tensor([i % 3 for i in range(count)] if types is None else types),
    )


def draw(batch, link, causes, dtype=torch.float64):
    shape = [batch.n_visits] if causes is None else [batch.n_visits, causes]
    if link == "softmax":
        shape[-1] += 1
    values = torch.randn(shape, dtype=torch.float64)
    return (values if link != "probabilities" else values.sigmoid()).to(dtype)


def loss(batch, hazards, link, **options):
    options["from_logits"] = link != "probabilities"
    if hazards.dim() == 1:
        return packed_survival_nll(hazards, batch, **options)
    kind = "softmax" if link == "softmax" else "sigmoid"
    return packed_competing_risks_nll(hazards, batch, link=kind, **options)


def expected(batch, hazards, link, **options):
    options["from_logits"] = link != "probabilities"
    real = torch.ones(batch.n_visits, dtype=torch.bool)
    padded, mask = batch.pad(hazards), batch.pad(real, False)
    types = batch.event_indicators
    if hazards.dim() == 2:
        types = batch.event_types
        options["link"] = "softmax" if link == "softmax" else "sigmoid"
    return definition(padded, batch.event_times, types, mask, **options)


def check(batch, link, causes, dtype=torch.float32, **options):
    hazards = draw(batch, link, causes, dtype).requires_grad_()
    oracle = hazards.detach().double().requires_grad_()
    ours, theirs = loss(batch, hazards, link, **options), expected(batch, oracle, link, **options)
    grad = torch.randn(theirs.shape, dtype=torch.float64)
    (ours_grad,) = torch.autograd.grad(ours, hazards, grad.to(ours.dtype))
    (theirs_grad,) = torch.autograd.grad(theirs, oracle, grad)
    assert ours_grad.dtype == dtype
    assert_close(ours, theirs, terms=max(batch.n_visits, 8))
    # a gradient of probabilities is 1 / h: compare what it moves the logit by
    slope = (oracle * (1 - oracle)).detach() if link == "probabilities" else 1.0
    assert_close((ours_grad.double() * slope).to(dtype), theirs_grad * slope, terms=16)


CASES = [
    (link, causes)
    for link, causes in itertools.product(LINKS, (None, 1, 3))
    if not (link == "softmax" and causes is None)
]


@pytest.mark.parametrize(("link", "causes"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("censored_visit", ["excluded", "included"])
def test_agrees_with_the_padded_definition(backend, link, causes, dtype, censored_visit):
    types = [0, 1, min(2, causes or 1), 1, 0]
    for reduction in ("mean", "sum", "none"):
        batch = packed(types=types)
        check(batch, link, causes, dtype, censored_visit=censored_visit, reduction=reduction)


@pytest.mark.parametrize(("link", "causes"), [("probabilities", None), ("softmax", 2)])
def test_entry_times_and_weights(backend, link, causes):
    options = {
        "entry_times": torch.tensor([0, 0, 2, 1, 0]),
        "sample_weight": torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64),
    }
    batch = packed(times=[2, 0, 4, 1, 1], types=[0, 1, 2, 1, 2])
    for reduction in ("mean", "sum", "none"):
        check(batch, link, causes, reduction=reduction, **options)


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (4, 4), (101, 1, 3), tuple(range(1, 140))])
def test_lengths(backend, lengths):
    check(packed(lengths), "probabilities", None, torch.float64)
    check(packed(lengths, types=[i % 3 for i in range(len(lengths))]), "sigmoid", 2, torch.float64)


def test_outcomes_may_come_with_the_call(backend):
    batch = packed()
    bare = from_lists([[[1]] * n for n in (3, 1, 5, 5, 2)])
    hazards = draw(batch, "probabilities", None)
    outcomes = {"event_times": batch.event_times, "event_indicators": batch.event_indicators.bool()}
    assert torch.equal(
        packed_survival_nll(hazards, batch), packed_survival_nll(hazards, bare, **outcomes)
    )


def test_visits_after_the_event_are_never_read(backend):
    batch = packed(lengths=(4, 4), times=[1, 2], seen=[1, 1])
    hazards = torch.full((8,), 0.25)
    poison_allocator((8,))
    late = torch.tensor([1, 2])[batch.patient_of_row] < batch.time_of_row
    dirty = torch.where(late, float("nan"), hazards).requires_grad_()
    clean = packed_survival_nll(hazards, batch)
    value = packed_survival_nll(dirty, batch)
    assert torch.equal(value, clean)
    value.backward()
    assert torch.equal(dirty.grad[late], torch.zeros(int(late.sum())))
    assert dirty.grad[~late].isfinite().all()


def test_stride_zero_and_strided_gradients(backend):
    batch = packed()
    hazards = draw(batch, "probabilities", None, torch.float32).requires_grad_()
    nll = packed_survival_nll(hazards, batch, reduction="none")
    (ones,) = torch.autograd.grad(nll, hazards, torch.ones(()).expand(5), retain_graph=True)
    (dense,) = torch.autograd.grad(nll, hazards, torch.ones(5), retain_graph=True)
    (strided,) = torch.autograd.grad(nll, hazards, torch.ones(10)[::2])
    assert torch.equal(ones, dense)
    assert torch.equal(strided, dense)


@pytest.mark.parametrize(("link", "causes"), CASES)
def test_gradcheck(backend, link, causes):
    batch = packed((3, 1, 2), types=[0, 1, 1])
    hazards = draw(batch, link, causes).requires_grad_()
    fast = is_emulated(backend)
    for reduction in ("mean", "none"):

        def reduced(hazards, reduction=reduction):
            return loss(batch, hazards, link, reduction=reduction)

        torch.autograd.gradcheck(reduced, hazards, fast_mode=fast)
    torch.autograd.gradgradcheck(lambda h: loss(batch, h, link), hazards, fast_mode=fast)


def raw_arguments(batch, hazards, reduction=1, needs_grad=True):
    rows = (batch.row_starts, batch.unsorted_indices, batch.last_rows)
    types = batch.event_indicators if hazards.dim() == 1 else batch.event_types
    return (
        hazards, *rows, batch.event_times, types, None, None, 0, False, 1e-7, reduction, needs_grad
    )  # fmt: skip


@pytest.mark.parametrize("causes", [None, 2])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(compiled, causes, reduction):
    batch = packed(types=[0, 1, 2, 1, 0])
    for needs_grad in (False, True):
        arguments = raw_arguments(
            batch, draw(batch, "probabilities", causes), reduction, needs_grad
        )
        torch.library.opcheck(torch.ops.ehrseq_fast.packed_survival_nll, arguments)


def test_compile(backend):
    torch._dynamo.reset()

    def value(hazards, batch):
        return packed_survival_nll(hazards, batch)

    compiler = "inductor" if backend == "cpu" else "aot_eager"
    whole = torch.compile(value, fullgraph=True, dynamic=True, backend=compiler)
    for lengths in ((3, 1, 5), (2, 2, 7, 4), (9, 1)):
        batch = packed(lengths)
        hazards = draw(batch, "probabilities", None, torch.float32).requires_grad_()
        actual = torch.autograd.grad(whole(hazards, batch), hazards)
        wanted = torch.autograd.grad(value(hazards, batch), hazards)
        torch.testing.assert_close(actual, wanted)


def test_same_bits_on_every_run_and_for_any_number_of_threads(compiled):
    batch = packed(tuple(1 + i % 37 for i in range(500)))
    hazards = draw(batch, "probabilities", None, torch.float32).requires_grad_()
    threads = torch.get_num_threads()
    try:
        with use_backend("cpu"):
            first = packed_survival_nll(hazards, batch)
            (first_grad,) = torch.autograd.grad(first, hazards)
            for run in range(1000):
                torch.set_num_threads(1 + run % 4)
                again = packed_survival_nll(hazards, batch)
                (grad,) = torch.autograd.grad(again, hazards)
                assert torch.equal(first, again)
                assert torch.equal(first_grad, grad)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RUNNABLE)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_batch(name, data):
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=80))
    times = [data.draw(st.integers(0, n - 1)) for n in lengths]
    types = [data.draw(st.integers(0, 2)) for _ in lengths]
    link, causes = data.draw(st.sampled_from([("probabilities", None), ("sigmoid", 2)]))
    batch = packed(lengths, times, [min(t, 1) for t in types], types)
    with use_backend(name):
        check(batch, link, causes, torch.float64, reduction="none")


def rows(n=16):
    return torch.full((n,), 0.5)


BAD_INPUT = {
    "rows": (
        lambda: packed_survival_nll(rows()[:-1], packed()),
        ValueError,
        r"one row per visit, n_visits = 16, got \[15\]",
    ),
    "dimensions": (
        lambda: packed_survival_nll(rows().unsqueeze(1), packed()),
        ValueError,
        r"hazards: expected shape \[n_visits\], got \[16, 1\]",
    ),
    "no outcomes": (
        lambda: packed_survival_nll(rows()[:1], from_lists([[[1]]])),
        ValueError,
        "event_times and event_indicators: expected",
    ),
    "event time past the visits": (
        lambda: packed_survival_nll(
            rows(), packed(), event_times=torch.tensor([0, 1, 0, 9, 0]), validate=True
        ),
        ValueError,
        r"event_times must be one of the patient's visits.*patient 1 has event time 1 and 1 visits "
        r"\(patients at fault: 2\)",
    ),
    "entry after the event": (
        lambda: packed_survival_nll(
            rows(), packed(), entry_times=torch.tensor([0, 0, 5, 0, 0]), validate=True
        ),
        ValueError,
        "entry_times must lie between 0 and the event time: patient 2",
    ),
    "indicator": (
        lambda: packed_survival_nll(
            rows(), packed(), event_indicators=torch.tensor([0, 1, 2, 0, 0]), validate=True
        ),
        ValueError,
        r"event_indicators must be 0 \(censored\) or 1 \(event\): patient 2 has 2",
    ),
    "event type": (
        lambda: packed_competing_risks_nll(rows().unsqueeze(1), packed()),
        ValueError,
        "event_types must be 0",
    ),
    "float times": (
        lambda: packed_survival_nll(rows(), packed(), event_times=torch.zeros(5)),
        TypeError,
        "event_times: expected an integer dtype",
    ),
    "number of patients": (
        lambda: packed_survival_nll(rows(), packed(), event_times=torch.zeros(4, dtype=torch.long)),
        ValueError,
        r"event_times: expected shape \[B\] = \[5\]",
    ),
    "integer hazards": (
        lambda: packed_survival_nll(rows().long(), packed()),
        TypeError,
        "hazards: expected a floating-point dtype",
    ),
    "reduction": (
        lambda: packed_survival_nll(rows(), packed(), reduction="median"),
        ValueError,
        "reduction: expected one of",
    ),
    "softmax of probabilities": (
        lambda: packed_competing_risks_nll(torch.ones(16, 3), packed(), link="softmax"),
        ValueError,
        "from_logits: expected True",
    ),
    "devices": (
        lambda: packed_survival_nll(
            rows().to("meta"), packed(), event_times=torch.ones(5, dtype=torch.long, device="meta")
        ),
        ValueError,
        r"batch: expected on meta, where hazards is, got (cpu|cuda:\d)",
    ),
    "weights that require a gradient": (
        lambda: packed_survival_nll(
            rows(), packed(), sample_weight=torch.ones(5, requires_grad=True)
        ),
        ValueError,
        "sample_weight: expected no requires_grad",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, name, monkeypatch):
    monkeypatch.setenv("EHRSEQ_FAST_VALIDATE", "1")  # a GPU's values are checked on request
    call, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=message):
        call()


TAMPERED = {
    "starts that fall": {"row_starts": torch.tensor([0, 5, 4, 9, 12, 16])},
    "starts past the end": {"row_starts": torch.tensor([0, 5, 9, 12, 14, 99])},
    "another patient's rank": {"unsorted_indices": torch.tensor([2, 4, 0, 1, 70])},
    "last rows past the end": {"last_rows": torch.tensor([1, 2, 3, 4, 99])},
    "another dtype": {"last_rows": torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32)},
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_batch_reads_nothing_out_of_bounds(compiled, name):
    fields = {
        key: getattr(packed(), key)
        for key in ("row_starts", "unsorted_indices", "last_rows", "event_times", "n_visits")
    }

    class Tampered(SimpleNamespace):
        def __len__(self):
            return 5

    batch = Tampered(**{**fields, "event_indicators": packed().event_indicators, **TAMPERED[name]})
    with (
        use_backend("cpu"),
        pytest.raises(
            ValueError, match=r": (row_starts|unsorted_indices|last_rows): expected .*, got"
        ),
    ):
        packed_survival_nll(rows(), batch)
