"""That the sanitizers are at work and find what is planted; see ``python -m tests.sanitized``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from . import sanitized, test_poisoned

KIND = os.environ.get("EHRSEQ_FAST_SANITIZED")
pytestmark = pytest.mark.skipif(KIND is None, reason="run by python -m tests.sanitized")

PROGRAM = """
import ctypes
import torch
torch.set_num_threads(4)
library = ctypes.CDLL({library!r})
values = torch.ones(1000)
library.planted_overflow.argtypes = [ctypes.c_void_p, ctypes.c_int64]
library.planted_overflow_of_integers.argtypes = [ctypes.c_int32]
print("called", library.{call})
"""


@pytest.fixture(scope="module")
def library():
    return str(sanitized.planted(KIND))


def run(library, call):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(library=library, call=call)],
        capture_output=True,
        text=True,
        check=False,
    )


def finds(kind, *cases):
    return [pytest.param(*case, id=case[0].partition("(")[0]) for case in cases if kind == KIND]


@pytest.mark.parametrize(
    ("call", "report"),
    finds(
        "address",
        ("planted_overflow(values.data_ptr(), 1000)", "heap-buffer-overflow"),
        ("planted_overflow_of_integers(2**31 - 1)", "signed integer overflow"),
    )
    + finds(
        "thread",
        ("planted_race()", "data race"),
        ("planted_race_out_of_step()", "data race"),
    ),
)
def test_what_is_planted_is_found(library, call, report):
    done = run(library, call)
    assert done.returncode != 0
    assert report in done.stderr
    assert "called" not in done.stdout


@pytest.mark.parametrize(
    "call",
    ["planted_overflow(values.data_ptr(), 999)", "planted_overflow_of_integers(1)"]
    + ["correct_in_step()"] * (KIND == "thread"),
)
def test_what_is_right_is_let_through(library, call):
    done = run(library, call)
    assert done.returncode == 0, done.stderr
    assert "called" in done.stdout


@pytest.mark.skipif(KIND != "address", reason="the other sanitizers leave memory as it is")
def test_memory_is_filled_as_in_the_poisoned_run():
    """Which leaves out what runs here."""
    freed = """
freed = libc.malloc(word(5000))
libc.free(word(freed))
assert bytes_at(freed + 64, 4900) == [0x5A] * 4900
"""
    program = test_poisoned.FRESH + freed
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
