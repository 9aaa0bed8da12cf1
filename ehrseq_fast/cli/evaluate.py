"""``ehrseq-fast evaluate RUN STORE``: a report on held-out patients."""

from __future__ import annotations

import argparse
from typing import Any

from ..optional import need


def add(commands: Any) -> None:
    """Add the command to ``argparse``'s sub-parsers."""
    parser = commands.add_parser("evaluate", help="report on held-out patients, with plots")
    parser.add_argument("trained", metavar="RUN", help="folder of a run that has ended")
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument("--split", default="held_out", help="whom to evaluate on (held_out)")
    parser.add_argument("--out", metavar="FOLDER", help="where the report goes (RUN/report)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--bootstrap", type=int, default=200, metavar="N", help="resamples (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    need("safetensors", "train", "ehrseq-fast evaluate")
    need("matplotlib", "train", "ehrseq-fast evaluate")
    from ..training import evaluate

    report = evaluate(
        arguments.trained,
        arguments.store,
        split=arguments.split,
        out=arguments.out,
        device=arguments.device,
        n_bootstrap=arguments.bootstrap,
        seed=arguments.seed,
    )
    print(report.summary())
    return 0
