"""Random arguments for the raw operators and the batch builder, valid ones and all sorts of others.

``python -m tests.fuzz --seconds 60 --seed 0``: every case either raises an error that a caller can
act on, or gives a result; the right one where the arguments are valid, and never one from memory
that nothing was written to. Cases run in a child process, under the poisoning allocator where there
is one, so that a crash is caught too; each defect is printed with the command that repeats it.
``--cases N`` runs N cases of every target, whatever time they take: the same ones each time.
``--cuda`` takes the operators of the CUDA kernels, compiled for the host (``tests/cuda_on_cpu``).
``python -m tests.sanitized address -- -m tests.fuzz ...`` runs it all under the sanitizers.
"""

from __future__ import annotations

import argparse
import ast
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import poisoned

HANGS_AFTER_S = 60.0
MOST_MEMORY = 12 << 30  # a size that was made up must not take the machine's memory
MOST_DEFECTS = 20
CHILD = (sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--child", "case")


def child(batch: str) -> None:
    """Run the cases ``target:seed`` that come in, telling of each before and after."""
    from . import runner

    if "EHRSEQ_FAST_SANITIZED" not in os.environ:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    for line in sys.stdin:
        target, _, seed = line.strip().rpartition(":")
        try:
            outcome = runner.run_case(target, int(seed))
        except runner.Defect as defect:
            outcome = "defect " + repr(str(defect))
        print(f"{batch} {outcome}", flush=True)


def environment() -> dict[str, str]:
    if "EHRSEQ_FAST_SANITIZED" in os.environ or poisoned.why_not() is not None:
        return dict(os.environ)
    return poisoned.environment()


class Child:
    """A process that runs cases one after the other."""

    def __init__(self, command: Sequence[str] = CHILD) -> None:
        self.log = tempfile.NamedTemporaryFile("a+", prefix="fuzz-")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
            env=environment(),
        )

    def run(self, case: str) -> str:
        """What became of it; a crash or a hang is told, and ends the process."""
        process = self.process
        self.log.truncate(0)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(case + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._ended("ended before this case")
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            deadline = time.monotonic() + HANGS_AFTER_S * (3 if self._starts() else 1)
            while time.monotonic() < deadline:
                if not selector.select(deadline - time.monotonic()):
                    break
                line = process.stdout.readline()
                if not line:
                    return self._ended("crashed")
                if line.startswith("case "):
                    return line[5:].strip()
        process.kill()
        return self._ended(f"did not return within {HANGS_AFTER_S:.0f} s")

    def _starts(self) -> bool:
        started, self._started = getattr(self, "_started", False), True
        return not started

    def _ended(self, how: str) -> str:
        self.process.wait()
        return f"crash {f'{how} (exit status {self.process.returncode}): {self._said()}'!r}"

    def _said(self) -> str:
        """The end of what it wrote to stderr."""
        self.log.flush()
        return "".join(Path(self.log.name).read_text(errors="replace").splitlines(True)[-60:])

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def cases(args: argparse.Namespace, targets: tuple[str, ...]) -> Iterator[str]:
    """In turn of every target, until the time or the number is up."""
    if args.only:
        yield from args.only
        return
    end = time.monotonic() + args.seconds
    number = 0
    while number < args.cases if args.cases else time.monotonic() < end:
        for target in targets:
            yield f"{target}:{args.seed + number}"
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case of every target")
    parser.add_argument("--cases", type=int, help="of every target, in place of --seconds")
    parser.add_argument("--targets", nargs="+", metavar="NAME")
    parser.add_argument(
        "--cuda", action="store_true", help="the CUDA kernels, compiled for the host, instead"
    )
    parser.add_argument("--only", nargs="+", metavar="TARGET:SEED", help="just these cases")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    from .runner import CUDA_TARGETS, TARGETS

    targets = tuple(args.targets or (CUDA_TARGETS if args.cuda else TARGETS))
    counts: Counter[str] = Counter()
    defects = 0
    process = Child()
    for case in cases(args, targets):
        outcome = process.run(case)
        kind, _, what = outcome.partition(" ")
        counts[kind] += 1
        if kind in ("defect", "crash"):
            defects += 1
            text = ast.literal_eval(what)
            print(f"\n{kind.upper()} {case}\n{text}\n  python -m tests.fuzz --only {case}")
        if kind == "crash":
            process = Child()
        if defects >= MOST_DEFECTS:
            print(f"Stopped after {defects} defects.")
            break
    process.close()
    print(f"{sum(counts.values())} cases: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
