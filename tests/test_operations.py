"""The registry of operations: complete, in step with the sources, and no list beside it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ehrseq_fast import backend, operations

from . import marked

ROOT = Path(__file__).parents[1]
NAMES = {operator.name for operator in operations.operators()}


def folders_with(kernels: str) -> set[str]:
    return {x.folder for x in operations.registered() if kernels in x.backends | x.on_request}


def operators_of(folders: set[str]) -> set[str]:
    return {x.name for x in operations.operators() if x.folder in folders}


def test_each_folder_with_an_op_registers_and_defines():
    assert {x.folder for x in operations.registered()} == {*operations.FOLDERS}
    assert {x.folder for x in operations.operators()} == {*operations.FOLDERS}


@pytest.mark.parametrize("folder", operations.FOLDERS)
def test_each_operation_has_a_definition_and_tests_of_its_own(folder):
    assert (ROOT / "ehrseq_fast" / folder / "reference.py").exists()
    assert f"tests/test_{folder}.py" in marked.of_operations(folder)


@pytest.mark.parametrize("namespace", [operations.COMPILED, operations.TRITON])
def test_every_operator_is_defined_with_the_shapes_of_its_results(namespace):
    for name in NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", "Meta"), name


@pytest.mark.parametrize(("kernels", "suffix"), [("cpu", ".cpp"), ("cuda", ".cu")])
def test_the_compiled_libraries_implement_what_is_registered(kernels, suffix):
    folders = folders_with(kernels)
    found = {
        name
        for path in (ROOT / "csrc").glob(f"*/*{suffix}")
        for name in re.findall(r'\bm\.impl\("(\w+)"', path.read_text())
    }
    assert found == operators_of(folders)


def test_the_compiled_kernels_are_found(compiled):
    for name in operators_of(folders_with("cpu")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ehrseq_fast::{name}", "CPU"), name


def test_the_triton_kernels_are_found():
    if backend.why_not_loaded("triton") is not None:
        pytest.skip(f"no Triton kernels: {backend.why_not_loaded('triton')}")
    key = backend.kernels("triton").device.upper()
    for name in operators_of(folders_with("triton")):
        qualified = f"{operations.TRITON}::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key), name


def test_a_folder_alone_makes_an_operation(tmp_path):
    """A copy of the package with one folder more: nothing else is touched."""
    copy = tmp_path / "ehrseq_fast"
    shutil.copytree(
        ROOT / "ehrseq_fast", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    folder = copy / "twice"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""A toy."""\n')
    (folder / "op.py").write_text(
        "from ..operations import operator, register\n"
        'register("twice", "cpu", package=__package__)\n'
        '@operator("twice(Tensor x) -> Tensor")\n'
        "def _(x):\n    return x.new_empty(x.shape)\n"
    )
    program = (
        "import torch\n"
        "from ehrseq_fast import cli\n"
        "assert 'twice ' in cli.describe()\n"
        "print(torch.ops.ehrseq_fast.twice(torch.ones(3, device='meta')).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "torch.Size([3])\n", done.stderr
