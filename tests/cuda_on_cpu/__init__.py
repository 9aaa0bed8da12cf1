"""The CUDA kernels of ``csrc`` on the host: compiled by g++ against a stand-in for CUDA's headers.

The same ``kernels.cuh`` and ``cuda.cu`` that nvcc compiles; ``include/`` has CUDA's names and
``shim.cpp`` runs grids, one fiber per CUDA thread; ``mma.cpp`` has tensor cores. The operators are
registered for CPU tensors in ``torch.ops.ehrseq_fast_cuda_on_cpu``, so that tests run them as the
backend ``cuda``.

``EHRSEQ_FAST_SANITIZE=1`` builds them with the address and undefined-behaviour sanitizers, which
have to be loaded before Python is: ``python -m tests.cuda_on_cpu`` runs pytest so.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ehrseq_fast import backend, operations

NAMESPACE = "ehrseq_fast_cuda_on_cpu"
KERNELS = backend.Kernels("cpu", NAMESPACE, None)
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_cpu"

SANITIZED = os.environ.get("EHRSEQ_FAST_SANITIZE", "0") not in ("", "0")
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-sanitize=vptr",
    "-fno-omit-frame-pointer",
    "-g1",
    "-O1",
]


def kernels() -> list[Path]:
    """The sources of the CUDA kernels; ``EHRSEQ_FAST_ONLY`` names the operations to compile while
    others are worked on."""
    wanted = os.environ.get("EHRSEQ_FAST_ONLY", "*").split(",")
    return sorted(path for folder in wanted for path in CSRC.glob(f"{folder}/*.cu"))


def why_not() -> str | None:
    """Why the CUDA kernels cannot be compiled for the host here; None where they can."""
    if os.environ.get("EHRSEQ_FAST_NO_COMPILED", "0") not in ("", "0"):
        return "EHRSEQ_FAST_NO_COMPILED is set"
    if not CSRC.is_dir():
        return f"the sources are not in {CSRC}"
    if shutil.which("g++") is None:
        return "there is no g++"
    return None


def _flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [
        *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall"),
        *(SANITIZERS if SANITIZED else ["-O1"]),
        "-Wno-unknown-pragmas",
        f"-I{HERE / 'include'}",
        f"-I{CSRC}",
        *("-isystem", str(include)),
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DTORCH_STABLE_ONLY",
        f"-DEHRSEQ_CUDA_NAMESPACE={NAMESPACE}",
        "-DEHRSEQ_CUDA_KEY=CPU",
    ]


def _key(*parts: str | Path) -> str:
    """What a compiled file depends on, as a name for it."""
    digest = hashlib.sha256(torch.__version__.encode())
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else part.encode())
    return digest.hexdigest()[:20]


def _headers_of(source: Path) -> list[Path]:
    """The headers here and in ``csrc`` that a source includes, or that one of those does."""
    found: set[Path] = set()
    unread = [source]
    while unread:
        for name in re.findall(r'#include [<"]([^>"]+)[>"]', unread.pop().read_text()):
            paths = (folder / name for folder in (CSRC, HERE / "include"))
            new = [path for path in paths if path.is_file() and path not in found]
            found.update(new)
            unread += new
    return sorted(found)


def _compile(source: Path) -> Path:
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    key = _key(version.stdout, *_flags(), source, *_headers_of(source))
    compiled = CACHE / f"{source.parent.name}-{source.stem}-{key}.o"
    if not compiled.exists():
        unfinished = compiled.with_suffix(f".{os.getpid()}")
        command = ["g++", *_flags(), "-x", "c++", "-c", str(source), "-o", str(unfinished)]
        _run(command)
        unfinished.rename(compiled)
    return compiled


def _run(command: list[str]) -> None:
    # the compiler does without the sanitizers that this process may have been started with
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run(command, env=environment, check=True)


def build() -> Path:
    """Compile what has changed and link it; the library."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:  # of pytest's workers, one compiles and the rest wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build()


def _build() -> Path:
    sources = [*sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("*.cu")), *kernels()]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        objects = list(pool.map(_compile, sources))
    library = CACHE / f"cuda_on_cpu-{_key(*(path.name for path in objects))}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        torch_lib = Path(torch.__file__).parent / "lib"
        command = ["g++", "-shared", *map(str, objects), "-o", str(unfinished)]
        command += ["-Wl,-Bsymbolic", f"-L{torch_lib}", "-Wl,--no-as-needed", "-ltorch"]
        _run([*command, *(SANITIZERS if SANITIZED else [])])
        unfinished.rename(library)
    return library


@dataclass
class Counts:
    """What has been launched since the last reset."""

    kernels: int
    memsets: int


def _mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return a.to(out_dtype) @ b.to(out_dtype)


def _products_of_gpus() -> torch.library.Library | None:
    """``torch.mm`` with an ``out_dtype`` for the host's tensors; torch has it for CUDA's alone."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", "CPU"):
        return None
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", _mm, "CPU")
    return library


class Shim:
    """The loaded library: its operators serve ``backend.emulating("cuda", KERNELS)``."""

    def __init__(self, path: Path) -> None:
        operations.define(NAMESPACE)
        self._products = _products_of_gpus()
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        operations.name_arguments_in(self._library)
        for name in ("launches", "memsets"):
            getattr(self._library, f"cuda_on_cpu_{name}").restype = ctypes.c_int64
        self._library.cuda_on_cpu_set_seed.argtypes = [ctypes.c_uint64]
        self._library.cuda_on_cpu_set_capturing.argtypes = [ctypes.c_bool]

    def selftest(
        self,
        kernel: int,
        blocks: int,
        threads: int,
        shared_bytes: int,
        given: torch.Tensor,
        out: torch.Tensor,
        cluster: int = 0,
    ) -> int:
        """Launch a kernel of ``selftest.cu``, in clusters of so many blocks; its cudaError_t."""
        pointers = (ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        return self._library.cuda_on_cpu_selftest(
            kernel, blocks, threads, ctypes.c_size_t(shared_bytes), cluster, *pointers
        )

    def reset_counts(self) -> None:
        self._library.cuda_on_cpu_reset_counts()

    def counts(self) -> Counts:
        return Counts(self._library.cuda_on_cpu_launches(), self._library.cuda_on_cpu_memsets())

    def set_capturing(self, capturing: bool) -> None:
        """Say so of every stream; what is launched runs all the same, but for the first launch of a
        kernel from then on by a thread that has not said that it may load one."""
        self._library.cuda_on_cpu_set_capturing(capturing)

    def set_seed(self, seed: int) -> None:
        """Choose the order in which blocks and threads run from the next launch on."""
        self._library.cuda_on_cpu_set_seed(seed)


@functools.cache
def _load() -> Shim | subprocess.CalledProcessError:
    try:
        return Shim(build())
    except subprocess.CalledProcessError as error:
        return error


def load() -> Shim:
    """Build where needed, load, and register the operators; once per process, and where it does not
    compile, that is found out once too."""
    loaded = _load()
    if not isinstance(loaded, Shim):
        raise loaded
    return loaded
