"""Every public operation, mode, dtype and mask is a row of the benchmarks, and gives the results of
its definition there."""

from __future__ import annotations

import inspect

import pytest
import torch

import ehrseq_fast
from benchmarks import devices, jobs, modes, registry
from benchmarks.cases import Missing, Variant, asked_for, difference_of
from ehrseq_fast import checks, operations
from ehrseq_fast.survival_nll.operators import LINKS
from ehrseq_fast.visit_pool.operators import MODES
from ehrseq_fast.visit_pool.packed import PACKED_MODES

ROWS = registry.modes()
# These compute nothing, or are plain PyTorch.
NO_OPERATION = {
    "accelerate",
    "cumulative_incidence",
    "fixed_horizon_labels",
    "restore",
    "use_backend",
    "warmup",
}
DIRECTIONS = ("one direction", "both directions")
LAYERS = {"packed_lstm": DIRECTIONS, "packed_gru": DIRECTIONS}
ONE_RISK = tuple(link for link in LINKS if link != "softmax")
KNOWN_MODES = {
    "visit_mean_pool": tuple(MODES),
    "masked_pool": tuple(MODES),
    "packed_visit_pool": tuple(PACKED_MODES),
    "discrete_time_survival_nll": ONE_RISK,
    "packed_survival_nll": ONE_RISK,
    "competing_risks_nll": tuple(LINKS),
    "packed_competing_risks_nll": tuple(LINKS),
    "piecewise_hazard_nll": ("softplus", "exp"),
    **LAYERS,
}


def public_operations():
    found = {name: getattr(ehrseq_fast, name) for name in ehrseq_fast.__all__}
    return {name for name, value in found.items() if inspect.isfunction(value)} - NO_OPERATION


def test_every_operation_in_every_mode_and_dtype_is_a_row():
    wanted = {
        (name, mode, dtype)
        for name in public_operations()
        for mode in KNOWN_MODES.get(name, ("default",))
        for dtype in checks.FLOATING
    }
    public = [row for row in ROWS if row.function in public_operations()]
    assert wanted == {(row.function, row.mode, row.dtype) for row in public}


def test_masks_of_every_dtype_are_rows():
    masked = {
        name
        for name in public_operations()
        if any(
            "mask" in parameter
            for parameter in inspect.signature(getattr(ehrseq_fast, name)).parameters
        )
    }
    wanted = {(name, mask) for name in masked for mask in checks.REAL}
    assert wanted == {(row.function, row.mask) for row in ROWS if row.mask is not None}


def test_every_operation_that_has_kernels_is_a_row():
    registered = {operation.name for operation in operations.registered()}
    assert registered == {row.operation for row in ROWS}


def test_all_of_them_are_run():
    planned = [job.title for job in registry.jobs("ops", jobs.Settings(workloads=("A",)))]
    assert {row.title for row in ROWS} <= set(planned)


@pytest.mark.parametrize("row", ROWS, ids=lambda e: f"{e.title}, {e.dtype}".replace("torch.", ""))
def test_ours_gives_what_the_definition_gives(row):
    made = modes.case(row, devices.Cpu(), quick=True)
    results = {}
    for name, variant in made.variants.items():
        assert not isinstance(variant, Missing)
        assert isinstance(variant, Variant)
        with asked_for(variant.backend):
            results[name] = variant.in_common(variant.run())
    assert len(results) > 1
    first = results.pop(modes.REFERENCE)
    for name, result in results.items():
        assert torch.is_tensor(result[0]), name
        made.require_equal(difference_of(result, first))
