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


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_on_every_instruction_set(compiled, instructions):
    environment = os.environ | {
        "EHRSEQ_FAST_CPU_CAPABILITY": instructions,
        "EHRSEQ_FAST_BACKEND": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    program = "\n".join((COMMON, RANKING, HORIZON, CLASSES))
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
