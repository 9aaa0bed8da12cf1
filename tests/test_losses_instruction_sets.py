"""The losses whose CPU kernels go over rows in vectors, compiled for every instruction set, on rows
of all lengths around a vector's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.operation("deephit_ranking"),
    pytest.mark.operation("fixed_horizon"),
    pytest.mark.operation("visit_cross_entropy"),
    pytest.mark.operation("survival_nll"),
    pytest.mark.operation("visit_weighted_nll"),
    pytest.mark.operation("pmf_nll"),
    pytest.mark.operation("piecewise_hazard"),
]

COMMON = """
import torch
from ehrseq_fast.visitwise import Visits
from tests.survival_cases import value_and_grad
from tests.tolerances import assert_matches
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""

RANKING = """
from ehrseq_fast.deephit_ranking import reference
from tests.test_deephit_ranking import draw, loss_of
for slots in (1, 3, 4, 5, 15, 16, 17, 31, 33, 50):
    for causes in (None, 1, 2, 3, 4, 5, 7):
        dtype = DTYPES[(slots + (causes or 0)) % 3]
        x, p = draw(70, slots, causes, dtype)
        for more in ({}, {"entry_times": p.entries, "sample_weight": p.weights}):
            got, grad = value_and_grad(loss_of(causes), x, p.times, p.types, p.mask, **more)
            wide = value_and_grad(
                reference.deephit_ranking, x.double(), p.times, p.types, p.mask, **more
            )
            assert_matches(got, wide[0], scale=10 * wide[0], terms=40)
            assert_matches(grad, wide[1], scale=10 * wide[1].abs().amax(), terms=40)
            assert not grad[~p.mask].any()
"""

HORIZON = """
from ehrseq_fast import fixed_horizon_bce
from ehrseq_fast.fixed_horizon import reference
from tests.fixed_horizon_cases import AXES, draw
KINDS = (torch.float32, torch.float64, torch.int32, torch.int64, torch.int16, torch.float16)
for slots in (1, 2, 7, 8, 9, 15, 16, 17, 24, 40):
    for number, kind in enumerate(KINDS):
        for axis in AXES:
            dtype = DTYPES[(slots + number) % 3]
            x, mask, given, _ = draw(30, slots, axis, dtype)
            if axis != "visits":
                if not kind.is_floating_point:  # so that times in order stay so
                    given["event_times"] = given["event_times"].floor()
                given["visit_times"] = given["visit_times"].to(kind)
                given["visit_times"][~mask] = 3
            x = torch.where(mask, x, torch.nan)
            value, grad = value_and_grad(
                lambda x: fixed_horizon_bce(x, sequence_mask=mask, **given), x
            )
            wide, wide_grad = value_and_grad(
                reference.fixed_horizon_bce, x.double(), given["event_times"],
                given["event_indicators"], Visits(mask), given.get("visit_times"),
                float(given["horizon"]),
            )
            assert_matches(value, wide, scale=wide.abs() + 2, terms=slots)
            assert_matches(grad, wide_grad, scale=wide_grad.abs().max() + 1, terms=slots)
            assert not grad[~mask].any()
for dtype in DTYPES:  # 2 to the power of the visits of a lane is no number of the dtype's
    x = torch.zeros(2, 20_000, dtype=dtype)
    value = fixed_horizon_bce(x, torch.tensor([20_000, 20_000]), torch.ones(2), 5_000)
    assert_matches(value, torch.tensor(2.0).double().log(), scale=1, terms=4)
days = torch.arange(20.0).repeat(2, 1)
for visit in range(20):
    wrong = days.clone()
    wrong[1, visit] = torch.nan
    try:
        fixed_horizon_bce(torch.zeros(2, 20), torch.tensor([30.0, 30.0]), torch.ones(2), 5.0,
                          visit_times=wrong)
    except ValueError as error:
        assert f"patient 1 has nan at visit {visit} " in str(error), error
    else:
        raise AssertionError(f"a NaN at visit {visit} was taken")
"""

