"""What the survival loss refuses, and how."""

from __future__ import annotations

import math

import pytest
import torch

from ehrseq_fast import backend as backends
from ehrseq_fast.survival_nll import discrete_time_survival_nll

from .survival_cases import (
    draw_patients,
    on_default_device,
)

pytestmark = pytest.mark.operation("survival_nll")


# What a good call is changed to, and how it is refused.
HOLE = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 0]])
BAD_INPUTS = {
    "hazards not a tensor": ({"hazards": [[0.5]]}, TypeError, "hazards: expected a tensor"),
    "hazards integer": (
        {"hazards": torch.ones(3, 4, dtype=torch.long)}, TypeError, "floating-point dtype"),
    "hazards [B, V, 1]": (
        {"hazards": torch.rand(3, 4, 1)}, ValueError, r"shape \[B, V\], got \[3, 4, 1\]"),
    "times float": (
        {"event_times": torch.tensor([0.0, 1, 2])}, TypeError, "event_times: expected an integer"),
    "times bool": (
        {"event_times": torch.ones(3, dtype=torch.bool)}, TypeError, "event_times: expected"),
    "times [B, 1]": (
        {"event_times": torch.zeros(3, 1, dtype=torch.long)}, ValueError,
        r"event_times: expected shape \[B\] = \[3\] .* got \[3, 1\]"),
    "indicators [2]": (
        {"event_indicators": torch.ones(2)}, ValueError, r"event_indicators: expected shape \[B\]"),
    "indicators complex": (
        {"event_indicators": torch.ones(3, dtype=torch.cfloat)}, TypeError, "event_indicators"),
    "mask [B, 3]": (
        {"sequence_mask": torch.ones(3, 3)}, ValueError,
        r"sequence_mask: expected shape \[B, V\] = \[3, 4\]"),
    "mask on another device": (
        {"sequence_mask": torch.ones(3, 4, device="meta")}, ValueError,
        "sequence_mask: expected on"),
    "entry float": (
        {"entry_times": torch.zeros(3)}, TypeError, "entry_times: expected an integer"),
    "weight [B, V]": (
        {"sample_weight": torch.ones(3, 4)}, ValueError, r"sample_weight: expected shape \[B\]"),
    "weight that learns": (
        {"sample_weight": torch.ones(3, requires_grad=True)}, ValueError,
        "sample_weight: expected no requires_grad"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: expected one of"),
    "censored_visit": ({"censored_visit": "both"}, ValueError, "censored_visit: expected one of"),
    "eps": ({"eps": 0.5}, ValueError, r"eps: expected 0 <= eps < 0.5"),
    "eps nan": ({"eps": math.nan}, ValueError, r"eps: expected 0 <= eps < 0.5"),
    "hole": (
        {"sequence_mask": HOLE}, ValueError,
        r"sequence_mask .* patient 1 has 1 at visit 2, after a 0 \(patients at fault: 1\)"),
    "hole in a bool mask": (
        {"sequence_mask": HOLE.bool()}, ValueError, "patient 1 has 1 at visit 2, after a 0"),
    "left-padded": (
        {"sequence_mask": torch.ones(3, 4).triu(2)}, ValueError,
        r"patient 0 has 1 at visit 2, after a 0 \(patients at fault: 2\)"),
    "half": (
        {"sequence_mask": HOLE[[0, 0, 2]] * 0.5}, ValueError,
        r"patient 0 has 0.5 at visit 0 \(patients at fault: 3\)"),
    "two": (
        {"sequence_mask": HOLE[[0, 2, 2]] * torch.tensor([1, 2, 1])[:, None]}, ValueError,
        r"patient 1 has 2 at visit 0 \(patients at fault: 1\)"),
    "nan mask": (
        {"sequence_mask": torch.full((3, 4), math.nan)}, ValueError, "patient 0 has nan at visit"),
    "no visits": (
        {"sequence_mask": torch.tensor([1, 0, 0])[:, None].expand(3, 4)}, ValueError,
        r"Found 2 sequences with zero length\. All sequences must have at least 1 visit\. The first"
        r" is patient 1\."),
    "no slots": ({"hazards": torch.rand(3, 0)}, ValueError, "Found 3 sequences with zero length"),
    "time in the padding": (
        {"event_times": torch.tensor([3, 1, 3]), "sequence_mask": HOLE[[0, 2, 2]]}, ValueError,
        r"event_times .* patient 2 has event time 3 and 3 visits \(patients at fault: 1\)"),
    "time past the slots": (
        {"event_times": torch.tensor([0, 4, 9])}, ValueError,
        r"patient 1 has event time 4 and 4 visits \(patients at fault: 2\)"),
    "time negative": (
        {"event_times": torch.tensor([0, 1, -1])}, ValueError, "patient 2 has event time -1"),
    "entry late": (
        {"entry_times": torch.tensor([0, 2, 0])}, ValueError,
        r"entry_times .* patient 1 has entry time 2 and event time 1 \(patients at fault: 1\)"),
    "entry negative": (
        {"entry_times": torch.tensor([0, 0, -2])}, ValueError, "patient 2 has entry time -2"),
    "indicator 2": (
        {"event_indicators": torch.tensor([1, 2, 2])}, ValueError,
        r"event_indicators must be 0 \(censored\) or 1 \(event\): patient 1 has 2 .*fault: 2\)"),
    "indicator half": (
        {"event_indicators": torch.tensor([0, 1, 0.5])}, ValueError, "patient 2 has 0.5"),
    "indicator nan": (
        {"event_indicators": torch.tensor([0, math.nan, 1])}, ValueError, "patient 1 has nan"),
}  # fmt: skip


def good_call():
    return {
        "hazards": torch.rand(3, 4),
        "event_times": torch.tensor([0, 1, 2]),
        "event_indicators": torch.tensor([1, 0, 1]),
    }


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(backend, name):
    change, error, message = BAD_INPUTS[name]
    change = on_default_device(change)
    discrete_time_survival_nll(**good_call())
    with pytest.raises(error, match=message):
        discrete_time_survival_nll(**(good_call() | change), validate=True)


def test_bad_input_late_in_a_large_batch(backend):
    """The first patient at fault is named whichever thread meets one first."""
    patients = draw_patients(3000, 60)
    patients.times[[1700, 2900]] = 60
    with pytest.raises(ValueError, match=r"patient 1700 has event time 60 .*at fault: 2\)"):
        discrete_time_survival_nll(
            torch.rand(3000, 60), patients.times, patients.types, patients.mask, validate=True
        )


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.rand(3), r"survival_nll: hazards: expected shape \[B, V\], got \[3\]"),
        (1, torch.zeros(2, dtype=torch.long), r"event_times: expected shape \[B\] = \[3\], got"),
        (1, torch.zeros(3), "event_times: expected uint8 or .*int64, got float32"),
        (2, torch.zeros(3, dtype=torch.cfloat), "event_indicators: expected bool or uint8 or"),
        (3, torch.ones(3, 5), r"sequence_mask: expected shape \[B, V\] = \[3, 4\]"),
        (4, torch.zeros(3), "entry_times: expected uint8 or .*int64, got float32"),
        (5, torch.ones(1), r"sample_weight: expected shape \[B\]"),
    ],
)
def test_the_raw_operator_defends_itself(compiled, position, value, message):
    args = [*good_call().values(), None, None, None, 0, False, 1e-7, 1, True]
    torch.ops.ehrseq_fast.survival_nll(*args)
    args[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.ehrseq_fast.survival_nll(*args)


def test_a_backend_that_cannot_run_is_an_error():
    with pytest.raises(RuntimeError, match="cannot run"), backends.use_backend("cuda"):
        discrete_time_survival_nll(**good_call())
