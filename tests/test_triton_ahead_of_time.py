"""The Triton kernels compiled for three GPUs without one: nothing spilled, wide loads, and the
committed table of what they take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.triton_resources import TABLE, TARGETS, WIDE

triton = pytest.importorskip("triton", reason="Triton is for Linux")

ROOT = Path(__file__).parents[1]
# they read the embedding table or gradients of its width, whose rows are whole 16-byte words
READ_ROWS = ("pool", "sum")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Compiled in a process of its own: here the kernels are the interpreter's."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "EHRSEQ_FAST_BACKEND")
    } | {"TRITON_CACHE_DIR": str(folder / "cache")}
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "triton", "--json", folder / "found.json"],
        env=environment,
        cwd=ROOT,
        check=True,
    )
    return json.loads((folder / "found.json").read_text())


def launched_in_the_source() -> set[str]:
    """The kernels of all operations, by where they are launched."""
    return {
        name.rpartition(".")[2]
        for file in (ROOT / "ehrseq_fast").glob("*/triton/*.py")
        for name in re.findall(r"\blaunch\(\s*([\w.]+),", file.read_text())
    }


def test_every_kernel_is_compiled_for_every_target(found):
    names = launched_in_the_source()
    assert len(names) > 12
    compiled = {(row["kernel"], row["arch"]) for row in found["rows"]}
    assert compiled == {(name, f"sm_{arch}") for name in names for arch in TARGETS}


def test_a_batch_of_another_size_compiles_nothing_again(found):
    assert found["compiled_again"] == []


def test_nothing_is_spilled(found):
    assert [row for row in found["rows"] if row["spilled"]] == []


def test_rows_of_whole_words_are_read_in_words_of_128_bits(found):
    rows = [
        row
        for row in found["rows"]
        if row["kernel"].startswith(READ_ROWS) and f"E {WIDE}" in row["case"]
    ]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16", "float64"}
    assert [row for row in rows if row["load_bits"] < 128] == []


def test_the_scaled_gradient_is_read_in_words_of_128_bits(found):
    rows = [row for row in found["rows"] if row["kernel"] == "scale_by_one_kernel"]
    assert [row for row in rows if row["load_bits"] < 128] == []


def test_the_committed_table_is_that_of_these_kernels(found):
    if f"Triton {triton.__version__}," not in TABLE.read_text():
        pytest.skip(f"{TABLE.name} is another Triton's; this is {triton.__version__}")
    assert found["table"] == TABLE.read_text(), "refresh it: python -m benchmarks triton --write"