# Blocks of 64 slots, chunks of 2,048; what has a weight of 0 is a NaN or no label at all.
GIVEN = """
from ehrseq_fast.losses import FixedHorizonProgressionLoss
from ehrseq_fast.fixed_horizon import reference
LABELS = (torch.bool, torch.int64, torch.float32, torch.float64, torch.uint8, torch.bfloat16)
WEIGHTS = (*LABELS, torch.int32, torch.float16)
loss = FixedHorizonProgressionLoss(1.0)

def given(slots, of_labels, of_weights):
    y, w = torch.rand(1, slots), torch.rand(1, slots) * 3
    y = y if of_labels.is_floating_point and slots % 2 else y.round()
    w = torch.where(torch.rand(1, slots) < 0.4, w if of_weights.is_floating_point else w.ceil(), 0)
    w[:, 64:128] = 0
    y = torch.where(w == 0, 0 if of_labels == torch.bool else 7, y)
    return y.to(of_labels), w.to(of_weights)

for at, slots in enumerate((1, 7, 63, 64, 65, 130, 200, 2048, 2049, 5000)):
    for i, of_labels in enumerate(LABELS):
        for j, of_weights in enumerate(WEIGHTS):
            y, w = given(slots, of_labels, of_weights)
            dtype = (*DTYPES, torch.float16)[(at + i + j) % 4]
            x = torch.where(w == 0, torch.nan, torch.randn(1, slots) * 4).to(dtype)
            value, grad = value_and_grad(loss, x, y, w)
            wide = value_and_grad(reference.masked_bce, x.double(), y.double(), w.double())
            assert_matches(value, wide[0], scale=wide[0] + 4, terms=40)
            assert_matches(grad, wide[1], scale=wide[1].abs().max() + 0.1, terms=40)
            assert not grad[w == 0].any()
for dtype in DTYPES:  # as above
    x, y = torch.zeros(1, 20_000, dtype=dtype), torch.arange(20_000).view(1, -1) % 2
    for of_labels in (torch.bool, torch.int64, torch.float32):
        value = loss(x, y.to(of_labels), torch.ones(1, 20_000, dtype=torch.bool))
        expected = torch.tensor(2.0).double().log()
        assert_matches(value, expected.to(dtype).double(), scale=1, terms=4)
for of_labels in LABELS:
    for of_weights in WEIGHTS:
        y, w = given(200, of_labels, of_weights)
        x = torch.randn(1, 200)
        for slot in w[0].nonzero().flatten()[::9].tolist():
            for value, expected in ((torch.nan, torch.nan), (torch.inf, torch.inf)):
                wrong = torch.where(torch.arange(200) == slot, value, x)
                zero = torch.where(torch.arange(200) == slot, torch.zeros((), dtype=y.dtype), y)
                got, grad = value_and_grad(loss, wrong, zero, w)
                assert got.isnan() if value != value else got == expected, (of_labels, of_weights)
                assert grad[0].isnan().nonzero().tolist() == ([[slot]] if value != value else [])
            changes = [] if of_labels == torch.bool else [(y, 3)]
            if of_weights not in (torch.bool, torch.uint8):
                changes.append((w, -1))
            for tensor, number in changes:
                before = tensor[0, slot].clone()
                tensor[0, slot] = number
                try:
                    torch.ops.ehrseq_fast.masked_bce(x, y, w, True)
                except ValueError:
                    tensor[0, slot] = before
                else:
                    raise AssertionError(f"{number} of {tensor.dtype} at {slot} was taken")
"""

# What the backward pass multiplies: the bits are those of PyTorch's product, and +0 stays +0.
SCALE = """
scale = torch.ops.ehrseq_fast.survival_nll_scale.default
for slots in (1, 15, 16, 17, 31, 33, 70):
    for dtype in (*DTYPES, torch.float16):
        saved = torch.randn(3, slots).to(torch.float32 if dtype == torch.float16 else dtype)
        saved[0, ::3], saved[1, ::3] = 0.0, -0.0
        saved[2, ::5] *= 1e-7
        wide = saved if dtype == torch.float64 else saved.float()
        for factor in (3e-3, 1e5, torch.nan, torch.inf):
            got = scale(saved, wide.new_tensor(factor), None, None, None, dtype)
            counts = (saved != 0) | saved.signbit()
            wanted = torch.where(counts, wide * factor + 0, 0).to(dtype)
            assert torch.equal(got.isnan(), wanted.isnan())
            assert torch.equal(got.nan_to_num(7), wanted.nan_to_num(7))
            assert torch.equal(got.signbit()[got == 0], wanted.signbit()[got == 0])
"""

CLASSES = """
from ehrseq_fast import visit_cross_entropy
from ehrseq_fast.visit_cross_entropy import reference
from tests.test_visit_cross_entropy import draw
for slots in (1, 4, 15, 16, 17, 33, 70):
    for classes in (1, 2, 3, 4, 5, 7, 8, 17):
        dtype = DTYPES[(slots + classes) % 3]
        x, y, mask, weights = draw(6, slots, classes, dtype)
        y[0] = -100
        y[1, ::2] = classes - 1
        for options in ({}, {**weights, "label_smoothing": 0.1}):
            value, grad = value_and_grad(visit_cross_entropy, x, y, mask, **options)
            wide, wide_grad = value_and_grad(
                reference.visit_cross_entropy, x.double(), y, Visits(mask), **options
            )
            terms = 6 * slots + classes
            if wide.isfinite():  # a visit counts
                assert_matches(value, wide, scale=wide.abs() + 10, terms=terms)
                assert_matches(grad, wide_grad, scale=wide_grad.abs().max() + 1, terms=terms)
            counts = mask & (y != -100)
            assert not grad[~counts].any()
"""

