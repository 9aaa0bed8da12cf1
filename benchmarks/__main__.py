"""``python -m benchmarks [command]``. Without a command: the main job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from . import compare, cuda_lstm, main_job, plot, readme, suite
from .workloads import MissingPackageError

# name -> module with SUMMARY, add_arguments(parser) and run(args)
COMMANDS = {
    "main": main_job,
    "compare": compare,
    "plot": plot,
    "readme": readme,
    "cuda-lstm": cuda_lstm,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Without a command: " + main_job.SUMMARY
    )
    commands = parser.add_subparsers(metavar="command")
    for name, summary in suite.SUMMARIES.items():
        command = commands.add_parser(name, help=summary, description=summary)
        suite.add_arguments(command, name)
        command.set_defaults(run=partial(suite.run, command=name))
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    main_job.add_arguments(parser)
    parser.set_defaults(run=main_job.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except (MissingPackageError, OSError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
