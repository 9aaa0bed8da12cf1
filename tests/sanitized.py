"""Run pytest with all compiled CPU code instrumented by the compiler's sanitizers.

``python -m tests.sanitized address [pytest's arguments]``: ``_C`` and ``_batching`` with the
address and undefined-behaviour sanitizers, in memory filled with 0xFF.
``python -m tests.sanitized thread [pytest's arguments]``: ``_C`` with the thread sanitizer, its
parallel loops on threads that the sanitizer can follow (``native/plain_threads.h``).
``python -m tests.sanitized address -- program arguments``: a program in place of pytest, such as
``-m tests.fuzz``.

Without arguments, the tests that :data:`TESTS` names. Each kind has a copy of the sources and its
own build under ``build/sanitized``; what has not changed is not compiled again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import marked

ROOT = Path(__file__).parent.parent
COPIED = ("csrc", "ehrseq_fast", "tests", "benchmarks")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt")

_COMMON = ["-O1", "-g1", "-fno-omit-frame-pointer"]
FLAGS = {
    "address": [
        *_COMMON,
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        # An empty tensor is a null pointer, and memset of no bytes there is what every C library
        # allows, and the next C standard too.
        "-fno-sanitize=vptr,nonnull-attribute",
    ],
    "thread": [
        *_COMMON,
        "-fsanitize=thread",
        "-DEHRSEQ_THREADS=ehrseq_plain_threads",
        "-DEHRSEQ_THREADS_HEADER=<plain_threads.h>",
    ],
}
# The sanitizers' runtimes have to be loaded before Python is; and libstdc++, for Python has not
# loaded it when they look for the functions that throw exceptions.
RUNTIMES = {
    "address": ("libasan.so", "libubsan.so", "libstdc++.so.6"),
    "thread": ("libtsan.so", "libstdc++.so.6"),
}
OPTIONS = {
    "address": {
        # Python keeps memory for ever. Fresh memory is full of NaN, freed memory of 0x5A, as under
        # tests/poisoned.py, which leaves out what runs here.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1"
        ":allocator_may_return_null=1:malloc_fill_byte=255:max_malloc_fill_size=268435456"
        ":free_fill_byte=90:max_free_fill_size=268435456",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    },
    "thread": {
        # What PyTorch's own threads do cannot be followed, and is not looked at.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:abort_on_error=1"
        ":report_signal_unsafe=0",
        "OMP_NUM_THREADS": "4",
    },
}
BATCHES = tuple(
    str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_batch*.py"))
)
# What is about values or torch.compile is tested without sanitizers (and in poisoned memory, which
# reads this); other backends' kernels are not in these libraries (tests/cuda_on_cpu has a sanitized
# run of its own).
ELSEWHERE = ("cuda", "triton", "compile")
LEFT_OUT = ("reference", "gradcheck", "derivatives", "formulas", "edges", "nonfinite", "thousand")
TESTS = {
    "address": (
        *marked.of_operations(),
        *BATCHES,
        "-k",
        " and ".join(f"not {word}" for word in (*ELSEWHERE, *LEFT_OUT)),
    ),
    "thread": ("tests/test_threads.py",),
}
SELF_TEST = ("tests/test_sanitized.py",)


def why_not() -> str | None:
    """Why nothing can be built with sanitizers here; None where it can."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "the sanitizers are g++'s on Linux, and there is none here"
    for name in {name for names in RUNTIMES.values() for name in names}:
        if not Path(runtime(name)).is_absolute():
            return f"g++ has no {name}"
    return None


def runtime(name: str) -> str:
    """Where g++ keeps a library."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def environment(kind: str) -> dict[str, str]:
    """What a sanitized child process is started with."""
    preload = " ".join(runtime(name) for name in RUNTIMES[kind])
    chosen = {"LD_PRELOAD": preload, "EHRSEQ_FAST_SANITIZED": kind}
    return os.environ | OPTIONS[kind] | chosen


def folder(kind: str) -> Path:
    return ROOT / "build" / "sanitized" / kind


def build(kind: str) -> Path:
    """Copy the sources, compile what has changed; the copy."""
    copy = folder(kind)
    for name in COPIED:
        _mirror(ROOT / name, copy / name)
    for name in FILES:
        shutil.copy2(ROOT / name, copy / name)
    flags = [*FLAGS[kind], f"-I{copy / 'tests' / 'native'}"]
    own = {"EHRSEQ_FAST_BUILD_FLAGS": " ".join(flags), "EHRSEQ_FAST_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=copy, env=os.environ | own, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\nThe sanitized build failed.")
    return copy


def _mirror(source: Path, target: Path) -> None:
    """Make ``target`` hold what ``source`` does, times included, but for compiled files."""
    ignored = shutil.ignore_patterns("*.so", "*.o", "__pycache__", "_build_record.json")
    if target.exists():
        wanted = {path.relative_to(source) for path in source.rglob("*")}
        for path in sorted(target.rglob("*"), reverse=True):
            is_source = path.suffix != ".so" and "__pycache__" not in path.parts
            if path.is_file() and is_source and path.relative_to(target) not in wanted:
                path.unlink()
    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)


def planted(kind: str) -> Path:
    """The library of planted faults, compiled as the kernels are."""
    import torch

    here = Path(__file__).parent
    library = here.parent / "build" / f"planted-{kind}.so"
    library.parent.mkdir(exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    without = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    command = [
        *("g++", "-std=c++17", "-fPIC", "-shared", *FLAGS[kind]),
        *(f"-I{here.parent / 'csrc'}", f"-I{here / 'native'}"),
        *("-isystem", str(torch_folder / "include")),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"),
        *(str(here / "native" / "planted.cpp"), str(here.parent / "csrc/common/parallel.cpp")),
        *("-o", str(library)),
        *(f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"),
    ]
    subprocess.run(command, env=without, check=True)
    return library


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in FLAGS:
        print(__doc__)
        return 2
    kind, *rest = arguments
    reason = why_not()
    if reason is not None:
        print(f"python -m tests.sanitized: {reason}", file=sys.stderr)
        return 2
    copy = build(kind)
    # what is written to stderr by a process that ends at once must not be kept by pytest
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "--capture=sys"]
    if rest[:1] == ["--"]:
        program = rest[1:]
    elif rest:
        program = [*pytest, *rest]
    else:
        program = [*pytest, "-q", *SELF_TEST, *TESTS[kind]]
    command = [sys.executable, *program]
    return subprocess.run(command, cwd=copy, env=environment(kind), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
