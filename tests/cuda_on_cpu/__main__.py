"""Run pytest with the CUDA kernels compiled for the host under sanitizers.

``python -m tests.cuda_on_cpu [pytest's arguments]``; without arguments, the operations' tests on
the backend ``cuda``.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .. import marked

TESTS = [*marked.of_operations(), "tests/test_cuda_on_cpu.py", "tests/test_cuda_kernels.py"]

# What is about values, or about torch.compile, is tested without sanitizers, and sooner.
CHOSEN = (
    "cuda and not compile and not thousand and not gradcheck"
    " and not derivatives and not formulas and not edges and not arguments"
)


def library(name: str) -> str:
    """Where g++ keeps a library."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def environment() -> dict[str, str]:
    """The sanitizers' runtimes first; and libstdc++, for Python has not loaded it when they look
    for the functions that throw exceptions."""
    preload = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    return os.environ | {
        "LD_PRELOAD": " ".join(preload),
        # Python keeps memory for ever
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "EHRSEQ_FAST_SANITIZE": "1",
        "OMP_NUM_THREADS": "1",
    }


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["-q", "-k", CHOSEN, *TESTS]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    sys.exit(subprocess.run(command, env=environment(), check=False).returncode)
