"""Which command is meant, and how errors end."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from . import evaluate, info, predict, store, train

_MOST_WARNINGS = 2

_DESCRIPTION = """\
EHR sequence models: records to a store, training, evaluation, predictions.

  ehrseq-fast store omop DATABASE STORE     records to a store (or: store meds FOLDER STORE)
  ehrseq-fast train STORE RUN --outcome CODE
  ehrseq-fast evaluate RUN STORE            a report on held-out patients
  ehrseq-fast predict RUN STORE OUT.parquet
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``ehrseq-fast`` and ``python -m ehrseq_fast``.

    Returns:
        0; 1 where the command failed, which is said in one line on stderr (with ``--traceback``
        after a traceback); 130 where it was interrupted. A command line that does not parse exits
        with 2.

    Example:
        >>> from ehrseq_fast.cli import main
        >>> main(["train", "no_such_store", "run", "--outcome", "1"])
        1
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with_traceback = "--traceback" in given
    given = [argument for argument in given if argument != "--traceback"]
    try:
        return _run(given)
    except KeyboardInterrupt:
        print("ehrseq-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if with_traceback:
            traceback.print_exc()
        print(f"ehrseq-fast: error: {_one_line(error)}", file=sys.stderr, flush=True)
        return 1


def _run(given: list[str]) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = _warning_printer()
        if given[:1] == ["train"]:  # has a parser of its own, made from the configuration's classes
            return train.main(given[1:])
        parsed = _parser().parse_args(given)
        return parsed.run(parsed)


def _warning_printer() -> Callable[..., None]:
    """Prints warnings in one line each, of one of several processes, and of one place in a program
    two at most: a library may warn at each of many fits."""
    told: Counter[tuple[str, int]] = Counter()

    def show(message: Warning | str, _: object, file: str, line: int, *more: object) -> None:
        told[file, line] += 1
        if told[file, line] <= _MOST_WARNINGS and os.environ.get("RANK", "0") == "0":
            text = " ".join(str(message).split())
            print(f"ehrseq-fast: warning: {text}", file=sys.stderr)

    return show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ehrseq-fast",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--traceback, anywhere, shows where in the program an error arose",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    store.add(commands)
    commands.add_parser("train", help="train a model on a store's patients", add_help=False)
    evaluate.add(commands)
    predict.add(commands)
    info.add(commands)
    return parser


def _one_line(error: Exception) -> str:
    """What an error says; of a KeyError not its repr, of the system's errors not their number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    said = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(str(said).split())
    kind = type(error).__name__
    return text if text and not isinstance(error, AssertionError) else f"{kind}: {text}"
