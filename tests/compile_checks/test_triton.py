"""The Triton kernels compiled for three GPUs without one: nothing spilled, wide loads, and the
committed table of what they take."""

from __future__ import annotations

import re
from pathlib import Path

from .triton_kernels import TARGETS, WIDE

KIND = "triton"
ROOT = Path(__file__).parents[2]
# they read the embedding table or gradients of its width, whose rows are whole 16-byte words
READ_ROWS = ("pool", "sum")


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


def test_no_thread_stores_over_what_another_has_yet_to_load(found):
    assert [row for row in found["rows"] if row["unordered"]] == []


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


def test_the_committed_page_is_that_of_these_kernels(found, committed):
    assert found["table"] == committed, "python -m tests.compile_checks triton --write"
