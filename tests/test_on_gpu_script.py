"""What a GPU's machine without a network needs, and what the script for it says without a GPU."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import marked

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "on-gpu"
# what .ci/on-gpu asks for; tests stand in for hypothesis where it is missing
THERE = {"torch", "numpy", "triton", "pytest", "hypothesis", "ehrseq_fast", "tests", "benchmarks"}


def imported(path: str) -> set[str]:
    """The packages that a file needs to be imported."""
    names: set[str] = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names)


def test_files_for_a_gpu_need_no_other_packages():
    files = marked.on_gpu()
    assert {
        "tests/test_on_gpu.py",
        "tests/test_packed_lstm_cuda.py",
        "tests/test_visit_pool.py",
    } <= {*files}
    assert {path: imported(path) - THERE for path in files if imported(path) - THERE} == {}


def test_property_tests_skip_themselves_without_hypothesis():
    script = (
        "from tests import without_hypothesis; without_hypothesis.stand_in()\n"
        "from hypothesis import HealthCheck, assume, example, given, settings, strategies as st\n"
        "drawn = st.lists(st.integers(0, 3).map(str) | st.none(), min_size=1)\n"
        "@given(drawn, st.data())\n"
        "@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])\n"
        "def test_a(a, b): pass\n"
        "assert [mark.name for mark in test_a.pytestmark] == ['skip']\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.skipif(not SCRIPT.exists(), reason="no .ci/on-gpu in this copy")
def test_without_a_gpu_nothing_but_the_build_is_run(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        ["bash", str(SCRIPT), "tests", "lstm"],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no CUDA device: " in done.stdout
    assert "only the build can run here" in done.stdout
    assert "tests (no CUDA device) lstm (no CUDA device)" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"device.log"}
