"""docs/adding-an-operation.md: its files, written where it says, make an operation that passes its
own tests and the fuzzer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding-an-operation.md").read_text()
COPIED = ("csrc", "ehrseq_fast", "tests", "benchmarks")
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-shared", "-DTORCH_STABLE_ONLY", "-w"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# a file's name at the start of a paragraph or of a numbered step, and the block after it
FILE = re.compile(
    r"^(?:\d\. \*\*[^*]+\*\*,|  ) `([\w/.]+)`(?:(?!```).)*?```(?:py|cpp)\n(.*?)^   ```$",
    re.DOTALL | re.MULTILINE,
)


def files() -> dict[str, str]:
    """The blocks of the page by the paths that it gives them."""
    return {path: textwrap.dedent(text) for path, text in FILE.findall(PAGE)}


def touch(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, (path, old)
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture
def copy(tmp_path, compiled):
    """A copy of the sources with the new operation, its kernels in a library beside the others."""
    folder = tmp_path
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for library in (ROOT / "ehrseq_fast").glob("*.so"):
        (folder / "ehrseq_fast" / library.name).symlink_to(library)
    fuzzer = "tests/fuzz/operators.py"
    for path, text in files().items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text((folder / path).read_text() + text if path == fuzzer else text)
    imported = "from ehrseq_fast.visit_pool import reference as pool_reference\n"
    added = "from ehrseq_fast.visit_scale import reference as scale_reference\n"
    touch(folder / fuzzer, (imported, imported + added))
    library = folder / "visit_scale.so"
    of_torch = Path(torch.__file__).parent
    csrc = folder / "csrc"
    sources = [csrc / "visit_scale" / "cpu.cpp", csrc / "common" / "parallel.cpp"]
    included = ["-I", csrc, "-isystem", of_torch / "include"]
    linked = ["-L", of_torch / "lib", "-ltorch_cpu"]
    subprocess.run(["g++", *FLAGS, *included, *sources, "-o", library, *linked], check=True)
    last = "from .warmup import warmup\n"
    load = f"\n\ndef _load():\n    import torch\n\n    torch.ops.load_library({str(library)!r})\n"
    called = "backend.load_triton_kernels()\n"
    touch(
        folder / "ehrseq_fast" / "__init__.py",
        (last, f"from .visit_scale import visit_scale\n{last}{load}"),
        (called, f"{called}_load()\n"),
        ('    "warmup",\n', '    "visit_scale",\n    "warmup",\n'),
    )
    return folder


def run(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_operation_of_the_page_passes_its_tests(copy):
    assert len(files()) == 8  # seven new ones, and the fuzzer
    said = run(copy, "pytest", "-q", "-k", "not cuda", "tests/test_visit_scale.py")
    assert re.search(r"[1-9]\d* passed", said)
    assert "failed" not in said
    run(copy, "tests.fuzz", "--cases", "10", "--targets", "visit_scale", "visit_scale_backward")
