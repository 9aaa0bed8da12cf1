"""What is found of one kind of kernels, in a process of its own, without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .__main__ import KINDS

ROOT = Path(__file__).parents[2]
NOT_PASSED_ON = ("TRITON_INTERPRET", "EHRSEQ_FAST_BACKEND")


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """The JSON of ``python -m tests.compile_checks`` for the kind that the test file names."""
    kind = request.module.KIND
    reason = KINDS[kind].why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp(kind)
    passed_on = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    subprocess.run(
        [sys.executable, "-m", "tests.compile_checks", kind, "--json", folder / "found.json"],
        env=passed_on | {"TRITON_CACHE_DIR": str(folder / "cache")},
        cwd=ROOT,
        check=True,
    )
    return json.loads((folder / "found.json").read_text())


@pytest.fixture
def committed(request):
    """The committed page, where this compiler made it."""
    kind = KINDS[request.module.KIND]
    text = kind.TABLE.read_text()
    if f"Compiled by {kind.compiler()};" not in text:
        pytest.skip(f"{kind.TABLE.name} is another compiler's; this is {kind.compiler()}")
    return text
