"""The survival losses where numbers end: NaN, infinities, zeros, clamps, subnormal hazards, masks
of any bytes; every backend against the formulas as plain loops in float64."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from ehrseq_fast import backend as backends
from ehrseq_fast import (
    competing_risks_nll,
    discrete_time_survival_nll,
    packed_competing_risks_nll,
    packed_survival_nll,
)

from .batches import from_lists
from .conftest import is_emulated
from .survival_cases import definition
from .survival_loops import loss_and_gradient
from .tolerances import assert_close

pytestmark = pytest.mark.operation("survival_nll")

WAYS = ("probabilities", "sigmoid", "softmax")
CAUSES = (None, 2)
KINDS = [kind for kind in itertools.product(WAYS, CAUSES) if kind != ("softmax", None)]
LENGTHS = [5, 1, 3, 5, 2, 4, 1]
TIMES = [4, 0, 1, 2, 1, 3, 0]
ENTRIES = [1, 0, 0, 2, 0, 3, 0]
TYPES = [1, 0, 2, 0, 1, 2, 1]
LAYOUTS = ("padded", "packed")
SPECIAL = {
    "probabilities": [math.nan, 0.0, 1.0, 1e-9, 0.3],  # others are refused
    "sigmoid": [math.nan, math.inf, -math.inf, 0.0, 1e4, -1e4, 60.0, -60.0, 0.3],
    "softmax": [math.nan, math.inf, -math.inf, 0.0, 1e4, -1e4, 60.0, -60.0, 0.3],
}


def patients(causes):
    types = [min(kind, causes or 1) for kind in TYPES]
    return torch.tensor(TIMES), torch.tensor(types), torch.tensor(ENTRIES)


def mask():
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def batch_of(causes):
    times, types, _ = patients(causes)
    return from_lists(
        [[[1]] * n for n in LENGTHS],
        event_times=times,
        **{"event_indicators" if causes is None else "event_types": types},
    )


def call(layout, way, causes, hazards, **options):
    """The loss of padded hazards [B, V(, K)], through either layout."""
    times, types, entries = patients(causes)
    options |= {"from_logits": way != "probabilities", "entry_times": entries}
    if causes is not None:
        options["link"] = "softmax" if way == "softmax" else "sigmoid"
    if layout == "packed":
        batch = batch_of(causes)
        loss = packed_survival_nll if causes is None else packed_competing_risks_nll
        return loss(batch.pack(hazards), batch, **options)
    loss = discrete_time_survival_nll if causes is None else competing_risks_nll
    return loss(hazards, times, types, mask(), **options)


def shape_of(way, causes):
    shape = [len(LENGTHS), max(LENGTHS)]
    return shape if causes is None else [*shape, causes + (way == "softmax")]


def ordinary(way, causes, dtype=torch.float32):
    values = torch.randn(shape_of(way, causes), dtype=torch.float64)
    return (values.sigmoid() if way == "probabilities" else values).to(dtype)


def gradient(nll, hazards, grad_nll):
    return torch.autograd.grad(nll, hazards, grad_nll)[0]


def by_loops(way, causes, hazards, weights, grad_nll, reduction, **options):
    times, types, entries = (column.tolist() for column in patients(causes))
    return loss_and_gradient(
        hazards,
        times,
        types,
        LENGTHS,
        entries,
        weights.tolist(),
        way,
        grad_nll,
        reduction,
        **options,
    )


def same(actual, expected, terms=60):
    """Equal numbers, and NaN and infinities in the same places."""
    assert_close(actual.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0), terms)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isposinf(), expected.isposinf())
    assert torch.equal(actual.isneginf(), expected.isneginf())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("convention", ["excluded", "included"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("way", "causes"), KINDS)
def test_agrees_with_plain_loops(backend, layout, convention, reduction, way, causes):
    hazards = ordinary(way, causes, torch.float64).requires_grad_()
    weights = torch.rand(len(LENGTHS), dtype=torch.float64) + 0.5
    options = {"censored_visit": convention, "reduction": reduction}
    nll = call(layout, way, causes, hazards, sample_weight=weights, **options)
    grad_nll = torch.rand_like(nll)
    expected, expected_grad = by_loops(way, causes, hazards, weights, grad_nll, **options)
    same(nll.detach(), expected)
    same(gradient(nll, hazards, grad_nll), expected_grad)


EPS = (0.0, 1e-300, 1e-50, 1e-8, 1e-7, 0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("causes", CAUSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clamped_hazards_have_no_gradient(backend, layout, eps, causes, dtype):
    """Also where 1 - eps is rounded to 1, and eps to 0."""
    shape = shape_of("probabilities", causes)
    values = torch.tensor([0.0, 1.0, 0.25, 0.5], dtype=dtype)
    for seed in range(1 if is_emulated(backend) else 3):
        torch.manual_seed(seed)
        hazards = values[torch.randint(0, 4, shape)].requires_grad_()
        ones = torch.ones(len(LENGTHS))
        nll = call(
            layout, "probabilities", causes, hazards, eps=eps, reduction="none",
            censored_visit="included",
        )  # fmt: skip
        grad = gradient(nll, hazards, torch.ones_like(nll))
        expected, expected_grad = by_loops(
            "probabilities", causes, hazards, ones, torch.ones_like(nll), "none",
            censored_visit="included", eps=eps,
        )  # fmt: skip
        same(nll.detach(), expected)
        same(grad, expected_grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("way", "causes"), KINDS)
def test_nan_and_infinity_are_where_the_definition_has_them(backend, layout, way, causes):
    """One special hazard at a time, at every place, with the definition's own loss and gradient."""
    plain = ordinary(way, causes)
    times, types, entries = patients(causes)
    places = [(0, 0), (0, 2), (0, 4), (1, 0), (2, 1), (2, 2), (3, 2), (4, 1), (5, 3), (6, 0)]
    values = SPECIAL[way]
    if is_emulated(backend):
        places, values = places[1::4], values[:5]
    for value, place in itertools.product(values, places):
        hazards = plain.clone()
        hazards[(*place, ...) if causes is None else (*place, -1)] = value
        hazards.requires_grad_()
        options = {"censored_visit": "included", "reduction": "none", "eps": 1e-7}
        nll = call(layout, way, causes, hazards, **options)
        options |= {"from_logits": way != "probabilities", "entry_times": entries}
        if causes is not None:
            options["link"] = "softmax" if way == "softmax" else "sigmoid"
        expected = definition(hazards, times, types, mask(), **options)
        same(nll.detach(), expected.detach().double())
        ones = torch.ones_like(nll)
        same(gradient(nll, hazards, ones), gradient(expected, hazards, ones).double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("way", "causes"), KINDS)
