"""Compiled parts of ehrseq_fast. Everything else about the package stands in pyproject.toml.

``_C``         CPU kernels, on LibTorch's stable ABI: one build serves every torch >= 2.10.
``_C_cuda``    CUDA kernels, the same way; optional. Built where there is an nvcc, with or without
               CUDA in torch, and loaded only by a torch with CUDA.
``_batching``  host-side packing of ragged records, an ordinary pybind11 module.

Environment: ``EHRSEQ_FAST_CPP=1`` makes a missing compiler fatal, ``EHRSEQ_FAST_CPP=0`` leaves the
compiled parts out; ``EHRSEQ_FAST_CUDA`` does the same for ``_C_cuda`` alone;
``TORCH_CUDA_ARCH_LIST`` names the GPUs that it is built for; ``MAX_JOBS`` bounds the compilers that
run at once. ``EHRSEQ_FAST_PREBUILT`` names a folder with a ``_C`` (and ``_C_cuda``) built before,
which serve every Python: ``_batching`` alone is compiled, which takes no torch (``tools/release``).
``EHRSEQ_FAST_BUILD_FLAGS`` stand after the flags of ``_C`` and ``_batching``, for the
compiler and the linker: the sanitized builds of ``tests/sanitized.py`` need them last.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))

import build_cuda  # noqa: E402
from build_backend import find_compiler  # noqa: E402

WITHOUT_CUDA = """
ehrseq_fast: building without the CUDA C++ kernels, because {reason}. Everything else is built, and
on a GPU the Triton kernels do the same work. To have them too, install CUDA's nvcc (or set
CUDA_HOME) and run the same pip command again; EHRSEQ_FAST_CUDA=1 makes their absence an error.
"""

WANTED = os.environ.get("EHRSEQ_FAST_CPP", "")
CUDA_WANTED = os.environ.get("EHRSEQ_FAST_CUDA", "")
PREBUILT = os.environ.get("EHRSEQ_FAST_PREBUILT", "")
STABLE_ABI_2_10 = "0x020a000000000000"
# Python's own flags hold -g, which takes a third of the time and nine tenths of the library:
# EHRSEQ_FAST_BUILD_FLAGS=-g asks for it.
PLAIN_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]


def sources(extension: str) -> list[str]:
    """The C++ of every operation, and of what they share, is of ``_C``; the packing of records
    (``csrc/batching``) of ``_batching``. Found, not listed."""
    found = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.cpp"))
    is_batching = extension == "_batching"
    return [str(path) for path in found if (path.parts[1] == "batching") == is_batching]


def is_gcc() -> bool:
    version = subprocess.run(
        [find_compiler() or "c++", "--version"], check=False, capture_output=True, text=True
    )
    return "Free Software Foundation" in version.stdout


def why_no_compiled_parts() -> str | None:
    if WANTED == "0":
        return "EHRSEQ_FAST_CPP=0 was set when the package was built"
    if find_compiler() is None:
        return "no C++ compiler (c++ or g++) was found when the package was built"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "no torch was importable when the package was built"
    return None


def compiled_parts() -> dict[str, Any]:
    import pybind11
    import torch
    from setuptools import Extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = [*PLAIN_FLAGS, "-fno-math-errno", "-fno-trapping-math"]
    # GCC would trade the register accumulators of row_kernels.h for scalar code
    flags += ["-fno-loop-unroll-and-jam"] if is_gcc() else []
    last = os.environ.get("EHRSEQ_FAST_BUILD_FLAGS", "").split()
    stable = [
        f"-DTORCH_TARGET_VERSION={STABLE_ABI_2_10}",
        "-DTORCH_STABLE_ONLY",
    ]
    include = str(ROOT.resolve() / "csrc")

    class BuildCompiled(BuildExtension):
        """Builds, and leaves a record of how beside the package for ``ehrseq_fast info``."""

        def run(self) -> None:
            self.cuda: dict[str, str] = {}
            super().run()
            compiler = find_compiler() or "c++"
            version = subprocess.run(
                [compiler, "--version"], check=False, capture_output=True, text=True
            )
            write_record(
                self,
                compiler=version.stdout.partition("\n")[0],
                torch=torch.__version__,
                **self.cuda,
            )
            if "cuda_skipped" in self.cuda:
                print(WITHOUT_CUDA.format(reason=self.cuda["cuda_skipped"]))

        def build_extension(self, extension: Extension) -> None:
            if extension.name != "ehrseq_fast._C_cuda":
                super().build_extension(extension)
                return
            try:
                self.cuda = {"cuda": self.build_cuda(extension)}
            except build_cuda.CudaBuildError as error:
                if CUDA_WANTED == "1":
                    raise SystemExit(f"EHRSEQ_FAST_CUDA=1 asks for _C_cuda, but {error}.") from None
                self.cuda = {"cuda_skipped": str(error)}

        def build_cuda(self, extension: Extension) -> str:
            if CUDA_WANTED == "0":
                raise build_cuda.CudaBuildError(
                    "EHRSEQ_FAST_CUDA=0 was set when the package was built"
                )
            return build_cuda.build(
                sorted((ROOT.resolve() / "csrc").glob("*/*.cu")),
                Path(self.get_ext_fullpath(extension.name)),
                Path(self.build_temp) / "cuda",
                Path(torch.__file__).parent,
                stable,
            )

    return {
        "ext_modules": [
            CppExtension(
                "ehrseq_fast._C",
                sources("_C"),
                include_dirs=[include],
                extra_compile_args=[*flags, *stable, *last],
                extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", *last],
                py_limited_api=True,
            ),
            # Its sources are nvcc's business (csrc/build_cuda.py), and it may be missing.
            Extension("ehrseq_fast._C_cuda", [], py_limited_api=True, optional=True),
            Extension(
                "ehrseq_fast._batching",
                sources("_batching"),
                include_dirs=[pybind11.get_include(), include],
                extra_compile_args=[*flags, *last],
                extra_link_args=last,
                language="c++",
            ),
        ],
        "cmdclass": {"build_ext": BuildCompiled.with_options(use_ninja=True)},
    }


def batching_with_prebuilt_kernels(folder: Path) -> dict[str, Any]:
    import pybind11
    from setuptools import Extension
    from setuptools.command.build_ext import build_ext

    libraries = sorted(folder.glob("_C*.abi3.so"))
    if not any(library.name == "_C.abi3.so" for library in libraries):
        raise SystemExit(f"EHRSEQ_FAST_PREBUILT must hold _C.abi3.so, got {folder} without it")

    class BuildBatching(build_ext):
        def run(self) -> None:
            super().run()
            package = ROOT if self.inplace else Path(self.build_lib)
            for library in libraries:
                shutil.copy(library, package / "ehrseq_fast" / library.name)
            shutil.copy(folder / "_build_record.json", package / "ehrseq_fast")

    return {
        "ext_modules": [
            Extension(
                "ehrseq_fast._batching",
                sources("_batching"),
                include_dirs=[pybind11.get_include(), str(ROOT.resolve() / "csrc")],
                extra_compile_args=PLAIN_FLAGS,
                language="c++",
            )
        ],
        "cmdclass": {"build_ext": BuildBatching},
    }


def write_record(command: Any, **record: str) -> None:
    base = ROOT if getattr(command, "inplace", False) else Path(command.build_lib)
    path = base / "ehrseq_fast" / "_build_record.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def without_compiled_parts(reason: str) -> dict[str, Any]:
    from setuptools.command.build_py import build_py

    class BuildPlain(build_py):
        def run(self) -> None:
            if "1" in (WANTED, CUDA_WANTED):
                name = "EHRSEQ_FAST_CPP" if WANTED == "1" else "EHRSEQ_FAST_CUDA"
                raise SystemExit(f"{name}=1 asks for compiled kernels, but {reason}.")
            super().run()
            print(
                f"\nehrseq_fast: installing without compiled kernels, because {reason}. The "
                "package "
                "works, on its plain PyTorch reference, and gives the same numbers at PyTorch's "
                "speed. For the fast kernels install a C++ compiler (Debian or Ubuntu: apt-get "
                "install g++) and run the same pip command again; `python -m ehrseq_fast info` "
                "tells what is in use.\n"
            )
            self.inplace = self.editable_mode
            write_record(self, skipped=reason)

    return {"cmdclass": {"build_py": BuildPlain}}


if PREBUILT:
    options = batching_with_prebuilt_kernels(Path(PREBUILT))
else:
    reason = why_no_compiled_parts()
    options = compiled_parts() if reason is None else without_compiled_parts(reason)
setup(**options)
