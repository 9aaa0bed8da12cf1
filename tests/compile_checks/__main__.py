"""``python -m tests.compile_checks cuda|triton``: what the compilers made of the kernels.

Prints the page; ``--write`` refreshes the committed one, ``--json FILE`` writes all that was found.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from . import cuda_kernels, triton_kernels

KINDS = {"cuda": cuda_kernels, "triton": triton_kernels}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.compile_checks", description=__doc__)
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("--write", action="store_true", help="refresh the committed page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there")
    args = parser.parse_args()
    kind = KINDS[args.kind]
    if (reason := kind.why_not()) is not None:
        sys.exit(reason)
    found = kind.found()
    if args.json:
        args.json.write_text(json.dumps({**found, "rows": [asdict(row) for row in found["rows"]]}))
    if args.write:
        kind.TABLE.write_text(found["table"])
        print(f"wrote {kind.TABLE}")
    if not args.json and not args.write:
        print(found["table"], end="")


if __name__ == "__main__":
    main()