OVER_TIME = """
from ehrseq_fast import (
    PackedRows, PackedVisits, competing_risks_nll, discrete_time_survival_nll, piecewise_hazard_nll,
    pmf_competing_risks_nll, pmf_nll, use_backend,
)
from tests.survival_cases import draw_patients
LOGITS = {"from_logits": True}
LOSSES = (
    (discrete_time_survival_nll, None, {}),
    (discrete_time_survival_nll, None, LOGITS),
    (discrete_time_survival_nll, None, {**LOGITS, "link": "cloglog"}),
    (competing_risks_nll, 2, {}),
    (competing_risks_nll, 3, LOGITS),
    (competing_risks_nll, 3, {**LOGITS, "link": "softmax"}),
    (competing_risks_nll, 6, {**LOGITS, "link": "softmax"}),
    (pmf_nll, None, {}),
    (pmf_competing_risks_nll, 2, {}),
    (pmf_competing_risks_nll, 5, {}),
    (piecewise_hazard_nll, None, {}),
    (piecewise_hazard_nll, None, {"link": "exp"}),
)
MASKS = (torch.bool, torch.int64, torch.float32, torch.bfloat16, torch.uint8)
for at, slots in enumerate((1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 65)):
    batch = None
    for number, (loss, causes, options) in enumerate(LOSSES):
        dtype = DTYPES[(at + number) % 3]
        p = draw_patients(37, slots, 1 if causes is None else 2, seed=at)
        shape = (37, slots) if causes is None else (37, slots, causes)
        x = torch.randn(shape, dtype=torch.float64) * 3
        if loss in (discrete_time_survival_nll, competing_risks_nll) and not options:
            x = x.sigmoid().clamp(1e-3, 0.99)
        x = torch.where(p.mask if causes is None else p.mask[..., None], x, torch.nan).to(dtype)
        outcomes = {"event_times": p.times, "entry_times": p.entries, "sample_weight": p.weights}
        outcomes["event_types" if causes else "event_indicators"] = p.types
        if loss is piecewise_hazard_nll:
            outcomes["fraction"] = torch.linspace(0.01, 0.99, 37)
        kinds = [{}]
        if loss not in (pmf_nll, pmf_competing_risks_nll):
            kinds.append({"visit_weight": torch.linspace(0, 2, 37 * slots).reshape(37, slots)})
        batch = batch or PackedVisits.from_lists([[[1]] * n for n in p.lengths.tolist()])
        for more in kinds:
            mask = p.mask.to(MASKS[(at + number) % 5])

            def compute(x, **changed):
                return loss(x, reduction="none", **{**options, **outcomes, **more, **changed})

            value, grad = value_and_grad(lambda x: compute(x, sequence_mask=mask), x)
            with use_backend("reference"):
                wide, wide_grad = value_and_grad(
                    lambda x: compute(x, sequence_mask=p.mask), x.double()
                )
            assert_matches(value, wide.detach(), scale=wide.detach().abs() + 1, terms=40)
            assert_matches(grad, wide_grad, scale=wide_grad.abs().max() + 1, terms=40)
            assert not grad[~p.mask].any()
            packed = {key: batch.pack(weight) for key, weight in more.items()}
            rows = compute(PackedRows(batch.pack(x), batch), **packed)
            assert_matches(rows, wide.detach(), scale=wide.detach().abs() + 1, terms=40)
    if slots > 2:  # a hole: after a 0 comes a 1
        mask = p.mask.clone()
        mask[1, slots // 2] = False
        try:
            pmf_nll(torch.zeros(37, slots), p.times, p.types, mask)
        except ValueError as error:
            assert "patient 1" in str(error), error
        else:
            raise AssertionError(f"a mask of {slots} with a hole was taken")
"""


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_on_every_instruction_set(compiled, instructions):
    environment = os.environ | {
        "EHRSEQ_FAST_CPU_CAPABILITY": instructions,
        "EHRSEQ_FAST_BACKEND": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    program = "\n".join((COMMON, RANKING, HORIZON, GIVEN, SCALE, CLASSES, OVER_TIME))
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
