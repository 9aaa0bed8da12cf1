"""What compilers made of kernels, read from their machine code with CUDA's tools: no GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from textwrap import fill

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target.

    Attributes:
        kernel: its name; mangled where a compiler has done so.
        arch: the target, ``sm_90``.
        registers: per thread.
        shared: static shared memory per block in bytes.
        spilled: local memory per thread in bytes; 1 where only an instruction tells of it.
        load_bits: the widest load from global memory.
        wide_loads: how many loads are of 128 bits.
        case, dtype, warps: what Triton compiled it for.
        unordered: stores, in Triton, over what a thread may not have loaded yet.
    """

    kernel: str
    arch: str
    registers: int
    shared: int
    spilled: int
    load_bits: int
    wide_loads: int
    case: str = ""
    dtype: str = ""
    warps: int = 0
    unordered: int = 0


def tool(name: str) -> str | None:
    """CUDA's own, or the one that Triton brings along."""
    triton = util.find_spec("triton")
    folder = Path()
    if triton is not None and triton.origin is not None:
        folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    return shutil.which(name) or shutil.which(name, path=str(folder))


def output(name: str, *arguments: str, given: str | None = None) -> str:
    """What a tool prints."""
    command = [tool(name) or name, *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def kernels_of(binary: Path, arch: str) -> list[Kernel]:
    """The kernels for one target that a library or a cubin holds."""
    target = () if binary.suffix == ".cubin" else ("-arch", arch)
    usage: dict[str, dict[str, int]] = {}
    for function, text in _by_function(output("cuobjdump", "-res-usage", *target, str(binary))):
        found = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)
        if found:
            usage[function] = {name: int(value) for name, value in found}
    kernels = []
    for function, text in _by_function(output("cuobjdump", "-sass", *target, str(binary))):
        used = usage[function]
        # patterns that begin with plain letters: all kernels are 140 MB of text for each target
        loads = re.findall(r"LDG\.E((?:\.\w+)*)", text)
        widths = [int(bits) for load in loads for bits in re.findall(r"\.(64|128|256)\b", load)]
        touches_local = "LDL" in text or "STL" in text
        kernels.append(
            Kernel(
                function,
                arch,
                registers=used["REG"],
                shared=used["SHARED"],
                spilled=max(used["STACK"] + used["LOCAL"], int(touches_local)),
                load_bits=max(widths, default=32 if loads else 0),
                wide_loads=widths.count(128),
            )
        )
    return kernels


def _by_function(dumped: str) -> Iterable[tuple[str, str]]:
    """The parts of a dump, each under the function that it is of."""
    parts = re.split(r"^\s*Function\s*:?\s+(\S+?):?\s*$", dumped, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


def page(
    title: str,
    compiler: str,
    kind: str,
    text: str,
    header: str,
    rows: Iterable[Sequence[object]],
) -> str:
    """A committed page: how it was made, what it says, and the table."""
    made = (
        f"Compiled by {compiler}; read from the machine code, not measured on a GPU. `python -m "
        f"tests.compile_checks {kind} --write` makes this page, and "
        f"`tests/compile_checks/test_{kind}.py` fails where it is out of date."
    )
    columns = header.count("|") + 1
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    table = "\n".join([f"| {header} |", "| " + " | ".join(["---"] * columns) + " |", *lines])
    return "\n\n".join([f"# {title}", _filled(made), _filled(text), table]) + "\n"


def _filled(text: str) -> str:
    return fill(text, 100, break_long_words=False, break_on_hyphens=False)
