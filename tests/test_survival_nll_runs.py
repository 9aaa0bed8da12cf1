"""The survival loss compiled, repeated, on any threads and instruction set, in fresh memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

import ehrseq_fast
from ehrseq_fast import DiscreteTimeSurvivalLoss, PackedRows, PackedVisits
from ehrseq_fast.survival_nll import discrete_time_survival_nll

from .conftest import is_emulated
from .survival_cases import (
    draw_hazards,
    draw_patients,
    value_and_grad,
)

pytestmark = pytest.mark.operation("survival_nll")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("link", [0, 1])
def test_opcheck(compiled, needs_grad, reduction, link):
    patients = draw_patients(6, 11)
    for dtype in (torch.float32, DTYPES[1 + reduction]):
        hazards = draw_hazards((6, 11), dtype, logits=link == 1)
        torch.library.opcheck(
            torch.ops.ehrseq_fast.survival_nll.default,
            (hazards, patients.times, patients.types, patients.mask, patients.entries,
             patients.weights, link, True, 1e-7, reduction, needs_grad),
        )  # fmt: skip


def test_compiles_whole_with_dynamic_shapes(backend):
    def step(x, times, seen, mask, weight):
        nll = discrete_time_survival_nll(
            x.sigmoid(), times, seen, mask, sample_weight=weight, reduction="none"
        )
        return nll.square().mean()

    torch._dynamo.reset()
    # Inductor once; its C++ compiler takes most of this file's time.
    compiler = "inductor" if backend == "cpu" else "aot_eager"
    compiled_step = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for count, slots in ((7, 13), (20, 33)):
        patients = draw_patients(count, slots)
        x = draw_hazards((count, slots), torch.float32, logits=True)
        args = patients.times, patients.types, patients.mask, patients.weights
        expected, expected_grad = value_and_grad(step, x, *args)
        actual, grad = value_and_grad(compiled_step, x, *args)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(grad, expected_grad)


def test_compiled_graphs_refuse_impossible_patients_too(compiled):
    step = torch.compile(discrete_time_survival_nll, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="event time 9 and 3 visits"):
        step(torch.rand(2, 3), torch.tensor([0, 9]), torch.tensor([1, 1]))


def test_a_thousand_repeats_are_bitwise_equal(backend):
    patients = draw_patients(130, 25)
    hazards = draw_hazards((130, 25), torch.float32, logits=False)
    args = hazards, patients.times, patients.types, patients.mask
    first, first_grad = value_and_grad(discrete_time_survival_nll, *args)
    # the reference is torch's own to keep, and an emulator runs one program after another
    for _ in range(20 if backend == "reference" or is_emulated(backend) else 1000):
        value, grad = value_and_grad(discrete_time_survival_nll, *args)
        assert torch.equal(value, first)
        assert torch.equal(grad, first_grad)


@pytest.mark.parametrize("logits", [False, True])
def test_any_number_of_threads_gives_the_same_bits(compiled, logits):
    patients = draw_patients(3000, 60)
    hazards = draw_hazards((3000, 60), torch.float32, logits)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(
                value_and_grad(
                    discrete_time_survival_nll,
                    hazards,
                    patients.times,
                    patients.types,
                    patients.mask,
                    from_logits=logits,
                )
            )
    finally:
        torch.set_num_threads(threads)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


ON_ONE_INSTRUCTION_SET = """
import torch
from tests.survival_cases import definition, draw_hazards, draw_patients, value_and_grad
from tests.tolerances import assert_close
from ehrseq_fast import PackedVisits, packed_competing_risks_nll
from ehrseq_fast.survival_nll import competing_risks_nll

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for options in ({}, {"from_logits": True}, {"from_logits": True, "link": "softmax"}):
        patients = draw_patients(70, 45, 3)
        classes = 3 + ("link" in options)
        hazards = draw_hazards((70, 45, classes), dtype, bool(options))
        args = patients.times, patients.types, patients.mask.to(dtype)
        oracle, oracle_grad = value_and_grad(
            definition, hazards.double(), *args, **options
        )
        batch = PackedVisits.from_lists(
            [[[1]] * n for n in patients.lengths.tolist()],
            event_times=patients.times, event_types=patients.types,
        )
        def packed(h, *args, **options):
            return packed_competing_risks_nll(batch.pack(h), batch, **options)
        for loss in (competing_risks_nll, packed):
            value, grad = value_and_grad(loss, hazards, *args, **options)
            assert_close(value, oracle, terms=40)
            assert_close(grad, oracle_grad, terms=40)
