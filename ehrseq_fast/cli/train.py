"""``ehrseq-fast train STORE RUN``: its options are the fields of the configuration's classes."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..optional import need

_DESCRIPTION = """Train a model on the patients of a store.

Every field of the configuration is an option, or a line of the file that --config names. RUN must
not exist, or be a run that --resume goes on with; then what is not given is that run's."""


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        SystemExit: with 2 for a command line that does not parse, 0 after ``--help``.
        ImportError: without the packages of the extra ``train``.
    """
    need("jsonargparse", "train", "ehrseq-fast train")
    need("safetensors", "train", "ehrseq-fast train")
    from ..training.config import RunConfig
    from ..training.convert import merged, read_yaml
    from ..training.run import RunFolder

    parser = _parser(RunConfig)
    try:
        options = parser.parse_args(list(arguments)).as_dict()
        saved = RunFolder(Path(options["run"])).config
        goes_on = options["resume"] and saved.exists()
        values = (RunConfig.load(saved) if goes_on else RunConfig()).to_dict()
        if options["config"]:
            values = merged(values, read_yaml(options["config"]))
        task = _task(options["task"], options["outcome"], options["competing"])
        base = RunConfig.from_dict(_with_model(values | ({"task": task} if task else {})))
        parser = _parser(RunConfig, base)
        options = parser.parse_args(list(arguments)).as_dict()
    except ArgumentError as error:
        print(f"ehrseq-fast train: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    resume = options.pop("resume")
    for name in ("config", "outcome", "competing"):
        options.pop(name)
    config = RunConfig.from_dict({**options, "task": base.task})
    from ..training import fit

    fit(config, resume=resume)
    return 0


def _parser(config: type, base: Any = None) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="ehrseq-fast train",
        description=_DESCRIPTION,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument("run", metavar="RUN", help="folder that is made for the run")
    parser.add_argument("--task", metavar="FILE", help="YAML file of FirstEvent's fields")
    parser.add_argument(
        "--outcome",
        metavar="CODE",
        nargs="+",
        action="extend",
        help="codes of the outcome (or: death): FirstEvent with its defaults, in place of --task",
    )
    parser.add_argument(
        "--competing",
        metavar="CODE",
        nargs="+",
        action="append",
        help="beside --outcome: codes of an outcome that competes with it (or: death); may be "
        "repeated, each time for another one",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of the configuration")
    parser.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    parser.add_class_arguments(config, skip={"store", "run", "task"})
    if base is not None:
        own = ("store", "run", "task")
        parser.set_defaults({name: value for name, value in base.flat() if name not in own})
    return parser


def _with_model(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values, with the model of competing outcomes where the task has such and no
    other model than the default is named."""
    from ..training.config import ModelConfig

    model = values["model"]
    if "competing" in values["task"] and model["name"] == ModelConfig.name:
        return values | {"model": model | {"name": "competing_risks"}}
    return values


def _task(
    file: str | None, outcome: list[str] | None, competing: list[list[str]] | None
) -> dict[str, Any]:
    from ..data.tasks import FirstEvent
    from ..training.convert import read_yaml

    if file is not None and outcome is not None:
        raise ValueError("--task, --outcome: expected one of them, got both")
    if competing is not None and outcome is None:
        raise ValueError("--competing: expected --outcome beside it, got none")
    if outcome is not None:
        others = None
        if competing is not None:
            others = [(", ".join(codes), _codes(codes)) for codes in competing]
        return FirstEvent(_codes(outcome), competing=others).to_dict()
    if file is None:
        return {}
    settings = read_yaml(file)
    try:
        return FirstEvent.from_dict(settings).to_dict()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from error


def _codes(codes: list[str]) -> str | list[str]:
    return "death" if codes == ["death"] else codes