def test_weights_and_incoming_gradients_reach_what_is_at_risk_alone(
    backend, layout, dtype, way, causes
):
    """Clamped hazards and slots that are not at risk have a gradient of 0, whatever comes in."""
    times, types, entries = patients(causes)
    options = {"from_logits": way != "probabilities", "entry_times": entries}
    if causes is not None:
        options["link"] = "softmax" if way == "softmax" else "sigmoid"
    hazards = ordinary(way, causes, dtype)
    if way == "probabilities":
        hazards[0, 2], hazards[3, 2] = 0.0, 1.0
    else:
        hazards[0, 2], hazards[3, 2] = -500.0, 500.0
    hazards.requires_grad_()
    bad = [math.nan, math.inf, 0.0]
    cases = list(itertools.product([1.0, *bad], [1.0, *bad, -math.inf], ["none", "sum"]))
    if is_emulated(backend):
        cases = [(math.nan, 1.0, "none"), (math.inf, 1.0, "sum"), (0.0, math.nan, "none")]
        cases += [(1.0, math.inf, "sum")]
    for weight, incoming, reduction in cases:
        weights = torch.ones(len(LENGTHS))
        weights[0] = weights[4] = weight
        common = {"sample_weight": weights, "reduction": reduction}
        nll = call(layout, way, causes, hazards, **common)
        expected = definition(hazards, times, types, mask(), **options, **common)
        grad_nll = torch.ones_like(nll)
        (grad_nll[:2] if nll.dim() else grad_nll).fill_(incoming)
        same(nll.detach(), expected.detach().double())
        grad, expected_grad = (gradient(x, hazards, grad_nll) for x in (nll, expected))
        if way == "softmax" and math.isinf(incoming):
            # (p - 1) * inf is -inf, where autograd has p * inf - inf, NaN
            expected_grad = torch.where(grad.isinf() & expected_grad.isnan(), grad, expected_grad)
        same(grad, expected_grad.double())