for kind in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16,
             torch.bfloat16, torch.float32, torch.float64):
    patients = draw_patients(70, 200)
    hazards = draw_hazards((70, 200), torch.float32, False)[..., None]
    args = hazards, patients.times, patients.types
    expected = competing_risks_nll(*args, patients.mask)
    assert torch.equal(competing_risks_nll(*args, patients.mask.to(kind)), expected)
    wrong = patients.mask.to(kind)
    wrong[30, -2], wrong[30, -1] = 0, 1
    try:
        competing_risks_nll(*args, wrong)
    except ValueError as error:
        assert "patient 30 has 1 at visit 199, after a 0" in str(error)
    else:
        raise AssertionError("a hole was taken")
"""


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_on_every_instruction_set(compiled, instructions):
    environment = os.environ | {
        "EHRSEQ_FAST_CPU_CAPABILITY": instructions,
        "EHRSEQ_FAST_BACKEND": "cpu",
    }
    subprocess.run([sys.executable, "-c", ON_ONE_INSTRUCTION_SET], env=environment, check=True)


def test_fresh_memory_is_never_read(backend):
    patients = draw_patients(300, 40)
    hazards = draw_hazards((300, 40), torch.float32, logits=False)
    expected, expected_grad = value_and_grad(
        discrete_time_survival_nll, hazards, patients.times, patients.types, patients.mask
    )
    for _ in range(5):
        poison = [torch.full((300, 40), math.nan) for _ in range(8)]
        poison += [torch.full((300,), math.nan), torch.tensor(math.nan)]
        del poison
        value, grad = value_and_grad(
            discrete_time_survival_nll, hazards, patients.times, patients.types, patients.mask
        )
        assert torch.equal(value, expected)
        assert torch.equal(grad, expected_grad)


def test_without_grad_none_is_made(compiled):
    hazards = torch.rand(4, 6)
    args = torch.zeros(4, dtype=torch.long), torch.ones(4), None, None, None, 0, False, 1e-7, 1
    _, grad = torch.ops.ehrseq_fast.survival_nll(hazards, *args, False)
    assert grad.numel() == 0
    with torch.no_grad():
        nll = discrete_time_survival_nll(hazards.requires_grad_(), *args[:2])
    assert not nll.requires_grad


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_call_costs_little_beside_its_kernel(compiled, layout):
    """Counted, as times depend on the machine: functions of the package that are entered, and
    operators of torch that run beside the loss's."""
    batch = PackedVisits.from_lists(
        [[[1], [2]], [[2], [1]]], event_times=[1, 1], event_indicators=[1, 0]
    )
    hazards = torch.full((2, 2), 0.5, requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    times, seen = batch.event_times, batch.event_indicators
    rows = PackedRows(torch.full((4,), 0.5, requires_grad=True), batch)
    arguments = (rows,) if layout == "packed" else (hazards, times, seen, mask)
    loss = DiscreteTimeSurvivalLoss()
    loss(*arguments).backward()
    entered, package = [], os.path.dirname(ehrseq_fast.__file__) + os.sep

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            entered.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        nll = loss(*arguments)
    finally:
        sys.setprofile(before)
    assert len(entered) <= 32, entered
    del nll
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss(*arguments)
    ran = [event.key for event in profile.key_averages() if event.key.startswith("aten::")]
    assert not ran, ran
