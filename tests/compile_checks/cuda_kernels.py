"""What nvcc made of the CUDA kernels, read from the built library."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ehrseq_fast import backend

from .machine_code import RESULTS, Kernel, kernels_of, output, page, tool

TABLE = RESULTS / "cuda-resources.md"
TARGETS = ("sm_80", "sm_90", "sm_100")


def library(stem: str) -> Path | None:
    """A built library of the package, by its name without the suffix."""
    return next(iter(sorted(Path(backend.__file__).parent.glob(f"{stem}.*so"))), None)


def why_not() -> str | None:
    """Why there is nothing to read here; None where there is."""
    if library("_C_cuda") is None:
        record = backend.build_record()
        return f"there is no _C_cuda: {record.get('cuda_skipped', 'it was not built')}"
    missing = [name for name in ("cuobjdump", "nvdisasm", "c++filt") if tool(name) is None]
    return f"there is no {' and no '.join(missing)}" if missing else None


def compiler() -> str:
    """The nvcc that the library was built with: another one allocates other registers."""
    match = re.search(r"nvcc (\S+)", backend.build_record().get("cuda", ""))
    return f"nvcc {match.group(1)}" if match else "an unknown nvcc"


def short_name(demangled: str) -> str:
    """A kernel's name with its template arguments, without namespaces, result and parameters."""
    name = re.sub(r"\(anonymous namespace\)::", "", demangled).removeprefix("void ")
    depth = 0
    for at, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and name[at - 1] != "<":
            name = name[:at]
            break
    name = re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name)
    return re.sub(r"(?:\w+::)+", "", name).replace("__nv_bfloat16", "bf16").replace("__half", "f16")


def measure() -> list[Kernel]:
    """Every kernel for every target, sorted by name."""
    built = library("_C_cuda")
    assert built is not None
    rows = [row for target in TARGETS for row in kernels_of(built, target)]
    mangled = sorted({row.kernel for row in rows})
    readable = output("c++filt", given="\n".join(mangled)).splitlines()
    names = dict(zip(mangled, map(short_name, readable), strict=True))
    assert len(set(names.values())) == len(names), "two kernels have one name"
    named = [replace(row, kernel=names[row.kernel]) for row in rows]
    return sorted(named, key=lambda row: (row.kernel, TARGETS.index(row.arch)))


def table(rows: list[Kernel]) -> str:
    """The committed page."""
    found = {(row.kernel, row.arch): row for row in rows}
    return page(
        "What the CUDA kernels take",
        compiler(),
        "cuda",
        "Registers are per thread, shared memory is static and in bytes per block. No kernel "
        "spills or uses local memory.",
        f"kernel | registers: {' | '.join(TARGETS)} | shared",
        [
            (
                f"`{name}`",
                *(found[name, target].registers for target in TARGETS),
                found[name, "sm_80"].shared,  # from sm_90 on, 1 KB of the system's is counted too
            )
            for name in dict.fromkeys(row.kernel for row in rows)
        ],
    )


def found() -> dict[str, Any]:
    """Every kernel, and the page."""
    rows = measure()
    return {"rows": rows, "table": table(rows)}
