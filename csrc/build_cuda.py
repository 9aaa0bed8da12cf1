"""Builds ``_C_cuda``: nvcc called by hand, so that a torch without CUDA is no obstacle.

``torch.utils.cpp_extension`` forgets where CUDA is under a CPU build of torch, and refuses an nvcc
of another version than torch's. Neither matters here: the sources know only LibTorch's stable ABI,
and the CUDA runtime is linked into the library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# What runs on data-centre GPUs since 2020; PTX of the last for those to come.
ARCHITECTURES = "8.0;9.0;10.0+PTX"


class CudaBuildError(Exception):
    """Why there is no ``_C_cuda``; for the user."""


def find_nvcc() -> str:
    """The nvcc of ``CUDA_HOME``, else of the path, else where CUDA is installed by default."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise CudaBuildError("no nvcc was found when the package was built")
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def version(nvcc: str) -> str:
    """Such as "13.0.88"."""
    found = re.search(r"V(\d+\.\d+\.\d+)", _output(nvcc, "--version"))
    return found.group(1) if found else "of unknown version"


def architectures(nvcc: str) -> list[str]:
    """``TORCH_CUDA_ARCH_LIST``, or those of the default list that this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    wanted = re.split(r"[;\s]+", (asked or ARCHITECTURES).strip())
    for name in wanted:
        if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", name):
            raise CudaBuildError(f"TORCH_CUDA_ARCH_LIST holds {name!r}; it takes such as 9.0+PTX")
    if asked:
        return wanted
    known = _output(nvcc, "--list-gpu-code").split()
    usable = [name for name in wanted if f"sm_{_number(name)}" in known]
    if not usable:
        raise CudaBuildError(f"nvcc {version(nvcc)} knows none of the GPUs {ARCHITECTURES}")
    return [*usable[:-1], usable[-1].removesuffix("+PTX") + "+PTX"]


def _number(architecture: str) -> str:
    return architecture.removesuffix("+PTX").replace(".", "")


def _generate(architecture: str) -> list[str]:
    number = _number(architecture)
    flags = ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    if architecture.endswith("+PTX"):
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def build(
    sources: list[Path], library: Path, scratch: Path, torch_folder: Path, flags: list[str]
) -> str:
    """Compile and link; returns with what, for the build record.

    Raises:
        CudaBuildError: if there is no nvcc, or it fails.
    """
    nvcc = find_nvcc()
    targets = architectures(nvcc)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    csrc = Path(__file__).parent.resolve()
    command = [
        *(nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr"),
        *("--threads", str(max(1, min(len(targets), jobs // len(sources))))),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{csrc}"),
        *("-isystem", str(torch_folder / "include")),
        *("-DUSE_CUDA", *flags),
        *(flag for target in targets for flag in _generate(target)),
    ]
    scratch.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> str:
        made = scratch / f"{source.parent.name}_{source.stem}.o"
        _run([*command, "-c", str(source), "-o", str(made)])
        return str(made)

    # the longest first, so that no compiler is left alone with one of them at the end
    ordered = sorted(sources, key=lambda source: source.stat().st_size, reverse=True)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, ordered))
    library.parent.mkdir(parents=True, exist_ok=True)
    _run(
        [
            *(nvcc, "-shared", "-cudart", "static", *objects, "-o", str(library)),
            f"-L{torch_folder / 'lib'}",
            # in one piece: nvcc would sort them
            *("-Xlinker", "--no-as-needed,-ltorch,--as-needed,--exclude-libs,ALL"),
        ]
    )
    return f"nvcc {version(nvcc)} for {';'.join(targets)}"


def _run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.decode(errors="replace")
    print(output, flush=True)
    if done.returncode != 0:
        errors = [line for line in output.splitlines() if "error" in line.lower()]
        raise CudaBuildError(f"nvcc failed ({errors[0].strip() if errors else 'no message'})")