def flags(values):
    """A bool tensor whose true bytes are not 1."""
    return torch.where(values.bool(), 64, 0).to(torch.uint8).view(torch.bool)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causes", [None, 1])
@pytest.mark.parametrize("slots", [3, 9, 64, 65, 200])
def test_any_byte_but_zero_is_true(backend, layout, causes, slots):
    lengths = torch.tensor([slots, 1, (slots + 1) // 2, slots - 1])
    times = lengths - 1
    seen = torch.tensor([True, False, True, True])
    sequence_mask = torch.arange(slots) < lengths[:, None]
    hazards = torch.rand(4, slots) * 0.8 + 0.1
    if causes is not None:
        hazards = hazards[..., None]
    batch = from_lists([[[1]] * n for n in lengths.tolist()])

    def value(sequence_mask, seen, weights):
        if layout == "packed":
            name = "event_indicators" if causes is None else "event_types"
            loss = packed_survival_nll if causes is None else packed_competing_risks_nll
            return loss(
                batch.pack(hazards),
                batch,
                event_times=times,
                sample_weight=weights,
                validate=True,
                **{name: seen},
            )
        loss = discrete_time_survival_nll if causes is None else competing_risks_nll
        return loss(hazards, times, seen, sequence_mask, sample_weight=weights, validate=True)

    weights = torch.tensor([True, True, False, True])
    expected = value(sequence_mask, seen, weights)
    assert torch.equal(value(flags(sequence_mask), flags(seen), flags(weights)), expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
     torch.bfloat16, torch.float32, torch.float64],
)  # fmt: skip
def test_masks_are_counted_and_refused_alike_in_every_dtype(compiled, dtype):
    """Every length of a row, around every length of a vector, and every place of a fault."""
    lanes = 64 // dtype.itemsize
    for slots in {1, 2, 7, lanes - 1, lanes, lanes + 1, 2 * lanes, 2 * lanes + 3, 3 * lanes - 1}:
        if slots < 1:
            continue
        lengths = torch.arange(1, slots + 1)
        good = (torch.arange(slots) < lengths[:, None]).to(dtype)
        hazards = torch.full((slots, slots), 0.5)
        seen = torch.ones(slots)
        with backends.use_backend("cpu"):
            nll = discrete_time_survival_nll(hazards, lengths - 1, seen, good, reduction="none")
            assert_close(nll, lengths * math.log(2), terms=slots)
            short = good[:1].clone()
            short[0, -1] = 0
            with pytest.raises(ValueError, match=rf"event time {slots - 1} and|zero length"):
                discrete_time_survival_nll(hazards[:1], lengths[:1] + slots - 2, seen[:1], short)
            for place in range(slots - 1):  # a hole
                holed = torch.ones(1, slots, dtype=dtype)
                holed[0, place] = 0
                with pytest.raises(ValueError, match=rf"1 at visit {place + 1}, after a 0"):
                    discrete_time_survival_nll(hazards[:1], lengths[:1] - 1, seen[:1], holed)
            if dtype == torch.bool:
                continue
            for place, wrong in itertools.product(range(slots), wrong_values(dtype)):
                odd = torch.ones(1, slots, dtype=dtype)
                odd[0, place] = wrong
                with pytest.raises(ValueError, match=rf"sequence_mask .* at visit {place}"):
                    discrete_time_survival_nll(hazards[:1], lengths[:1] - 1, seen[:1], odd)
            if dtype.is_floating_point:
                signed = torch.where(good == 0, torch.tensor(-0.0, dtype=dtype), good)
                discrete_time_survival_nll(hazards, lengths - 1, seen, signed)


def wrong_values(dtype):
    if not dtype.is_floating_point:
        return [2, 127] if dtype == torch.uint8 else [2, -1]
    return [math.nan, math.inf, -1.0, 0.5, torch.finfo(dtype).tiny]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiny_event_hazards_in_double_precision(backend, layout):
    """Beside visits that were all but certain: no product of them fits a double."""
    slots = 300
    lengths = [slots] * 9
    tiny = [1e-300, 5e-324, 1e-310, 0.5, 1e-300, 1e-100, 1e-200, 1e-16, 1.0]
    hazards = torch.full((9, slots), 1 - 1e-15, dtype=torch.float64)
    times = torch.tensor([slots - 1, 17, 150, 299, 0, 15, 16, 1, 2])
    hazards[torch.arange(9), times] = torch.tensor(tiny, dtype=torch.float64)
    hazards.requires_grad_()
    seen = torch.ones(9)
    options = {"eps": 0.0, "reduction": "none"}
    if layout == "packed":
        batch = from_lists([[[1]] * n for n in lengths], event_times=times, event_indicators=seen)
        nll = packed_survival_nll(batch.pack(hazards), batch, **options)
    else:
        nll = discrete_time_survival_nll(hazards, times, seen, **options)
    survived = -math.log1p(-hazards[0, 1].item())
    for i, (time, hazard) in enumerate(zip(times.tolist(), tiny, strict=True)):
        expected = time * survived - math.log(hazard)
        assert abs(nll[i].item() / expected - 1) < 1e-13 if expected else nll[i] == 0
    grad = gradient(nll, hazards, torch.ones_like(nll))
    slopes = grad[torch.arange(9), times].tolist()
    assert slopes == [-1 / hazard if hazard > 1e-308 else -math.inf for hazard in tiny]


UNDER_FLUSHED_DENORMALS = """
import math, torch
from ehrseq_fast import discrete_time_survival_nll, packed_survival_nll, PackedVisits

assert torch.set_flush_denormal(True)
time, seen = torch.tensor([1]), torch.tensor([1])
batch = PackedVisits.from_lists([[[1]] * 3], event_times=[1], event_indicators=[1])
half, brain = torch.float16, torch.bfloat16
for dtype, bits, small in ((half, 16, 2.0**-20), (half, 1, 2.0**-24), (brain, 8, 2.0**-130)):
    hazards = torch.full((1, 3), 0.5).to(dtype)
    hazards.view(torch.int16)[0, 1] = bits
    expected = -math.log(0.5) - math.log(small)
    for nll in (
        discrete_time_survival_nll(hazards, time, seen, eps=0.0),
        packed_survival_nll(hazards.flatten(), batch, eps=0.0),
    ):
        assert abs(nll.item() / expected - 1) < 1e-6, (dtype, small, nll.item(), expected)
"""


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_subnormal_hazards_are_not_zero(compiled, instructions):
    """In 16 bits they are ordinary numbers, whatever torch.set_flush_denormal says."""
    environment = os.environ | {
        "EHRSEQ_FAST_CPU_CAPABILITY": instructions,
        "EHRSEQ_FAST_BACKEND": "cpu",
    }
    subprocess.run([sys.executable, "-c", UNDER_FLUSHED_DENORMALS], env=environment, check=True)
