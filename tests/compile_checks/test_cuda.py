"""The CUDA kernels as nvcc built them for three GPUs: nothing spilled, wide loads, and the table of
what they take that is committed; and libraries of which one build serves every torch."""

from __future__ import annotations

import re
import shutil

import pytest

from .cuda_kernels import TARGETS, library
from .machine_code import output

KIND = "cuda"
COLUMNS_OF_16_BYTES = {"float": 4, "double": 2, "f16": 8, "bf16": 8}


def test_every_kernel_is_compiled_for_every_target(found):
    names = {row["kernel"] for row in found["rows"]}
    assert len(names) > 12
    compiled = {(row["kernel"], row["arch"]) for row in found["rows"]}
    assert compiled == {(name, target) for name in names for target in TARGETS}


def test_nothing_is_spilled(found):
    assert [row for row in found["rows"] if row["spilled"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_loaded_by_16_bytes_several_at_a_time(found, target):
    """The pooling loop, and that over the visits of a code in the gradient of the table."""
    seen = set()
    for row in found["rows"]:
        match = re.match(r"(pool_visits|sum_chunks)<\w+<(\w+), (\d+)>", row["kernel"])
        whole = match and int(match.group(3)) == COLUMNS_OF_16_BYTES[match.group(2)]
        if match and whole and row["arch"] == target:
            assert row["wide_loads"] >= 4, row
            seen.add((match.group(1), match.group(2)))
    assert len(seen) == 2 * len(COLUMNS_OF_16_BYTES)


def test_the_committed_page_is_that_of_these_kernels(found, committed):
    assert found["table"] == committed, "python -m tests.compile_checks cuda --write"


@pytest.mark.parametrize("stem", ["_C", "_C_cuda"])
def test_libraries_know_only_the_stable_abi(stem):
    """Then one build serves every torch."""
    path = library(stem)
    if path is None or shutil.which("nm") is None:
        pytest.skip(f"{stem} was not built" if path is None else "there is no nm")
    symbols = [line.split()[-1] for line in output("nm", "-D", "-u", str(path)).splitlines()]
    stable = [name for name in symbols if re.match(r"(?:aoti_)?torch_", name)]
    others = set(symbols) - set(stable)
    assert stable
    system = r"\S+@\S+|_ITM_\w+|__gmon_start__|__cxa_finalize|_ZN?K?St\w+"
    assert [name for name in others if not re.fullmatch(system, name)] == []
